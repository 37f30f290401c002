"""Pictures of explanations: what they show, that nothing is clipped, files, and what is refused."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from varlik.explanation import pictures
from varlik.explanation.information import Explanation, others_log_prob
from varlik.explanation.maps import compose

SIDES = {"small": (1, 2, 3, 4, 6, 8), "imagenet": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)}
NAMES = (
    "great white shark, white shark, man-eater, man-eating shark",
    "$",
    "_",
    "W" * 40,
    "Supercalifragilisticexpialidocious",
    "T-shirt/top",
    "a $5 or $10 {\\bill}",
)


def made_up(sides=SIDES["small"], target=0, rival=3, kind="others", images=1):
    generator = torch.Generator().manual_seed(0)
    length = sum(p * p for p in sides)
    log_prob = -3 + 0.4 * torch.randn(images, len(NAMES) + 1, length, generator=generator)
    return Explanation(
        labels=torch.arange(len(NAMES) + 1),
        target=torch.full((images,), target),
        rival=torch.full((images,), rival),
        tokens=torch.zeros(images, length, dtype=torch.long),
        patch_nums=sides,
        token_log_prob=log_prob,
        unconditional=others_log_prob(log_prob, torch.full((images,), target)).float(),
        rival_unconditional=others_log_prob(log_prob, torch.full((images,), rival)).float(),
        kind=kind,
    )


def pixels(size=32, channels=1):
    ramp = torch.linspace(-1, 1, size)
    return torch.stack([ramp.outer(ramp)] * channels)


def figure_of(way, explanation, **arguments):
    pytest.importorskip("matplotlib")
    if way == "released":
        return pictures.panels(explanation, pixels(), NAMES, released=True, **arguments)
    return getattr(pictures, way)(explanation, pixels(), NAMES, **arguments)


def texts(figure):
    """Texts as they are drawn, with the rectangles they take, in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return {text: text.get_window_extent(canvas.get_renderer()) for text in found}


def maps_in(figure):
    """The data of what `imshow` drew, in order."""
    axes = [axis for axis in figure.axes or [a for part in figure.subfigs for a in part.axes] if axis.images]
    return [np.asarray(axis.images[0].get_array()) for axis in axes]


@pytest.mark.parametrize("way", ["panels", "released", "scales"])
@pytest.mark.parametrize(("sides", "target", "rival"), [("small", 0, 1), ("imagenet", 3, 4), ("small", 6, 3)])
def test_nothing_is_clipped_and_no_texts_overlap(way, sides, target, rival):
    figure = figure_of(way, made_up(SIDES[sides], target, rival))
    boxes = texts(figure)
    assert len(boxes) > 10
    for text, box in boxes.items():
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{text.get_text()!r} is clipped"
    rectangles = list(boxes.items())
    for i, (text, box) in enumerate(rectangles):
        for other, its in rectangles[i + 1 :]:
            across = min(box.x1, its.x1) - max(box.x0, its.x0)
            down = min(box.y1, its.y1) - max(box.y0, its.y0)
            assert min(across, down) < 1, f"{text.get_text()!r} lies over {other.get_text()!r}"


@pytest.mark.parametrize("way", ["panels", "scales"])
def test_names_are_text_and_no_mathematics(way):
    shown = " ".join(text.get_text() for text in texts(figure_of(way, made_up(target=1, rival=2))))
    assert r"“\$”" in shown
    assert "“_”" in shown
    shown = " ".join(text.get_text() for text in texts(figure_of(way, made_up(target=7, rival=0))))
    assert "“null”" in shown
    assert "“great white shark…”" in shown


def test_panels_say_what_is_explained():
    one = made_up()
    shown = [text.get_text() for text in texts(figure_of("panels", one))]
    for values in (one.information, one.rival_information, one.contrast):
        number = f"{values.sum().item():+.2f} nats".replace("-", "−")
        assert any(number in text for text in shown)
    assert any("against the other classes" in text for text in shown)
    assert any("against the null class" in text.get_text() for text in texts(figure_of("panels", made_up(kind="null"))))


def test_heat_lies_half_and_half_over_the_picture():
    colormaps = pytest.importorskip("matplotlib").colormaps

    one = made_up()
    for released in (False, True):
        picture, first = maps_in(figure_of("released" if released else "panels", one))[:2]
        assert picture.shape == (32, 32, 3)
        assert first.shape == (256, 256, 3)
        total = compose(one.information.double(), one.patch_nums, "nearest" if released else "area")[0]
        row, column = divmod(int(total.argmax()), 8)
        centre = first[32 * row + 16, 32 * column + 16]
        grey = picture[4 * row + 2, 4 * column + 2]
        under = grey if released else 0.45 + 0.55 * grey
        colours = colormaps["viridis"] if released else pictures._diverging()
        assert np.abs(2 * centre - under - colours(1.0)[:3]).max() < 0.15


def test_zero_is_the_middle_and_signs_are_told_apart():
    pytest.importorskip("matplotlib")
    colours = pictures._diverging()
    red, green, blue, _ = colours(0.5)
    assert min(red, green, blue) > 0.95
    assert colours(0.8)[0] > 0.8 > 0.1 > colours(0.8)[2]
    assert colours(0.2)[2] > 0.6 > 0.1 > colours(0.2)[0]
    norms = [axis.images[0].norm for axis in figure_of("scales", made_up()).subfigs[0].axes[1:7]]
    assert all(norm.vmin == -norm.vmax for norm in norms)


def test_scales_show_every_token_once():
    one = made_up()
    _, *maps = maps_in(figure_of("scales", one))
    for values, shown in ((one.information[0], maps[:6]), (one.contrast[0], maps[6:12])):
        torch.testing.assert_close(torch.from_numpy(np.concatenate([part.ravel() for part in shown])).float(), values)


def test_race_is_behind_the_leader_of_all_classes():
    one = made_up()
    (axis,) = figure_of("scales", one, top=1).subfigs[1].axes
    ends = torch.tensor([p * p for p in one.patch_nums]).cumsum(0)
    running = one.token_log_prob[0].double().cumsum(1)[:, ends - 1]
    behind = running - running.amax(0)
    wanted = {int(behind[:, -1].argmax()), 0, 3}  # the best, the target, the rival
    lines = {tuple(np.round(line.get_ydata()[1:], 6)) for line in axis.lines}
    assert lines == {tuple(np.round(behind[label].numpy(), 6)) for label in wanted}
    styles = {(line.get_color(), line.get_marker()) for line in axis.lines}
    assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == len(wanted)
    assert all(line.get_ydata()[0] == 0 for line in axis.lines)


def test_races_of_equals_and_even_maps_are_drawn():
    one = made_up()
    same = replace(one, token_log_prob=torch.full_like(one.token_log_prob, -1.0))
    for way in ("panels", "released", "scales"):
        assert all(np.isfinite(shown).all() for shown in maps_in(figure_of(way, same)))


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (33, 3), (300, 3)])
def test_pictures_of_any_size(size, channels):
    pytest.importorskip("matplotlib")
    first, heat = maps_in(pictures.panels(made_up(), pixels(size, channels), NAMES))[:2]
    assert first.shape == (size, size, 3)
    assert 256 <= len(heat) < 256 + size
    assert len(heat) % size == 0


def test_files(tmp_path):
    figure = figure_of("panels", made_up())
    pictures.save(figure, tmp_path / "a.PNG")
    width, height = Image.open(tmp_path / "a.PNG").size
    assert 1000 < width < 1400
    assert 400 < height < 500
    pictures.save(figure, tmp_path / "a.svg")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_the_image_that_is_asked_for():
    two = made_up(images=2)
    for way in ("panels", "scales"):
        alone = maps_in(figure_of(way, two[1:2]))
        assert all(map(np.array_equal, maps_in(figure_of(way, two, image=1)), alone))
        assert not all(map(np.array_equal, maps_in(figure_of(way, two, image=0)), alone))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": 1}, "image: expected 0 to 0, got 1"),
        ({"image": -1}, "image: expected 0 to 0, got -1"),
        ({"pixels": torch.zeros(32, 32)}, "pixels: expected (1, S, S) or (3, S, S), got (32, 32)"),
        ({"pixels": torch.zeros(1, 32, 30)}, "pixels: expected (1, S, S) or (3, S, S), got (1, 32, 30)"),
        ({"names": NAMES[:3]}, "names: expected one for each class up to 7, got 3"),
        (
            {"explanation": replace(made_up(), unconditional=torch.full((1, 130), torch.nan))},
            "expected finite log-probs",
        ),
        (
            {"explanation": replace(made_up(), rival_unconditional=torch.full((1, 130), -torch.inf))},
            "expected finite log-probs",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    pytest.importorskip("matplotlib")
    arguments = {"explanation": made_up(), "pixels": pixels(), "names": NAMES, **change}
    for draw in (pictures.panels, pictures.scales):
        with pytest.raises(ValueError) as error:
            draw(**arguments)
        assert message in str(error.value)


def test_other_endings_and_numbers_of_classes_are_refused(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.pdf", "a"):
        with pytest.raises(ValueError, match=r"pictures: expected a file that ends in \.png or \.svg, got "):
            pictures.save(pictures.panels(made_up(), pixels(), NAMES), tmp_path / name)
    for top in (0, 6):
        with pytest.raises(ValueError, match=f"top: expected 1 to 5 classes, got {top}"):
            pictures.scales(made_up(), pixels(), NAMES, top=top)


def test_without_matplotlib_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for call in (
        lambda: pictures.panels(made_up(), pixels(), NAMES),
        lambda: pictures.scales(made_up(), pixels(), NAMES),
        lambda: pictures.check(tmp_path / "a.png"),
    ):
        with pytest.raises(ValueError, match=r"need matplotlib: python -m pip install 'varlik\[plots\]'"):
            call()
