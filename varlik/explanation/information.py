"""Which tokens speak for a class: token-wise mutual information, and contrasts between two classes.

A token r says `log p(r | coarser maps, y) - log p(r | what came before)` for class y: its token-wise mutual information
(TMI). Summed over the tokens of an image that is log p(x | y) - log p(x). What stands for p(x) is a choice:

- "mixture": the mean of p(x | y') over the candidate classes y', as the definition of mutual information asks. Taken
  token by token, the chain rule gives `log sum over y' of w(y') p(r | coarser maps, y')`, where w is the posterior
  after the tokens before r, in the order of the token maps.
- "null": the null class, as the released code of A-VARC does. That says how much better y explains a token than the
  model without a class, which is no marginal of the classes' likelihoods.

Source: A-VARC, ICLR 2026, section on explainability (TMI and its contrastive form).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from varlik.classifier import Classes, Images, VARClassifier
from varlik.models.quantizer import MultiScaleQuantizer
from varlik.smoothing import Smoothing, perturb
from varlik.tokens import TokenMaps

Unconditional = Literal["mixture", "null"]


@dataclass(frozen=True)
class Explanation:
    """Why B images are of their classes, token by token.

    - `labels` (N,): the candidate classes, whose order columns follow; `target`, `rival` (B,): the class explained and
      the one it is set against.
    - `tokens` (B, L): the clean image's. `patch_nums`: side of each token map.
    - `token_log_prob` (B, N, L): log p(token | coarser maps, class). `unconditional` (B, L): what stands for
      log p(token | what came before), as `kind` says.
    - `information` (B, L): TMI of the target, in nats. `rival_information` (B, L): of the rival.
      `contrast` (B, L): log p(token | target) - log p(token | rival).

    With several samples, log-probs are averaged over them.
    """

    labels: Tensor
    target: Tensor
    rival: Tensor
    tokens: Tensor
    patch_nums: tuple[int, ...]
    token_log_prob: Tensor
    unconditional: Tensor
    kind: Unconditional

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Explanation:
        """The images of a slice."""
        if not isinstance(rows, slice):
            raise TypeError(f"rows: expected a slice, got {type(rows).__name__}")
        names = ("target", "rival", "tokens", "token_log_prob", "unconditional")
        of_images: dict[str, Any] = {name: getattr(self, name)[rows] for name in names}
        return replace(self, **of_images)

    @property
    def information(self) -> Tensor:
        return self._of(self.target) - self.unconditional

    @property
    def rival_information(self) -> Tensor:
        return self._of(self.rival) - self.unconditional

    @property
    def contrast(self) -> Tensor:
        return self._of(self.target) - self._of(self.rival)

    @property
    def posterior(self) -> Tensor:
        """p(class | image) over the candidate classes, (B, N), under a uniform prior."""
        return self.token_log_prob.double().sum(-1).softmax(-1).float()

    def _of(self, classes: Tensor) -> Tensor:
        """Token log-probs (B, L) of one class an image, (B,)."""
        column = (self.labels == classes.unsqueeze(1)).int().argmax(1)
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
    unconditional: Unconditional = "mixture",
) -> Explanation:
    """Token-wise mutual information of images with their classes.

    `target` is a class, or one for each image (default: the most likely one); `contrast` likewise, by default the most
    likely of the others. `classes` are the candidates (default: all); targets and rivals must be among them. With
    `samples` above 1, log-probs are averaged over the clean image and so many minus one perturbed samples, each token
    map position by position; `sigma` and `seed` as for `VARClassifier.smoothed_log_likelihood`.

    Raises `ValueError` for less than two candidates, a target or rival outside them, a rival equal to the target, an
    unknown `unconditional`, a null class without finite log-probs where that is asked for, samples below 1, and as
    `VARClassifier.token_log_prob`.
    """
    if unconditional not in get_args(Unconditional):
        raise ValueError(f"unconditional: expected 'mixture' or 'null', got {unconditional!r}")
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
    asked = labels if unconditional == "mixture" or null in labels else torch.cat((labels, null))
    found = _mean_log_prob(classifier, maps, asked, samples, Smoothing(sigma, seed))
    log_prob = found[:, : len(labels)]
    marginal = mixture_log_prob(log_prob) if unconditional == "mixture" else found[:, asked == null][:, 0]
    if unconditional == "null" and not torch.isfinite(marginal).all():
        raise ValueError(
            f"unconditional: the null class of {classifier.name} gives no finite log-probs; "
            "'mixture' and contrasts do without it"
        )
    scores = log_prob.double().sum(-1)
    if targets is None:
        targets = labels[scores.argmax(1)]
    if rivals is None:
        rivals = labels[scores.masked_fill(labels == targets.unsqueeze(1), -torch.inf).argmax(1)]
    if (rivals == targets).any():
        raise ValueError("contrast: expected another class than the target")
    return Explanation(
        labels, targets, rivals, maps.tokens, maps.patch_nums, log_prob, marginal.to(log_prob.dtype), unconditional
    )


def mixture_log_prob(token_log_prob: Tensor) -> Tensor:
    """log p(token | tokens before it) under an even mixture of the classes, (B, L) float64, of (B, N, L).

    Its sum over the tokens is the log of the mean over classes of p(tokens | class).
    """
    own = token_log_prob.double()
    before = own.cumsum(-1) - own
    weights = before.log_softmax(1)
    return (weights + own).logsumexp(1)


def _mean_log_prob(classifier: VARClassifier, maps: TokenMaps, labels: Tensor, samples: int, how: Smoothing) -> Tensor:
    quantizer: MultiScaleQuantizer = classifier.vqvae.quantize
    total = classifier.token_log_prob(maps, labels)
    for sample in range(1, samples):
        total = total + classifier.token_log_prob(perturb(quantizer, maps, sample, how), labels)
    return total / samples


def _chosen(classifier: VARClassifier, wanted: Any, labels: Tensor, count: int, name: str) -> Tensor:
    """One class an image, (B,), from one for all or a list."""
    values = [wanted] * count if isinstance(wanted, int | str) else list(wanted)
    if len(values) != count:
        raise ValueError(f"{name}: expected one class or {count}, got {len(values)}")
    try:
        chosen = torch.cat([classifier.labels([value]) for value in values])
    except ValueError as error:  # which names the argument of `labels`
        raise ValueError(f"{name}: {str(error).removeprefix('classes: ')}") from error
    absent = chosen[~torch.isin(chosen, labels)]
    if len(absent):
        raise ValueError(f"{name}: classes {sorted(set(absent.tolist()))} are not among the candidates")
    return chosen
