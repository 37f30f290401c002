"""Starts the tests of the kernels in a process of their own, where Triton interprets instead of compiling."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from varlik.ops import _registry

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(not _registry.has_triton(), reason="triton is not installed")
@pytest.mark.parametrize("file", ["test_kernels.py", "test_kernel_registration.py", "test_kernel_engine.py"])
def test_kernels_in_the_interpreter(file):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    # That they ran, and none was skipped.
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 5
    assert "skipped" not in done.stdout
