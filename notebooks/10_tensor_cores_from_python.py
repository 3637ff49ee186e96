# %% [markdown]
# # 10 · Tensor cores from Python: one instruction, one function
#
# The portable kernels use the GPU's ordinary arithmetic. Beside it sits hardware that multiplies small matrices whole, more
# than ten times as fast. In this lesson you will
#
# * make a Python function out of one machine instruction,
# * find out which thread holds which element of a tile, by asking the hardware,
# * see how data gets to the tensor cores fast enough: swizzled, copied in bulk, announced by barriers that count, through a
#   ring.
#
# This lesson has no simulator: tensor cores exist on GPUs alone. Without one you will compile kernels, and see what an H200
# answered.

# %%
import lessons

machine = lessons.begin(simulator=False)

# %%
import ml_dtypes
import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.ptx import memory
from cce_numba.ptx.instruction import F32, U32, instruction
from lessons import compiled, drawings, measured

# %% [markdown]
# ## One instruction
#
# A GPU's machine language, as far as NVIDIA documents it, is called PTX. This instruction multiplies a 16 × 16 matrix by a 16 ×
# 8 matrix, of bfloat16 numbers, and adds the result to 16 × 8 sums in float32:
#
# ```
# mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {d...}, {a...}, {b...}, {c...};
# ```
#
# A *warp* runs it, all 32 threads together: 2048 multiply-adds at once. No thread has a matrix. Each has a few numbers of $A$,
# of $B$ and of the sums in its registers, and the instruction takes them from all 32.
#
# Numba has no such function. `cce_numba.ptx` has a factory that makes one, from the text of the instruction and the types of
# its operands; `$0`, `$1`, ... stand for the results, then the operands.

# %%
mma = instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
    (U32, U32, U32, U32, U32, U32, F32, F32, F32, F32),  # A in 4 registers, B in 2, two numbers of bfloat16 in each; 4 sums
    types.UniTuple(F32, 4),
    doc="(a, b, c): a warp's D (16, 8) = A (16, 16) @ B (8, 16).T + C.",
)
load_4_matrices = instruction(
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", (U32,), types.UniTuple(U32, 4),
    doc="(shared address of a row): four 8 x 8 matrices; lane 8 * i + j says where row j of matrix i lies.",
)  # fmt: skip
load_2_matrices = instruction(
    "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {$0, $1}, [$2];", (U32,), types.UniTuple(U32, 2), doc="The same, two matrices."
)
shared_address = memory.shared_address

# %% [markdown]
# Now they are functions that kernels call like any other. This kernel runs one tile product, and writes down what each lane
# (thread of the warp) got.


# %%
def tile_kernel(a, b, out):
    """out (32, 4): each lane's part of a (16, 16) @ b (8, 16).T, both bfloat16 by their bits."""
    a_smem = cuda.shared.array(256, np.uint16, 16)
    b_smem = cuda.shared.array(128, np.uint16, 16)
    lane = cuda.threadIdx.x
    for i in range(lane, 256, 32):
        a_smem[i] = a[i // 16, i % 16]
    for i in range(lane, 128, 32):
        b_smem[i] = b[i // 16, i % 16]
    cuda.syncthreads()
    row, k = lane % 16, 8 * (lane // 16)
    fa = load_4_matrices(shared_address(a_smem) + np.uint32(2 * (16 * row + k)))
    row, k = lane % 8, 8 * (lane // 8 % 2)
    fb = load_2_matrices(shared_address(b_smem) + np.uint32(2 * (16 * row + k)))
    zero = np.float32(0)
    d = mma(fa[0], fa[1], fa[2], fa[3], fb[0], fb[1], zero, zero, zero, zero)
    out[lane, 0] = d[0]
    out[lane, 1] = d[1]
    out[lane, 2] = d[2]
    out[lane, 3] = d[3]


bits, sums = types.Array(types.uint16, 2, "C"), types.Array(types.float32, 2, "C")
signature = types.void(bits, bits, sums)
if compiled.why_not() is None:
    for line in compiled.instructions(compiled.ptx(tile_kernel, signature, (8, 0)), "ldmatrix", "mma"):
        print(line)
else:
    print(compiled.why_not())

# %% [markdown]
# The compiler gave each operand a register (`%r` integers, `%f` floats), and that is all: one function, one instruction.
# Everything in `cce_numba/ptx/` is made like that, some seventy instructions.
#
# ## Who holds what
#
# Which of the 128 sums does a lane hold? The manual says it (ISA 9.7.14.5.8), but we can ask the hardware. With $A_{row,0} =
# row$, $A_{row,1} = 1$, $B_{column,0} = 8$ and $B_{column,1} = column$, the result at (row, column) is $8 \cdot row + column$.
# So each number that a lane gets tells where it belongs.


# %%
def probe():
    """What each lane of a warp got, (32, 4), on this machine or where it was recorded; and whose answer it is."""
    a, b = np.zeros((16, 16), np.float32), np.zeros((8, 16), np.float32)
    a[:, 0], a[:, 1], b[:, 0], b[:, 1] = np.arange(16), 1, 8, np.arange(8)
    if machine.capability() >= (8, 0):
        cupy = machine.array_module()
        out = cupy.zeros((32, 4), np.float32)
        as_bits = [cupy.asarray(x.astype(ml_dtypes.bfloat16).view(np.uint16)) for x in (a, b)]
        cuda.jit(tile_kernel)[1, 32](*as_bits, out)
        return machine.to_host(out), machine.name()
    recorded = measured.lesson("fragment")
    return np.array(recorded["lanes"]), measured.source(recorded)


answer, whose = probe()
rows, columns = answer.astype(int) // 8, answer.astype(int) % 8
lanes, elements = np.zeros((16, 8), int), np.zeros((16, 8), int)
for lane in range(32):
    lanes[rows[lane], columns[lane]] = lane
    elements[rows[lane], columns[lane]] = np.arange(4)
print("answered by", whose)
drawings.fragment(lanes, elements)

# %% [markdown]
# Four lanes share a row, each with two neighbours; and each lane has a second row, eight further down. So the maximum of a row,
# which the log-sum-exp needs, takes an exchange among four lanes and not a trip through shared memory. The larger instructions
# of the H100 (`wgmma`: four warps, 64 rows, up to 256 columns) keep this very layout, repeated. `cce_numba/ptx/fragment.py`
# says it in two lines:

# %%
element = np.arange(4)
for lane in range(32):
    assert (rows[lane] == lane // 4 + 8 * (element // 2)).all()
    assert (columns[lane] == 2 * (lane % 4) + element % 2).all()
print("row = lane // 4 + 8 * half, column = 2 * (lane % 4) + i: as the answer says")

# %% [markdown]
# And here is the product itself in NumPy, out of what the lanes hold: a tile product is nothing but sums that live in odd
# places.

# %%
rng = np.random.default_rng(0)
A = rng.standard_normal((16, 16)).astype(ml_dtypes.bfloat16).astype(np.float32)
B = rng.standard_normal((8, 16)).astype(ml_dtypes.bfloat16).astype(np.float32)
held = (A @ B.T)[rows, columns]  # (32, 4): what each lane would hold
back = np.zeros((16, 8), np.float32)
back[rows, columns] = held
assert (back == A @ B.T).all()

# %% [markdown]
# ## Swizzle: shared memory without conflicts
#
# A tile of $e$ for the tensor cores lies in shared memory in rows of 128 bytes, 64 numbers of 16 bits, eight pieces of 16
# bytes. The hardware reads 8 rows of the same piece at a time. Rows of 128 bytes are exactly as wide as all 32 banks, so these
# 8 pieces lie in the same four banks: 8 turns (lesson 4). Padding the rows would help, but bulk copies want whole rows.
#
# So the pieces of row $r$ are **swizzled**: piece $p$ goes to slot $p \oplus (r \bmod 8)$, where $\oplus$ is exclusive or.
# Within a row the pieces only change places; within a column they now lie in eight different slots.

# %%
row, piece = np.arange(8)[:, None], np.arange(8)
place = piece ^ (row & 7)
assert all(sorted(slots) == list(range(8)) for slots in place)  # each row keeps its pieces
assert all(len(set(place[:, p])) == 8 for p in range(8))  # and each column is spread over all slots
drawings.swizzle(place)

# %% [markdown]
# The copy engine and the tensor cores both know this pattern. Where the package copies rows by hand, it writes `r * 128 +
# ((piece ^ (r & 7)) << 4)`.
#
# ## Bulk copies and barriers that count
#
# In lesson 5 all threads loaded the tile: each computed addresses, loaded, stored. An H100 has a **copy engine** for that
# (TMA). One thread says: *this box of that matrix, to this place, swizzled; and tell this barrier when it is there.* It needs
# no registers and no further instructions.
#
# The barrier is a new kind: an **mbarrier** in shared memory that counts arrivals of threads *and bytes of copies*. It goes
# through phases; a phase is complete when all expected arrivals and bytes are in. Who waits names the parity of the phase it
# waits for, 0 or 1. Here is one in Python:


# %%
class Mbarrier:
    """Counts arrivals and bytes; `phase` is the number of the phase that is under way."""

    def __init__(self, arrivals):
        self.expected, self.phase, self.arrivals, self.bytes = arrivals, 0, arrivals, 0

    def expect(self, count):
        self.bytes += count

    def arrive(self):
        self.arrivals -= 1
        self._complete()

    def copied(self, count):
        self.bytes -= count
        self._complete()

    def is_complete(self, parity):
        return self.phase % 2 != parity  # the phase of that parity is behind us

    def _complete(self):
        if self.arrivals == 0 and self.bytes == 0:
            self.phase, self.arrivals = self.phase + 1, self.expected


full = Mbarrier(arrivals=1)
full.expect(40960)  # the producer: a stage has 40 KiB
full.arrive()
assert not full.is_complete(0)  # it has arrived, but no byte has
full.copied(16384)  # the part of e
assert not full.is_complete(0)
full.copied(24576)  # the part of c
assert full.is_complete(0)
print("phase 0 is complete, and the barrier is ready for phase", full.phase)

# %% [markdown]
# Two bits of trouble hide in "parity". A waiter that is a whole round late takes an earlier phase of the same parity for its
# own, and goes on too early. That happened in this project, which is why its two consumers tell each other when their turn has
# come (lesson 11).
#
# ## A ring of stages
#
# A load takes longer than the product that uses it. So several are under way at a time, into a **ring** of places in shared
# memory, the *stages*. One warp does nothing but start copies: the **producer**. Others do nothing but multiply: the
# **consumers**. Each stage has two barriers: `full` (its bytes are there) and `empty` (the consumer has let go of it).
#
# Here is the time line of such a ring, simulated in a dozen lines. A stage takes 1300 cycles to arrive and its products take
# 768, about what was measured for the forward's stages of 40 KiB.


# %%
def ring(stages, uses, arrives_after=1300, multiply=768, between=500):
    """Times of each use of a ring: when its copy starts, is there, and when its products start and end.

    between: the copy engine delivers a stage at most this often.
    """
    times = []
    for use in range(uses):
        asked = times[use - stages][3] if use >= stages else 0.0  # the stage must be empty
        there = max(asked + arrives_after, times[-1][1] + between if times else 0)
        start = max(there, times[-1][3] if times else 0)
        times.append((asked, there, start, start + multiply))
    return times


def timeline(stages, uses=11):
    times = ring(stages, uses)
    rows = [(f"stage {i}", []) for i in range(stages)]
    for use, (asked, there, _, _) in enumerate(times):
        rows[use % stages][1].append((asked, there, "c", f"copy {use}"))
    rows.append(("tensor cores", [(start, stop, "z", f"use {use}") for use, (_, _, start, stop) in enumerate(times)]))
    busy = 100 * 768 * 200 / ring(stages, 200)[-1][3]
    return drawings.gantt(rows, f"a ring of {stages}: the tensor cores are busy {busy:.0f} % of the time", "cycles", until=9000)


timeline(1)

# %%
timeline(2)

# %%
timeline(4)

# %%
stages = np.arange(1, 8)
busy = np.array([768 * 200 / ring(n, 200)[-1][3] for n in stages])
assert busy[0] < 0.4
assert busy[2] > 0.98
measured.Table(
    ("stages", "tensor cores busy"), [(int(n), f"{100 * share:.0f} %") for n, share in zip(stages, busy, strict=True)]
)

# %% [markdown]
# Three stages would do if every copy took 1300 cycles. Some take longer: the shipped forward has five, as many as fit in 227
# KB.
#
# ## Measure it
#
# What it is worth: the product and its fold, against cuBLAS's product alone, in the same run.

# %%
recorded = measured.benchmark("forward_h100")
measured.Table(
    ("N, V, D, bfloat16", "data", "cuBLAS, ms", "loss, ms", "ratio", "TFLOP/s"),
    [
        (
            f"{p['N']}, {p['V']}, {p['D']}",
            p["data"].split(" ")[0],
            p["calls"]["cuBLAS e @ c.T"]["median_ms"],
            p["calls"]["loss"]["median_ms"],
            p["calls"]["loss"]["x"]["median"],
            round(p["calls"]["loss"]["tflops"]),
        )
        for p in recorded["problems"]
    ],
    measured.source(recorded) + "; the portable kernels reach 33 TFLOP/s in float32",
)

# %% [markdown]
# ## Exercises
#
# 1. Which lane holds the sum at row 11, column 5, and as which of its numbers? Work it out from the rule, then look it up in
#    the answer.
# 2. In the ring above, let the products take 400 cycles instead of 768 (smaller tiles). How many stages keep the tensor cores
#    as busy as the copy engine allows? What limits them then?

# %% jupyter={"source_hidden": true}
lane, number = 4 * (11 % 8) + 5 // 2, 2 * (11 // 8) + 5 % 2
assert lanes[11, 5] == lane
assert elements[11, 5] == number
print(f"exercise 1: lane {lane}, its number {number}")

for count in range(1, 7):
    share = 400 * 200 / ring(count, 200, multiply=400)[-1][3]
    print(f"exercise 2: {count} stages, {100 * share:.0f} % busy")
# A stage comes every 500 cycles at best, so the products of 400 wait for it: 80 %, from four stages on. Then the engine is the
# limit, and no ring helps; only tiles that multiply more for each byte do (lesson 5).
assert 400 * 200 / ring(4, 200, multiply=400)[-1][3] > 0.79

# %% [markdown]
# ## What to take away
#
# * A PTX instruction is a Python function of one line. Kernels stay algorithms.
# * A warp's registers hold a tile in a fixed pattern, and the hardware itself can be asked for it.
# * Swizzled rows, bulk copies, counting barriers and a ring of stages: four ways of not waiting.
#
# Next: [lesson 11](11_the_hopper_kernel.ipynb), all of it at once.
