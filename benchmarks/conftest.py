"""What the pytest-benchmark suites share; plain pytest does not run them.

python -m pytest benchmarks --benchmark-only
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# As in tests/conftest.py: what is installed is measured, not the checkout, where varlik lies without its kernels.
# pytest puts the checkout back for the next module of this package, so varlik is imported here, before that.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

import varlik  # noqa: E402, F401
