"""`demo_file`: the demo finds the loss that the archive tells."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

import cce_numba.__main__
import reference
from benchmarks.__main__ import main
from benchmarks.data.archive import read


@pytest.fixture
def source(archive_arrays, tmp_path):
    """The path of an archive that tells the losses as they are."""
    np.savez(tmp_path / "archive.npz", **archive_arrays)
    layer = read(str(tmp_path / "archive.npz"))
    nll = reference.forward(layer.e, layer.c, layer.targets).nll
    np.savez(tmp_path / "archive.npz", **archive_arrays | {"loss_fp32": nll.astype(np.float32)})
    return str(tmp_path / "archive.npz")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_takes_the_file(source, tmp_path, dtype, capsys):
    """In float32 everything is exact."""
    layer, out = read(source), str(tmp_path / "demo.npz")
    assert main(["demo_file", source, out, "--tokens", "20", "--dtype", dtype]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: e ")
    with np.load(out) as file:
        made = dict(file)
    if dtype == "bfloat16":
        assert made["e"].dtype == made["c"].dtype == np.uint16
        made |= {name: made[name].view(ml_dtypes.bfloat16) for name in ("e", "c")}
    assert np.array_equal(made["e"].astype(np.float32), layer.e[:20])
    assert np.array_equal(made["c"].astype(np.float32), layer.c.astype(made["c"].dtype).astype(np.float32))
    assert cce_numba.__main__.main(["demo", "--backend", "cpu", "--data", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problem"]["tokens"] == 20
    assert found["known_loss"] == pytest.approx(layer.loss[:20].mean(), rel=1e-6)
    assert found["loss"] == pytest.approx(layer.loss[:20].mean(), rel=1e-5 if dtype == "float32" else 1e-2)


def test_what_it_cannot_turn(source, tmp_path, capsys):
    np.save(tmp_path / "single.npy", np.ones(3))
    for argv, part in (
        ([str(tmp_path / "absent.npz")], "No such file"),
        ([str(tmp_path / "single.npy")], "is no npz file"),
        ([source, "--tokens", "31"], "--tokens must lie in [1, 30]"),
    ):
        path, *options = argv
        assert main(["demo_file", path, str(tmp_path / "out.npz"), *options]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"benchmarks demo_file: error: {path}: ")
        assert part in err
    assert not (tmp_path / "out.npz").exists()
    assert main(["demo_file", source, str(tmp_path / "absent" / "out.npz")]) == 2
