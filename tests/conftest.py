"""What all tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the checkout first on the path, where varlik lies without its kernels. The tests take what is
# installed, which is the checkout itself where that is installed with -e.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

# The problems here are small: many threads cost more than they save.
torch.set_num_threads(min(torch.get_num_threads(), 4))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    interpreter = os.environ.get("TRITON_INTERPRET") == "1"
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords and not (interpreter and "interpreted" in item.keywords):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of stored test data."""
    return ROOT / "tests" / "data"


@pytest.fixture(scope="session")
def golden_classifier(data: Path):
    """The golden plain-AdaLN model as a classifier, with what the original modules gave for it."""
    from varlik.classifier import VARClassifier
    from varlik.models import checkpoints

    files = [data / f"adaln.{part}.safetensors" for part in ("var", "vqvae")]
    loaded = checkpoints.load_models(*files)
    classifier = VARClassifier(loaded.var, loaded.vqvae, loaded.class_names, loaded.preprocessing)
    return classifier, load_file(data / "adaln.expected.safetensors")


@pytest.fixture(scope="session")
def fashion():
    """The bundled fashion-mnist: classifier, token maps of its 12 pictures, and their exact scores (12, 10, K)."""
    import varlik
    from varlik.evaluation.samples import samples
    from varlik.scoring.score_table import score_table

    classifier = varlik.load("fashion-mnist")
    images = classifier.tokenize(list(samples("fashion-mnist").paths))
    return classifier, images, score_table(classifier.engine, images, classifier.labels()).double()


@pytest.fixture
def run(capsys, monkeypatch):
    """`run(*arguments)` calls the command line as a user does: (exit code, stdout, stderr)."""
    from varlik.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["varlik", *map(str, arguments)])
        monkeypatch.setattr("varlik.cli.console._width", 160)
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return int(str(code)), captured.out, captured.err

    return call
