"""Which tokens speak for a class: token-wise mutual information, and contrasts between two classes.

A token r says `log p(r | coarser maps, y) - log p(r | what came before)` for class y: its token-wise mutual information
(TMI). Summed over the tokens of an image that is log p(x | y) - log p(x). What stands for p(x) is a choice:

- "others": the mean of p(x | y') over the candidate classes y' but y itself. The difference is the weight of evidence
  for y: over all tokens it is what the image adds to the log-odds of y. The default, for neither of the other
  two gives more faithful maps (docs/explanations.md).
- "mixture": the mean of p(x | y') over the candidate classes y', as the definition of mutual information asks. Taken
  token by token, the chain rule gives `log sum over y' of w(y') p(r | coarser maps, y')`, where w is the posterior
  after the tokens before r, in the order of the token maps. Once the coarse maps have settled that posterior on y,
  finer tokens can say nothing more, whatever they show.
- "null": the null class, as the released code of A-VARC does. That says how much better y explains a token than the
  model without a class, which is no marginal of the classes' likelihoods.

Sources: A-VARC, ICLR 2026, section on explainability (TMI and its contrastive form); "Probability and the Weighing of
Evidence", Good 1950 (weight of evidence).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from varlik.classifier import Classes, Images, VARClassifier
from varlik.models.quantizer import MultiScaleQuantizer
from varlik.smoothing import Smoothing, perturb
from varlik.tokens import TokenMaps

Unconditional = Literal["others", "mixture", "null"]

MARGINAL: dict[Unconditional, str] = {
    "others": "the other classes",
    "mixture": "all candidate classes",
    "null": "the null class",
}
"""What a class is compared with, in words."""


@dataclass(frozen=True)
class Explanation:
    """Why B images are of their classes, token by token.

    - `labels` (N,): the candidate classes, whose order columns follow; `target`, `rival` (B,): the class explained and
      the one it is set against.
    - `tokens` (B, L): the clean image's. `patch_nums`: side of each token map.
    - `token_log_prob` (B, N, L): log p(token | coarser maps, class). `unconditional`, `rival_unconditional` (B, L):
      what stands for log p(token | what came before) beside the target and beside the rival, as `kind` says.
    - `information` (B, L): nats that a token says for the target; `rival_information` (B, L): for the rival. `contrast`
      (B, L): log p(token | target) - log p(token | rival).

    With several samples all of these are means over them.
    """

    labels: Tensor
    target: Tensor
    rival: Tensor
    tokens: Tensor
    patch_nums: tuple[int, ...]
    token_log_prob: Tensor
    unconditional: Tensor
    rival_unconditional: Tensor
    kind: Unconditional

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Explanation:
        """The images of a slice."""
        if not isinstance(rows, slice):
            raise TypeError(f"rows: expected a slice, got {type(rows).__name__}")
        names = ("target", "rival", "tokens", "token_log_prob", "unconditional", "rival_unconditional")
        of_images: dict[str, Any] = {name: getattr(self, name)[rows] for name in names}
        return replace(self, **of_images)

    @property
    def information(self) -> Tensor:
        return self._of(self.target) - self.unconditional

    @property
    def rival_information(self) -> Tensor:
        return self._of(self.rival) - self.rival_unconditional

    @property
    def contrast(self) -> Tensor:
        return self._of(self.target) - self._of(self.rival)

    @property
    def posterior(self) -> Tensor:
        """p(class | image) over the candidate classes, (B, N), under a uniform prior."""
        return self.token_log_prob.double().sum(-1).softmax(-1).float()

    def _of(self, classes: Tensor) -> Tensor:
        """Token log-probs (B, L) of one class an image, (B,)."""
        column = _column(self.labels, classes)
        return self.token_log_prob[torch.arange(len(self), device=column.device), column]


def explain(
    classifier: VARClassifier,
    images: Images,
    target: Any = None,
    contrast: Any = None,
    *,
    classes: Classes = None,
    samples: int = 1,
    sigma: float = 0.1,
    seed: int = 0,
    unconditional: Unconditional = "others",
) -> Explanation:
    """What every token of images says for their classes: weight of evidence, or token-wise mutual information.

    `target` is a class, or one for each image (default: the most likely one); `contrast` likewise, by default the most
    likely of the others. `classes` are the candidates (default: all); targets and rivals must be among them. With
    `samples` above 1, maps are averaged over the clean image and so many minus one perturbed samples, position by
    position; `sigma` and `seed` as for `VARClassifier.smoothed_log_likelihood`.

    Raises `TypeError` or `ValueError` naming the argument for less than two candidates, a target or rival that is no
    class or not among them, a rival equal to the target, an unknown `unconditional`, a null class without finite
    log-probs where that is asked for, samples that are no number from 1 on, and as `VARClassifier.token_log_prob`.
    """
    if unconditional not in get_args(Unconditional):
        raise ValueError(
            f"unconditional: expected {' or '.join(map(repr, get_args(Unconditional)))}, got {unconditional!r}"
        )
    if not isinstance(samples, int) or isinstance(samples, bool):
        raise TypeError(f"samples: expected an int, got {type(samples).__name__}")
    if samples < 1:
        raise ValueError(f"samples: expected 1 or more, got {samples}")
    labels = classifier.labels(classes)
    if len(labels) < 2:
        raise ValueError(f"classes: an explanation takes two candidates or more, got {len(labels)}")
    maps = classifier.tokenize(images)
    count = len(maps)
    targets = None if target is None else _chosen(classifier, target, labels, count, "target")
    rivals = None if contrast is None else _chosen(classifier, contrast, labels, count, "contrast")
    null = labels.new_tensor([classifier.null_class])
    asked = labels if unconditional != "null" or null in labels else torch.cat((labels, null))
    found = _log_prob_of_samples(classifier, maps, asked, samples, Smoothing(sigma, seed))
    log_prob = found[:, :, : len(labels)]
    of_null = found[:, :, asked == null][:, :, 0] if unconditional == "null" else None
    if of_null is not None and not torch.isfinite(of_null).all():
        raise ValueError(
            f"unconditional: the null class of {classifier.name} gives no finite log-probs; "
            "'others', 'mixture' and contrasts do without it"
        )
    scores = log_prob.double().mean(0).sum(-1)
    if targets is None:
        targets = labels[scores.argmax(1)]
    if rivals is None:
        rivals = labels[scores.masked_fill(labels == targets.unsqueeze(1), -torch.inf).argmax(1)]
    same = (rivals == targets).nonzero().flatten().tolist()
    if same:
        raise ValueError(f"contrast: expected another class than the target, but it is the target of images {same}")

    def beside(classes: Tensor) -> Tensor:
        if of_null is not None:
            return of_null.mean(0)
        if unconditional == "mixture":
            marginals = [mixture_log_prob(sample) for sample in log_prob]
        else:
            marginals = [others_log_prob(sample, _column(labels, classes)) for sample in log_prob]
        return torch.stack(marginals).mean(0).to(log_prob.dtype)

    return Explanation(
        labels,
        targets,
        rivals,
        maps.tokens,
        maps.patch_nums,
        log_prob.mean(0),
        beside(targets),
        beside(rivals),
        unconditional,
    )


def mixture_log_prob(token_log_prob: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(token | tokens before it) under an even mixture of the classes, (B, L) float64, of (B, N, L).

    Its sum over the tokens is the log of the mean over classes of p(tokens | class). At another `temperature`, the
    posterior that weights the classes at a token is taken at that temperature; what the sum is then the log of is
    still a normalised p(x), for the weights depend on earlier tokens alone.
    """
    own = token_log_prob.double()
    before = own.cumsum(-1) - own
    weights = (before / temperature).log_softmax(1)
    return (weights + own).logsumexp(1)


def others_log_prob(token_log_prob: Tensor, column: Tensor, temperature: float = 1.0) -> Tensor:
    """As `mixture_log_prob`, of all classes but the one in `column` (B,): (B, L) float64, of (B, N, L)."""
    count = token_log_prob.shape[1]
    others = torch.arange(count - 1, device=column.device).expand(len(column), -1)
    others = others + (others >= column.unsqueeze(1))
    rows = torch.arange(len(column), device=column.device).unsqueeze(1)
    return mixture_log_prob(token_log_prob[rows, others], temperature)


def _column(labels: Tensor, classes: Tensor) -> Tensor:
    """Which of `labels` (N,) each of `classes` (B,) is."""
    return (labels == classes.unsqueeze(1)).int().argmax(1)


def _log_prob_of_samples(
    classifier: VARClassifier, maps: TokenMaps, labels: Tensor, samples: int, how: Smoothing
) -> Tensor:
    """Token log-probs (S, B, N, L), the clean images' first."""
    quantizer: MultiScaleQuantizer = classifier.vqvae.quantize
    noisy = (perturb(quantizer, maps, sample, how) for sample in range(1, samples))
    return torch.stack([classifier.token_log_prob(one, labels) for one in (maps, *noisy)])


def _chosen(classifier: VARClassifier, wanted: Any, labels: Tensor, count: int, name: str) -> Tensor:
    """One class an image, (B,), from one for all or a list."""
    if isinstance(wanted, Tensor | np.ndarray | np.generic):
        wanted = wanted.tolist()
    if not isinstance(wanted, int | str | Sequence):
        raise TypeError(f"{name}: expected a class or a list of classes, got {type(wanted).__name__}")
    values = [wanted] * count if isinstance(wanted, int | str) else list(wanted)
    if len(values) != count:
        raise ValueError(f"{name}: expected one class or {count}, got {len(values)}")
    try:
        chosen = torch.cat([classifier.labels([value]) for value in values])
    except (ValueError, TypeError) as error:  # which names the argument of `labels`
        raise type(error)(f"{name}: {str(error).removeprefix('classes: ')}") from error
    absent = chosen[~torch.isin(chosen, labels)]
    if len(absent):
        raise ValueError(f"{name}: classes {sorted(set(absent.tolist()))} are not among the candidates")
    return chosen
