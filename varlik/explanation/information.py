"""Which tokens speak for a class: token-wise mutual information, and contrasts between two classes.

A token r says `log p(r | coarser maps, y) - log p(r | what came before)` for class y: its token-wise mutual information
(TMI). Summed over the tokens of an image that is log p(x | y) - log p(x). What stands for p(x) is a choice:

- "others": the mean of p(x | y') over the candidate classes y' but y itself. The difference is the weight of evidence
  for y: over all tokens it is what the image adds to the log-odds of y. Of the three this one gives the most faithful
  maps (docs/explanations.md), and it is the default.
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

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from varlik.classifier import Classes, Images, VARClassifier
from varlik.models.quantizer import MultiScaleQuantizer
from varlik.smoothing import Smoothing, perturb
from varlik.tokens import TokenMaps

Unconditional = Literal["others", "mixture", "null"]


@dataclass(frozen=True)
class Explanation:
    """Why B images are of their classes, token by token.

    - `labels` (N,): the candidate classes, whose order columns follow; `target`, `rival` (B,): the class explained and
      the one it is set against.
    - `tokens` (B, L): the clean image's. `patch_nums`: side of each token map.
    - `token_log_prob` (B, N, L): log p(token | coarser maps, class). `kind`: what stands for log p(token | what came
      before). `null_log_prob` (B, L): of the null class, where that is the kind.
    - `unconditional` (B, L): what stands beside the target. `information` (B, L): TMI of the target, in nats;
      `rival_information` (B, L): of the rival. `contrast` (B, L): log p(token | target) - log p(token | rival).

    With several samples, log-probs are averaged over them.
    """

    labels: Tensor
    target: Tensor
    rival: Tensor
    tokens: Tensor
    patch_nums: tuple[int, ...]
    token_log_prob: Tensor
    kind: Unconditional
    null_log_prob: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Explanation:
        """The images of a slice."""
        if not isinstance(rows, slice):
            raise TypeError(f"rows: expected a slice, got {type(rows).__name__}")
        names = ("target", "rival", "tokens", "token_log_prob")
        of_images: dict[str, Any] = {name: getattr(self, name)[rows] for name in names}
        null = None if self.null_log_prob is None else self.null_log_prob[rows]
        return replace(self, **of_images, null_log_prob=null)

    @property
    def unconditional(self) -> Tensor:
        return self.unconditional_of(self.target)

    @property
    def information(self) -> Tensor:
        return self._of(self.target) - self.unconditional

    @property
    def rival_information(self) -> Tensor:
        return self._of(self.rival) - self.unconditional_of(self.rival)

    def unconditional_of(self, classes: Tensor) -> Tensor:
        """What stands for log p(token | what came before) beside one class an image, (B,): (B, L)."""
        if self.null_log_prob is not None:
            return self.null_log_prob
        if self.kind == "mixture":
            return mixture_log_prob(self.token_log_prob).to(self.token_log_prob.dtype)
        return others_log_prob(self.token_log_prob, self._column(classes)).to(self.token_log_prob.dtype)

    @property
    def contrast(self) -> Tensor:
        return self._of(self.target) - self._of(self.rival)

    @property
    def posterior(self) -> Tensor:
        """p(class | image) over the candidate classes, (B, N), under a uniform prior."""
        return self.token_log_prob.double().sum(-1).softmax(-1).float()

    def _of(self, classes: Tensor) -> Tensor:
        """Token log-probs (B, L) of one class an image, (B,)."""
        column = self._column(classes)
        return self.token_log_prob[torch.arange(len(self), device=column.device), column]

    def _column(self, classes: Tensor) -> Tensor:
        return (self.labels == classes.unsqueeze(1)).int().argmax(1)


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
        raise ValueError(
            f"unconditional: expected {' or '.join(map(repr, get_args(Unconditional)))}, got {unconditional!r}"
        )
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
    found = _mean_log_prob(classifier, maps, asked, samples, Smoothing(sigma, seed))
    log_prob = found[:, : len(labels)]
    null_log_prob = found[:, asked == null][:, 0] if unconditional == "null" else None
    if null_log_prob is not None and not torch.isfinite(null_log_prob).all():
        raise ValueError(
            f"unconditional: the null class of {classifier.name} gives no finite log-probs; "
            "'others', 'mixture' and contrasts do without it"
        )
    scores = log_prob.double().sum(-1)
    if targets is None:
        targets = labels[scores.argmax(1)]
    if rivals is None:
        rivals = labels[scores.masked_fill(labels == targets.unsqueeze(1), -torch.inf).argmax(1)]
    same = (rivals == targets).nonzero().flatten().tolist()
    if same:
        raise ValueError(f"contrast: expected another class than the target, but it is the target of images {same}")
    return Explanation(labels, targets, rivals, maps.tokens, maps.patch_nums, log_prob, unconditional, null_log_prob)


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
