"""Tensors of a file, under the model's names, and modules made of them.

No file is unpickled with code execution. A published file says nothing about its configuration, so that is read off the
tensors; what does not fit is refused, with the tensors that differ.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from varlik.models.config import VARConfig, VQVAEConfig
from varlik.models.presets import SCHEDULES

TRANSFORMER, AUTOENCODER = "VAR transformer", "VQ-VAE"

_LISTED = 8  # tensors named in a message before the rest is counted
_WRAPPERS = {  # under which keys training scripts nest a state dict
    TRANSFORMER: ("trainer", "var_wo_ddp", "model", "state_dict"),
    AUTOENCODER: ("trainer", "vae_local", "model", "state_dict"),
}
_PREFIXES = frozenset({"_orig_mod", "module"})  # left in names by torch.compile and DistributedDataParallel
_DERIVED = re.compile(
    r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias|quantize\.ema_vocab_hit_SV|quantize\.beta"
)
_FINGERPRINTS = (  # a tensor name that only one kind of file has
    ("word_embed.weight", TRANSFORMER),
    ("quantize.quant_resi.qresi_ls.0.weight", AUTOENCODER),
    ("tok_embeddings.weight", "LlamaGen or RandAR transformer"),
    ("quantize.embedding.weight", "VQ tokenizer with one scale (LlamaGen, taming-transformers)"),
)
_METADATA_HINT = "save it as safetensors with the metadata of varlik.models.config.to_metadata"


class CheckpointError(ValueError):
    """A file that cannot be read safely, or whose tensors are not those of the model."""


@dataclass(frozen=True)
class Contents:
    """What a file holds: a tree of dicts with tensors in it, and metadata (empty for `.pth`)."""

    path: Path
    tree: Any
    metadata: Mapping[str, str]


def read(path: Path) -> Contents:
    """Read a `.safetensors` file, or one of `torch.save` under any other name."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return Contents(path, tensors, file.metadata() or {})
        return Contents(path, torch.load(path, map_location="cpu", weights_only=True), {})
    except (OSError, MemoryError):
        raise
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cut short, damaged or not a safetensors file ({error})") from error
    except Exception as error:  # a damaged pickle can fail in any way
        code = re.search(r"GLOBAL ([\w.]+)|[Tt]rying to call reduce", str(error))
        if code is None:
            raise CheckpointError(f"{path}: cut short, damaged or not written by torch.save") from error
        raise CheckpointError(
            f"{path}: refused, because reading it would run code ({code[1] or 'a function call'}). Where the file is "
            "trusted, save its tensors alone, as safetensors or as a plain dict of tensors with torch.save"
        ) from error


def state_dict(contents: Contents, kind: str) -> dict[str, Tensor]:
    """The tensors of the module of that kind, whatever they are nested in.

    Raises `CheckpointError`, with a guess at what the file is, where there is none.
    """
    tensors = _unnested(contents, kind)
    if _kind(tensors) == kind:
        return tensors
    path = contents.path
    if kind == TRANSFORMER and holds(contents, AUTOENCODER):
        raise CheckpointError(
            f"{path} is a VQ-VAE, not a VAR transformer: name it with vqvae=, and the transformer first"
        )
    if kind == AUTOENCODER and holds(contents, TRANSFORMER):
        raise CheckpointError(
            f"{path} is a VAR transformer, not a VQ-VAE: pass it as the source, and the VQ-VAE as vqvae="
        )
    other = _kind(tensors)
    found = some(list(tensors)) or "no tensors where they are looked for"
    raise CheckpointError(f"{path} {f'is a {other}, not' if other else 'does not hold'} a {kind}: it has {found}")


def holds(contents: Contents, kind: str) -> bool:
    """Whether a module of that kind is in the file."""
    return _kind(_unnested(contents, kind)) == kind


def _unnested(contents: Contents, kind: str) -> dict[str, Tensor]:
    tree, keys = contents.tree, _WRAPPERS[kind]
    for _ in keys:
        inner = [tree[key] for key in keys if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping)]
        tree = inner[0] if inner else tree
    tensors: dict[str, Tensor] = {}
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(key, str) and isinstance(value, Tensor):
            name = ".".join(part for part in key.split(".") if part not in _PREFIXES)
            if name in tensors:
                raise CheckpointError(f"{contents.path}: tensor {name} is there twice, under different prefixes")
            tensors[name] = value
    return tensors


def _kind(tensors: Mapping[str, Tensor]) -> str | None:
    return next((kind for name, kind in _FINGERPRINTS if name in tensors), None)


def infer_var(tensors: Mapping[str, Tensor], path: Path) -> VARConfig:
    """Configuration of a transformer from its tensors."""
    try:
        length, scales = tensors["pos_1LC"].shape[1], tensors["lvl_embed.weight"].shape[0]
        width, codebook_dim = tensors["word_embed.weight"].shape
        scale_mul = tensors.get("blocks.0.attn.scale_mul_1H11")
        candidates = [schedule(tensors), *SCHEDULES.values()]
        fits = [s for s in candidates if s and (sum(p * p for p in s), len(s)) == (length, scales)]
        if not fits:
            raise ValueError(f"{length} tokens in {scales} scales are no schedule that varlik knows")
        return VARConfig(
            depth=num_blocks(tensors),
            embed_dim=width,
            num_heads=scale_mul.shape[1] if scale_mul is not None else width // 64,
            patch_nums=fits[0],
            vocab_size=tensors["head.weight"].shape[0],
            codebook_dim=codebook_dim,
            num_classes=tensors["class_emb.weight"].shape[0] - 1,
            shared_aln="blocks.0.ada_gss" in tensors,
            attn_l2_norm=scale_mul is not None,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise _not_inferred(path, TRANSFORMER, error) from error


def infer_vqvae(tensors: Mapping[str, Tensor], path: Path) -> VQVAEConfig:
    """Configuration of a VQ-VAE from its tensors. They do not tell the number of groups: the published one is taken."""
    try:
        channels, in_channels = tensors["encoder.conv_in.weight"].shape[:2]
        levels = _count(tensors, r"encoder\.down\.(\d+)\.")
        widths = [tensors[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
        vocab_size, codebook_dim = tensors["quantize.embedding.weight"].shape
        return VQVAEConfig(
            channels=channels,
            channel_multipliers=tuple(width // channels for width in widths),
            num_res_blocks=_count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
            in_channels=in_channels,
            attention="deepest level and mid" if any(".attn." in name for name in tensors) else "mid only",
            codebook_dim=codebook_dim,
            vocab_size=vocab_size,
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise _not_inferred(path, AUTOENCODER, error) from error


def _not_inferred(path: Path, kind: str, error: Exception) -> CheckpointError:
    why = f"tensor {error} is missing" if isinstance(error, KeyError) else str(error)
    return CheckpointError(
        f"{path}: the configuration of this {kind} cannot be read off its tensors: {why}. To state it, {_METADATA_HINT}"
    )


def schedule(tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """`patch_nums` from the buffer that holds the scale of every token, where the file has kept it."""
    levels = tensors.get("lvl_1L")
    if levels is None or levels.is_floating_point() or levels.numel() == 0:
        return None
    sizes = [len(list(run)) for _, run in itertools.groupby(levels.flatten().tolist())]
    return tuple(math.isqrt(size) for size in sizes)


def num_blocks(tensors: Mapping[str, Tensor]) -> int:
    """Number of blocks that a transformer's tensors belong to."""
    return _count(tensors, r"blocks\.(\d+)\.")


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path, model: str) -> None:
    """Make the tensors the parameters of a module that was built on the meta device, and set it to eval mode.

    Float32 tensors are shared, others converted. Raises `CheckpointError` with the tensors of `path` that are missing,
    unexpected, not finite, on different devices or of another shape, where `model` says whose shapes were expected.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not _DERIVED.fullmatch(name)}
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _check_shapes(tensors, expected, path, model)
    state = {name: tensor.detach().to(torch.float32).contiguous() for name, tensor in tensors.items()}
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{path}: not finite: {some(bad)}")
    if len(devices := {str(tensor.device) for tensor in state.values()}) > 1:
        raise CheckpointError(f"{path}: expected all tensors on one device, got {', '.join(sorted(devices))}")
    module.load_state_dict(state, assign=True)
    module.eval()


def _check_shapes(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], path: Path, model: str
) -> None:
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    differing = []
    for name in expected.keys() & tensors.keys():
        tensor = tensors[name]
        if tuple(tensor.shape) != expected[name]:
            differing.append(f"{name} (expected {expected[name]}, found {tuple(tensor.shape)})")
        elif not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            differing.append(f"{name} (expected plain floats, found {tensor.dtype}, {tensor.layout}, {tensor.device})")
    if not missing and not unexpected and not differing:
        return
    lines = [f"{path} does not fit {model}:"]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("differing", sorted(differing))):
        if names:
            lines.append(f"  {title}: {some(names)}")
    if any("scale_mul" in name for name in missing) and not any("scale_mul" in name for name in tensors):
        lines.append(
            "  The file has no scale_mul: it is a model without q/k L2 normalisation, as the first upload of "
            "var_d16.pth was. Use the current file, or load this one by its path: without metadata, it is taken as "
            "attn_l2_norm=False"
        )
    raise CheckpointError("\n".join(lines))


def some(names: Sequence[str]) -> str:
    """The first few of `names`, and how many more there are."""
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"


def digest(module: nn.Module) -> str:
    """32 hexadecimal digits that stand for the names, shapes and values of a module's weights."""
    return tensors_digest(module.state_dict())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The same of tensors by name."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(tensors.items()):
        plain = value.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        found.update(plain.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
