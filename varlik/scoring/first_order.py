"""Estimates of every class's log-likelihood from one forward and one backward pass.

log p(image | class) is close to linear in what the class brings into the transformer, m(class): its class vectors, and
the key and value of position 0 in every block. So f(m0) + g . (m(class) - m0), with value f and gradient g from one
pass at a point m0 between the classes, estimates all of them; the first token's log-prob is exact, from the table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varlik.scoring import adjoint
from varlik.scoring.adjoint import Conditions
from varlik.scoring.engine import Engine
from varlik.tokens import TokenMaps

CLASSES_AT_A_TIME = 256


def parts(engine, images, labels, at):
    """(B, N, P) products by kind, (B,) values at the point"""
    engine.prepare(torch.cat((labels, at)))
    tables = engine.tables
    point = _point(tables, at)
    done = adjoint.forward(
        engine.weights,
        images.teacher_forcing_input,
        images.tokens[:, 1:],
        point,
        torch.zeros(len(images), dtype=torch.int64),
    )
    grad = adjoint.backward(done)
    rows = tables.rows(labels)
    dv = tables.vectors[rows] - point.vectors
    dp = _pages(tables, rows) - point.pages
    terms = torch.cat(
        (torch.einsum("bpc,npc->bnp", grad.vectors, dv), torch.einsum("bpc,npc->bnp", grad.pages, dp)), -1
    )
    first = tables.first_log_prob[rows][:, images.tokens[:, 0]].T
    return terms, first, done.log_prob.double().sum(1)


def _pages(tables, rows):
    return torch.stack([p[rows].flatten(2) for p in tables.pages], 1).flatten(1, 2)


def _point(tables, at):
    rows = tables.rows(at)
    return Conditions(tables.vectors[rows].mean(0, keepdim=True), _pages(tables, rows).mean(0, keepdim=True))
