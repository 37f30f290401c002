"use strict";

// The page's data: what varlik/explanation/report.py gathers. Text from it becomes text nodes, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const controls = { kind: byId("kind"), scale: byId("scale"), opacity: byId("opacity") };
const tip = byId("tip");
const SVG = byId("blank").namespaceURI;
const sides = data.patch_nums;
const starts = sides.map((_, k) => sides.slice(0, k).reduce((sum, p) => sum + p * p, 0));
const side = sides[sides.length - 1];
for (const image of data.images) for (const part of ["log_prob", "unconditional"]) // they come in thousandths of a nat
  image[part] = image[part].map((values) => values.map((x) => x / 1000));
const AGAINST = [33, 102, 172], ZERO = [247, 247, 247], FOR = [217, 95, 2]; // told apart with any colour vision

// Small helpers -----------------------------------------------------------------------------------------------------

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
const make = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const className = (label) => data.class_names[label].trim() || `class ${label}`;
const named = (label) => make("span", { class: "class" }, className(label));
const pictureOf = (image, alt) => make("img", { src: image.picture, alt, class: data.small ? "small" : "" });
const plain = (x, digits = 3) => (Number(x.toFixed(digits)) < 0 ? "−" : "") + Math.abs(x).toFixed(digits);
const signed = (x, digits = 3) => (Number(x.toFixed(digits)) > 0 ? "+" : "") + plain(x, digits);
const whole = (x) => String(x).replace(/\B(?=(\d{3})+$)/g, "\u202f");
const sum = (values) => values.reduce((total, x) => total + x, 0);

function probability(p) {
  if (p === 0 || p >= 0.001) return p === 0 ? "0" : p.toFixed(3);
  const [digits, power] = p.toExponential(0).split("e-");
  return make("span", {}, `${digits}·10`, make("sup", {}, `−${power}`));
}

function flops(x) {
  const units = ["", "k", "M", "G", "T", "P", "E"];
  const step = x < 1000 ? 0 : Math.min(units.length - 1, Math.floor(Math.log10(x) / 3));
  const value = x / 1000 ** step;
  return `${value.toFixed(value < 10 && step ? 1 : 0)}${step ? "\u00a0" + units[step] : ""}`;
}

// Numbers of tokens -------------------------------------------------------------------------------------------------

function valuesOf(image, kind) {
  const [target, rival] = image.log_prob;
  if (kind === "contrast") return target.map((x, t) => x - rival[t]);
  const c = kind === "target" ? 0 : 1;
  return image.log_prob[c].map((x, t) => x - image.unconditional[c][t]);
}

/** The map that is asked for: its side, rows of values, and the token values behind it. */
function mapOf(image) {
  const kind = controls.kind.value, k = Number(controls.scale.value) - 1, values = valuesOf(image, kind);
  if (k < 0) return { kind, k, p: side, rows: image.maps[kind], values };
  const p = sides[k], first = starts[k];
  const rows = Array.from({ length: p }, (_, i) => values.slice(first + i * p, first + (i + 1) * p));
  return { kind, k, p, rows, values };
}

function colour(x) {
  const end = x < 0 ? AGAINST : FOR, share = Math.min(1, Math.abs(x));
  return ZERO.map((zero, c) => Math.round(zero + share * (end[c] - zero)));
}

/** Paint rows (p, p), divided by `most`; a smooth map is enlarged bilinearly, tokens stay squares. */
function paint(canvas, rows, most, smooth) {
  const p = rows.length, size = smooth ? Math.max(128, 4 * p) : p;
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d"), pixels = context.createImageData(size, size);
  const near = Array.from({ length: size }, (_, i) => {
    const at = Math.min(p - 1, Math.max(0, ((i + 0.5) * p) / size - 0.5)), low = Math.floor(at);
    return [low, Math.min(p - 1, low + 1), at - low];
  });
  near.forEach(([top, bottom, down], i) => near.forEach(([left, right, across], j) => {
    const above = rows[top][left] * (1 - across) + rows[top][right] * across;
    const below = rows[bottom][left] * (1 - across) + rows[bottom][right] * across;
    pixels.data.set([...colour((above * (1 - down) + below * down) / most), 255], 4 * (i * size + j));
  }));
  context.putImageData(pixels, 0, 0);
}

// The tooltip -------------------------------------------------------------------------------------------------------

const row = (header, ...cells) =>
  make("tr", {}, make("th", { scope: "row" }, header), ...cells.map((cell) => make("td", { class: "number" }, cell)));
const heads = (...titles) => make("thead", {}, make("tr", {}, ...titles.map((title, i) =>
  make("th", i ? { scope: "col", class: "number" } : { scope: "col" }, title))));

/** One token: its log-prob under every class shown. */
function aboutToken(image, k, i, j) {
  const t = starts[k] + i * sides[k] + j;
  const rows = image.classes.map((label, c) => {
    const x = image.log_prob[c][t], without = image.unconditional[c]?.[t], role = c === 0 ? " target" : c === 1 ? " rival" : "";
    return row(make("span", {}, named(label), role), plain(x),
      ...(without === undefined ? ["", ""] : [plain(without), signed(x - without)]));
  });
  return [
    make("strong", {}, `scale ${k + 1} of ${sides.length}, row ${i + 1}, column ${j + 1}: code ${image.tokens[t]}`),
    make("table", {}, heads("class", "log p", "unconditional", "information"),
      make("tbody", {}, ...rows)),
    make("div", {}, `target against rival ${signed(image.log_prob[0][t] - image.log_prob[1][t])}`),
  ];
}

/** One place of the composed map: the tokens of all scales that lie over its centre. */
function aboutPlace(image, map, i, j) {
  const unconditional = image.unconditional[map.kind === "rival" ? 1 : 0];
  const rows = sides.map((p, k) => {
    const [y, x] = [i, j].map((at) => Math.floor(((at + 0.5) * p) / side)), t = starts[k] + y * p + x;
    return row(`${k + 1}: ${y + 1}, ${x + 1}`, String(image.tokens[t]), plain(image.log_prob[0][t]),
      plain(image.log_prob[1][t]), plain(unconditional[t]), signed(map.values[t]));
  });
  const titles = ["scale: place", "code", "target", "rival", "uncond.", "value"];
  return [
    make("strong", {}, `row ${i + 1}, column ${j + 1}: ${signed(map.rows[i][j])} nats, all scales`),
    make("table", {}, heads(...titles), make("tbody", {}, ...rows)),
    make("div", { class: "soft" }, "log p of each scale’s token at this place, and its value before it is spread over the map"),
  ];
}

function showTip(cell) {
  const { image, map, i, j, stack } = cell.about;
  tip.replaceChildren(...(map.k < 0 ? aboutPlace(image, map, i, j) : aboutToken(image, map.k, i, j)));
  tip.hidden = false;
  document.querySelectorAll("[aria-describedby=tip]").forEach((other) => other.removeAttribute("aria-describedby"));
  cell.setAttribute("aria-describedby", "tip");
  // Beside the map where there is room, else under it, else by the cell: as little of the map is hidden as can be.
  const box = stack.getBoundingClientRect(), at = cell.getBoundingClientRect();
  const width = tip.offsetWidth, height = tip.offsetHeight, gap = 8;
  const wide = document.documentElement.clientWidth, high = document.documentElement.clientHeight;
  const within = (x, room) => Math.max(gap, Math.min(x, room - gap));
  let left = within(box.left, wide - width), top = box.bottom + gap;
  if (box.right + gap + width <= wide - gap) {
    left = box.right + gap;
    top = within(at.top, high - height);
  } else if (top + height > high) {
    top = at.bottom + gap + height <= high ? at.bottom + gap : Math.max(gap, at.top - gap - height);
  }
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${top + window.scrollY}px`;
}

function hideTip() {
  tip.hidden = true;
}

// The map with its grid of places -----------------------------------------------------------------------------------

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -99], End: [0, 99] };

function onKey(event) {
  const move = MOVES[event.key], about = event.target.about;
  if (!move || !about) return;
  event.preventDefault();
  const [i, j] = [about.i + move[0], about.j + move[1]].map((x) => Math.max(0, Math.min(about.map.p - 1, x)));
  event.currentTarget.querySelectorAll("[role=gridcell]")[i * about.map.p + j].focus();
}

function onFocus(event) {
  event.currentTarget.querySelector("[tabindex='0']").tabIndex = -1;
  event.target.tabIndex = 0; // one stop for Tab, wherever one has gone with the arrow keys
  showTip(event.target);
}

function mapFigure(image) {
  const picture = pictureOf(image, `The image ${image.name}`);
  const canvas = make("canvas", { "aria-hidden": "true" });
  const grid = make("div", { role: "grid", class: "grid" });
  const stack = make("div", { class: "stack" }, picture, canvas, grid);
  const legend = make("div", { class: "legend" }), caption = make("figcaption");
  grid.addEventListener("keydown", onKey);
  grid.addEventListener("focusin", onFocus);
  grid.addEventListener("focusout", hideTip);
  grid.addEventListener("pointerover", (event) => event.target.about && showTip(event.target));
  grid.addEventListener("pointerleave", () =>
    grid.contains(document.activeElement) ? showTip(document.activeElement) : hideTip());

  function show() {
    const map = mapOf(image), most = Math.max(...map.rows.flat().map(Math.abs));
    paint(canvas, map.rows, most || 1, map.k < 0);
    canvas.className = grid.className = map.k < 0 ? "" : "tokens";
    grid.classList.add("grid");
    grid.style.gridTemplate = `repeat(${map.p}, 1fr) / repeat(${map.p}, 1fr)`;
    grid.setAttribute("aria-label", `Map of ${controls.kind.selectedOptions[0].text}, scale ${controls.scale.selectedOptions[0].text}`);
    grid.replaceChildren(...map.rows.map((values, i) => make("div", { role: "row" }, ...values.map((x, j) => {
      const label = `row ${i + 1}, column ${j + 1}: ${signed(x)} nats`;
      const cell = make("div", { role: "gridcell", tabindex: i || j ? "-1" : "0", "aria-label": label });
      cell.about = { image, map, i, j, stack };
      return cell;
    }))));
    legend.replaceChildren(...legendOf(image, map, most));
    caption.replaceChildren(...captionOf(image, map));
  }
  return { figure: make("figure", { class: "map" }, stack, legend, caption), show };
}

function legendOf(image, map, most) {
  const [target, rival] = image.classes;
  const speaks = (word, label) => make("span", {}, `${word} `, named(label));
  const explained = map.kind === "rival" ? rival : target;
  const ends = map.kind === "contrast"
    ? [speaks("for", rival), speaks("for", target)] : [speaks("against", explained), speaks("for", explained)];
  const colours = make("div");
  colours.style.background = `linear-gradient(to right, ${[AGAINST, ZERO, FOR].map((rgb) => `rgb(${rgb})`).join(", ")})`;
  return [
    make("div", { class: "bar" }, colours),
    make("div", { class: "ends" }, ...[plain(-most), "0", signed(most)].map((text) => make("span", {}, text))),
    make("div", { class: "ends" }, ...ends),
  ];
}

function captionOf(image, map) {
  const sums = image.sums[map.kind], total = sum(sums);
  const meaning = { target: "information about the target", rival: "information about the rival", contrast: "contrast" };
  return [`Sum of ${meaning[map.kind]}: ${signed(total, 2)} nats` +
    (map.k < 0 ? ` over ${whole(map.values.length)} tokens.` : `, of which scale ${map.k + 1} has ${signed(sums[map.k], 2)}.`)];
}
