"""The package as it is installed: what importing it needs and does, and that its version is told once."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import varlik
import varlik.kernels

ROOT = Path(__file__).resolve().parent.parent

# Runs before anything else in a fresh process: no triton, no optional package, no network.
BARE_MACHINE = """
import socket, sys

for name in ("triton", "captum", "datasets", "matplotlib", "ray", "tensorboard", "torchmetrics"):
    sys.modules[name] = None

def refuse(*args, **kwargs):
    raise AssertionError("import opened a socket")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
"""


def run_python(code: str, folder: Path) -> str:
    """Output of `code` in a fresh process, started outside the checkout so that only the installed package is seen."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_on_a_bare_machine_does_no_device_work(tmp_path: Path) -> None:
    code = """
import varlik
import torch

assert not torch.cuda.is_initialized(), "import initialised CUDA"
for name in ("huggingface_hub", "varlik.cli", "varlik.evaluation", "varlik.kernels", "varlik.training"):
    assert name not in sys.modules, f"import varlik imports {name}"
print(varlik.__version__)
"""
    assert run_python(BARE_MACHINE + code, tmp_path).strip() == varlik.__version__


def test_every_module_imports_on_a_bare_machine(tmp_path: Path) -> None:
    code = """
import importlib, pkgutil
import varlik

for module in pkgutil.walk_packages(varlik.__path__, "varlik."):
    if not module.name.startswith("varlik.kernels") and module.name != "varlik.__main__":
        importlib.import_module(module.name)

import torch
assert not torch.cuda.is_initialized(), "import initialised CUDA"
"""
    run_python(BARE_MACHINE + code, tmp_path)


def test_version_is_told_once() -> None:
    assert varlik.__version__ == importlib.metadata.version("varlik")


def test_changelog_knows_the_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    released = headings[1:]
    assert not released or released[0] == varlik.__version__


def test_readme_gives_one_test_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"<!-- command: test -->\s*```\w*\n(.+?)```", readme, flags=re.DOTALL)
    assert len(commands) == 1
    assert "pytest" in commands[0]


def test_package_data_is_installed() -> None:
    package = Path(varlik.__file__).parent
    for folder in (ROOT / "varlik", ROOT / "varlik" / "models" / "bundled"):
        for file in folder.rglob("*"):
            if file.is_file() and file.suffix not in (".py", ".pyc"):
                assert (package / file.relative_to(ROOT / "varlik")).is_file(), f"{file.name} is not installed"


def kernel_files() -> list[Path]:
    return sorted(Path(varlik.kernels.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", kernel_files(), ids=lambda file: file.stem)
def test_kernels_know_tensors_only(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            top = name.partition(".")[0]
            assert top in ("torch", "triton", *sys.stdlib_module_names) or name.startswith("varlik.kernels"), name


@pytest.mark.parametrize("file", kernel_files(), ids=lambda file: file.stem)
def test_each_kernel_stands_behind_the_op_of_its_name(file: Path) -> None:
    tools = ("resources",)
    if not file.stem.startswith("_") and file.stem not in tools:
        op = file.stem.removesuffix("_backward")
        assert (Path(varlik.__file__).parent / "ops" / f"{op}.py").is_file()
