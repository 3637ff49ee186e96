"""Functions that Numba compiles for the CPU: what is kept of them, and that no fault of a file or a directory stops a call."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from cce_numba import disk
from cce_numba.cpu import compiled as module
from cce_numba.cpu.compiled import compiled

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """The cache's directory, which is not there yet; no warning has been given."""
    monkeypatch.setenv("CCE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CCE_SHARED_CACHE_DIR", raising=False)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(disk, "_warned", set())
    return tmp_path / "cache"


def made():
    """A function that no process has compiled yet."""

    @compiled(nogil=True)
    def twice(x):
        return 2 * x

    return twice


def hits(function):
    return sum(function.stats.cache_hits.values())


def only_file(directory):
    (path,) = directory.iterdir()
    return path


def test_a_process_compiles_what_no_other_has(directory):
    first, second = made(), made()
    assert first(3.0) == 6.0
    assert hits(first) == 0
    assert second(3.0) == 6.0
    assert hits(second) == 1
    assert second(3) == 6
    assert hits(second) == 1, "of integers there was none"
    assert len(list(directory.iterdir())) == 2


def test_a_name_tells_what_machine_code_depends_on(directory, monkeypatch):
    made()(1.0)
    compiled(nogil=True, fastmath={"contract"})(made().py_func)(1.0)
    environment = module._environment()
    for i in range(len(environment)):
        changed = (*environment[:i], "another", *environment[i + 1 :])
        monkeypatch.setattr(module, "_environment", lambda changed=changed: changed)
        made()(1.0)
    assert len(list(directory.iterdir())) == 2 + len(environment)


def times(factor):
    @compiled(nogil=True)
    def product(x):
        return factor * x

    return product


def test_functions_that_one_function_makes_are_told_apart(directory):
    """They have one name and one code; what they are made of is compiled in."""
    assert [times(factor)(3.0) for factor in (2.0, 5.0, np.float32(2), 2.0)] == [6.0, 15.0, 6.0, 6.0]
    assert len(list(directory.iterdir())) == 3


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


def of_another_version(path):
    """Whole, but not to be loaded."""
    content = pickle.dumps(("nonsense",))
    path.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


@pytest.mark.parametrize("damage", [truncated, emptied, of_another_version])
def test_what_cannot_be_loaded_is_compiled_again_with_one_warning(directory, damage):
    made()(3.0)
    damage(only_file(directory))
    with pytest.warns(RuntimeWarning, match="so its function is compiled again"):
        assert made()(3.0) == 6.0
    again = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert again(3.0) == 6.0
    assert hits(again) == 1, "and kept again"


def test_a_directory_that_cannot_be_made_costs_a_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CCE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match=r"compiled functions are not kept, so each process .* CCE_CACHE_DIR"):
        assert made()(3.0) == 6.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made()(3.0) == 6.0


def test_a_full_disk_costs_a_warning(directory, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "replace", full)
    with pytest.warns(RuntimeWarning, match="not kept.*No space left on device"):
        assert made()(3.0) == 6.0
    assert list(directory.iterdir()) == [], "nothing is left behind"


def test_an_empty_name_keeps_nothing_and_says_nothing(directory, monkeypatch):
    monkeypatch.setenv("CCE_CACHE_DIR", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made()(3.0) == 6.0
    assert not directory.exists()


def test_numbas_own_variable_counts_where_ours_is_not_set(monkeypatch, tmp_path):
    monkeypatch.delenv("CCE_CACHE_DIR")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numbas"))
    made()(3.0)
    assert only_file(tmp_path / "numbas").suffix == ".cce-compiled"


class Opened:
    """What a pickle would run."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="there are no owners and modes here")
@pytest.mark.parametrize("what", ["a file that others can write to", "a directory that others can write to", "another's"])
def test_a_pickle_that_somebody_else_may_have_written_is_not_loaded(directory, monkeypatch, what):
    made()(3.0)
    path, content = only_file(directory), pickle.dumps(Opened())
    path.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    if what == "another's":
        owner = os.geteuid()
        monkeypatch.setattr(disk.os, "geteuid", lambda: owner + 1)
    else:
        (path if "file" in what else directory).chmod(0o722)
    with pytest.warns(RuntimeWarning, match="compiled functions are n"):
        assert made()(3.0) == 6.0


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="there are no owners and modes here")
def test_a_shared_directory_is_read_and_never_written(directory, monkeypatch):
    made()(3.0)
    owner = os.geteuid()
    monkeypatch.setattr(disk.os, "geteuid", lambda: owner + 1)
    monkeypatch.setenv("CCE_SHARED_CACHE_DIR", str(directory))
    monkeypatch.setenv("CCE_CACHE_DIR", "")
    function = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (function(3.0), function(3)) == (6.0, 6)
    assert hits(function) == 1
    assert len(list(directory.iterdir())) == 1


PROGRAM = """
import numpy as np, cce_numba as cce
rng = np.random.default_rng(0)
e, c, targets = rng.standard_normal((5, 8)).astype(np.float32), rng.standard_normal((90, 8)).astype(np.float32), np.arange(5)
for options in ({}, {"softcap": 3.0, "label_smoothing": 0.1}):
    loss, grads = cce.linear_cross_entropy_with_grad(e, c, targets, bias=np.zeros(90, np.float32), filter_eps=0.01, **options)
    print(repr(float(loss)), *(repr(float(np.float64(x).sum())) for x in (abs(grads.e), abs(grads.c), abs(grads.bias))))
"""


def printed(**environment):
    """What a process of its own prints, and what it complains of."""
    clean = {name: x for name, x in os.environ.items() if not name.endswith("CACHE_DIR")}
    command = [sys.executable, "-W", "always::RuntimeWarning", "-c", PROGRAM]
    done = subprocess.run(command, env=clean | environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.array(done.stdout.split(), float), done.stderr


def test_plain_python_computes_the_same(directory):
    """NUMBA_DISABLE_JIT is what debuggers and coverage ask for."""
    compiled_numbers, _ = printed(CCE_CACHE_DIR=str(directory))
    plain, complaints = printed(NUMBA_DISABLE_JIT="1")
    np.testing.assert_allclose(plain, compiled_numbers, rtol=1e-5)
    assert complaints == ""


def test_a_process_without_a_home_computes(tmp_path):
    (tmp_path / "file").write_text("in the way")
    numbers, complaints = printed(HOME=str(tmp_path / "file"), CCE_CACHE_DIR=str(tmp_path / "file"))
    assert np.isfinite(numbers).all()
    assert complaints.count("RuntimeWarning") == 1, complaints
