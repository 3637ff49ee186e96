"""Programs launch what the host functions do: the same kernels on the same grids, with the same bytes for parameters."""

from __future__ import annotations

import ctypes
import struct
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest

import cce_numba as cce
from benchmarks.measure.stand_in import stand_in
from cce_numba import gpu
from cce_numba.interchange import BFLOAT16
from tests.helpers.harness import SimulatorHarness

pytest.importorskip("cupy")
if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.hopper import programs, tensor_map
from cce_numba.launch.program import Program, Programs

SHAPE = 300, 20000, 136  # several phases of the forward, and a last tile that is not whole
OPTIONS = [
    {},
    {"filter": "drop"},
    {"filter_eps": None},
    {"filter": "drop", "filter_e_grad": False},
    {"softcap": 3.0, "logit_scale": 2.0},
    {"filter_seed": 7},
    {"label_smoothing": 0.1},
    {"reduction": "none", "ignore_index": 3},
    {"accum_e_fp32": True, "accum_c_fp32": True},
]


@contextmanager
def launches_read():
    """What was launched: kernel, grid and the rest of its form, and its bytes; and what became zeros."""
    seen = []

    def launch(handle, *others):
        *form, _, extra = others
        place, size = (ctypes.c_void_p * 5).from_address(extra)[1::2]
        seen.append((handle, *form, ctypes.string_at(place, ctypes.c_size_t.from_address(size).value)))

    def clear(address, value, n_bytes, stream):
        seen.append((address, value, n_bytes))

    def encode(*told):
        return struct.unpack("16Q", np.random.default_rng([int(x) for x in told]).bytes(128))

    with stand_in(), mock.patch.object(tensor_map, "_encode", encode):
        cuda = gpu.cupy().cuda
        with mock.patch.object(cuda.driver, "launchKernel", launch), mock.patch.object(cuda.runtime, "memsetAsync", clear):
            yield seen


@contextmanager
def run_directly(addresses):
    """Programs are not used; what host functions allocate lies at these addresses, in turn."""
    cuda, remaining = gpu.cupy().cuda, iter(addresses)

    def run(self, key, arrays, function, integers=()):
        def allocate(n_bytes):
            return cuda.MemoryPointer(cuda.UnownedMemory(next(remaining), n_bytes, None, 0), 0)

        def zeros(shape, dtype=float):
            array = gpu.cupy().ndarray(shape, dtype)
            cuda.runtime.memsetAsync(array.data.ptr, 0, array.nbytes, 0)
            return array

        with cuda.using_allocator(allocate), mock.patch.object(gpu.cupy(), "zeros", zeros):
            return function(*arrays, *integers)

    with mock.patch.object(Programs, "run", run):
        yield
    assert next(remaining, None) is None, "a program allocated what the host functions did not"


@contextmanager
def programs_run():
    """The addresses of all that programs allocate, in the order in which host functions ask for it."""
    addresses, original = [], Program.run

    def run(program, inputs):
        cuda, blocks = gpu.cupy().cuda, []
        allocate = cuda.alloc
        with mock.patch.object(cuda, "alloc", lambda n: blocks.append(allocate(n)) or blocks[-1]):
            result = original(program, inputs)
        found = {}
        for block, (_, places) in zip(blocks, program._allocations, strict=True):
            found |= {base: block.ptr + offset for base, offset in places}
        addresses.extend(found[base] for base in sorted(found))
        return result

    with mock.patch.object(Program, "run", run):
        yield addresses


def form_of(found):
    return {
        name: (x.shape, x.dtype, x.strides, x.data.ptr) if hasattr(x, "data") and hasattr(x, "strides") else x
        for name, x in vars(found).items()
        if name != "folded"
    }


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float16)], ids=str)
def test_a_program_launches_what_the_host_function_does(options, dtype):
    N, V, D = SHAPE
    with launches_read() as seen:
        cupy = gpu.cupy()
        made = []
        original = cce.driver.combine

        def combine(parts):
            made.append(form_of(parts[0]))
            return original(parts)

        for turn in range(2):  # other arrays, of the same form, than those that were recorded
            arrays = [cupy.ndarray(size, kind, memory(cupy, turn, i)) for i, (size, kind) in enumerate(
                (((N, D), dtype), ((V, D), dtype), ((N,), np.dtype(np.int64)))
            )]  # fmt: skip
            given = dict(options, filter_seed=options["filter_seed"] + turn) if "filter_seed" in options else options
            with mock.patch.object(cce.driver, "combine", combine):
                with programs_run() as addresses:
                    cce.linear_cross_entropy_with_grad(*arrays, **given)
                by_program = seen.copy()
                seen.clear()
                with run_directly(addresses):
                    cce.linear_cross_entropy_with_grad(*arrays, **given)
            assert by_program == seen
            assert made[-2] == made[-1], "statistics lie where they did"
            assert len(seen) > 10
            seen.clear()
        for kept in (programs.FORWARD, programs.BACKWARD):
            assert [type(program) for program in kept._by_key.values()] == [Program]


def memory(cupy, turn, i):
    address = 2**50 + turn * 2**40 + i * 2**36
    return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, 2**30, None, 0), 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda e, c: (e[:, :-1], c[:, :-1]),  # rows that are no whole 16 bytes
        lambda e, c: (e[::-1], c),
        lambda e, c: (e, c[:, ::-1]),
    ],
)
def test_what_must_be_copied_is_not_recorded(change):
    N, V, D = SHAPE
    with launches_read():
        cupy = gpu.cupy()
        e, c = change(cupy.empty((N, D), np.float16), cupy.empty((V, D), np.float16))
        cce.linear_cross_entropy_with_grad(e, c, cupy.empty(N, np.int64))
        assert None in [*programs.FORWARD._by_key.values(), *programs.BACKWARD._by_key.values()]


def test_a_changed_form_is_another_program():
    N, V, D = SHAPE
    with launches_read():
        cupy = gpu.cupy()
        c, targets = cupy.empty((V, D), np.float16), cupy.empty(N, np.int64)
        wide = cupy.empty((N, 2 * D), np.float16)
        for e in (wide[:, :D], wide[:, D:], cupy.empty((N, D), np.float16)):
            for options in ({}, {"softcap": 2.0}):
                cce.linear_cross_entropy(e, c, targets, **options)
        assert len(programs.FORWARD._by_key) == 4, "two strides of e, both aligned, and two sets of options"
