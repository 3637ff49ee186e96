"""The adapter for `cupyx.distributed`, on a group that keeps to its signatures, with NumPy in CuPy's place."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest

from cce_numba import gpu
from cce_numba.parallel import Communicator, CupyCommunicator
from tests.helpers.ranks import on_ranks


class Group:
    """What `cupyx.distributed.NCCLBackend` offers, of which this adapter takes part, by threads."""

    def __init__(self, one):
        self.one, self.rank, self._n_devices = one, one.rank, one.size

    def all_gather(self, in_array, out_array, count, stream=None):
        assert count == in_array.size
        out_array[...] = self.one.all_gather(in_array)

    def all_reduce(self, in_array, out_array, op="sum", stream=None):
        out_array[...] = self.one.all_reduce(in_array.copy())

    def reduce_scatter(self, in_array, out_array, count, op="sum", stream=None):
        assert count == out_array.size == in_array.size // self._n_devices
        out_array[...] = self.one.reduce_scatter(in_array)


@pytest.fixture
def numpy_for_cupy(monkeypatch):
    monkeypatch.setattr(gpu, "cupy", lambda: np)


def test_each_operation(numpy_for_cupy):
    def run(one):
        ours = CupyCommunicator(Group(one))
        assert isinstance(ours, Communicator)
        own = np.arange(6, dtype=np.float32).reshape(3, 2) + one.rank
        return ours.all_gather(own), ours.reduce_scatter(own), ours.all_reduce(own)

    parts = np.stack([np.arange(6).reshape(3, 2) + rank for rank in range(3)])
    for rank, (gathered, scattered, reduced) in enumerate(on_ranks(3, run)):
        np.testing.assert_array_equal(gathered, parts)
        np.testing.assert_array_equal(reduced, parts.sum(axis=0))
        np.testing.assert_array_equal(scattered, parts.sum(axis=0)[rank])


def test_the_group_here_has_the_signatures_of_cupyx():
    pytest.importorskip("cupy", reason="CuPy is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where there is no NCCL, CuPy says so
        from cupyx.distributed import NCCLBackend
    for name in ("all_gather", "all_reduce", "reduce_scatter"):
        ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (Group, NCCLBackend))
        assert [(x.name, x.default) for x in ours.parameters.values()] == [
            (x.name, x.default) for x in theirs.parameters.values()
        ]
    assert "self.rank" in inspect.getsource(NCCLBackend.__mro__[1])
    assert "self._n_devices" in inspect.getsource(NCCLBackend.__mro__[1])
