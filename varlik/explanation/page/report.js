// Classes: posterior and race ---------------------------------------------------------------------------------------

const MARKS = [
  [[-4, -4], [4, -4], [4, 4], [-4, 4]], [[0, -5], [5, 4], [-5, 4]], [[0, -5.5], [5.5, 0], [0, 5.5], [-5.5, 0]],
  [[0, 5], [5, -4], [-5, -4]], [[-2, -5], [2, -5], [2, -2], [5, -2], [5, 2], [2, 2], [2, 5], [-2, 5], [-2, 2], [-5, 2], [-5, -2], [-2, -2]],
  [[-5, -5], [5, -5], [-5, 5], [5, 5]],
];
const paintOf = (c) => `var(--class-${c})`;
const mark = (c, x, y) => draw("polygon", {
  points: MARKS[c].map(([dx, dy]) => `${x + dx},${y + dy}`).join(" "), style: `fill: ${paintOf(c)}`,
});
const stroke = (c) => `stroke: ${paintOf(c)}; stroke-width: ${c < 2 ? 2.5 : 1.5}; fill: none`;
const swatch = (c) => draw("svg", { class: "swatch", viewBox: "-12 -7 24 14", "aria-hidden": "true" },
  draw("path", { d: "M-12 0H12", style: stroke(c) }), mark(c, 0, 0));

function posteriorTable(image) {
  const last = sides.length - 1;
  const order = image.classes.map((_, c) => c).sort((a, b) => image.race[b][last] - image.race[a][last]);
  const rows = order.map((c) => {
    const label = image.classes[c], bar = make("span", { class: "share" });
    bar.style.cssText = `width: ${100 * image.posterior[c]}%; background: ${paintOf(c)}`;
    const roles = [[0, "target"], [1, "rival"]].filter(([at]) => at === c).map(([, role]) => role);
    if (label === image.truth) roles.push("truth");
    const behind = image.race[c][last] - image.leader[last];
    return make("tr", {},
      make("th", { scope: "row" }, swatch(c), named(label), " ", make("small", {}, roles.join(", "))),
      make("td", { class: "track", "aria-hidden": "true" }, bar),
      make("td", { class: "number" }, probability(image.posterior[c])),
      make("td", { class: "number" }, behind ? plain(behind, 2) : "0"));
  });
  const titles = ["class", "", "posterior", "nats behind"];
  return make("table", { class: "posterior" },
    make("caption", {}, `Most likely of ${data.candidates} classes`), heads(...titles), make("tbody", {}, ...rows));
}

function raceFigure(image) {
  const behind = image.race.map((scores) => scores.map((x, k) => x - image.leader[k]));
  const holder = make("div", { class: "chart" });
  const rows = image.classes.map((label, c) => row(named(label), ...image.race[c].map((x) => plain(x, 2))));
  const numbers = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Running log-likelihoods" },
    make("table", {}, heads("class", ...sides.map((_, k) => (k ? `${k + 1}` : "scale 1"))), make("tbody", {}, ...rows)));
  new ResizeObserver(() => holder.replaceChildren(raceChart(image, behind, holder))).observe(holder);
  return make("figure", { class: "race" }, make("h3", {}, "Race over the scales"), holder,
    make("figcaption", {}, "Running log-likelihood, in nats behind the leader of all candidates at each scale."),
    make("details", {}, make("summary", {}, "Running log-likelihoods as numbers"), numbers));
}

function raceChart(image, behind, holder) {
  const width = holder.clientWidth, height = holder.clientHeight, [left, right, top, bottom] = [42, 12, 12, 38];
  const lowest = Math.min(-1, ...behind.flat());
  const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000].find((s) => -lowest / s <= 5) || -lowest;
  const x = (k) => left + (sides.length > 1 ? (k / (sides.length - 1)) * (width - left - right) : 0);
  const y = (value) => top + (value / lowest) * (height - top - bottom);
  const chart = draw("svg", { role: "img", "aria-label": `Race of ${image.classes.map(className).join(", ")}` });
  for (let value = 0; value >= lowest; value -= step) {
    chart.append(draw("line", { class: "rule", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      draw("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, value ? plain(value, 0) : "0"));
  }
  sides.forEach((_, k) => chart.append(
    draw("text", { x: x(k), y: height - bottom + 20, "text-anchor": "middle" }, String(k + 1))));
  chart.append(draw("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, "scale"));
  for (let c = behind.length - 1; c >= 0; c--) { // target and rival last, on top
    const path = behind[c].map((value, k) => `${k ? "L" : "M"}${x(k)} ${y(value)}`).join("");
    chart.append(draw("g", {}, draw("title", {}, className(image.classes[c])),
      draw("path", { d: path, style: stroke(c) }), ...behind[c].map((value, k) => mark(c, x(k), y(value)))));
  }
  return chart;
}

// The cascade -------------------------------------------------------------------------------------------------------

function stagesTable(image) {
  const cells = (...texts) => texts.map((text) => make("td", { class: "number" }, text));
  const groups = image.stages.map((stage, s) => make("tbody", {},
    make("tr", {}, make("th", { scope: "rowgroup", colspan: "5" },
      make("strong", {}, data.stages[s].stage), ` ${data.stages[s].meaning}; left: `,
      ...stage.survivors.flatMap((label) => [named(label), " "]),
      stage.left > stage.survivors.length ? `and ${stage.left - stage.survivors.length} more` : "")),
    make("tr", {}, ...cells(`${stage.entered} → ${stage.left}`, whole(stage.forward_tokens),
      whole(stage.backward_tokens), flops(stage.flops), data.stages[s].seconds.toFixed(2)))));
  const total = (key) => whole(sum(image.stages.map((stage) => stage[key])));
  const all = make("tr", {}, make("th", { scope: "row", class: "number" }, "in all"),
    ...cells(total("forward_tokens"), total("backward_tokens"), flops(image.flops), data.cost.seconds.toFixed(2)));
  const heading = make("tr", {}, ...["classes", "tokens forwards", "tokens backwards", "FLOPs", "seconds*"].map((title) =>
    make("th", { scope: "col", class: "number" }, title)));
  const share = (100 * image.flops) / data.cost.full_flops;
  const answer = image.answer === image.best ? [] : [" Its answer, ", named(image.answer), ", is not the most likely class."];
  return make("section", { class: "stages" },
    make("table", {}, make("caption", {}, `Cascade ${data.cascade.replaceAll(",", ", ")}`), make("thead", {}, heading),
      ...groups, make("tfoot", {}, all)),
    make("p", { class: "soft" }, `${share.toPrecision(2)} % of the FLOPs of one pass per class, and ` +
      `${flops(data.cost.encode_flops)} to encode the image. *For all images of this page; in all with encoding.`, ...answer));
}

// The page ----------------------------------------------------------------------------------------------------------

function verdict(image) {
  const [target, rival] = image.classes, words = [];
  if (image.best !== target) words.push("Most likely ", named(image.best), ". ");
  words.push("Target ", named(target), ", rival ", named(rival));
  if (image.truth !== null) words.push(", truth ", named(image.truth), image.best === image.truth ? " (right)" : " (wrong)");
  return make("p", { class: "verdict" }, ...words);
}

function article(image, number, figure) {
  return make("article", { id: `image-${number}`, "aria-labelledby": `title-${number}` },
    make("div", { class: "head" }, pictureOf(image, ""),
      make("div", {}, make("h2", { id: `title-${number}` }, image.name), verdict(image))),
    make("div", { class: "parts" }, figure, posteriorTable(image), raceFigure(image), stagesTable(image)));
}

function thumbnail(image, number) {
  const wrong = image.truth !== null && image.truth !== image.best;
  return make("li", {}, make("a", { href: `#image-${number}`, class: wrong ? "wrong" : "", title: image.name },
    pictureOf(image, ""), named(image.best), wrong ? make("small", {}, "wrong") : ""));
}

function start() {
  byId("model").textContent = data.model;
  const many = data.images.length > 1;
  byId("about").textContent = `${data.images.length} image${many ? "s" : ""}, ${data.candidates} candidate classes, ` +
    `${sides.length} scales of ${sides.map((p) => `${p}×${p}`).join(", ")} tokens.` +
    (data.decoded ? " The pictures are decoded from their tokens." : "");
  byId("unconditional").textContent = {
    others: "“Without it” is the mixture of the other candidate classes, each as likely as the tokens before make it.",
    mixture: "“Without it” is the mixture of all candidate classes, each as likely as the tokens before make it.",
    null: "“Without it” is the model’s null class.",
  }[data.kind];
  controls.scale.append(make("option", { value: "0" }, "all"),
    ...sides.map((p, k) => make("option", { value: String(k + 1) }, `${k + 1}: ${p}×${p}`)));
  const figures = data.images.map(mapFigure);
  byId("images").append(...data.images.map((image, n) => article(image, n + 1, figures[n].figure)));
  if (many) byId("thumbnails").append(...data.images.map((image, n) => thumbnail(image, n + 1)));
  const show = () => { hideTip(); figures.forEach((figure) => figure.show()); };
  const fade = () => {
    byId("percent").textContent = `${controls.opacity.value} %`;
    byId("images").style.setProperty("--opacity", controls.opacity.value / 100); // of maps and their legends
  };
  controls.kind.addEventListener("change", show);
  controls.scale.addEventListener("change", show);
  controls.opacity.addEventListener("input", fade);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
  show();
  fade();
}

start();
