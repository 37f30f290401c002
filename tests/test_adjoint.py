"""The explicit gradient of log-likelihoods with respect to what classes bring in, against finite differences."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from tiny_model import CLASSES, IMAGES, make_model, make_samples

from varlik.scoring import adjoint
from varlik.scoring.adjoint import Conditions
from varlik.scoring.engine import Engine

STEP = 1e-5


@pytest.fixture(scope="module")
def engine():
    made = Engine(make_model().double())
    made.prepare(torch.arange(CLASSES))
    return made


@pytest.fixture(scope="module")
def images():
    clean = make_samples()[0]
    return replace(clean, teacher_forcing_input=clean.teacher_forcing_input.double())


def conditions(engine):
    pages = torch.stack([page.flatten(2) for page in engine.tables.pages], dim=1).flatten(1, 2)
    return Conditions(engine.tables.vectors, pages)


def run(engine, images, at, row_class, **options):
    return adjoint.forward(
        engine.weights, images.teacher_forcing_input, images.tokens[:, 1:], at, torch.tensor(row_class), **options
    )


def test_the_forward_pass_gives_the_engines_scores(engine, images):
    rows = engine.open(images, torch.tensor([[4], [0], [2]]), per_token=True)
    engine.advance(rows, engine.config.num_scales)
    done = run(engine, images, conditions(engine), [4, 0, 2])
    torch.testing.assert_close(done.log_prob.float(), rows.per_token()[:, 1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scales", [None, (2,), (3,), (2, 4)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_gradient_is_that_of_finite_differences(engine, images, scales, checkpointed):
    at, row_class = conditions(engine), [5, 1, 1]
    found = adjoint.backward(run(engine, images, at, row_class, checkpointed=checkpointed), scales)
    boundaries = engine.config.boundaries
    counted = [
        t - 1
        for k, (a, b) in enumerate(itertools.pairwise(boundaries), start=1)
        for t in range(a, b)
        if k > 1 and (scales is None or k in scales)
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        steps = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (at.vectors, at.pages)]
        moved = [Conditions(at.vectors + sign * STEP * steps[0], at.pages + sign * STEP * steps[1]) for sign in (1, -1)]
        up, down = (run(engine, images, point, row_class).log_prob[:, counted].sum(1) for point in moved)
        wanted = (up - down) / (2 * STEP)
        slope = (found.vectors * steps[0][row_class]).sum((1, 2)) + (found.pages * steps[1][row_class]).sum((1, 2))
        torch.testing.assert_close(slope, wanted, rtol=1e-6, atol=1e-6)


def test_a_prefix_of_scales_has_the_gradient_of_the_whole(engine, images):
    """Tokens of finer scales have no say in those of coarser ones, so they can be left out."""
    at, length = conditions(engine), engine.config.boundaries[3] - 1
    whole = adjoint.backward(run(engine, images, at, [0, 1, 2]), scales=(2, 3))
    short = replace(
        images,
        tokens=images.tokens[:, : length + 1],
        teacher_forcing_input=images.teacher_forcing_input[:, :length],
    )
    part = adjoint.backward(run(engine, short, at, [0, 1, 2]))
    torch.testing.assert_close(part.vectors, whole.vectors)
    torch.testing.assert_close(part.pages, whole.pages)


def test_rows_have_gradients_of_their_own(engine, images):
    at = conditions(engine)
    together = adjoint.backward(run(engine, images, at, [3, 3, 3]))
    for i in range(IMAGES):
        alone = adjoint.backward(run(engine, images[i : i + 1], at, [3]))
        torch.testing.assert_close(together.vectors[i : i + 1], alone.vectors)
