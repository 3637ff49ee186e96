"""All jobs of a backward, described and filled by the kernel's own functions, run in Python one thread after the other.

What they copy is real, and goes to a stage of shared memory; NumPy multiplies it. Only what needs a warp at once (searches,
sums) is done here in another way. So a row, slot, unit or round that is mistaken gives wrong gradients, without a GPU.
"""

from __future__ import annotations

import types as python_types
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from numba.cuda.dispatcher import CUDADispatcher

from cce_numba.ampere.backward import fill as fill_module
from cce_numba.ampere.backward import scheduler
from cce_numba.ampere.backward.records import WORD, Dimensions, Filling, Outputs
from cce_numba.ampere.backward.scheduler import D_C, D_E, END, LOGITS
from cce_numba.ampere.backward.tiles import BackwardTiles
from cce_numba.ampere.backward.workspace import BUFFERS, WorkspaceLayout
from cce_numba.ampere.elements import elements_of
from cce_numba.ampere.product import row_of_term
from cce_numba.ptx import memory, pointers
from cce_numba.tensor_core.records import LogitTerms, Matrix, Output
from cce_numba.tensor_core.survey.tables import Tables
from tests.tensor_core.test_survey import make_inputs, model

TILES = BackwardTiles(stages=2)
_APART = 40  # bits of an address within one array


class Machine:
    """Global memory as arrays, each at an address of its own; shared memory as bytes; what instructions do with them."""

    def __init__(self):
        self.arrays, self.smem = [], np.zeros(TILES.stage_bytes + TILES.job_bytes, np.uint8)

    def at(self, array):
        """The address of an array, which gets one."""
        for i, known in enumerate(self.arrays):
            if known is array:
                return (i + 1) << _APART
        self.arrays.append(array)
        return len(self.arrays) << _APART

    def bytes_at(self, address, count):
        array = self.arrays[(int(address) >> _APART) - 1].reshape(-1).view(np.uint8)
        start = int(address) & ((1 << _APART) - 1)
        assert 0 <= start <= len(array) - count, "within the array"
        return array[start : start + count]

    def load(self, address, wanted, count=1):
        words = self.bytes_at(address, 4 * count).view(np.uint32) if wanted else np.zeros(count, np.uint32)
        return np.uint32(words[0]) if count == 1 else tuple(np.uint32(word) for word in words)

    def copy_row(self, place, source, row, pitch_bytes):
        data = np.zeros(16, np.uint8) if row < 0 else self.bytes_at(int(source) + int(row) * int(pitch_bytes), 16)
        self.smem[int(place) : int(place) + 16] = data

    def store_shared(self, address, value):
        self.smem[int(address) : int(address) + 4] = np.int32(value).reshape(1).view(np.uint8)

    def load_shared(self, address):
        return self.smem[int(address) : int(address) + 4].view(np.int32)[0]

    def instructions(self):
        """What stands for an instruction, by the instruction."""
        return {
            memory.load_if_u32: self.load,
            memory.load_if_4_u32: lambda address, wanted: self.load(address, wanted, 4),
            memory.load_shared_i32: self.load_shared,
            memory.store_shared_i32: self.store_shared,
            memory.store_shared_f32: lambda address, value: None,
            memory.copy_async_16_of_row: self.copy_row,
            memory.load_acquire_u32: lambda address: self.load(address, True),
            memory.store_global_u32: lambda address, value: self.bytes_at(address, 4).view(np.uint32).fill(value),
            pointers.address_of: self.at,
        }


def expand(columns, wanted, skipped, bits, row, first_word, end_word, lane, machine):
    """`lists.expand`, of which a lane writes what is its own in `write_columns`."""
    in_order = np.unpackbits(bits[row + first_word : row + end_word].view(np.uint8), bitorder="little")
    for position, column in enumerate(32 * first_word + np.flatnonzero(in_order)[skipped : skipped + wanted]):
        if position % 32 == lane:
            machine.store_shared(columns + 4 * position, column)


def largest_at_most(prefix, first, count, value, lane):
    return np.int32(np.searchsorted(prefix[first : first + count], value, side="right") - 1)


class Plain:
    """Makes plain Python functions of device functions, and of all that they call."""

    def __init__(self, machine):
        ints = {"popc": lambda x: int(x).bit_count(), "ffs": lambda x: (int(x) & -int(x)).bit_length()}
        cuda = SimpleNamespace(syncwarp=lambda: None, nanosleep=lambda ns: pytest.fail("waits for what nobody does"), **ints)
        instructions = machine.instructions()
        names = {name: instructions.get(x, x) for name, x in vars(memory).items() if not name.startswith("_")}
        self.known = {
            **{id(k): v for k, v in instructions.items()},
            id(scheduler.cuda): cuda,
            id(memory): SimpleNamespace(**names),
            id(scheduler.expand): lambda *given: expand(*given, machine),
            id(scheduler.largest_at_most): largest_at_most,
            id(scheduler.warp_sum): lambda x: x,  # one word of blocks, which lane 0 has
        }

    def __call__(self, x):
        if id(x) in self.known:
            return self.known[id(x)]
        if not isinstance(x, CUDADispatcher | python_types.FunctionType):
            return x
        function = x.py_func if isinstance(x, CUDADispatcher) else x
        code = function.__code__
        globals_ = {name: self(function.__globals__[name]) for name in code.co_names if name in function.__globals__}
        cells = tuple(python_types.CellType(self(cell.cell_contents)) for cell in function.__closure__ or ())
        self.known[id(x)] = python_types.FunctionType(code, globals_, function.__name__, function.__defaults__, cells)
        return self.known[id(x)]


def operands(smem, across, dtype):
    """A (128, terms) and B (192, terms) of the stage at address 0, float32; across: of A, of B."""
    terms = elements_of(dtype).terms
    numbers = smem[: TILES.stage_bytes].view(dtype).reshape(-1, 8, terms // 8)
    row, part = np.ogrid[: len(numbers), :8]
    rows = numbers[row, part ^ (row % 8)].reshape(-1, terms).astype(np.float32)
    found = []
    for x, is_across in zip((rows[:128], rows[128:]), across, strict=True):
        if is_across:
            x = np.concatenate(np.split(x, len(x) // terms), axis=1).T
            if terms == 32 and across != (1, 1):  # beside terms in order
                x = x[:, [row_of_term(term) for term in range(terms)]]
        found.append(x)
    return found


def g_of(z):
    """Stands for the gradient of a logit: small integers, of which sums are exact."""
    return z % 5 - 2


def run(layout, found, e, c, outputs, dims, n_blocks):
    """`(dE, dC)` by listed token and by vocabulary entry, as the jobs in order make them."""
    machine = Machine()
    plain = Plain(machine)
    slots = BUFFERS * layout.buffer_slots
    g, lists = np.full((slots, 128), np.nan, e.dtype), np.full(slots, -1, np.int32)
    done = np.zeros(2 * layout.survey.rounds_max, np.uint32)
    tables = Tables(**{name: found[name].reshape(-1) if name in found else None for name in Tables.declared})
    workspace = layout.at(0)._replace(done=machine.at(done), lists=machine.at(lists), g=machine.at(g))
    job, D = np.uint32(TILES.stage_bytes), dims.D
    e_rows, c_rows = (Matrix(machine.at(x), x.strides[0]) for x in (e, c))
    schedule, begin = plain(scheduler.make_schedule(e.dtype)), plain(scheduler.begin)
    field = plain(scheduler.field)
    sources = fill_module.make_fill(TILES, elements_of(e.dtype))
    of_kind = {LOGITS: (sources.logits, (0, 0)), D_E: (sources.d_e, (1, 1)), D_C: (sources.d_c, (0, 1))}
    terms = LogitTerms(*(0,) * len(LogitTerms.declared))
    d_e, d_c = np.zeros((128 * layout.blocks, D), np.float32), np.full((len(c), D), np.nan, np.float32)
    sums_e = {}
    begin(job, 0)
    number, kinds = 0, []
    while True:
        for _ in range(2):  # in the second turn each lane finds what all have written in the first
            for lane in range(32):
                schedule(job, np.int32(number), lane, terms, n_blocks, tables, workspace, outputs, dims)
        read = {name: int(field(job, word)) for name, word in WORD._asdict().items()}
        number, kind = number + 1, read["kind"]
        if kind == END:
            break
        kinds.append(kind)
        source, across = of_kind[kind]
        filling = Filling(job, *(np.int32(read[name]) for name in ("slot", "d0", "block_or_tile", "round")), e_rows, c_rows, D)
        sums, units, rest = np.zeros((128, 192), np.float32), np.int32(read["units"]), (filling, workspace, tables, dims)
        threads = [np.int32(i) for i in range(256)]
        states = [plain(source.begin)(*rest, thread, units) for thread in threads]
        for unit in range(units):
            machine.smem[: TILES.stage_bytes] = 0xFF
            fill = plain(source.fill)
            states = [
                fill(state, np.int32(unit), np.uint32(0), *rest, thread, units)
                for state, thread in zip(states, threads, strict=True)
            ]
            a, b = operands(machine.smem, across, e.dtype)
            sums += a @ b.T
        block, d0, stored = read["block_or_tile"], read["d0"], read["stored"]
        if kind == LOGITS:
            ids = machine.smem[int(job) + 64 : int(job) + 64 + 4 * 192].view(np.int32)
            takes_part = found["row_of"].reshape(-1, 128)[block] >= 0
            if units:
                tile = np.where(takes_part[:, None] & (ids >= 0), g_of(sums), 0)
                g[read["slot"] : read["slot"] + stored] = tile[:, :stored].T
        elif kind == D_E:
            if not read["is_first"]:
                sums = sums + sums_e[block, d0]
            sums_e[block, d0] = sums
            if read["is_last"]:
                d_e[128 * block : 128 * block + 128, d0 : d0 + 192] = sums[:, : D - d0]
        else:
            entries = found["order"][128 * block : 128 * block + 128]
            d_c[entries[entries >= 0], d0 : d0 + 192] = sums[entries >= 0][:, : D - d0]
        done[read["phase"]] += 1
    return d_e, d_c, kinds


@pytest.mark.parametrize(
    ("N", "V", "D", "named", "dtype"),
    [
        (300, 700, 72, {"density": 0.4, "listed": 0.9, "dead": 0.2, "coarse": 0.5}, np.float16),
        (130, 200, 200, {"density": None}, np.float16),
        (130, 300, 8, {"density": 0.02}, np.float16),
        (100, 1500, 8, {"density": 0.9, "dense_share": 1.0}, np.float16),
        (130, 1200, 8, {"density": None}, np.float16),
        (300, 400, 200, {"density": 0.4, "listed": 0.9, "dead": 0.2, "coarse": 0.5}, np.float32),
    ],
    ids=["filtered", "exact", "few", "many rounds", "exact, many rounds", "filtered, float32"],
)
def test_jobs_make_the_gradients(N, V, D, named, dtype):
    """Tokens without weight; dC for some of what survives; tiles without survivors; more rounds than buffers."""
    x = make_inputs(1, N, V, jobs=(-(-D // 192),) * 2, **named)
    layout = WorkspaceLayout(N, V, D, with_e=True, with_sums=False, g_bytes=0, itemsize=np.dtype(dtype).itemsize)
    found = model(layout.survey, x)
    rng = np.random.default_rng(0)
    e, c = (rng.integers(-2, 3, (n, D)).astype(dtype) for n in (N, V))
    outputs = Outputs(*(Output(1, 0, 0, x.jobs[0]),) * 2, bias=0, adds=0)
    dims = Dimensions(layout.blocks, layout.survey.block_words, layout.survey.column_tiles, D)
    n_blocks = np.int32(-(-len(x.tokens) // 128))
    d_e, d_c, kinds = run(layout, found, e, c, outputs, dims, n_blocks)

    row_of, order, tiles = found["row_of"], found["order"], layout.survey.column_tiles
    z = np.where(row_of[:, None] >= 0, e[row_of], 0).astype(np.float32) @ c.astype(np.float32).T
    kept = np.zeros((layout.blocks, V), bool)
    in_order = np.unpackbits(found["bits"].view(np.uint8), axis=1, bitorder="little").astype(bool)
    kept[:, order[order >= 0]] = in_order[:, order >= 0]
    g = np.where(np.repeat(kept, 128, axis=0) & (row_of[:, None] >= 0), g_of(z), 0)
    np.testing.assert_array_equal(d_e, g @ c.astype(np.float32))
    needed = np.unpackbits(found["needed"].view(np.uint8), axis=1, bitorder="little").astype(bool)[:, : layout.blocks]
    tile_of = np.empty(V, int)
    tile_of[order[order >= 0]] = np.repeat(np.arange(tiles), 128)[order >= 0]
    g_c = g * np.repeat(needed[tile_of].T, 128, axis=0)
    np.testing.assert_array_equal(d_c, g_c.T @ np.where(row_of[:, None] >= 0, e[row_of], 0).astype(np.float32))
    assert set(kinds) == {LOGITS, D_E, D_C}
    assert len(kinds) == found["phase_end"][2 * found["n_rounds"][0] - 1]
    assert (found["n_rounds"][0] > BUFFERS) == (V >= 1200)
