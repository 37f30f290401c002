"""Exact scores of many images: one list of classes for all, or one for each."""

from __future__ import annotations

import pytest
import torch
from tiny_model import CLASSES, CONFIG, make_model, make_samples

from varlik.scoring.engine import Engine
from varlik.scoring.score_table import score_table


@pytest.fixture
def engine():
    return Engine(make_model())


def test_classes_of_each_image_equal_calls_of_their_own(engine, tmp_path):
    images = make_samples()[0]
    labels = torch.tensor([[4, 0], [1, 5], [3, 2]])
    found = score_table(engine, images, labels)
    assert found.shape == (3, 2, CONFIG.num_scales)
    for i in range(3):
        one = score_table(engine, images[i : i + 1], labels[i])
        torch.testing.assert_close(found[i], one[0], rtol=1e-5, atol=1e-5)
    whole = score_table(engine, images, torch.arange(CLASSES))
    torch.testing.assert_close(found, whole[torch.arange(3)[:, None], labels], rtol=1e-5, atol=1e-5)
    for _ in range(2):  # made, then read
        assert torch.equal(score_table(engine, images, labels, tmp_path), found)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 2), (1, 2), (4, 2), (3, 2, 1)])
def test_labels_of_another_shape_are_refused(engine, shape, tmp_path):
    with pytest.raises(ValueError, match=r"labels: expected \(N,\) or \(3, N\) with one class or more, got \("):
        score_table(engine, make_samples()[0], torch.zeros(shape, dtype=torch.int64), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
