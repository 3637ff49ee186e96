"""Programs launch what the host functions do: the same kernels on the same grids, with the same bytes for parameters."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.measure.stand_in import stand_in
from cce_numba import gpu, interchange, survivors
from cce_numba import plan as planning
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics, Weights, backend_module
from cce_numba.interchange import BFLOAT16
from cce_numba.options import Options
from tests.helpers.harness import SimulatorHarness

pytest.importorskip("cupy")
if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.hopper import tensor_map
from cce_numba.launch.program import Program, Programs
from cce_numba.tensor_core import programs

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
CAPABILITIES = {"hopper": (9, 0), "ampere": (8, 0)}


@dataclass(frozen=True)
class Call:
    """A forward and its backward, all that tells it from others but addresses.

    Attributes:
        shape: (N, V, D).
        K: targets of a token, or None.
        strides: of e, c, dE and dC: "rows", "wide" for rows that lie twice as far apart, "shifted" by 8 bytes, "backwards".
        seed: "number" or "array".
        others: which of bias, logit_scale, class_weights there are, and whether an entropy's and a uniform weight.
        wrt: gradients that are wanted.
        options: beside defaults.
    """

    shape: tuple[int, int, int] = (300, 20000, 136)  # several phases of the forward, and a last tile that is not whole
    dtype: np.dtype = BFLOAT16
    K: int | None = None
    strides: tuple[str, str, str, str] = ("rows",) * 4
    seed: str = "number"
    bias_dtype: np.dtype | None = None
    others: frozenset = frozenset()
    wrt: frozenset = frozenset({"e", "c"})
    adds: bool = False
    has_loss: bool = True
    options: dict = field(default_factory=dict)


class Memory:
    """Arrays at addresses that differ from turn to turn, far from all that is allocated."""

    def __init__(self, turn):
        self.next = 2**50 + turn * 2**44

    def array(self, shape, dtype, how="rows"):
        cupy, (dtype, strides) = gpu.cupy(), (np.dtype(dtype), None)
        start = self.next
        self.next += 2**36
        if how == "wide":
            strides = 2 * shape[1] * dtype.itemsize, dtype.itemsize
        elif how == "shifted":
            start += 8
        elif how == "backwards":
            start, strides = start + 2**30, (-shape[1] * dtype.itemsize, dtype.itemsize)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(start, 2**36, None, 0), 0), strides)


def run(call, backend, turn):
    """The backend's forward and backward; what the forward returned."""
    memory, (N, V, D), numbers = Memory(turn), call.shape, np.float32
    of_targets = (N,) if call.K is None else (N, call.K)
    options = Options.of(call.dtype, call.options)
    p = Problem(
        e=memory.array((N, D), call.dtype, call.strides[0]),
        c=memory.array((V, D), call.dtype, call.strides[1]),
        targets=memory.array(of_targets, np.int64),
        bias=None if call.bias_dtype is None else memory.array((V,), call.bias_dtype),
        logit_scale=memory.array((N,), numbers) if "logit_scale" in call.others else None,
        class_weights=memory.array((V,), numbers) if "class_weights" in call.others else None,
        token_weights=None,
        target_probs=None,
        has_loss=call.has_loss,
        filter_seed=turn if call.seed == "number" else memory.array((1,), np.int64),
        options=options,
        e_shape=(N, D),
        token_shape=(N,),
        kind=interchange.Kind("cupy", 0, lambda array: array),
    )  # fmt: skip
    plan, module = planning.choose(p, backend), backend_module(backend)
    keeps = plan.kept_bytes > 0 and options.keeps_logits(call.wrt)
    found = module.forward(p, plan, record_survivors=options.records_survivors(call.wrt), keep_logits=keeps)
    weights = Weights(
        softmax=memory.array((N,), numbers),
        target=memory.array(of_targets, numbers),
        uniform=memory.array((N,), numbers) if options.smooths_capped else None,
        entropy=memory.array((N,), numbers) if options.entropy and "entropy" in call.others else None,
    )
    shapes = {
        "e": ((N, D), p.grad_e_dtype, call.strides[2]),
        "c": ((V, D), p.grad_c_dtype, call.strides[3]),
        "bias": ((V,), FLOAT32),
    }
    if not call.wrt:
        return found
    into = Gradients(**{name: memory.array(*shapes[name]) for name in sorted(call.wrt)})
    module.backward(p, plan, found, weights, into, call.adds)
    return found


@contextmanager
def launches_read(backend):
    """What was launched: kernel, grid and the rest of its form, and its bytes; and what became zeros."""
    seen = []

    def launch(handle, *others):
        *form, _, extra = others
        place, size = (ctypes.c_void_p * 5).from_address(extra)[1::2]
        seen.append((handle, *form, ctypes.string_at(place, ctypes.c_size_t.from_address(size).value)))

    def clear(address, value, n_bytes, stream):
        seen.append((address, value, n_bytes))

    def write_zeros(array):
        if not isinstance(array, gpu.cupy().ndarray):
            array.data.memset_async(0, array.nbytes)
        else:
            clear(array.data.ptr, 0, array.nbytes, 0)

    def zeros(shape, dtype=float):
        array = gpu.cupy().ndarray(shape, dtype)
        if array.nbytes:
            clear(array.data.ptr, 0, array.nbytes, 0)
        return array

    def encode(*told):
        return struct.unpack("16Q", np.random.default_rng([int(x) for x in told]).bytes(128))

    with stand_in(CAPABILITIES[backend]), mock.patch.object(tensor_map, "_encode", encode):
        cupy = gpu.cupy()
        with (
            mock.patch.object(cupy.cuda.driver, "launchKernel", launch),
            mock.patch.object(cupy.cuda.runtime, "memsetAsync", clear),
            mock.patch.object(interchange, "write_zeros", write_zeros),
            mock.patch.object(cupy, "zeros", zeros),
        ):
            yield seen


@contextmanager
def run_directly(of_programs):
    """Programs are not used. What host functions allocate lies where their program, if they have one, has allocated it."""
    cuda, remaining = gpu.cupy().cuda, iter(of_programs)

    def run(self, key, arrays, function, integers=()):
        if (addresses := next(remaining)) is None:
            return function(*arrays, *integers)
        left = iter(addresses)

        def allocate(n_bytes):
            return cuda.MemoryPointer(cuda.UnownedMemory(next(left), n_bytes, None, 0), 0)

        with cuda.using_allocator(allocate):
            result = function(*arrays, *integers)
        assert next(left, None) is None, "a program allocated what the host functions did not"
        return result

    with mock.patch.object(Programs, "run", run):
        yield


@contextmanager
def programs_watched():
    """Of each call of `Programs.run` the addresses of all that its program allocates, in the order of the host's asking."""
    of_calls, run_any, run_one = [], Programs.run, Program.run

    def run(self, *arguments):
        of_calls.append(None)
        return run_any(self, *arguments)

    def run_program(program, inputs):
        cuda, blocks = gpu.cupy().cuda, []
        allocate = cuda.alloc
        with mock.patch.object(cuda, "alloc", lambda n: blocks.append(allocate(n)) or blocks[-1]):
            result = run_one(program, inputs)
        found = {}
        for block, (_, places) in zip(blocks, program._allocations, strict=True):
            found |= {base: block.ptr + offset for base, offset in places}
        of_calls[-1] = [found[base] for base in sorted(found)]
        return result

    with mock.patch.object(Programs, "run", run), mock.patch.object(Program, "run", run_program):
        yield of_calls


def form_of(found):
    values = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    values |= values.pop("folded")
    return {n: (x.shape, x.dtype, x.strides, x.data.ptr) if hasattr(x, "strides") else x for n, x in values.items()}


def compared(calls, backend):
    """Runs the calls in turn, by programs and directly, and compares; of each, whether forward and backward had a program."""
    with launches_read(backend) as seen:
        were_programs = []
        for turn, call in enumerate(calls):
            with programs_watched() as of_programs:
                by_program = form_of(run(call, backend, turn))
            launched = seen.copy()
            seen.clear()
            with run_directly(of_programs):
                directly = form_of(run(call, backend, turn))
            assert len(launched) == len(seen) > 2
            for one, other in zip(launched, seen, strict=True):
                assert one == other
            assert by_program == directly, "statistics lie where they did"
            seen.clear()
            were_programs.append([x is not None for x in of_programs])
        return were_programs


ONE_AND_ALL = [
    Call(),
    Call(dtype=FLOAT16),
    Call(options={"filter": "drop"}),
    Call(options={"filter_eps": None}),
    Call(options={"filter": "drop", "filter_e_grad": False}),
    Call(options={"filter": "drop", "filter_c_grad": False}),  # two passes, of which the device takes one
    Call(options={"filter_c_grad": False}),  # and each of these is two kernels
    Call(options={"filter_eps": None, "workspace_bytes": 2**24}),
    Call(options={"filter_c_grad": False, "workspace_bytes": 2**30}),
    Call(options={"softcap": 3.0}, others=frozenset({"logit_scale"})),
    Call(seed="array"),
    Call(options={"accum_e_fp32": True, "accum_c_fp32": True}, adds=True),
    Call(wrt=frozenset({"e"})),
    Call(wrt=frozenset({"c"}), bias_dtype=BFLOAT16),
    Call(options={"entropy": True, "sum_squares": True}),
    Call(options={"batch_invariant": True}),
    Call(shape=(2000, 3000, 64), options={"filter_eps": None}),
]


@pytest.mark.parametrize("backend", CAPABILITIES)
@pytest.mark.parametrize("call", ONE_AND_ALL)
def test_a_program_launches_what_the_host_functions_do(call, backend):
    """Three times, at other addresses each."""
    assert compared([call] * 3, backend) == [[True, True]] * 3


IN_PLAIN = [  # in the forward, in the backward
    (Call(options={"entropy": True}, others=frozenset({"entropy"})), [True, False]),
    (Call(K=3), [True, False]),
    (Call(wrt=frozenset({"e", "bias"}), bias_dtype=BFLOAT16), [True, False]),
    (Call(dtype=FLOAT16, options={"batch_invariant": True}), [True, False]),
    (Call(options={"softcap": 3.0, "label_smoothing": 0.1}), [False, False]),
    (Call(shape=(300, 5000, 100)), [False, False]),  # rows that are no whole 16 bytes
    (Call(strides=("backwards", "rows", "rows", "rows")), [False, False]),
    (Call(strides=("rows", "shifted", "rows", "rows")), [False, False]),
    (Call(strides=("rows", "rows", "wide", "rows")), [True, False]),
]


@pytest.mark.parametrize("backend", CAPABILITIES)
@pytest.mark.parametrize(("call", "are_programs"), IN_PLAIN)
def test_what_computes_on_arrays_is_not_recorded(call, are_programs, backend):
    assert compared([call] * 2, backend) == [are_programs] * 2


OPTIONS = {
    "filter": ["unbiased", "drop"],
    "filter_eps": ["auto", 1e-4, None],
    "filter_e_grad": [True, False],
    "filter_c_grad": [True, False],
    "accum_e_fp32": [False, True],
    "accum_c_fp32": [False, True],
    "softcap": [None, 3.0, 5.0],
    "label_smoothing": [0.0, 0.1],
    "entropy": [False, True],
    "sum_squares": [False, True],
    "batch_invariant": [False, True],
    "workspace_bytes": [0, 2**23, 2**24, 2**30],
    "ignore_index": [-100, 3],
    "reduction": ["mean", "none"],
}
FIELDS = {
    "shape": [(300, 20000, 136), (300, 5000, 136), (130, 3000, 64), (300, 5000, 100)],
    "dtype": [BFLOAT16, FLOAT16],
    "K": [None, None, 2, 5],
    "seed": ["number", "array"],
    "bias_dtype": [None, None, FLOAT16, FLOAT32],
    "others": [frozenset(x) for x in ((), ("logit_scale",), ("class_weights",), ("entropy",), ("logit_scale", "entropy"))],
    "wrt": [frozenset(x) for x in ((), ("e", "c"), ("e",), ("c",), ("e", "c", "bias"))],
    "adds": [False, True],
    "has_loss": [True, False],
    "strides": [("rows",) * 4]
    + [tuple(how if i == place else "rows" for i in range(4)) for place in range(4) for how in ("wide", "shifted")],
}


def possible(call):
    """With what goes together: a bias has a gradient where there is one, and float32 or the inputs' dtype."""
    bias_dtype = call.bias_dtype if call.bias_dtype in (None, FLOAT32) else call.dtype
    return replace(call, bias_dtype=bias_dtype, wrt=call.wrt - {"bias"} if bias_dtype is None else call.wrt)


BASES = [
    Call(),
    Call(options={"filter_e_grad": False}),
    Call(options={"filter_eps": None, "workspace_bytes": 2**24}, bias_dtype=BFLOAT16),
    Call(shape=(130, 3000, 64), K=2, options={"entropy": True}, others=frozenset({"logit_scale"})),
]


@pytest.mark.parametrize("backend", CAPABILITIES)
@pytest.mark.parametrize("base", BASES)
def test_calls_that_differ_in_one_thing_have_programs_of_their_own(base, backend):
    """All of them after one another, twice, in whose second turn each finds its program."""
    calls = [base]
    for name, values in OPTIONS.items():
        calls += [replace(base, options=base.options | {name: value}) for value in values]
    for name, values in FIELDS.items():
        calls += [possible(replace(base, **{name: value})) for value in values]
    compared(calls * 2, backend)


@st.composite
def like(draw, call, most):
    """A call that differs from another one in a few things."""
    for _ in range(draw(st.integers(1, most))):
        name = draw(st.sampled_from([*OPTIONS, *FIELDS]))
        value = draw(st.sampled_from((OPTIONS | FIELDS)[name]))
        call = replace(call, options=call.options | {name: value}) if name in OPTIONS else replace(call, **{name: value})
    return possible(call)


@st.composite
def sequences(draw):
    """Calls that come again, among such as differ from them."""
    first = draw(like(Call(), 6))
    others = [draw(like(first, 1)) for _ in range(2)]
    return [first, *others, first, *others]


@pytest.mark.parametrize("backend", CAPABILITIES)
@settings(max_examples=15)
@given(calls=sequences())
def test_no_program_is_run_for_another_call(calls, backend):
    compared(calls, backend)


@pytest.mark.parametrize("backend", CAPABILITIES)
@pytest.mark.parametrize("at", range(6))
def test_a_constant_that_tests_change_is_in_the_key(at, backend):
    with mock.patch.object(survivors, "DENSE_SHARE", 0.25):
        before = [Call()] * 2
        with launches_read(backend) as seen:
            run(before[0], backend, 0)
            first = seen.copy()
            seen.clear()
            with mock.patch.object(survivors, "DENSE_SHARE", at / 8):
                run(before[1], backend, 0)
            assert (first == seen) == (at == 2)


def test_every_array_is_told_or_withheld():
    """A new field of these records must be put into one of the lists, or be nothing that launches read."""
    names = {kind: {f.name for f in dataclasses.fields(kind)} for kind in (Problem, Statistics, Weights, Gradients)}
    of_terms = {"token_weights", "target_probs", "e_shape", "token_shape", "kind"}
    in_key = {"options", "has_loss", "filter_seed", "shard"}
    assert names[Problem] == {*programs.OF_PROBLEM} | of_terms | in_key
    of_caller = {"lse", "mean_logit", "entropy", "sum_squares", "top_logits", "top_ids", "folded", "survivor_block"}
    assert names[Statistics] == {*programs.OF_STATISTICS} | of_caller
    assert names[Weights] == {*programs.OF_WEIGHTS, "outer"}
    assert names[Gradients] == {*programs.OF_GRADIENTS}


def test_memory_is_used_again_once_it_was_dropped():
    """Two passes, one after the other, need the larger one's workspace, and not both."""
    with launches_read("hopper"):
        run(Call(options={"filter_c_grad": False}), "hopper", 0)
        (program,) = programs.BACKWARD._by_key.values()
        ((n_bytes, places),) = program._allocations
        run(Call(options={"filter_eps": None}), "hopper", 0)
        (_, one_pass) = programs.BACKWARD._by_key.values()
        starts = [offset for _, offset in places]
        assert len(set(starts)) < len(starts)
        assert n_bytes < 1.9 * one_pass._allocations[0][0]
