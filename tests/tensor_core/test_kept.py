"""Logits that are kept in 16 bits: how much they are off, and where they lie; by the functions of kernels, in Python."""

from __future__ import annotations

import math
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.hopper import backend
from cce_numba.hopper.backward import scheduler
from cce_numba.tensor_core import kept
from cce_numba.tensor_core.folds import kept_logits

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
F32 = np.float32


def fma(a, b, c):
    return F32(np.float64(a) * np.float64(b) + np.float64(c))


PYTHON = {
    "fma": fma,
    "maximum": lambda a, b: F32(np.fmax(a, b)),
    "minimum": lambda a, b: F32(np.fmin(a, b)),
    "bits_of": lambda x: np.uint32(F32(x).view(np.uint32)),
    "float_of": lambda x: np.uint32(x).view(F32),
}
encode_two, decode = (FunctionType(f.__code__, f.__globals__ | PYTHON) for f in (kept.encode_two, kept.decode))


def kept_and_back(z, base):
    """A logit that was kept in the upper half of a word, and in the lower."""
    word, other = encode_two(F32(z), F32(base - 1), F32(base)), encode_two(F32(base - 1), F32(z), F32(base))
    assert int(word) & 0xFFFF == int(other) >> 16
    assert int(word) >> 16 == int(other) & 0xFFFF
    bottom = F32(base) - F32(float(kept.LARGEST) * math.log(2) / kept.STEPS)
    return float(decode(np.uint32(int(word) & 0xFFFF), bottom))


@given(base=st.floats(-100, 100, width=32), below=st.floats(0, 44))
def test_a_probability_is_hardly_changed(base, below):
    z = F32(base - below)
    error = kept_and_back(z, base) - float(z)
    # Half a step, and what float32 rounds of numbers of this size.
    assert abs(error) <= math.log(2) / (2 * kept.STEPS) + 4 * 2.0**-24 * (abs(base) + below + 45)


def test_what_has_no_probability_keeps_none():
    for z, base in ((-math.inf, 3.0), (-math.inf, -math.inf), (math.nan, 1.0), (-70.0, 0.0), (1.0, math.nan)):
        back = (
            kept_and_back(z, base) if not math.isnan(base) else decode(encode_two(F32(z), F32(z), F32(base)) & 0xFFFF, F32(0))
        )
        assert back == -math.inf


@given(base=st.floats(-(2.0**17), 2.0**17, width=32), above=st.floats(0, 0.02))
def test_a_logit_above_its_base_is_not_lost(base, above):
    """The base is a log-sum-exp, rounded: it may lie a little below the only logit that counts."""
    z = F32(base + above)
    assert abs(kept_and_back(z, base) - base) <= above + math.log(2) / kept.STEPS + 2.0**-20 * (abs(base) + 45)


def test_memory():
    """Chunks of 16 bytes fill a half, halves and bases a tile; backends that know no kernels know the size of a tile."""
    chunks = kept.TILE_V // 16
    assert chunks * kept.CHUNK_BYTES == kept.HALF_BYTES == 64 * kept.TILE_V * 2
    assert kept.TILE_BYTES == 2 * kept.HALF_BYTES + 128 * 4
    form = backend._FORM
    assert (form.kept_tile_bytes, form.kept_entries) == (kept.TILE_BYTES, kept.TILE_V)
    assert form.kept_bytes(300, 5000, 10**6) == kept.bytes_of(3, form.kept_tiles(300, 5000, 10**6)) <= 10**6


@given(N=st.integers(0, 10**6), V=st.integers(1, 10**6), room=st.integers(0, 2**40), more=st.integers(0, 2**40))
def test_more_room_keeps_more(N, V, room, more):
    form = backend._FORM
    tiles = form.kept_tiles(N, V, room)
    assert tiles % 2 == 0
    assert 0 <= tiles <= max(0, -(-V // kept.TILE_V))
    assert form.kept_bytes(N, V, room) <= room
    assert tiles <= form.kept_tiles(N, V, room + more)


@given(tiles=st.integers(0, 20), first=st.integers(0, 30), off=st.sampled_from([0, 0, 64, 128]))
def test_both_ctas_of_a_cluster_find_their_tiles_kept_or_neither_does(tiles, first, off):
    """Else they would take different numbers of stages, and wait for each other for ever."""
    kept_tile = scheduler.kept_tile.py_func
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "quotient", lambda a, b: np.int32(int(a) // int(b)))
        workspace = type("Workspace", (), {"kept_tiles": np.int32(tiles)})
        found = [kept_tile(np.int32(192 * (first + r) + off), np.int32(r), workspace) for r in range(2)]
    expected = off == 0 and first + 1 < tiles
    assert found == ([first, first + 1] if expected else [-1, -1])


@pytest.mark.parametrize(("block", "tile", "kept_here"), [(2, 3, True), (3, 3, False), (2, 4, False)])
def test_nothing_is_stored_past_what_is_kept(block, tile, kept_here, monkeypatch):
    """A worker of Hopper's forward has two blocks; where they are odd in number, the last one has no tokens and no memory."""
    stored = []
    monkeypatch.setattr(kept, "make_store", lambda: lambda z, address, base_0, base_1: stored.append(int(address)))
    step = kept_logits.make.__wrapped__(kept.TILE_V).step.py_func
    instructions = {"store_global_f32": lambda address, x: stored.append(int(address))}
    names = {"memory": SimpleNamespace(**instructions), "opaque": lambda x: x}
    step = FunctionType(step.__code__, step.__globals__ | names, "step", None, step.__closure__)
    tile = SimpleNamespace(
        v_tile=tile, block=block, half=1, thread=np.int32(0), survivors=SimpleNamespace(first_block=0)
    )  # fmt: skip
    found = SimpleNamespace(kept=2**20, kept_tiles=4, kept_blocks=3)
    step((), None, tile, (np.float32(0), np.float32(0)), found, 0)
    assert len(stored) == (3 if kept_here else 0)
    assert all(2**20 <= address < 2**20 + kept.bytes_of(3, 4) for address in stored)
