"""What a classification costs in arithmetic, from the shapes alone: no weights, no run.

Two conventions, never to be mixed:

- "paper", in multiply-adds: what fvcore counts, and so what the A-VARC paper prints as GFLOPs. A multiply-add of a
  convolution, a linear layer or a batched matmul is 1; a value that passes a LayerNorm without affine is 4, a GroupNorm
  5. The transformer's attention (a fused op) and the quantiser are not counted; the attention of the encoder is, being
  two explicit matmuls.
- "true", in FLOPs: 2 for a multiply-add of every matmul, with attention over the pairs that the block-causal rule
  allows (even where a program computes the masked ones), the quantiser's distances and its phi convolutions. Norms are
  no matmuls and count nothing. This is what `torch.utils.flop_counter` sees of a run of ours (`count_live`).

And two ways of doing the work of a cascade:

- `released`: as the released code does. Every stage starts from scratch, one row per (class, sample), and works out the
  AdaLN vectors of that row again; noisy samples are drawn and quantised anew in every stage.
- `engine`: only what is unique. Stages continue, nothing scored before is scored again, whatever depends on the class
  alone (AdaLN vectors, all of scale 1) is read from the `class_table`, and the image's inputs are embedded once for all
  classes. Noisy samples count with all tokens from scale 2 on: how many they share with the clean one depends on the
  image, so this is an upper bound.

Source: A-VARC, ICLR 2026, tables 1 and 2, whose figures "paper" and `released` give back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from varlik.calibration import Calibration
from varlik.cascade import Cascade, Race, Screen, Smooth, Stage
from varlik.models.config import VARConfig, VQVAEConfig
from varlik.models.presets import VAR_FILE, describe, get_preset
from varlik.models.vqvae import AttnBlock, Encoder

Convention = Literal["paper", "true"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
UNITS: dict[Convention, str] = {"paper": "multiply-adds", "true": "FLOPs"}


@dataclass(frozen=True)
class Flops:
    """Work by part, in multiply-adds ("paper") or FLOPs ("true"); printed in units of 1e9.

    - `blocks`: linear layers of the transformer's blocks; `attention`: its QK and PV products; `norms`: its LayerNorms.
    - `adaln`: projections that make the AdaLN vectors, the head's too.
    - `word_embed`: the embedding of the teacher-forcing input; `head`: the projection to V logits.
    - `encoder`: the VQ-VAE's encoder and quant_conv; `quantiser`: distances to the codes and phi convolutions.
    """

    blocks: int = 0
    adaln: int = 0
    word_embed: int = 0
    head: int = 0
    norms: int = 0
    attention: int = 0
    encoder: int = 0
    quantiser: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def as_dict(self) -> dict[str, int]:
        """The total and the parts, for JSON."""
        return {"total": self.total, **self.parts()}

    def __add__(self, other: Flops) -> Flops:
        return Flops(**{name: value + getattr(other, name) for name, value in self.parts().items()})

    def __mul__(self, times: float) -> Flops:
        return Flops(**{name: round(times * value) for name, value in self.parts().items()})

    __rmul__ = __mul__

    def __str__(self) -> str:
        return f"{self.total / 1e9:.1f} G"


@dataclass(frozen=True)
class Step:
    """One step of a classification: `name`, the (class, sample) `rows` that go through the transformer, their cost."""

    name: str
    rows: int
    flops: Flops


@dataclass(frozen=True)
class CascadeFlops:
    """Cost of one image in `steps`: to encode and quantise it, then every stage of the cascade."""

    steps: tuple[Step, ...]

    @property
    def flops(self) -> Flops:
        """All steps together."""
        return sum((step.flops for step in self.steps), start=Flops())

    @property
    def rows(self) -> int:
        """Rows of all steps together."""
        return sum(step.rows for step in self.steps)

    def as_dict(self) -> dict[str, object]:
        """Totals, parts and steps, for JSON."""
        steps = [{"step": step.name, "rows": step.rows, **step.flops.as_dict()} for step in self.steps]
        return {**self.flops.as_dict(), "rows": self.rows, "steps": steps}


def attended_pairs(patch_nums: tuple[int, ...], num_scales: int | None = None) -> int:
    """(query, key) pairs with scale(key) <= scale(query) among the first `num_scales` scales (default: all)."""
    sides, seen, pairs = patch_nums[:num_scales], 0, 0
    for side in sides:
        seen += side * side
        pairs += side * side * seen
    return pairs


def class_pass(config: VARConfig, num_scales: int | None = None, convention: Convention = "paper") -> Flops:
    """One pass under one class over the first `num_scales` scales (default: all K), from scratch.

    Multiply-adds ("paper") or FLOPs ("true"). Raises `ValueError` for scales the model lacks, another convention.
    """
    num_scales = config.num_scales if num_scales is None else num_scales
    if not 1 <= num_scales <= config.num_scales:
        raise ValueError(f"num_scales: expected 1 to {config.num_scales}, got {num_scales}")
    return (
        _class_vectors(config, convention)
        + _word_embed(config, 0, num_scales, convention)
        + _tokens(config, 0, num_scales, convention)
    )


def class_table(config: VARConfig, classes: int, convention: Convention = "paper") -> Flops:
    """Once per model: AdaLN vectors and the whole of scale 1, which depend on nothing but the class, for N classes.

    Raises `ValueError` for `classes` below 1 or beyond the model's.
    """
    return check_classes(config, classes) * class_pass(config, 1, convention)


def token_flops(config: VARConfig) -> list[int]:
    """FLOPs of one token of each scale through the transformer, given its input and keys of coarser scales ("true")."""
    sizes = [p * p for p in config.patch_nums]
    return [_tokens(config, k, k + 1, "true").total // size for k, size in enumerate(sizes)]


def first_order(config: VARConfig, convention: Convention = "paper") -> Flops:
    """Estimates of all classes of one image: a pass forwards and one backwards over all tokens but the first.

    The product of the gradient with the class tables comes on top: see `first_order_product`. Raises `ValueError` for
    another convention.
    """
    forward = _word_embed(config, 1, config.num_scales, convention) + _tokens(config, 1, config.num_scales, convention)
    return forward + first_order_backward(config, convention)


def first_order_backward(config: VARConfig, convention: Convention = "paper") -> Flops:
    """Its pass backwards, activations alone: as many products as forwards, the head's logits and attention's weights
    being computed again.
    """
    forward = _tokens(config, 1, config.num_scales, convention)
    return replace(forward, head=2 * forward.head, attention=5 * forward.attention // 2)


def first_order_product(config: VARConfig, classes: int, convention: Convention = "paper") -> Flops:
    """Its product of a gradient with what so many `classes` bring in: vectors, and keys and values of position 0."""
    numbers = (8 * config.depth + 2) * config.embed_dim
    return Flops(adaln=_factor(convention) * classes * numbers)


def encode(config: VQVAEConfig, convention: Convention = "paper") -> Flops:
    """From the pixels of one image to its token maps. Raises `ValueError` for another convention."""
    products, norms = _encoder(config)
    if _factor(convention) == 1:
        return Flops(encoder=products + norms)
    return Flops(encoder=2 * products) + _quantise(config, convention)


def released(
    cascade: Cascade, var: VARConfig, vqvae: VQVAEConfig, classes: int, convention: Convention = "paper"
) -> CascadeFlops:
    """Cost per image of a cascade over N `classes` as the released code does it: every stage from scratch.

    Raises `ValueError` for `classes` below 1 or beyond the model's, for stages that the released code lacks, and as
    `Cascade.scales_of`.
    """
    alive = check_classes(var, classes)
    steps = [Step("encode", 0, encode(vqvae, convention))]
    for stage, scales in zip(cascade.stages, cascade.scales_of(var.num_scales), strict=True):
        if not isinstance(stage, Stage):
            raise ValueError(f"cascade: the released code has no stage like {stage}")
        rows = alive * stage.samples
        work = rows * class_pass(var, scales, convention) + (stage.samples - 1) * _quantise(vqvae, convention)
        steps.append(Step(str(replace(stage, scales=scales)), rows, work))
        alive = min(alive, stage.keep)
    return CascadeFlops(tuple(steps))


def engine(
    cascade: Cascade,
    var: VARConfig,
    vqvae: VQVAEConfig,
    classes: int,
    convention: Convention = "paper",
    calibration: Calibration | None = None,
) -> CascadeFlops:
    """Cost per image of the same cascade without what is computed twice; the `class_table` comes once on top.

    Screening, a race that shares its delta, and smoothing take as many rows as they did on average on the images of
    `calibration`; any other race counts as if it dropped nobody. Without a calibration the fixed counts of
    `Cascade.fixed` are taken. Raises as `released`, but for its stages.
    """
    cascade = cascade.fixed(classes) if calibration is None else cascade
    smooths = calibration is not None and calibration.smooths(cascade.smooths)
    alive: float = check_classes(var, classes)
    steps = [Step("encode", 0, encode(vqvae, convention))]
    # How far each sample has been scored and embedded. All live classes have come equally far, and scale 1 is a table.
    reached = [0] * cascade.max_samples
    for stage, scales in zip(cascade.stages, cascade.scales_of(var.num_scales), strict=True):
        if isinstance(stage, Screen):
            work = first_order(var, convention) + first_order_product(var, classes, convention)
            steps.append(Step(str(stage), 1, work))
            delta, finalists = stage.delta, stage.keep or alive
            if calibration is not None and delta is not None:
                finalists = calibration.expected_finalists(delta, smooths)
            alive = min(alive, finalists)
        elif isinstance(stage, Race) and calibration is not None:
            rows = (alive,) * scales
            if cascade.shares_delta:
                rows = calibration.expected_race_rows(stage.delta, smooths)
            start = max(1, reached[0])
            work = _word_embed(var, start, scales, convention)
            for k in range(start, scales):
                work += min(alive, rows[k]) * _tokens(var, k, k + 1, convention)
            steps.append(Step(str(stage), round(alive), work))
            reached[0], alive = scales, 1
        elif isinstance(stage, Smooth) and calibration is not None:
            count = calibration.expected_smooth_rows(stage.delta) if smooths else 0.0
            work = count * _tokens(var, 1, scales, convention)
            if reached[0] < scales:  # the clean image comes first
                work += alive * _tokens(var, max(1, reached[0]), scales, convention)
                count += alive
            steps.append(Step(str(stage), round(count), work))
        elif isinstance(stage, Stage):
            work, count = _fixed_stage(stage, scales, alive, reached, var, vqvae, convention)
            steps.append(Step(str(replace(stage, scales=scales)), count, work))
            alive = min(alive, stage.keep)
    return CascadeFlops(tuple(steps))


def _fixed_stage(
    stage: Stage,
    scales: int,
    alive: float,
    reached: list[int],
    var: VARConfig,
    vqvae: VQVAEConfig,
    convention: Convention,
) -> tuple[Flops, int]:
    """Work and rows of a fixed stage; `reached` says how far each sample was scored, and is brought up to date."""
    work, rows = Flops(), 0
    for sample in range(stage.samples):
        start = max(1, reached[sample])
        if sample and not reached[sample]:
            work += _quantise(vqvae, convention)
        if scales > start:
            work += _word_embed(var, start, scales, convention) + alive * _tokens(var, start, scales, convention)
            rows += round(alive)
        reached[sample] = scales
    return work, rows


def count_live(function: Callable[[], object]) -> int:
    """FLOPs ("true" convention) of what `function()` really runs, as torch counts them.

    Torch's counter knows no formula for the fused attention of CPUs; it is given one here.
    """

    def attention(query: torch.Size, key: torch.Size, value: torch.Size, *args: object, **kwargs: object) -> int:
        return sdpa_flop_count(query, key, value)

    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={on_cpu: attention}) as counter:
        function()
    return counter.get_total_flops()


def configs_of(model: str) -> tuple[VARConfig, VQVAEConfig]:
    """Configurations of a model by name, or of a folder of ours; no weights are read or fetched.

    Raises `ValueError` for a name nobody knows and a file that does not describe itself, `FileNotFoundError` for a
    folder without a model.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        preset = get_preset(model)
        return preset.var, preset.vqvae
    file = folder / VAR_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        with safe_open(str(file), "pt") as opened:
            about = describe(opened.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    return about.var, about.vqvae


def check_classes(config: VARConfig, classes: int) -> int:
    """`classes`. Raises `ValueError` unless the model can tell so many apart."""
    if not 1 <= classes <= config.num_classes:
        raise ValueError(f"classes: expected 1 to {config.num_classes}, got {classes}")
    return classes


def _factor(convention: str) -> int:
    """What a multiply-add counts."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected 'paper' or 'true', got {convention!r}")
    return 1 if convention == "paper" else 2


def _class_vectors(config: VARConfig, convention: Convention) -> Flops:
    projections = 6 * (1 if config.shared_aln else config.depth) + 2
    return Flops(adaln=_factor(convention) * projections * config.embed_dim**2)


def _word_embed(config: VARConfig, start: int, end: int, convention: Convention) -> Flops:
    """Embedding of the inputs of scales `start` to `end` of one sample; that of position 0 is the class itself."""
    tokens = config.boundaries[end] - max(1, config.boundaries[start])
    return Flops(word_embed=_factor(convention) * tokens * config.codebook_dim * config.embed_dim)


def _tokens(config: VARConfig, start: int, end: int, convention: Convention) -> Flops:
    """One row through scales `start` to `end`, given its inputs, its class vectors and the keys of coarser scales."""
    factor, width, depth = _factor(convention), config.embed_dim, config.depth
    tokens = config.boundaries[end] - config.boundaries[start]
    pairs = attended_pairs(config.patch_nums, end) - attended_pairs(config.patch_nums, start)
    return Flops(
        blocks=factor * depth * 12 * width**2 * tokens,  # qkv 3, proj 1, MLP 4 + 4
        head=factor * tokens * config.vocab_size * width,
        norms=0 if convention == "true" else 4 * tokens * width * (2 * depth + 1),
        attention=0 if convention == "paper" else factor * depth * 2 * pairs * width,
    )


def _quantise(config: VQVAEConfig, convention: Convention) -> Flops:
    """One sample from its feature map to token maps of all scales, whatever part of them is scored."""
    if _factor(convention) == 1:
        return Flops()
    distances = sum(p * p for p in config.patch_nums) * config.vocab_size * config.codebook_dim
    phi = len(config.patch_nums) * 9 * config.codebook_dim**2 * config.patch_nums[-1] ** 2
    return Flops(quantiser=2 * (distances + phi))


@lru_cache(maxsize=16)
def _encoder(config: VQVAEConfig) -> tuple[int, int]:
    """Multiply-adds of encoder and quant_conv, and what their GroupNorms count in the "paper" convention.

    Runs the encoder on the meta device, which computes nothing, and looks at the shapes that go by.
    """
    products = norms = 0

    def see(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal products, norms
        if isinstance(module, nn.Conv2d):
            products += out.numel() * module.weight[0].numel()
        elif isinstance(module, nn.GroupNorm):
            norms += 5 * out.numel()
        elif isinstance(module, AttnBlock):
            _, channels, height, width = out.shape
            products += 2 * channels * (height * width) ** 2

    # What is looked at here is no work that a counter around the caller should see.
    with _disable_current_modes(), torch.device("meta"), torch.no_grad():
        quant_conv = nn.Conv2d(config.codebook_dim, config.codebook_dim, 3, padding=1)
        network = nn.Sequential(Encoder(config), quant_conv)
        for module in network.modules():
            module.register_forward_hook(see)
        network(torch.empty(1, config.in_channels, config.resolution, config.resolution))
    return products, norms
