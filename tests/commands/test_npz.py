"""Reading an npz file that is not trusted."""

from __future__ import annotations

import io
import pickle
import zipfile

import numpy as np
import pytest

from cce_numba.commands import npz
from cce_numba.commands.npz import Wanted

WANTED = {"x": Wanted("f", 8, 2)}


def written(path, header: str | None = None, body: bytes = b"", version: bytes = b"\x01\x00") -> str:
    """A file with one array, whose header may say what it wants."""
    if header is None:
        array = io.BytesIO()
        np.save(array, np.arange(6.0).reshape(2, 3))
        member = array.getvalue()
    else:
        text = header.encode().ljust(117) + b"\n"
        member = b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + body
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.npy", member)
    return str(path)


def header(shape: str, descr: str = "<f8") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}"


def test_an_array_is_read(tmp_path):
    path = written(tmp_path / "file.npz")
    assert npz.headers(path, WANTED)["x"] == npz.Header((2, 3), np.dtype(float))
    np.testing.assert_array_equal(npz.arrays(path, WANTED)["x"], np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("shape", ["(1 << 20, 1 << 20)", "(1048576, 1048576)", "(3, 3)", "(2, 2)", "(-2, -3)"])
def test_a_header_that_tells_another_size_than_the_file_is_refused(shape, tmp_path, monkeypatch):
    """No memory is taken for it."""
    monkeypatch.setattr(npz.npy, "read_array", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"not what the file holds|no readable header"):
        npz.arrays(written(tmp_path / "file.npz", header(shape), np.arange(6.0).tobytes()), WANTED)


def test_a_small_file_that_unpacks_to_a_large_array_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = written(tmp_path / "file.npz", header("(1024, 1024)"), bytes(2**23))
    assert (tmp_path / "file.npz").stat().st_size < 2**15
    monkeypatch.setattr(npz.os, "sysconf", lambda name: 2**12 if name == "SC_PAGE_SIZE" else 2**12 - 1)
    monkeypatch.setattr(npz.npy, "read_array", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"would take 0\.0 GiB"):
        npz.arrays(path, WANTED)
    monkeypatch.setattr(npz.os, "sysconf", lambda name: 2**12)
    monkeypatch.undo()
    assert npz.arrays(path, WANTED)["x"].shape == (1024, 1024)


class Opened:
    """What a pickle would run."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_no_pickle_is_loaded(tmp_path):
    path = written(tmp_path / "file.npz", header("(1,)", "|O"), pickle.dumps([Opened()]))
    for wanted in (WANTED, {"x": Wanted("O", 8, 1)}):
        with pytest.raises(ValueError, match="object"):
            npz.arrays(path, wanted)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        npz.arrays(str(tmp_path / "absent.npz"), WANTED)
    np.save(tmp_path / "single.npy", np.ones(3))
    with pytest.raises(ValueError, match="is no npz file"):
        npz.arrays(str(tmp_path / "single.npy"), WANTED)
    with pytest.raises(ValueError, match="lacks y"):
        npz.arrays(written(tmp_path / "file.npz"), {"y": WANTED["x"]})
    with pytest.raises(ValueError, match="npy version"):
        npz.arrays(written(tmp_path / "file.npz", header("(2, 3)"), version=b"\x03\x00"), WANTED)


def test_a_damaged_file_is_told(tmp_path):
    path = tmp_path / "file.npz"
    written(path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"cannot be read as an npz file|not what the file holds|no readable header"):
        npz.arrays(str(path), WANTED)
