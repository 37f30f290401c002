"""The report page: what stands in it, and what a browser makes of it."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Browser
from PIL import Image
from tiny_model import make_classifier, make_images

import varlik
from varlik.evaluation.samples import samples
from varlik.explanation.information import Explanation, explain
from varlik.explanation.report import SHOWN, page, report, write_report

HOSTILE = "</script><script>document.title='broken'</script>"
LONG = "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias"


@pytest.fixture(scope="module")
def hostile():
    """A report with names that would break a page that took them for markup, and one that is hard to lay out."""
    classifier = make_classifier()
    names = [HOSTILE, "<!-- & \"'", LONG, "", "<b>bold</b>", "x" * 60, "\u2028", "<!-- data -->", *"abcd"]
    named = varlik.VARClassifier(classifier.var, classifier.vqvae, names, classifier.preprocessing, name="<i>tiny</i>")
    pictures = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    files = ["<img src=x onerror=\"document.title='broken'\">.png", LONG * 2]
    return report(named, pictures, names=files, truth=[HOSTILE, None], cascade="screen:12,25%:12,50%:11,100%:1")


def block(text: str) -> dict:
    """The data of a page, as a browser finds it: what stands before the first end of a script."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_numbers_are_the_explanations(fashion):
    classifier, images, scores = fashion
    explanation = explain(classifier, images[:3])
    truth = [9, "Coat", None]
    data = report(classifier, images[:3], explanation, truth=truth, names=["a", "b", "c"]).data()
    assert data["patch_nums"] == list(images.patch_nums)
    assert data["decoded"]
    for i, image in enumerate(data["images"]):
        shown = image["classes"]
        assert len(shown) == SHOWN
        assert shown[:2] == [explanation.target[i], explanation.rival[i]]
        assert image["truth"] == [9, 4, None][i]
        assert image["truth"] is None or image["truth"] in shown
        assert image["tokens"] == images.tokens[i].tolist()
        exact = explanation.token_log_prob[i, shown]
        assert torch.allclose(torch.tensor(image["log_prob"]) / 1000, exact, atol=5.1e-4)
        beside = torch.stack((explanation.unconditional[i], explanation.rival_unconditional[i]))
        assert torch.allclose(torch.tensor(image["unconditional"]) / 1000, beside, atol=5.1e-4)
        running = scores[i].cumsum(-1)
        assert torch.allclose(torch.tensor(image["race"]).double(), running[shown], atol=1e-3)
        assert torch.allclose(torch.tensor(image["leader"]).double(), running.amax(0), atol=1e-3)
        assert torch.allclose(torch.tensor(image["posterior"]), explanation.posterior[i, shown], rtol=1e-3)
        for kind, values in (
            ("target", explanation.information),
            ("rival", explanation.rival_information),
            ("contrast", explanation.contrast),
        ):
            assert torch.tensor(image["maps"][kind]).sum().item() == pytest.approx(values[i].sum().item(), abs=0.01)
            by_scale = torch.stack([part.sum() for part in values[i].split([p * p for p in images.patch_nums])])
            assert torch.allclose(torch.tensor(image["sums"][kind]), by_scale, atol=1e-3)


def test_race_is_led_by_any_candidate(fashion):
    """A class that leads early and ends last is not shown, and still is the one that others are behind of."""
    classifier, images, _ = fashion
    explanation = explain(classifier, images[:1])
    log_prob = explanation.token_log_prob.clone()
    last = log_prob[0].sum(-1).argmin()
    log_prob[0, last, :5], log_prob[0, last, 5:] = 0, -99
    data = report(classifier, images[:1], replace(explanation, token_log_prob=log_prob)).data()["images"][0]
    assert int(last) not in data["classes"]
    assert data["leader"][:2] == [0, 0]
    assert max(race[1] for race in data["race"]) < 0
    assert data["leader"][-1] == max(race[-1] for race in data["race"])


def test_stages_are_the_cascades(fashion):
    classifier, images, _ = fashion
    found = report(classifier, images[:2], cascade="50%:5,100%:1")
    prediction, data = found.prediction, found.data()
    assert [stage["meaning"] for stage in data["stages"]] == ["3 of 6 scales", "all 6 scales"]
    for i, image in enumerate(data["images"]):
        first, last = image["stages"]
        assert (first["entered"], first["left"], last["entered"], last["left"]) == (10, 5, 5, 1)
        assert set(first["survivors"]) == set(prediction.ranking[i, :5].tolist())
        assert last["survivors"] == [image["answer"]] == [prediction.classes[i]]
        assert first["flops"] + last["flops"] == image["flops"] == prediction.cost.flops[i]
        assert first["forward_tokens"] + last["forward_tokens"] == prediction.cost.tokens[i]


def test_files_are_named_and_shown_as_the_model_sees_them(fashion, tmp_path):
    classifier = fashion[0]
    paths = list(samples("fashion-mnist").paths[:2])
    found = report(classifier, paths, cascade=varlik.FAST)
    assert found.names == ("test_00.png", "test_01.png")
    assert not found.decoded
    picture = found.data()["images"][0]["picture"]
    assert picture.startswith("data:image/png;base64,")
    (tmp_path / "seen.png").write_bytes(base64.b64decode(picture.partition(",")[2]))
    again = varlik.images.load(tmp_path / "seen.png", replace(classifier.preprocessing, resize=32, crop=32, padding=0))
    assert torch.equal(again, varlik.images.load(paths[0], classifier.preprocessing))


def test_files_of_one_name_are_told_apart(fashion, tmp_path):
    classifier, path = fashion[0], samples("fashion-mnist").paths[0]
    for folder in ("a/same", "b/same", "c"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "boot.png").write_bytes(path.read_bytes())
    files = [tmp_path / name for name in ("a/same/boot.png", "b/same/boot.png", "c/boot.png")]
    assert report(classifier, [*files, path], cascade=varlik.FAST).names == (
        str(Path("a/same/boot.png")),
        str(Path("b/same/boot.png")),
        str(Path("c/boot.png")),
        path.name,
    )
    assert report(classifier, [str(path), path], cascade=varlik.FAST).names == (path.name, path.name)


def test_nothing_breaks_out_of_the_data(hostile):
    text = page(hostile)
    assert text.count("</script") == 2
    assert "<i>tiny" not in text
    data = block(text)
    assert data["model"] == "<i>tiny</i>"
    assert HOSTILE in data["class_names"].values()
    assert data["images"][0]["name"].startswith("<img src=x")


def test_ten_images_of_a_hundred_classes_take_less_than_a_megabyte():
    classifier = varlik.load("glyphs-100")
    images = classifier.tokenize(list(samples("glyphs-100").paths[:10]))
    log_prob = -9 * torch.rand(10, 100, images.tokens.shape[1], generator=torch.Generator().manual_seed(0))
    labels = classifier.labels()
    beside = log_prob.mean(1)
    explanation = Explanation(
        labels, labels[:10], labels[10:20], images.tokens, images.patch_nums, log_prob, beside, beside, "others"
    )
    text = page(report(classifier, images, explanation, cascade=varlik.FAST))
    assert len(text.encode()) < 300_000
    assert "http:" not in text
    assert "https:" not in text
    assert "//" not in re.sub(r"^.*?// .*$|base64,\S*", "", text, flags=re.MULTILINE)  # not without a scheme either


def detailed(count, size):
    """Pictures in colour with more detail than photographs have: amplitude falls with frequency to the 0.8, not 1."""
    generator = torch.Generator().manual_seed(0)
    across = torch.fft.rfftfreq(size).square()
    down = torch.fft.fftfreq(size).square().unsqueeze(1)
    noise = torch.fft.rfft2(torch.randn(count, 3, size, size, generator=generator))
    grey = torch.fft.irfft2(noise * (across + down + 1 / size**2) ** -0.4, s=(size, size))
    mixed = grey + grey.mean(1, keepdim=True)
    return (0.5 + 0.2 * mixed / mixed.std()).clamp(0, 1)


@pytest.mark.parametrize(
    ("size", "sides", "most"),
    [
        (256, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 950_000),
        (512, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), 2_000_000),
    ],
)
def test_pages_of_ten_photographs(size, sides, most):
    """With the geometries of VAR, of a thousand classes; the numbers are made up."""
    classifier, generator = make_classifier(), torch.Generator().manual_seed(0)
    small = report(classifier, make_images(classifier, 10), cascade="100%:1")
    length = sum(p * p for p in sides)
    # Mostly between -3 and -12, as of a codebook of 4096.
    log_prob = -7.5 + 2 * torch.randn(10, 1000, length, generator=generator)
    beside, labels = log_prob.mean(1), torch.arange(1000)
    tokens = torch.randint(4096, (10, length), generator=generator)
    explanation = Explanation(labels, labels[:10], labels[10:20], tokens, sides, log_prob, beside, beside, "others")
    names = tuple(f"{LONG} {i}" for i in range(1001))
    large = replace(small, explanation=explanation, pictures=detailed(10, size), class_names=names)
    text = page(large)
    assert len(text.encode()) < most
    for image in block(text)["images"]:
        content = base64.b64decode(image["picture"].partition(",")[2])
        assert Image.open(io.BytesIO(content)).size == (256, 256)


def test_large_pictures_are_compressed():
    from varlik.explanation.report import _data_uri

    noise = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))
    smooth = torch.linspace(0, 1, 256).expand(3, 256, 256)
    assert _data_uri(smooth).startswith("data:image/png")
    assert _data_uri(noise).startswith("data:image/jpeg")
    assert len(_data_uri(noise)) < 45_000


def test_bad_input(fashion, tmp_path):
    classifier, images, _ = fashion
    explanation = explain(classifier, images[:2])
    for wrong, message in (
        ({"names": ["a"]}, "names: expected one for each of 2 images, got 1"),
        ({"truth": [1]}, "truth: expected one class for each of 2 images, got 1"),
        ({"truth": [1, "no such class"]}, "no such class"),
        ({"explanation": explain(classifier, images[:3])}, "explanation: expected one of 2 images"),
        ({"explanation": replace(explanation, unconditional=explanation.contrast / 0)}, "NaN or infinity"),
        ({"explanation": replace(explanation, rival_unconditional=explanation.contrast / 0)}, "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            report(classifier, images[:2], **{"explanation": explanation, **wrong})
    found = report(classifier, images[:2], explanation)
    with pytest.raises(ValueError, match="path: no such folder"):
        write_report(tmp_path / "absent" / "report.html", found)
    few = report(make_classifier(), make_images(make_classifier(), 1), cascade="100%:1")
    assert few.names == ("image 1",)


# In a browser -------------------------------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
OPACITY = "['canvas', '.bar div'].map((e) => Number(getComputedStyle(document.querySelector(e)).opacity))"
LEADER = "[...document.querySelectorAll('.chart path')].map((e) => e.getAttribute('d'))"
CELLS = "document.querySelectorAll('[role=grid]')[0].querySelectorAll('[role=gridcell]').length"
TIP = "document.getElementById('tip').hidden ? null : document.getElementById('tip').innerText"
TOO_WIDE = """[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, svg')
    && e.getBoundingClientRect().right > document.querySelector('main').getBoundingClientRect().right + 0.5)
    .map((e) => e.outerHTML)"""
CLIPPED = """[...document.querySelectorAll('h1, h2, h3, p, th, td, label, span, figcaption, summary')].filter((e) =>
    getComputedStyle(e).overflowX !== 'visible' && e.scrollWidth > e.clientWidth + 1).map((e) => e.outerHTML)"""
OVERLAPPING = """[...document.querySelectorAll('article')].flatMap((article) => {
    const boxes = [...article.querySelectorAll('figure, .posterior, .stages')].map((e) => e.getBoundingClientRect());
    return boxes.filter((a, i) => boxes.slice(i + 1).some((b) =>
        a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1));
}).length"""


@needs_chromium
def test_page_works_by_keyboard_and_mouse(fashion, tmp_path):
    classifier = fashion[0]
    chosen = samples("fashion-mnist")
    found = report(classifier, list(chosen.paths[:2]), truth=chosen.labels[:2], cascade=varlik.FAST)
    file = tmp_path / "report.html"
    write_report(file, found)
    image = found.data()["images"][0]
    target, rival = (found.class_names[label] for label in image["classes"][:2])

    with Browser() as browser:
        browser.open(file)
        assert browser.evaluate("document.title") == "fashion-mnist: why these classes"
        assert browser.evaluate("document.querySelectorAll('article').length") == 2
        assert browser.evaluate("document.querySelectorAll('.chart path').length") == 2 * SHOWN
        assert f"Target {target}, rival {rival}" in browser.evaluate("document.querySelector('.verdict').innerText")

        assert browser.evaluate(OPACITY) == [0.8, 0.8]
        browser.evaluate("document.getElementById('opacity').focus()")
        browser.press("ArrowLeft")
        assert browser.evaluate(OPACITY) == [0.75, 0.75]
        assert browser.evaluate("document.getElementById('percent').innerText") == "75 %"

        assert browser.evaluate(TIP) is None
        browser.press("Tab")  # from the last control to the first place of the first map
        tip = browser.evaluate(TIP)
        assert tip.startswith("row 1, column 1:")
        for k, first in enumerate((0, 1, 5, 14, 30, 66)):
            code, own = image["tokens"][first], image["log_prob"][0][first] / 1000
            assert f"{k + 1}: 1, 1\t{code}\t{minus(own)}" in tip
        browser.press("Escape")
        assert browser.evaluate(TIP) is None

        before = browser.evaluate("document.querySelector('canvas').toDataURL()")
        assert browser.evaluate(CELLS) == 64
        browser.evaluate("document.getElementById('kind').focus()")
        browser.press("ArrowUp")
        browser.press("ArrowUp")
        assert browser.evaluate("document.getElementById('kind').value") == "target"
        assert browser.evaluate("document.querySelector('canvas').toDataURL()") != before
        assert f"for {target}" in browser.evaluate("document.querySelector('.legend').innerText")
        total = found.explanation.information[0].double().sum().item()
        assert f"{minus(total, 2)} nats over 130 tokens" in browser.evaluate(
            "document.querySelector('figcaption').innerText"
        )
        browser.evaluate("document.getElementById('scale').focus()")
        for _ in range(3):
            browser.press("ArrowDown")
        assert browser.evaluate(CELLS) == 9
        browser.press("Tab")
        browser.press("Tab")
        for key in ("ArrowRight", "ArrowDown"):  # row 2, column 2 of scale 3: token 1 + 4 + 4
            browser.press(key)
        tip = browser.evaluate(TIP)
        assert tip.startswith(f"scale 3 of 6, row 2, column 2: code {image['tokens'][9]}")
        for label, log_prob in zip(image["classes"], image["log_prob"], strict=True):
            assert re.search(
                rf"{re.escape(found.class_names[label])}( target| rival)?\t{minus(log_prob[9] / 1000)}", tip
            )
        for role, log_prob, unconditional in zip(
            ("target", "rival"), image["log_prob"], image["unconditional"], strict=False
        ):
            assert f" {role}\t{minus(log_prob[9] / 1000)}\t{minus(unconditional[9] / 1000)}\t" in tip
        described = browser.evaluate("document.activeElement.getAttribute('aria-describedby')")
        assert described == "tip"

        browser.point_at("article:nth-of-type(2) [role=row]:nth-child(1) [role=gridcell]:nth-child(3)")
        assert browser.evaluate(TIP).startswith("scale 3 of 6, row 1, column 3")
        assert browser.complaints() == []
        assert browser.requests() == [file.as_uri()]


@needs_chromium
@pytest.mark.parametrize("kind", ["target", "rival", "contrast"])
def test_values_of_a_place_follow_from_what_stands_beside_them(fashion, tmp_path, kind):
    """Target, rival and their unconditionals differ; the tooltip shows those of the map."""
    found = report(fashion[0], fashion[1][:1])
    write_report(tmp_path / "report.html", found)
    with Browser() as browser:
        browser.open(tmp_path / "report.html")
        browser.evaluate(
            f"((e) => {{ e.value = '{kind}'; e.dispatchEvent(new Event('change')); }})(document.getElementById('kind'))"
        )
        browser.evaluate("document.querySelectorAll('[role=gridcell]')[27].focus()")
        lines = browser.evaluate(TIP).replace("−", "-").splitlines()
        rows = [line.split("\t") for line in lines if re.match(r"\d+: \d+, \d+\t", line)]
        assert len(rows) == len(found.explanation.patch_nums)
        for _, _, target, rival, unconditional, value in (map(str, row) for row in rows):
            own, beside = {
                "target": (target, unconditional),
                "rival": (rival, unconditional),
                "contrast": (target, rival),
            }[kind]
            assert float(value) == pytest.approx(float(own) - float(beside), abs=1e-6)
        assert browser.complaints() == []


@needs_chromium
def test_race_is_drawn_behind_any_candidate(fashion, tmp_path):
    """Nobody shown is level with a leader that is not shown."""
    found = report(fashion[0], fashion[1][:1])
    data = found.data()["images"][0]
    log_prob = found.explanation.token_log_prob.clone()
    hidden = next(label for label in range(10) if label not in data["classes"])
    log_prob[0, hidden, :5], log_prob[0, hidden, 5:] = 0, -99
    write_report(tmp_path / "a.html", found)
    write_report(tmp_path / "b.html", replace(found, explanation=replace(found.explanation, token_log_prob=log_prob)))
    heights = []
    with Browser() as browser:
        for name in ("a.html", "b.html"):
            browser.events.clear()
            browser.open(tmp_path / name)
            paths = browser.evaluate(LEADER)
            assert len(paths) == SHOWN
            heights.append([min(float(path[1:].split("L")[k].split(" ")[1]) for path in paths) for k in (1, 5)])
        assert browser.complaints() == []
    (early, late), (behind, last) = heights
    assert early == late == last < behind


def minus(x: float, digits: int = 3) -> str:
    """As the page writes numbers, but for a plus."""
    return f"{x:.{digits}f}".replace("-", "−")


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(320, True), (800, False), (1280, True)])
def test_page_is_laid_out_whatever_the_names(hostile, tmp_path, width, dark):
    file = tmp_path / "report.html"
    write_report(file, hostile)
    with Browser(width, dark=dark) as browser:
        browser.open(file)
        assert browser.evaluate("document.title") == "<i>tiny</i>: why these classes"
        assert browser.evaluate("document.querySelectorAll('b, i, img[src=x]').length") == 0
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        assert browser.evaluate(TOO_WIDE) == []
        assert browser.evaluate(CLIPPED) == []
        assert browser.evaluate(OVERLAPPING) == 0
        browser.evaluate("document.querySelectorAll('[role=gridcell]')[5].focus()")
        assert browser.evaluate("document.getElementById('tip').getBoundingClientRect().right") <= width
        paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(20, 23, 27)") == dark
        assert browser.complaints() == []
        assert browser.requests() == [file.as_uri()]
