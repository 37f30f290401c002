"""The self-check: is this installation sound, and does the bundled model still say what it said when it was made?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from varlik import ops
from varlik.classifier import VARClassifier, load
from varlik.evaluation.samples import samples
from varlik.models.presets import bundled_folder

TOLERANCE = 2e-4  # nats per token, between machines
PACKAGES = ("varlik", "torch", "triton", "numpy", "safetensors", "huggingface_hub", "pillow")


@dataclass(frozen=True)
class Check:
    """One finding: `ok` is None where there is nothing to pass or fail."""

    name: str
    ok: bool | None
    detail: str


def diagnose(model: str = "fashion-mnist") -> tuple[Check, ...]:
    """Versions, devices, usable paths, and the bundled model's tokens, log-probs and accuracy against its fixture."""
    return (*environment(), *check_fixture(model))


def environment() -> tuple[Check, ...]:
    """What is installed and which paths can run."""
    versions = [Check(name, None, _version(name)) for name in PACKAGES]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return (
        Check("python", None, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *versions,
        Check("cpu", None, f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        Check("cuda gpu", None, gpu),
        Check("torch path", True, "usable on " + ("CPU and GPU" if torch.cuda.is_available() else "CPU")),
        _triton_path(),
    )


def _triton_path() -> Check:
    """Whether kernels run here: one is, where there is a GPU."""
    if not ops.has_triton():
        return Check("triton path", None, "triton is not installed")
    if not torch.cuda.is_available():
        return Check("triton path", None, "triton is installed; kernels need a CUDA GPU")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).cuda() for n in (7, 300))
    inputs = hidden, weight, torch.zeros(300).cuda(), torch.arange(7).cuda()
    try:
        ours = ops.token_log_prob(*inputs, impl="triton")
    except Exception as error:  # compilers and drivers fail in many ways
        return Check("triton path", False, f"a kernel failed: {error}".splitlines()[0])
    difference = (ours - ops.token_log_prob(*inputs, impl="torch")).abs().max().item()
    return Check("triton path", difference < 1e-3, f"usable; largest difference {difference:.1e} nats")


def check_fixture(model: str) -> tuple[Check, ...]:
    """Score the bundled sample pictures and compare with what was stored when the model was made."""
    path = _fixture(model)
    if not path.is_file():
        return (Check(f"{model} fixture", None, "none bundled"),)
    expected = load_file(path)
    pictures = samples(model)
    classifier = load(model, device="cpu")
    images = classifier.tokenize(list(pictures.paths))
    flipped = int((images.tokens != expected["tokens"]).sum())
    # Tokens decide the log-probs, so a flipped one is reported as such and not as a wrong log-prob too.
    same = (images.tokens == expected["tokens"]).all(1)
    scores = classifier.token_log_prob(images)
    difference = (scores - expected["token_log_prob"])[same].abs().max().item() if same.any() else float("nan")
    truth = torch.tensor(pictures.labels)
    correct = int((scores.sum(-1).argmax(1) == truth).sum())
    wanted = int((expected["token_log_prob"].sum(-1).argmax(1) == truth).sum())
    tables = classifier.engine.tables
    size = f"{len(tables)} classes, {tables.num_bytes / 2**20:.2f} MiB, built once in {1000 * tables.seconds:.0f} ms"
    return (
        Check(f"{model} class tables", None, size),
        Check(f"{model} tokens", flipped == 0, f"{flipped} of {images.tokens.numel()} differ"),
        Check(f"{model} token log-probs", difference <= TOLERANCE, f"largest difference {difference:.1e} nats"),
        Check(f"{model} accuracy", correct == wanted, f"{correct} of {len(truth)} right, {wanted} expected"),
    )


def write_fixture(classifier: VARClassifier, model: str) -> None:
    """Store what `check_fixture` compares with; part of making a bundled model."""
    images = classifier.tokenize(list(samples(model).paths))
    tensors = {"tokens": images.tokens, "token_log_prob": classifier.token_log_prob(images)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, _fixture(model))


def _fixture(model: str) -> Path:
    return bundled_folder(model) / "fixture.safetensors"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "present" if importlib.util.find_spec(package) else "not installed"
