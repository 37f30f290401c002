"""The self-check: is this installation sound, does a bundled model still say what it said when it was made, and can a
model's first-order scores be trusted?
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from varlik import ops
from varlik.calibration import Calibration
from varlik.classifier import VARClassifier, load
from varlik.evaluation import first_order, pictures
from varlik.evaluation.first_order import FirstOrder, Quality
from varlik.evaluation.samples import has_samples, is_bundled, samples
from varlik.models.presets import bundled_folder

TOLERANCE = 2e-4  # nats per token, between machines
TRUSTED_RECALL = 0.95  # of the best ten estimates: below it, a fixed number of finalists is too risky
PACKAGES = ("varlik", "torch", "triton", "numpy", "safetensors", "huggingface_hub", "pillow")


@dataclass(frozen=True)
class Check:
    """One finding: `ok` is None where there is nothing to pass or fail."""

    name: str
    ok: bool | None
    detail: str


def diagnose(
    model: str = "fashion-mnist",
    images: Sequence[Path] = (),
    *,
    vqvae: str | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Check, ...]:
    """Versions, devices and usable paths; a bundled model's tokens, log-probs and accuracy against its fixture; and how
    far its first-order scores can be trusted.

    The last is seen on pictures `images`, by default those bundled with the model. `progress` is told how many have
    exact scores. Raises as `varlik.load` and for pictures that cannot be read.
    """
    fixture = check_fixture(model) if is_bundled(model) else ()
    classifier = load(model, vqvae=vqvae, device=device)
    return (*environment(), *fixture, *check_first_order(classifier, _pictures(model, images), progress))


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


def check_first_order(
    classifier: VARClassifier, images: Sequence[Path], progress: Callable[[int, int], None] | None = None
) -> tuple[Check, ...]:
    """Is there a calibration that fits, how good are first-order scores with and without it, and what do they cost?

    Nothing fails but scores that are no numbers. Raises for pictures that cannot be read.
    """
    check, calibration = _calibration(classifier)
    name = f"{classifier.name} first-order scores"
    if not images:
        return check, Check(name, None, "not measured: give some pictures")
    if classifier.var.config.num_classes < 2:
        return check, Check(name, None, "not measured: there is but one class")
    found = pictures.find(images)
    maps = classifier.tokenize([str(path) for path in found])
    measured = first_order.measure(classifier, maps, calibration, progress)
    checks = [Check(f"{name}, {kind.name}", *_finding(kind, measured)) for kind in measured.kinds]
    cost = f"{measured.passes:.1f} forward passes of one class for estimates of {measured.classes}"
    return check, *checks, Check(f"{name}, time", None, cost)


def _pictures(model: str, images: Sequence[Path]) -> Sequence[Path]:
    if images or not (is_bundled(model) and has_samples(model)):
        return images
    return samples(model).paths


def _calibration(classifier: VARClassifier) -> tuple[Check, Calibration | None]:
    """What there is to say about the calibration beside a model, and the calibration if it fits."""
    name, file = f"{classifier.name} calibration", classifier.calibration_file
    if file is None:
        return Check(name, None, "none; varlik calibrate makes one"), None
    try:
        found = Calibration.load(file)
    except (ValueError, OSError) as error:
        return Check(name, None, f"not used: {error}"), None
    differing = found.fingerprint.differences(classifier.fingerprint)
    if differing:
        return Check(name, None, f"{file} does not fit, it differs in {'; '.join(differing)}"), None
    return Check(name, None, f"{file} fits; {len(found.labels)} classes, {found.images} images"), found


def _finding(kind: Quality, measured: FirstOrder) -> tuple[bool | None, str]:
    """Whether scores of a kind are numbers, and how good they are."""
    if kind.correlation != kind.correlation:
        return False, "NaN"
    ranks, hits = ", ".join(map(str, kind.found)), ", ".join(map(str, kind.found.values()))
    text = (
        f"correlation {kind.correlation:.3f} with exact scores; "
        f"exact best among the best {ranks} in {hits} of {measured.images} images"
    )
    share = kind.found.get(10, measured.images) / measured.images
    if share < TRUSTED_RECALL and kind.name != first_order.CORRECTED:
        text += f"; that is under {100 * TRUSTED_RECALL:g} % for ten: do not trust screening without a calibration"
    return None, text


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
