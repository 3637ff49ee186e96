"""What the driver is handed: arguments where C would put them, in a launch of the kernel's own shape."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

import pytest

from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from numba.cuda import types

from cce_numba.launch import kernel as launch
from cce_numba.launch.kernel import Kernel, pointer_to, recorded
from cce_numba.launch.record import Record


class Arguments(ctypes.Structure):
    """As C lays out int, pointer, float, 64-bit integer, int, three 64-bit numbers."""

    _fields_ = (
        ("a", ctypes.c_int32),
        ("b", ctypes.c_void_p),
        ("c", ctypes.c_float),
        ("d", ctypes.c_int64),
        ("e", ctypes.c_int32),
        ("f", ctypes.c_uint64 * 3),
    )


_INNER = types.float32, pointer_to("f4")
PARAMETERS = (types.int32, pointer_to("f4"), types.float32, types.int64, types.int32, types.UniTuple(types.uint64, 3))


@pytest.fixture
def launched(monkeypatch):
    """What came to the driver: the shape of the launch, and a copy of the arguments."""
    seen = []

    def launch_kernel(handle, x, y, z, block_x, block_y, block_z, smem_bytes, stream, parameters, extra):
        words = (ctypes.c_void_p * 5).from_address(extra)
        assert (words[0], words[2], words[4]) == (1, 2, None), "pointer, size and end, in this order"
        assert ctypes.c_size_t.from_address(words[3]).value >= ctypes.sizeof(Arguments) - 8  # C pads at the end
        shape = (handle, (x, y, z), (block_x, block_y, block_z), smem_bytes, stream, parameters)
        seen.append((shape, Arguments.from_buffer_copy(ctypes.string_at(words[1], ctypes.sizeof(Arguments)))))

    stream = SimpleNamespace(ptr=77)
    cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDevice=lambda: 0),
        driver=SimpleNamespace(launchKernel=launch_kernel),
        get_current_stream=lambda device: stream,
    )
    monkeypatch.setattr(launch.gpu, "cupy", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(Kernel, "_compile", lambda self, device: (1234, None))
    return seen


def test_arguments_lie_where_c_would_put_them(launched):
    kernel = Kernel(lambda: None, PARAMETERS, threads=96, smem_bytes=4096, cluster=2)
    kernel.launch(8, -5, 2**40 + 3, 1.5, -(2**40), True, (1, 2, 2**64 - 1))
    ((shape, arguments),) = launched
    assert shape == (1234, (8, 1, 1), (96, 1, 1), 4096, 77, 0)
    assert (arguments.a, arguments.b, arguments.c, arguments.d, arguments.e) == (-5, 2**40 + 3, 1.5, -(2**40), 1)
    assert list(arguments.f) == [1, 2, 2**64 - 1]


def test_grids_and_blocks_may_have_several_dimensions(launched):
    kernel = Kernel(lambda: None, PARAMETERS, threads=(16, 8))
    assert (kernel.threads, kernel.block) == (128, (16, 8, 1))
    kernel.launch((3, 5), *range(5), (5, 6, 7))
    kernel.launch((2, 3, 4), *range(5), (5, 6, 7))
    assert [shape[1:3] for shape, _ in launched] == [((3, 5, 1), (16, 8, 1)), ((2, 3, 4), (16, 8, 1))]


@pytest.mark.parametrize("grid", [0, (0, 3), (3, 0)])
def test_an_empty_grid_launches_nothing(launched, grid):
    Kernel(lambda: None, PARAMETERS, threads=32).launch(grid, 1, 2, 3.0, 4, 5, (6, 7, 8))
    assert launched == []


def test_recorded_launches_run_nothing_and_only_in_their_thread(launched):
    kernel, other = (Kernel(lambda: None, PARAMETERS, threads=32) for _ in range(2))
    with recorded() as kernels:
        kernel.launch(1, *range(5), (5, 6, 7))
        other.launch(0, *range(5), (5, 6, 7))
        thread = threading.Thread(target=lambda: other.launch(1, *range(5), (5, 6, 7)))
        thread.start()
        thread.join()
        kernel.launch(2, *range(5), (5, 6, 7))
    assert kernels == [kernel, kernel]
    assert len(launched) == 1
    kernel.launch(1, *range(5), (5, 6, 7))
    assert len(launched) == 2


def test_threads_do_not_mix_their_arguments(launched):
    kernel = Kernel(lambda: None, PARAMETERS, threads=32)

    def work(mark):
        for _ in range(500):
            kernel.launch(1, mark, mark, mark, mark, mark, (mark, mark, mark))

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(launched) == 2000
    for _, x in launched:
        assert {x.a, x.b, int(x.c), x.d, x.e, *x.f} == {x.a}


class Inner(Record):
    number = types.float32
    address = pointer_to("f4")


class Outer(Record):
    inner = Inner
    count = types.int32


def test_records_lie_as_their_fields_would():
    kernel = Kernel(lambda: None, (types.int32, Inner, Outer), threads=32)
    flat = Kernel(lambda: None, (types.int32, *_INNER, *_INNER, types.int32), threads=32)
    assert kernel.layout.format == flat.layout.format
    assert kernel._numbers((1, Inner(2.0, 3), Outer(inner=Inner(4.0, 5), count=6))) == [1, 2.0, 3, 4.0, 5, 6]


def test_values_that_are_not_the_parameters_are_refused(launched):
    kernel = Kernel(lambda: None, (types.int32, Inner), threads=32)
    for values in ((1, 2.0, 3), (1,), (1, Inner(2.0, 3), 4)):
        with pytest.raises((TypeError, ValueError)):
            kernel.launch(1, *values)
    assert launched == []
