"""Reading an npz file that is not trusted: no pickle is loaded, and every size is checked before memory is taken for it."""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.lib import format as npy

_SHARE = 0.5  # a file may ask for this share of the machine's memory


@dataclass(frozen=True)
class Header:
    """What an array's header says of it: shape, dtype, and bytes of its numbers."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Wanted:
    """What an array must be: kinds of its dtype, as `numpy.dtype.kind` has them, bytes of a number at most, dimensions.

    None stands for any number of dimensions.
    """

    kinds: str
    itemsize: int
    ndim: int | None


def names(path: str) -> list[str]:
    """The arrays that a file has. Raises OSError if it cannot be read, ValueError if it is no npz file."""
    with _opened(path) as file:
        return [name.removesuffix(".npy") for name in file.namelist()]


def headers(path: str, wanted: Mapping[str, Wanted]) -> dict[str, Header]:
    """Headers of the wanted arrays; nothing else is read.

    Raises OSError if the file cannot be read, ValueError if it is no npz file, or lacks an array, or has one of another kind.
    """
    found = {}
    with _opened(path) as file:
        there = set(file.namelist())
        if missing := [name for name in wanted if f"{name}.npy" not in there]:
            raise ValueError(f"lacks {', '.join(missing)}")
        for name, must_be in wanted.items():
            found[name] = header = _header(file, name)
            if header.dtype.kind not in must_be.kinds or header.dtype.itemsize > must_be.itemsize:
                raise ValueError(f"{name} is {header.dtype}")
            if must_be.ndim is not None and len(header.shape) != must_be.ndim:
                raise ValueError(f"{name} must have {must_be.ndim} dimensions, its shape is {header.shape}")
    return found


def arrays(path: str, wanted: Mapping[str, Wanted]) -> dict[str, np.ndarray]:
    """The wanted arrays. Raises as `headers` does, and ValueError for arrays that would fill the machine's memory."""
    require_memory(sum(header.nbytes for header in headers(path, wanted).values()))
    found = {}
    with _opened(path) as file:
        for name in wanted:
            with file.open(f"{name}.npy") as member:
                found[name] = npy.read_array(member, allow_pickle=False)
    return found


@contextlib.contextmanager
def _opened(path: str) -> Iterator[zipfile.ZipFile]:
    """The file; whatever the zip format has to complain about becomes a ValueError."""
    if not zipfile.is_zipfile(path):
        open(path, "rb").close()  # raises OSError for a file that is not there
        raise ValueError("is no npz file")
    try:
        with zipfile.ZipFile(path) as file:
            yield file
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: it is encrypted
        raise ValueError(f"cannot be read as an npz file: {error}") from error


def require_memory(nbytes: int) -> None:
    """Raises ValueError if this is more than half of the machine's memory, where the system tells how much that is."""
    if not hasattr(os, "sysconf"):
        return
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if nbytes > _SHARE * machine:
        raise ValueError(f"would take {nbytes / 2**30:.1f} GiB, and this machine has {machine / 2**30:.1f}")


def _header(file: zipfile.ZipFile, name: str) -> Header:
    """Reads no more than the header. Its size must be what the zip file says, or the array could take any memory."""
    member_bytes = file.getinfo(f"{name}.npy").file_size
    with file.open(f"{name}.npy") as member:
        try:
            shape, dtype = _shape_and_dtype(member)
        except Exception as error:  # whatever the parser of headers trips over
            raise ValueError(f"{name} has no readable header: {error}") from error
        header = Header(shape, dtype)
        if dtype.hasobject or min(shape, default=0) < 0 or member.tell() + header.nbytes != member_bytes:
            raise ValueError(f"{name} is {dtype} of shape {shape}, which is not what the file holds")
    return header


def _shape_and_dtype(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = npy.read_magic(member)
    if version == (1, 0):
        shape, _, dtype = npy.read_array_header_1_0(member)
    elif version == (2, 0):
        shape, _, dtype = npy.read_array_header_2_0(member)
    else:
        raise ValueError(f"npy version {version} is for arrays that are no plain numbers")
    return shape, dtype
