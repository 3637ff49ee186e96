"""The README's programs for several GPUs, with processes on the CPU; that for CuPy needs GPUs, and is only read."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PROGRAMS = dict(re.findall(r"<!-- ([\w ]+) -->\n```python\n(.*?)```", README, re.DOTALL))
# For the CPU, and smaller.
CHANGES = {
    'torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))': "torch.set_num_threads(1)",
    '"cuda"': '"cpu"',
    "49152": "1000",
    "128256": "1283",
    "hidden_size=576": "hidden_size=64, intermediate_size=64",
}


def run(name, tmp_path):
    program = PROGRAMS[name]
    for before, after in CHANGES.items():
        program = program.replace(before, after)
    assert "cuda" not in program
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--log-dir", tmp_path / "logs", "--redirects", "1", tmp_path / "program.py"]  # or lines get mixed
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = sorted((tmp_path / "logs").rglob("stdout.log"))
    return [line for log in logs for line in log.read_text().splitlines()]


def test_tensor_parallel(tmp_path):
    one, other = run("tensor parallel", tmp_path)
    assert one == other
    assert float(one.split()[0]) == pytest.approx(7.6, abs=0.5), "log(1283) and a half, of logits that are normal"
    assert one.endswith("(Replicate(),) (Shard(dim=0),)")


def test_fsdp2(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    lines = run("FSDP2", tmp_path)
    assert sorted(line.split()[0] for line in lines) == ["0", "0", "1", "1", "2", "2"]
    assert all(5 < float(line.split()[1]) < 9 for line in lines)


def test_cupy_is_read():
    """What it calls is there, with these arguments."""
    import cce_numba as cce
    from cce_numba import parallel

    tree = ast.parse(PROGRAMS["CuPy"])
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "cce"}
    assert names == {"forward", "backward"}
    assert "communicator" in inspect.signature(cce.forward).parameters
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "cce_numba.parallel"]
    assert all(hasattr(parallel, alias.name) for node in imported for alias in node.names)
    assert "(not run yet, on no machine)" in README
