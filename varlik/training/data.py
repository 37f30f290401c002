"""Token maps of labelled images, as training reads them: from memory or from a file, with augmentation variants."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from varlik.models.config import VARConfig
from varlik.models.quantizer import MultiScaleQuantizer
from varlik.models.var import VAR
from varlik.models.weights import digest
from varlik.tokens import TokenMaps

TOKENIZE_BATCH = 500
_FINGERPRINTED = 64  # images whose tokens a fingerprint looks at
_VARIANT_STREAM = 0x5DEECE66D  # keeps these draws apart from those of `loop.generator`


@dataclass(frozen=True, eq=False)
class TrainingTokens:
    """Token maps of labelled images, with one or more augmentation variants of each.

    - `tokens` (m, A, L) of any integer type, in memory or mapped from a file: variant 0 is the plain image.
    - `labels` (n,) int64 on the CPU, indexing `class_names`.
    - `quantizer` turns tokens into what the transformer reads; batches come on its device.
    - `places` (n,) int64: where in `tokens` each image lies (default: one after another, n = m).

    Raises `TypeError` or `ValueError` naming the argument for values of another kind or shape, labels that are no
    class and tokens outside the codebook.
    """

    tokens: np.ndarray
    labels: Tensor
    class_names: tuple[str, ...]
    quantizer: MultiScaleQuantizer
    places: Tensor | None = None

    def __post_init__(self) -> None:
        tokens, labels = self.tokens, self.labels
        if not isinstance(tokens, np.ndarray) or tokens.dtype.kind not in "iu":
            raise TypeError(f"tokens: expected an array of integers, got {getattr(tokens, 'dtype', type(tokens))}")
        length = sum(p * p for p in self.quantizer.patch_nums)
        if tokens.ndim != 3 or tokens.shape[1] < 1 or tokens.shape[2] != length:
            raise ValueError(f"tokens: expected (n, variants, {length}), got {tokens.shape}")
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            raise TypeError(f"labels: expected an int64 tensor, got {getattr(labels, 'dtype', type(labels).__name__)}")
        if self.places is not None:
            self._check_index("places", self.places, len(tokens))
        count = len(tokens) if self.places is None else len(self.places)
        if labels.shape != (count,):
            raise ValueError(f"labels: expected ({count},), one for each image, got {tuple(labels.shape)}")
        if count == 0:
            raise ValueError("labels: expected at least one image, got none")
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"labels: expected 0 to {self.num_classes - 1}, got {low} to {high}")
        if not isinstance(tokens, np.memmap):  # a file is checked as it is read
            self._check_codes(tokens)

    @property
    def num_classes(self) -> int:
        """How many classes there are names of; some may have no image here."""
        return len(self.class_names)

    @property
    def variants(self) -> int:
        """A, the plain image included."""
        return self.tokens.shape[1]

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Hexadecimal digits that stand for labels, places and codebook, and for some of the tokens."""
        places = torch.arange(len(self)) if self.places is None else self.places
        sampled = self.tokens[np.linspace(0, len(self.tokens) - 1, _FINGERPRINTED).astype(int)]
        found = hashlib.blake2b(repr((self.tokens.shape, self.class_names)).encode(), digest_size=16)
        for part in (self.labels, places, torch.from_numpy(sampled.astype(np.int64))):
            found.update(part.cpu().contiguous().numpy().data)
        found.update(digest(self.quantizer).encode())
        return found.hexdigest()

    def variant(self, rows: Tensor, seed: int, step: int) -> Tensor:
        """Which variant each of `rows` (b,) shows at a step, (b,) int64 in [0, A): drawn from (seed, step) alone."""
        if self.variants == 1:
            return torch.zeros(len(rows), dtype=torch.int64)
        random = torch.Generator().manual_seed((seed * 1_000_003 + step) ^ _VARIANT_STREAM)
        return torch.randint(self.variants, (len(rows),), generator=random)

    def batch(self, rows: Tensor, variant: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (b, L) int64, teacher-forcing input (b, L - 1, Cvae) and labels (b,) of the images `rows` (b,).

        `variant` (b,) says which variant of each (default: the plain images). All are on the quantizer's device.
        Raises `ValueError` for rows or variants that are not there, `TypeError` for such that are no integers.
        """
        tokens = self._read(rows, variant)
        return tokens, self._inputs(tokens), self.labels[rows.cpu()].to(tokens.device)

    def token_maps(self, rows: Tensor, variant: Tensor | None = None) -> TokenMaps:
        """The same as the engine takes it; feature maps are those after quantisation. Raises as `batch`."""
        tokens = self._read(rows, variant)
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            feature_map = self.quantizer.feature_map(tokens)
        keys = tuple(self._places(rows, variant).tolist())
        return TokenMaps(tokens, self._inputs(tokens), feature_map, keys, self.quantizer.patch_nums)

    def of_rows(self, rows: Tensor) -> TrainingTokens:
        """Only the images `rows` (b,), in that order. Raises as `batch`, and `ValueError` where there is none."""
        self._check_index("rows", rows, len(self))
        rows = rows.cpu()
        places = rows if self.places is None else self.places[rows]
        return replace(self, labels=self.labels[rows], places=places)

    def split(self, share: float, seed: int = 0) -> tuple[TrainingTokens, TrainingTokens]:
        """Two parts, the second a random `share` of the images of each class (at least one), to hold out.

        Raises `ValueError` for a share outside (0, 1) or a class of which nothing would be left to train on.
        """
        if not 0 < share < 1:
            raise ValueError(f"share: expected more than 0 and less than 1, got {share}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held_out = torch.zeros(len(self), dtype=torch.bool)
        for label in self.labels.unique().tolist():
            rows = order[self.labels[order] == label]
            count = max(1, round(share * len(rows)))
            if count == len(rows):
                name = self.class_names[label]
                raise ValueError(f"share: holding out {share} leaves no image of class {name!r} to train on")
            held_out[rows[:count]] = True
        return self.of_rows((~held_out).nonzero().flatten()), self.of_rows(held_out.nonzero().flatten())

    @classmethod
    def from_features(
        cls, features: Tensor, labels: Tensor, quantizer: MultiScaleQuantizer, class_names: Sequence[str]
    ) -> TrainingTokens:
        """Token maps of `features` (n, Cvae, h, w) with `labels` (n,), tokenised once and kept in memory.

        Raises `ValueError` for feature maps of another shape, and as the class.
        """
        device = quantizer.embedding.weight.device
        with torch.no_grad():
            parts = [quantizer.tokenize(part.to(device))[0].cpu() for part in features.split(TOKENIZE_BATCH)]
        tokens = torch.cat(parts).unsqueeze(1).numpy().astype(token_type(quantizer.embedding.num_embeddings))
        return cls(tokens, labels.cpu() if isinstance(labels, Tensor) else labels, tuple(class_names), quantizer)

    def _places(self, rows: Tensor, variant: Tensor | None) -> Tensor:
        """(b,) where in `tokens`, with its first two dimensions taken as one, the images lie."""
        self._check_index("rows", rows, len(self))
        places = rows.cpu() if self.places is None else self.places[rows.cpu()]
        if variant is None:
            return places * self.variants
        self._check_index("variant", variant, self.variants)
        if variant.shape != rows.shape:
            raise ValueError(f"variant: expected {tuple(rows.shape)}, one for each row, got {tuple(variant.shape)}")
        return places * self.variants + variant.cpu()

    def _read(self, rows: Tensor, variant: Tensor | None) -> Tensor:
        places = self._places(rows, variant).numpy()
        read = np.asarray(self.tokens[places // self.variants, places % self.variants])
        self._check_codes(read)
        return torch.from_numpy(read.astype(np.int64)).to(self.quantizer.embedding.weight.device)

    def _inputs(self, tokens: Tensor) -> Tensor:
        # Float32 outside of autocast, as when images are scored: training must read what scoring will read.
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            return self.quantizer.teacher_forcing_input(tokens)

    def _check_codes(self, tokens: np.ndarray) -> None:
        codes = self.quantizer.embedding.num_embeddings
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < codes:
            raise ValueError(f"tokens: expected 0 to {codes - 1}, got {tokens.min()} to {tokens.max()}")

    @staticmethod
    def _check_index(name: str, index: Tensor, size: int) -> None:
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            raise TypeError(f"{name}: expected an int64 tensor, got {getattr(index, 'dtype', type(index).__name__)}")
        if index.dim() != 1:
            raise ValueError(f"{name}: expected one dimension, got {tuple(index.shape)}")
        if len(index) and not 0 <= index.min() <= index.max() < size:
            raise ValueError(f"{name}: expected 0 to {size - 1}, got {index.min().item()} to {index.max().item()}")


def check_model(model: VAR, name: str = "model") -> None:
    """Raise `TypeError` unless the argument called `name` is a VAR transformer."""
    if not isinstance(model, VAR):
        raise TypeError(f"{name}: expected a VAR, got {type(model).__name__}")


def check_fits(name: str, config: VARConfig, data: TrainingTokens, device: torch.device) -> None:
    """Raise unless the argument called `name` holds token maps and classes for a model of `config` on `device`.

    `TypeError` for other kinds of values, `ValueError` for what does not fit.
    """
    if not isinstance(data, TrainingTokens):
        raise TypeError(f"{name}: expected TrainingTokens, got {type(data).__name__}")
    codebook = data.quantizer.embedding
    given = {
        "patch_nums": tuple(data.quantizer.patch_nums),
        "vocab_size": codebook.num_embeddings,
        "codebook_dim": codebook.embedding_dim,
        "num_classes": data.num_classes,
    }
    for field, value in given.items():
        if getattr(config, field) != value:
            raise ValueError(f"{name}: expected the model's {field} {getattr(config, field)}, got {value}")
    if codebook.weight.device != device:
        raise ValueError(f"{name}: expected its quantizer on {device}, as the model, got {codebook.weight.device}")


def fingerprints(data: TrainingTokens, held_out: TrainingTokens | None) -> dict[str, str]:
    """Of what a run trains on and, if there is such, is validated with."""
    return {name: tokens.fingerprint() for name, tokens in (("data", data), ("held_out", held_out)) if tokens}


def check_every_class(data: TrainingTokens, first: int = 0) -> None:
    """Raise `ValueError` unless the argument `data` holds images of every class of its names from `first` on."""
    counts = data.labels.bincount(minlength=data.num_classes).tolist()
    empty = [named for named, count in zip(data.class_names[first:], counts[first:], strict=True) if not count]
    if empty:
        such = ", ".join(map(repr, empty[:5])) + (", ..." if len(empty) > 5 else "")
        raise ValueError(f"data: expected images of every class, got none of {such}")


def token_type(vocab_size: int) -> type[np.integer]:
    """The smallest unsigned type that holds every index of a codebook."""
    return next(kind for kind in (np.uint8, np.uint16, np.uint32) if vocab_size - 1 <= np.iinfo(kind).max)
