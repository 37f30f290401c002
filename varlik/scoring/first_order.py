"""Estimates of every class's log-likelihood from one forward and one backward pass.

log p(image | class) is close to linear in what the class brings into the transformer, m(class): its class vectors, and
the key and value of position 0 in every block. So f(m0) + g . (m(class) - m0), with value f and gradient g from one
pass at a point m0 between the classes, estimates the scores of all classes; that of the first token is exact, from the
table. What the estimates leave open is mostly a constant for each class: see `varlik.calibration`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from varlik.scoring import adjoint
from varlik.scoring.class_tables import CHUNK, ClassTables, Conditions
from varlik.scoring.engine import Engine
from varlik.tokens import TokenMaps

# How far a further expansion leans towards the preferred classes: weights are softmax(SHARPNESS * estimate / spread).
# Much sharper ones come so near one class that the others look better than they are (measured on glyphs-100).
SHARPNESS = 2.0

# Images whose gradients are held until they are multiplied with the class tables, which are read once for all of them.
IMAGES_AT_A_TIME = 64


def first_order_log_likelihood(
    engine: Engine,
    images: TokenMaps,
    labels: Tensor,
    at: Tensor,
    *,
    scales: int | None = None,
    per_scale: bool = False,
    expansions: int = 1,
) -> Tensor:
    """Estimates of log p(first `scales` token maps | class) of `labels` (N,), (B, N) float32.

    The first expansion is around the mean of the classes `at` (n,). Further ones, `expansions` in all, are around an
    image's own point: the mean of `labels` weighted towards those that the estimates so far prefer; estimates are then
    the average over the expansions. With `per_scale`, those of every scale by itself, (B, N, K'), for one backward pass
    a scale.

    Raises `ValueError` for no classes, scales out of range, less than one expansion, and as `Engine.open`.
    """
    count = engine.config.num_scales
    scales = count if scales is None else scales
    if not 1 <= scales <= count:
        raise ValueError(f"scales: expected 1 to {count}, got {scales}")
    if expansions < 1:
        raise ValueError(f"expansions: expected 1 or more, got {expansions}")
    for name, classes in (("labels", labels), ("at", at)):
        if classes.dim() != 1 or not len(classes):
            raise ValueError(f"{name}: expected one class or more, got shape {tuple(classes.shape)}")
    engine.check_images(images)
    engine.prepare(torch.cat((labels, at)))
    with torch.autocast(labels.device.type, enabled=False):  # the caller's, as in the engine
        estimates = [
            _estimate(engine, batch, labels, at, scales, per_scale, expansions)
            for batch in _batches(images, IMAGES_AT_A_TIME)
        ]
    return torch.cat(estimates)


def _batches(images: TokenMaps, size: int) -> Iterator[TokenMaps]:
    for first in range(0, len(images), size):
        yield images[first : first + size]


def batch_rows(engine: Engine, scales: int) -> tuple[int, bool]:
    """How many images go through at a time, and whether every block has to be run again on the way back.

    Without that where the memory of a chunk allows it; one image is always taken.
    """
    tokens, kind = engine.config.boundaries[scales], engine.weights.positions.device.type
    good = adjoint.GOOD_BYTES.get(kind, adjoint.GOOD_BYTES["cpu"])
    for checkpointed in (False, True):
        size = adjoint.activation_bytes(engine.weights, tokens, checkpointed)
        if size <= engine.chunk_bytes:
            return max(1, min(engine.chunk_bytes, good) // size), checkpointed
    return 1, True


@torch.inference_mode(False)
@torch.no_grad()
def _estimate(
    engine: Engine, images: TokenMaps, labels: Tensor, at: Tensor, scales: int, per_scale: bool, expansions: int
) -> Tensor:
    tables, rows = engine.tables, engine.tables.rows(labels)
    first = tables.first_log_prob[rows][:, images.tokens[:, 0]].T.unsqueeze(-1)  # (B, N, 1)
    if scales == 1:
        return first if per_scale else first[..., 0]
    point, total = tables.point(at), torch.zeros((), dtype=torch.float64, device=labels.device)
    for done in range(1, expansions + 1):
        total = total + _expand(engine, images, point, rows, scales, per_scale)
        if done < expansions:
            estimates = first[..., 0] + total.sum(-1) / done
            lead = estimates - estimates.amax(-1, keepdim=True)  # finite over any spread, that of one class included
            spread = lead.std(-1, correction=0, keepdim=True).clamp(min=torch.finfo(lead.dtype).tiny)
            point = tables.mean(rows, (SHARPNESS * lead / spread).softmax(-1))
    later = total / expansions
    found = torch.cat((first.to(later.dtype), later), dim=-1)
    return (found if per_scale else found.sum(-1)).float()


def _expand(engine: Engine, images: TokenMaps, point: Conditions, rows: Tensor, scales: int, per_scale: bool) -> Tensor:
    """Estimates of scales 2 to `scales` for the classes in `rows` (N,) of the tables, around one point or one an image.

    (B, N, scales - 1), or (B, N, 1) of them all together.
    """
    boundaries = engine.config.boundaries
    parts = [(k,) for k in range(2, scales + 1)] if per_scale else [tuple(range(2, scales + 1))]
    values: list[list[Tensor]] = [[] for _ in parts]
    gradients: list[list[Conditions]] = [[] for _ in parts]
    size, checkpointed = batch_rows(engine, scales)
    for first in range(0, len(images), size):
        batch = images[first : first + size]
        at = point if len(point) == 1 else point[first : first + size]
        row_point = torch.arange(len(batch), device=rows.device) % len(at)
        inputs = batch.teacher_forcing_input[:, : boundaries[scales] - 1].to(engine.weights.positions.dtype)
        tokens = batch.tokens[:, 1 : boundaries[scales]]
        done = adjoint.forward(engine.weights, inputs, tokens, at, row_point, checkpointed)
        for i, part in enumerate(parts):
            scored = done.log_prob[:, boundaries[part[0] - 1] - 1 : boundaries[part[-1]] - 1]
            values[i].append(scored.double().sum(1, keepdim=True))
            gradients[i].append(adjoint.backward(done, part))
    found = [
        torch.cat(value) + _products(engine.tables, Conditions.concatenate(gradient), point, rows)
        for value, gradient in zip(values, gradients, strict=True)
    ]
    return torch.stack(found, dim=-1)


def _products(tables: ClassTables, gradient: Conditions, point: Conditions, rows: Tensor) -> Tensor:
    """gradient . (class - point) of every image and class, (B, N)."""
    # Differences from one point that all images share are small, and lose nothing when they are summed up.
    base = Conditions(point.vectors[:1], point.pages[:1])
    shift = (gradient.vectors * (point.vectors - base.vectors)).sum((1, 2))
    shift += (gradient.pages * (point.pages - base.pages)).sum((1, 2))
    found = []
    for chunk in rows.split(CHUNK):
        classes = tables.conditions(chunk)
        vectors = (classes.vectors - base.vectors).flatten(1).to(gradient.vectors.dtype)
        pages = (classes.pages - base.pages).flatten(1).to(gradient.pages.dtype)
        found.append(gradient.vectors.flatten(1) @ vectors.T + gradient.pages.flatten(1) @ pages.T)
    return torch.cat(found, dim=1) - shift.unsqueeze(1)
