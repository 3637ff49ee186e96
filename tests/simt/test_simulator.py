"""The tests of `tests/backends` once more, with the portable kernels in Numba's simulator: the same source, no GPU.

The simulator is chosen when Numba is imported, hence another process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.harness import SimulatorHarness

ROOT = Path(__file__).parents[2]
FILES = {f"backends/{path.name}": "simt" for path in sorted((ROOT / "tests" / "backends").glob("test_*.py"))}
FILES["launch/test_array_kernel.py"] = "simulator"


@pytest.mark.skipif(SimulatorHarness.is_active(), reason="this is that process")
@pytest.mark.parametrize(("file", "tests"), FILES.items(), ids=FILES)
def test_portable_kernels_in_the_simulator(file, tests):
    command = [sys.executable, "-m", "pytest", f"tests/{file}", "-k", tests, "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    environment.pop("CCE_TEST_PROFILE", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"=*\s*\d+ passed, \d+ deselected.*", summary), f"not all ran: {summary}"
