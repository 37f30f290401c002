"""Cascades as text, as values and at work."""

from __future__ import annotations

import pytest

from varlik.cascade import AVARC_PLUS, VARC, Cascade, Stage


def test_parse_and_print():
    cascade = Cascade.parse("6:10, 10:3,10x3:1")
    assert cascade.stages == (Stage(6, 10), Stage(10, 3), Stage(10, 1, samples=3))
    assert str(cascade) == "6:10,10:3,10x3:1"
    assert Cascade.parse(str(cascade)) == cascade
    assert cascade.max_samples == 3


def test_released_cascade_at_ten_scales():
    assert AVARC_PLUS.scales_of(10) == (6, 10, 10)
    assert AVARC_PLUS.scales_of(6) == (3, 6, 6)
    assert [(s.keep, s.samples) for s in AVARC_PLUS.stages] == [(10, 1), (3, 1), (1, 3)]
    assert VARC.scales_of(10) == (10,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read stage ''"),
        ("6", "cannot read stage '6'"),
        ("6:10,ten:1", "cannot read stage 'ten:1'"),
        ("6:3,10:5,10:1", "narrows"),
        ("6:3", "must keep 1"),
        ("0:1", "scales"),
        ("120%:1", "scales"),
        ("6x0:1", "samples"),
        ("6:0", "keep"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(ValueError, match=message):
        Cascade.parse(text)


def test_scales_beyond_the_model_and_backwards():
    with pytest.raises(ValueError, match="wants 12 scales, the model has 10"):
        Cascade.parse("12:1").scales_of(10)
    with pytest.raises(ValueError, match="fewer scales"):
        Cascade.parse("6:3,4:1").scales_of(10)
