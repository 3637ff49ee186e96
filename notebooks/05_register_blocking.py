# %% [markdown]
# # 5 · Register blocking: more results for each number read
#
# The kernel of lesson 4 reads global memory as little as it should. It still does not come near the GPU's arithmetic. In this
# lesson you will
#
# * find out why, with one ratio: how many numbers are read for each multiplication,
# * let each thread compute a small tile in its registers,
# * see the ladder of steps by which the shipped kernel came to two thirds of the speed of NVIDIA's own library.

# %%
import lessons

machine = lessons.begin()

# %%
import numpy as np
from numba import cuda

import reference
from lessons import figures, measured
from lessons.stepper import Layout, Shown, record, walk

xp = machine.array_module()  # CuPy on a GPU (NumPy's functions, for arrays in its memory), else NumPy

# %% [markdown]
# ## On paper
#
# A *multiply-add*, `total += a * b`, is one instruction of a GPU. It works on **registers**: the few numbers that a thread has
# at hand without asking any memory, such as its variable `total`. Whatever lies in shared memory must be read into a register
# first. In each clock cycle a multiprocessor of an H100 can begin
#
# * 4 multiply-adds of a whole warp (it has 128 arithmetic units, and a warp has 32 threads), but only
# * 1 request of a warp to shared memory (32 banks of one word).
#
# The inner loop of lesson 4 reads two numbers from shared memory for each multiply-add. So for 4 multiply-adds it makes 8
# requests, and takes 8 cycles for what could be done in 1. Its arithmetic units are idle for seven eighths of the time, however
# well everything else is done.
#
# Now let a thread compute $R \times R$ logits, its results. For each term of the sum it reads $R$ numbers of $e$ and $R$ of $c$
# into registers, and makes $R^2$ multiply-adds out of them:
#
# | $R$ | reads | multiply-adds | reads for each multiply-add | share of the arithmetic that shared memory allows |
# |---|---|---|---|---|
# | 1 | 2 | 1 | 2 | 1/8 |
# | 2 | 4 | 4 | 1 | 1/4 |
# | 4 | 8 | 16 | 1/2 | 1/2 |
# | 8 | 16 | 64 | 1/4 | 1 |
#
# (The last column is 1 / 4 divided by the reads for each multiply-add, but at most 1.) The tile of the block grows as well.
# With 16 × 16 threads and $R = 8$ it is 128 × 128, and each element that is loaded from global memory serves 128 results.
#
# ## NumPy first
#
# The sum over terms is a sum of *outer products*: a column of $R$ numbers times a row of $R$ numbers gives $R \times R$
# products.

# %%
rng = np.random.default_rng(0)
a, b = rng.standard_normal((4, 10)), rng.standard_normal((4, 10))  # rows of e and of c
sums = np.zeros((4, 4))
for k in range(10):
    sums += np.outer(a[:, k], b[:, k])  # 8 numbers in, 16 multiply-adds
assert np.allclose(sums, a @ b.T)

# %% [markdown]
# ## The kernel
#
# `cuda.local.array` is an array that each thread has for itself. With a constant size it becomes registers, if all its indices
# are known when the kernel is compiled: the compiler writes out short loops of constant length. Let a block have $T \times T$
# threads, so its tile has $B = T R$ rows and columns; and let a slice have $K$ terms of the sums. Two details:
#
# * The slices lie in shared memory with $k$ first, `e_smem[k, row]`: so the rows that neighbouring threads want are neighbours.
# * Thread $x$ takes columns $x, x + T, x + 2T, \ldots$ and not $R$ neighbours, for the same reason.


# %%
def make_blocked_kernel(T, R, K):
    """Tiles of T * R x T * R, K terms a slice; launched with blocks of T x T threads, each of which has R x R results."""
    B, width = T * R, T * R + 1

    @cuda.jit
    def blocked_kernel(e, c, z):
        """z (N, V) = e (N, D) @ c (V, D).T"""
        e_smem = cuda.shared.array((K, width), np.float32)
        c_smem = cuda.shared.array((K, width), np.float32)
        sums = cuda.local.array((R, R), np.float32)
        a = cuda.local.array(R, np.float32)
        b = cuda.local.array(R, np.float32)
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        n0, v0 = cuda.blockIdx.y * B, cuda.blockIdx.x * B
        N, V, D = e.shape[0], c.shape[0], e.shape[1]
        for i in range(R):
            for j in range(R):
                sums[i, j] = 0
        for d0 in range(0, D, K):
            for i in range(y * T + x, B * K, T * T):  # the block's threads share out the slice, along its rows
                row, k = i // K, i % K
                e_smem[k, row] = e[n0 + row, d0 + k] if n0 + row < N and d0 + k < D else np.float32(0)
                c_smem[k, row] = c[v0 + row, d0 + k] if v0 + row < V and d0 + k < D else np.float32(0)
            cuda.syncthreads()
            for k in range(K):
                for i in range(R):
                    a[i] = e_smem[k, y + i * T]
                    b[i] = c_smem[k, x + i * T]
                for i in range(R):
                    for j in range(R):
                        sums[i, j] += a[i] * b[j]
            cuda.syncthreads()
        for i in range(R):
            for j in range(R):
                n, v = n0 + y + i * T, v0 + x + j * T
                if n < N and v < V:
                    z[n, v] = sums[i, j]

    return blocked_kernel


def logits(T, R, K, e, c):
    z, B = xp.full((len(e), len(c)), np.nan, np.float32), T * R
    make_blocked_kernel(T, R, K)[(-(-len(c) // B), -(-len(e) // B)), (T, T)](xp.asarray(e), xp.asarray(c), z)
    return machine.to_host(z)


for N, V, D in ((8, 16, 8), (10, 17, 6), (3, 5, 1)):  # whole tiles, ragged ones, less than one
    e, c = rng.standard_normal((N, D), dtype=np.float32), rng.standard_normal((V, D), dtype=np.float32)
    for T, R, K in ((2, 4, 4), (4, 1, 4), (2, 2, 2)):
        np.testing.assert_allclose(logits(T, R, K, e, c), reference.logits(e, c), rtol=1e-4, atol=1e-5)
print("it agrees with the reference")

# %% [markdown]
# ## Step through it
#
# Four threads, each with 4 × 4 results. Click at one to see that they are spread over the tile: every second row and column.

# %%
N, V, D = 8, 18, 8
T, R, K = 2, 4, 4
B = T * R
e, c = rng.standard_normal((N, D), dtype=np.float32), rng.standard_normal((V, D), dtype=np.float32)


def own_sums(held, x, y):
    """Where a thread's sums belong in z."""
    return [(held["n0"] + y + i * T, held["v0"] + x + j * T, held["sums"][i, j]) for i in range(R) for j in range(R)]


blocked = walk(
    make_blocked_kernel(T, R, K),
    (-(-V // B), -(-N // B)),
    (T, T),
    {"e": e, "c": c, "z": np.zeros((N, V), np.float32)},
    Layout(
        left=Shown("e", "e"),
        top=Shown("c", "c", turned=True),
        result=("z = e @ c.T", "z"),
        sums=own_sums,
        stored=Shown("z", "z"),
        shared=[Shown("e_smem", "e", words=1), Shown("c_smem", "c", words=1)],
        tile=lambda held: [(held["n0"], held["v0"], B, B)],
        say={"e_smem": "The threads share out a slice of e and one of c", "z": "Each thread writes its 16 results"},
        say_read={"e_smem": "The sums grow by the terms of the slice"},
    ),
)
blocked

# %%
blocked.still(1)

# %% [markdown]
# ## Count
#
# On paper: $2 B D$ loads from global memory for the tile's $B^2$ logits; $2 R$ reads of shared memory for $R^2$ multiply-adds.

# %%
slices = -(-D // K)
budget = blocked.compare(e=B * D, c=B * D, e_smem=T * T * R * D, c_smem=T * T * R * D, write_z=B * B)
assert budget.holds
budget

# %% [markdown]
# And here is the table from above, counted: requests of whole warps, where one with a bank conflict counts as many times as it
# takes turns, and threads that want the same word are served together.


# %%
def counted(R, T=16, K=4):
    """Requests to shared memory for each multiply-add of a warp, in one block of T x T threads."""
    side = T * R
    small = {"e": rng.standard_normal((side, K), dtype=np.float32), "c": rng.standard_normal((side, K), dtype=np.float32)}
    seen = record(make_blocked_kernel(T, R, K), (1, 1), (T, T), {**small, "z": np.zeros((side, side), np.float32)})
    turns = sum(seen.bank_conflicts(name, write=False).wavefronts for name in ("e_smem", "c_smem"))
    multiply_adds = side * side * K / 32
    return turns / multiply_adds


ratios = {R: counted(R) for R in (1, 2, 4)}
measured.Table(
    ("R", "requests for each multiply-add", "share of the arithmetic that they allow"),
    [(R, ratio, min(1.0, 1 / (4 * ratio))) for R, ratio in ratios.items()],
)

# %%
assert ratios == {1: 2.0, 2: 1.0, 4: 0.5}

# %% [markdown]
# ## The roof
#
# The same argument holds for every level of memory, and is usually drawn as a **roofline**. The *arithmetic intensity* is the
# number of operations for each byte that is read. A multiply-add counts as two operations, so the kernel of lesson 3 makes 2 of
# them for 2 numbers of 4 bytes: 1/4. Left of the knee, memory decides how fast a kernel can be; right of it, arithmetic does.
# The figures are those of the H100's data sheet: 3.35 TB/s, and 67 TFLOP/s ($10^{12}$ operations a second) in float32 without
# tensor cores. The dots say where a kernel would be if all its loads went to memory. Caches can lift it above its dot;
# everything else pulls it down.

# %% jupyter={"source_hidden": true}
bandwidth, peak = 3.35, 67.0  # TB/s, TFLOP/s
kernels = {"lesson 3": 2 / 8, "lesson 4, T = 32": 32 / 4, "lesson 5, tile of 128": 128 / 4}  # FLOP for each byte
intensity = np.geomspace(0.1, 300, 100)
figure, axes = figures.new(6.6, 3.0)
axes.loglog(intensity, np.minimum(peak, bandwidth * intensity), color=figures.light("ink"))
for (name, x), colour in zip(kernels.items(), ("trouble", "c", "survivor"), strict=True):
    y = min(peak, bandwidth * x)
    axes.plot(x, y, "o", color=figures.light(colour))
    axes.annotate(f"{name}\n{y:.3g} TFLOP/s", (x, y), xytext=(8, -22), textcoords="offset points", fontsize=8)
axes.set(
    xlabel="operations for each byte from global memory", ylabel="TFLOP/s", ylim=(0.2, 150), title="What memory allows, H100"
)
figures.show(figure, "Roofline of an H100 in float32, with the kernels of lessons 3 to 5")

# %% [markdown]
# ## The ladder
#
# The shipped kernels (`cce_numba/simt/product.py`) are this kernel with 128 × 128 tiles and $R = 8$, and three more ideas. Each
# was measured on an H100 before the next was tried. The figures are shares of cuBLAS's speed. They are for the forward of
# lesson 6, which does not only multiply, but also makes a log-sum-exp of the logits (`benchmarks/NOTES.md`).

# %% jupyter={"source_hidden": true}
steps = [
    ("128 × 128 tile, 8 × 8 a thread, 16 terms a slice", 0.27),
    ("the next slice is loaded into registers while this one is used", 0.40),
    ("8 terms a slice: no spilled registers, two blocks at a time", 0.44),
    ("the loop over terms unrolled, unsigned indices", 0.61),
    ("not the kernel, the clock: calls timed in a queue", 0.68),
    ("launches straight to the compiled kernel", 0.69),
]
figure, axes = figures.new(7.0, 2.6)
places = np.arange(len(steps))[::-1]
axes.barh(places, [share for _, share in steps], color=figures.light("z"), height=0.62)
for place, (_, share) in zip(places, steps, strict=True):
    axes.text(share + 0.01, place, f"{100 * share:.0f} %", va="center")
axes.set_yticks(places, [name for name, _ in steps])
axes.set(xlim=(0, 1), xlabel="share of cuBLAS's speed, float32", title="Six steps of one kernel")
axes.grid(False, axis="y")
figures.show(figure, "Share of cuBLAS's speed after each of six steps")

# %% [markdown]
# What each step teaches:
#
# * **Loads make you wait.** A load from global memory takes some 500 cycles. In the first version each load stood behind an
#   `if`, and waited for the one before it. Loading the *next* slice into registers before multiplying *this* one hides that
#   time.
# * **Registers are a budget.** 65536 of them are shared by all threads of a multiprocessor. When a thread needs more than it is
#   given, the compiler *spills* to memory. Half the slice made room for two blocks at a time, of which one loads while the
#   other computes.
# * **Integers cost as much as floats.** Who computes an address or counts a loop makes integer instructions: 30 of them for
#   each 64 multiply-adds, as long as the loop over terms was a loop. *Unrolled*, which means written out term by term, it needs
#   few.
# * **Doubt your clock.** The fifth step changed no kernel at all: the calls had been timed one by one, host time and all.
#
# Here is the innermost function as it is shipped. It is the loop body of our kernel; another function writes it out eight
# times. `a_smem` and `b_smem` are the two slices, and a thread has `thread_n` × `thread_v` results, for us $R \times R$. It
# takes its columns in groups of `vector` = 4 neighbours, which one instruction can read. `threads_v` is the number of threads
# along the vocabulary.

# %%
from lessons import shipped

print(shipped.source("accumulate_term"))

# %% [markdown]
# ## Measure it

# %%
here = {}
if machine.has_gpu():
    n, v, d = 1024, 8192, 1024
    random = xp.random.default_rng(0)
    ee, cc = (random.standard_normal((rows, d), dtype=np.float32) for rows in (n, v))
    zz, kernel = xp.empty((n, v), np.float32), make_blocked_kernel(16, 8, 8)
    scale = 2048 * 32768 / (n * v)  # to the recorded shape, to which time is proportional
    here["blocked_kernel"] = scale * machine.gpu_ms(lambda: kernel[(v // 128, n // 128), (16, 16)](ee, cc, zz), 5)
    here["cuBLAS"] = scale * machine.gpu_ms(lambda: xp.matmul(ee, cc.T, out=zz), 5)
recorded = measured.ladder()
measured.Table(
    ("z = e @ c.T, N = 2048, V = 32768, D = 1024, float32", "ms here", f"ms, {recorded.gpu}", f"TFLOP/s, {recorded.gpu}"),
    [(name, here.get(name), ms, 2e-9 * 2048 * 32768 * 1024 / ms) for name, ms in recorded.up_to("blocked_kernel")],
    recorded.source,
)

# %% [markdown]
# Now compare with the paper. Without bank conflicts, lesson 4's kernel was allowed one eighth of the arithmetic, that is 8.4 of
# 67 TFLOP/s. It reached 8.1: shared memory was all that held it back. `blocked_kernel` has that behind it, and is nearly twice
# as fast. What it still lacks are the steps of the ladder.
#
# ## Exercises
#
# 1. A multiprocessor has 65536 registers, and a thread at most 255. A thread with $R \times R$ results needs about $R^2 + 2R +
#    30$. How many threads run at the same time with $R$ = 4, 8 and 12? Why does nobody use $R = 16$?
# 2. Tiles need not be square. How many loads from global memory does a logit take in a tile of 64 × 256, and in one of 128 ×
#    128, which has as many results? What does that say about the tile of 128 × 192 that the tensor-core kernels use (lesson
#    11)?

# %% jupyter={"source_hidden": true}
for side in (4, 8, 12, 16):
    registers = side**2 + 2 * side + 30
    print(
        f"R = {side}: {registers} registers a thread"
        + (f", {65536 // registers} threads" if registers <= 255 else ": too many")
    )
assert 16**2 > 255  # the sums alone are more than a thread can have

for rows, columns in ((64, 256), (128, 128), (128, 192)):
    print(f"{rows} x {columns}: {1 / rows + 1 / columns:.4f} D loads for a logit")
assert 1 / 64 + 1 / 256 > 1 / 128 + 1 / 128  # of tiles with as many results, the square one loads least

# %% [markdown]
# ## What to take away
#
# * Count what each level of memory is asked for, for each multiply-add. The level that is asked too often sets the speed.
# * A tile is blocked twice: in shared memory, so that the block loads once; in registers, so that a thread reads once.
# * The last factor of two is about waiting: load early, keep registers free for a second block, unroll.
#
# Next: [lesson 6](06_the_fused_forward.ipynb). The tile of logits is complete, in registers. Now it need not be stored at all.
