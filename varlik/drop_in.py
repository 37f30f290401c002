"""A faster forward for scripts that hold a VAR module of the original code base.

`accelerate` reads the module's tensors by their published names, shares their memory, and answers what such scripts
compute from all logits: log p(token | coarser token maps, class).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varlik.classifier import VARClassifier
from varlik.models import presets, weights
from varlik.models.config import Preprocessing, VARConfig, VQVAEConfig
from varlik.models.var import VAR
from varlik.models.vqvae import VQVAE
from varlik.models.weights import AUTOENCODER, TRANSFORMER, Contents
from varlik.scoring.engine import Engine
from varlik.scoring.options import EngineOptions
from varlik.tokens import TokenMaps


def accelerate(
    module_or_state_dict: nn.Module | Mapping[str, Any],
    *,
    vqvae: nn.Module | Mapping[str, Any] | str | Path | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    **options: Any,
) -> Accelerated:
    """Score with the engine what a VAR module of the original code base would score with its forward.

    `module_or_state_dict` is such a module in eval mode (also compiled or data-parallel), or its state dict, nested and
    prefixed as checkpoints may be. Its float32 weights are shared, not copied (on a CPU, models of up to 8 M parameters
    get matrices of another layout beside them); weights of any other dtype are converted to a float32 copy, and scores
    are float32. Everything stays on the device where the weights are. Nothing is drawn at random, whereas the
    original's forward replaces labels by the null class with probability `cond_drop_rate` even in eval mode, unless
    that is set to 0.

    `vqvae` adds `Accelerated.classifier`: the original's VQ-VAE module, its state dict or file, or a VQ-VAE of ours.
    `class_names` (one per class) and `preprocessing` belong to that classifier; they default to what the file of the
    VQ-VAE says, else to ImageNet's. `options` are those of `EngineOptions`, as `varlik.load` takes them.

    Raises `TypeError` for other kinds of objects, `ValueError` for a module in training mode and for parts that do not
    belong together, `CheckpointError` (a `ValueError`) with the tensors that are missing or differ.
    """
    return Accelerated(module_or_state_dict, vqvae, class_names, preprocessing, **options)


class Accelerated:
    """Token log-probs and, with a VQ-VAE, the classifier of someone else's VAR module; made by `accelerate`.

    Inference only: no gradients flow, and autocast is without effect. What depends on the class alone, and with it
    scale 1, is computed once, when a class is first asked for (0.7 MB a class for VAR-d16): call `refresh` after the
    weights of the module have changed; changes in place are noticed, and nothing is scored until then.
    """

    def __init__(
        self,
        module_or_state_dict: nn.Module | Mapping[str, Any],
        vqvae: nn.Module | Mapping[str, Any] | str | Path | None = None,
        class_names: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        **options: Any,
    ):
        """As `accelerate`, which see."""
        self._options = EngineOptions(**options)
        if isinstance(module_or_state_dict, Mapping):  # hold on to its weights only, not to an optimiser beside them
            module_or_state_dict = weights.state_dict(
                _contents(module_or_state_dict, "module_or_state_dict"), TRANSFORMER
            )
        if vqvae is None and (class_names is not None or preprocessing is not None):
            raise ValueError("class_names, preprocessing: they belong to the classifier, which needs vqvae too")
        self._source = module_or_state_dict
        self._engine: Engine | None = None
        self._classifier: VARClassifier | None = None
        self._vqvae, self._class_names, self._preprocessing = vqvae, class_names, preprocessing
        self.refresh()

    @property
    def var(self) -> VAR:
        """Our transformer, which shares the weights."""
        return self._var

    @property
    def classifier(self) -> VARClassifier:
        """The whole classifier, which shares the engine. Raises `ValueError` if there is no VQ-VAE."""
        if self._classifier is None:
            raise ValueError(
                "classifier: there is no VQ-VAE to tokenise images with; pass vqvae to varlik.accelerate "
                "(the original VAR module holds its own as vae_proxy[0])"
            )
        return self._classifier

    @property
    def engine(self) -> Engine:
        """The scoring engine, made when first asked for; see `varlik.scoring.engine`."""
        if self._classifier is not None:
            return self._classifier.engine
        if self._engine is None:
            self._engine = Engine(self._var, self._options)
        return self._engine

    def refresh(self) -> None:
        """Take up weights that have changed since `accelerate`: call it after training, loading or moving the module.

        Class tables are built anew when next needed; what `var`, `engine` and `classifier` gave before is out of date.
        Raises as `accelerate`.
        """
        self._var = _read_var(self._source)
        self._engine = None
        self._classifier = None if self._vqvae is None else self._make_classifier()

    def __call__(
        self, label_B: Tensor, x_BLCv_wo_first_l: Tensor, targets: Tensor, num_scales: int | None = None
    ) -> Tensor:
        """log p(target token | coarser token maps, label), (B, L_k) float32: row b is image b under label b.

        Stands for forward, log-softmax and gather. `label_B` (B,) int64 in [0, num_classes], where the last is the null
        class; `x_BLCv_wo_first_l` (B, L - 1, Cvae) as forward takes it; `targets` (B, L) int64. With `num_scales`, only
        the L_k tokens of the first so many scales are scored, and both may stop there: (B, L_k - 1, Cvae), (B, L_k).
        An image may stand in several rows; many classes of one image are better asked of `all_classes`.

        Raises `TypeError` for other dtypes, `ValueError` for other shapes, values or devices, and for inputs that
        require grad outside `torch.no_grad`.
        """
        with self._inference(x_BLCv_wo_first_l):
            images, scales = self._checked(x_BLCv_wo_first_l, targets, num_scales)
            labels = self._labels(label_B, "label_B", len(images))
            return self._score(images, labels.unsqueeze(1), scales)[:, 0]

    def all_classes(
        self,
        x_BLCv_wo_first_l: Tensor,
        targets: Tensor,
        classes: Sequence[int] | Tensor | None = None,
        num_scales: int | None = None,
    ) -> Tensor:
        """log p(target token | coarser token maps, class) of every image under every class, (B, N, L_k) float32.

        `classes` (N,) are indices, the null class among them if wanted; default: all but the null class. Inputs are not
        expanded over classes, and what depends on the image alone is done once. The rest, and errors, as in a call.
        """
        with self._inference(x_BLCv_wo_first_l):
            images, scales = self._checked(x_BLCv_wo_first_l, targets, num_scales)
            chosen = range(self._var.config.num_classes) if classes is None else classes
            labels = self._labels(_indices(chosen).to(self._device), "classes")
            return self._score(images, labels.expand(len(images), -1), scales)

    @property
    def _device(self) -> torch.device:
        return self._var.pos_start.device

    @contextmanager
    def _inference(self, inputs: Tensor) -> Iterator[None]:
        """No gradients and no half precision; refuses inputs that expect a gradient."""
        if torch.is_grad_enabled() and isinstance(inputs, Tensor) and inputs.requires_grad:
            raise ValueError("x_BLCv_wo_first_l: it requires grad, but none will flow; call under torch.no_grad()")
        # Tables and pages outlive the call, so they are not made as tensors of the caller's inference mode.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            yield

    def _score(self, images: TokenMaps, labels: Tensor, scales: int) -> Tensor:
        """Token log-probs (B, N, L_k) of checked images under labels (B, N)."""
        self.engine.prepare(labels.flatten())
        rows = self.engine.open(images, labels, per_token=True)
        self.engine.advance(rows, scales, retain=0)
        length = self._var.config.boundaries[scales]
        return rows.per_token()[:, :length].view(*labels.shape, length)

    def _labels(self, labels: Tensor, name: str, count: int | None = None) -> Tensor:
        self._check(labels, name, ("N" if count is None else count,), torch.int64)
        null = self._var.config.null_class
        if len(labels) == 0:
            raise ValueError(f"{name}: expected at least one class, got none")
        if labels.min() < 0 or labels.max() > null:
            raise ValueError(f"{name}: expected values from 0 to {null} (the null class), got {_range(labels)}")
        return labels

    def _checked(self, inputs: Tensor, targets: Tensor, num_scales: int | None) -> tuple[TokenMaps, int]:
        """Both as token maps, and a number of scales that the model has."""
        config = self._var.config
        scales = config.num_scales if num_scales is None else num_scales
        if not 1 <= scales <= config.num_scales:
            raise ValueError(f"num_scales: expected 1 to {config.num_scales}, got {num_scales}")
        low, high = config.boundaries[scales], config.num_tokens
        name = "x_BLCv_wo_first_l"
        self._check(inputs, name, ("B", range(low - 1, high), config.codebook_dim), torch.float32)
        if len(inputs) == 0:
            raise ValueError(f"{name}: expected at least one image, got none")
        self._check(targets, "targets", (len(inputs), range(low, high + 1)), torch.int64)
        tokens = targets[:, :low]
        if tokens.min() < 0 or tokens.max() >= config.vocab_size:
            raise ValueError(f"targets: expected tokens from 0 to {config.vocab_size - 1}, got {_range(tokens)}")
        keys, features = (0,) * len(inputs), inputs.new_empty(len(inputs), 0, 0, 0)
        return TokenMaps(tokens, inputs.detach().float(), features, keys, config.patch_nums), scales

    def _check(self, value: Tensor, name: str, shape: tuple[int | str | range, ...], dtype: torch.dtype) -> None:
        """Refuse another dtype (any float passes for float32), device or shape; a letter stands for any size."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        floating = dtype.is_floating_point and value.dtype.is_floating_point
        if value.dtype != dtype and not floating:
            raise TypeError(f"{name}: expected {dtype}, got {value.dtype}")
        fits = [
            isinstance(wanted, str) or (size in wanted if isinstance(wanted, range) else size == wanted)
            for wanted, size in zip(shape, value.shape, strict=False)
        ]
        if value.dim() != len(shape) or not all(fits):
            sizes = [
                " to ".join(str(size) for size in sorted({w[0], w[-1]})) if isinstance(w, range) else str(w)
                for w in shape
            ]
            raise ValueError(f"{name}: expected shape ({', '.join(sizes)}), got {tuple(value.shape)}")
        if value.device != self._device:
            raise ValueError(f"{name}: expected it on {self._device}, where the model is, got {value.device}")

    def _make_classifier(self) -> VARClassifier:
        config = self._var.config
        vqvae, about = _read_vqvae(self._vqvae, config.patch_nums)
        codes = (vqvae.config.vocab_size, vqvae.config.codebook_dim)
        if codes != (config.vocab_size, config.codebook_dim):
            raise ValueError(
                f"vqvae: its codebook has {codes[0]} codes of {codes[1]} numbers, but the transformer reads "
                f"{config.vocab_size} of {config.codebook_dim}: they do not belong together"
            )
        names, preprocessing = self._class_names, self._preprocessing
        about = about if about is not None and about.var == config else None
        if names is None:
            names = about.class_names if about else presets.default_class_names(config.num_classes)
        if preprocessing is None:
            preprocessing = about.preprocessing if about else presets.default_preprocessing(vqvae.config)
        options = dataclasses.asdict(self._options)
        return VARClassifier(self._var, vqvae.to(self._device), names, preprocessing, name="accelerated", **options)


def _contents(tree: Mapping[str, Any], name: str) -> Contents:
    """A state dict in memory, named in messages by the argument that it came in."""
    return Contents(Path(name), tree, {})


def _read_var(source: nn.Module | Mapping[str, Any]) -> VAR:
    """Our transformer with the weights of `source`."""
    name = "module_or_state_dict"
    if not isinstance(source, (nn.Module, Mapping)):
        raise TypeError(
            f"{name}: expected a VAR module or its state dict, got {type(source).__name__} "
            "(varlik.load takes files and names of models)"
        )
    if isinstance(source, nn.Module) and source.training:
        raise ValueError(f"{name}: in training mode, where likelihoods mean something else; call .eval() first")
    tree = source.state_dict() if isinstance(source, nn.Module) else source
    tensors = weights.state_dict(_contents(tree, name), TRANSFORMER)
    config = _var_config(source, tensors, Path(name))
    with torch.device("meta"):
        var = VAR(config)
    weights.fill(var.requires_grad_(False), tensors, Path(name), "the VAR it seems to be")
    return var


def _var_config(source: nn.Module | Mapping[str, Any], tensors: Mapping[str, Tensor], name: Path) -> VARConfig:
    """Read off the tensors; what they leave open, off the module's attributes."""
    if not isinstance(source, nn.Module):
        return weights.infer_var(tensors, name)
    module = source
    while isinstance(inner := getattr(module, "_orig_mod", getattr(module, "module", None)), nn.Module):
        module = inner
    if isinstance(module, VAR):
        return module.config
    sides = getattr(module, "patch_nums", None)
    if sides is not None and "lvl_1L" not in tensors:
        tensors = {**tensors, "lvl_1L": torch.cat([torch.full((p * p,), k) for k, p in enumerate(sides)])}
    config = weights.infer_var(tensors, name)
    if not config.attn_l2_norm and isinstance(heads := getattr(module, "num_heads", None), int):
        config = dataclasses.replace(config, num_heads=heads)
    return config


def _read_vqvae(source: Any, patch_nums: tuple[int, ...]) -> tuple[VQVAE, presets.Description | None]:
    """Our VQ-VAE with the weights of `source`, and what its file says about the model if it is one of ours."""
    if isinstance(source, nn.Module):
        contents = _contents(source.state_dict(), "vqvae")
    elif isinstance(source, Mapping):
        contents = _contents(source, "vqvae")
    elif isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        contents = weights.read(path / presets.VQVAE_FILE if path.is_dir() else path)
    else:
        raise TypeError(f"vqvae: expected a VQ-VAE module, its state dict or a file, got {type(source).__name__}")
    tensors = weights.state_dict(contents, AUTOENCODER)
    about = presets.describe(contents.metadata) if "depth" in contents.metadata else None
    config: VQVAEConfig
    if isinstance(source, VQVAE):
        config = source.config
    else:
        config = about.vqvae if about else weights.infer_vqvae(tensors, contents.path)
    # Its tensors do not depend on the scales: those of the transformer decide.
    config = dataclasses.replace(config, patch_nums=patch_nums)
    with torch.device("meta"):
        vqvae = VQVAE(config, decoder=any(name.startswith(("decoder.", "post_quant_conv.")) for name in tensors))
    weights.fill(vqvae.requires_grad_(False), tensors, contents.path, "the VQ-VAE it seems to be")
    return vqvae, about


def _indices(classes: Sequence[int] | Tensor) -> Tensor:
    if isinstance(classes, Tensor):
        return classes
    values = list(classes)
    if not all(hasattr(value, "__index__") and not isinstance(value, bool) for value in values):
        raise TypeError(f"classes: expected indices, got {values!r}")
    return torch.tensor([int(value) for value in values], dtype=torch.int64)


def _range(values: Tensor) -> str:
    return f"values from {int(values.min())} to {int(values.max())}"
