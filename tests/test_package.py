"""Importing costs little and needs no GPU library; what the package says of itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import cce_numba

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_touches_neither_numba_nor_cupy_nor_torch():
    code = "import sys, json, cce_numba; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    loaded = json.loads(run(code))
    assert not {"numba", "cupy", "torch", "jax", "reference"} & set(loaded)


def test_the_cpu_path_touches_neither_cupy_nor_torch():
    code = (
        "import sys, json, numpy as np, cce_numba as cce;"
        "cce.linear_cross_entropy_with_grad(np.ones((2, 3)), np.ones((4, 3)), np.array([0, 1]));"
        "print(json.dumps(sorted(sys.modules)))"
    )
    loaded = json.loads(run(code))
    assert "torch" not in loaded
    assert "cupy" not in loaded


def test_public_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cce_numba.__version__ == project["version"]
    assert all(getattr(cce_numba, name).__doc__ for name in cce_numba.__all__)


def test_the_version_stands_in_every_place():
    assert f"\nversion: {cce_numba.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == cce_numba.__version__


def test_what_the_manifest_names_is_there():
    """setuptools only warns of a name that matches nothing."""
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    names = [name for line in lines if line and line[0] in ("include", "graft") for name in line[1:]]
    assert len(names) > 8
    assert all((ROOT / name).exists() for name in names)
