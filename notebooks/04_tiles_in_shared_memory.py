# %% [markdown]
# # 4 · Tiles in shared memory: fetch once, use many times
#
# In lesson 3 every thread fetched for itself what its neighbours fetched as well. In this lesson you will
#
# * let the threads of a block fetch together, into memory that they share,
# * step through the kernel from barrier to barrier, and see why it needs two barriers,
# * take one away and watch what a race looks like,
# * meet the banks of shared memory, and the oldest trick of GPU programmers: one column too many.

# %%
import lessons

machine = lessons.begin()

# %%
import numpy as np
from numba import cuda

import reference
from lessons import drawings, measured
from lessons.edited import edited
from lessons.stepper import Layout, Shown, record, walk

xp = machine.array_module()  # CuPy on a GPU (NumPy's functions, for arrays in its memory), else NumPy

# %% [markdown]
# ## On paper
#
# Give a block a **tile** of $T \times T$ logits, for $T$ tokens and $T$ entries. It needs $T$ rows of $e$ and $T$ rows of $c$,
# of $D$ numbers each. Each of these numbers is needed $T$ times: an element of $e$ by all logits of its row, an element of $c$
# by all of its column.

# %%
drawings.sharing()

# %% [markdown]
# If the block fetches each element once, that makes $2\,T\,D$ loads for $T^2$ logits: **$2D/T$ loads for each logit**, where
# lesson 3 had $2D$. With $T = 32$ that is one thirty-second of them.
#
# ## NumPy first
#
# Rows may be long, and the memory that threads share is small. So the sum over $d$ is cut into **slices** of $T$ terms, and
# only one slice of the rows is fetched at a time.


# %%
def tile_of_logits(e, c, n0, v0, T):
    """The logits of tokens n0 to n0 + T and entries v0 to v0 + T."""
    total = np.zeros((T, T), np.float32)
    for d0 in range(0, e.shape[1], T):
        e_smem = e[n0 : n0 + T, d0 : d0 + T]  # a slice of each, fetched once ...
        c_smem = c[v0 : v0 + T, d0 : d0 + T]
        total += e_smem @ c_smem.T  # ... and used T times
    return total


rng = np.random.default_rng(0)
e = rng.standard_normal((8, 12), dtype=np.float32)
c = rng.standard_normal((8, 12), dtype=np.float32)
assert np.allclose(tile_of_logits(e, c, 4, 0, T=4), reference.logits(e, c)[4:8, 0:4], atol=1e-5)

# %% [markdown]
# ## The kernel
#
# `cuda.shared.array` is memory on the multiprocessor itself: some 20 times faster than the GPU's main memory, up to 227 KB, and
# seen by all threads of a block. `cuda.syncthreads()` is a **barrier**: no thread goes on before all threads of the block have
# come there.
#
# In this project, names that end in `_smem` stand for shared memory. The thread at (x, y) of the block computes one logit, in
# row y and column x of the tile, and fetches one element of each slice. Tiles at the edge of $z$ are not full. Where there is
# nothing to fetch, a thread puts a zero into shared memory, which adds nothing to the sums.


# %%
def make_tiled_kernel(T, unused=0):
    """The kernel for tiles of T x T, launched with blocks of T x T threads. Rows of c_smem have some unused elements."""
    width = T + unused  # Numba wants sizes of shared arrays that it knows when it compiles, so not "T + unused" below

    @cuda.jit
    def tiled_kernel(e, c, z):
        """z (N, V) = e (N, D) @ c (V, D).T"""
        e_smem = cuda.shared.array((T, T), np.float32)
        c_smem = cuda.shared.array((T, width), np.float32)
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        n0, v0 = cuda.blockIdx.y * T, cuda.blockIdx.x * T
        N, V, D = e.shape[0], c.shape[0], e.shape[1]
        total = np.float32(0)
        for d0 in range(0, D, T):
            e_smem[y, x] = e[n0 + y, d0 + x] if n0 + y < N and d0 + x < D else np.float32(0)
            c_smem[y, x] = c[v0 + y, d0 + x] if v0 + y < V and d0 + x < D else np.float32(0)
            cuda.syncthreads()  # all of the slice is there
            for k in range(T):
                total += e_smem[y, k] * c_smem[x, k]
            cuda.syncthreads()  # nobody needs it any more
        if n0 + y < N and v0 + x < V:
            z[n0 + y, v0 + x] = total

    return tiled_kernel


T = 4  # tiny, for the picture
tiled_kernel = make_tiled_kernel(T)


def logits(kernel, T, e, c):
    """Launches a kernel with a block of T x T threads for each tile of z."""
    z = xp.full((len(e), len(c)), np.nan, np.float32)
    kernel[(-(-len(c) // T), -(-len(e) // T)), (T, T)](xp.asarray(e), xp.asarray(c), z)
    return machine.to_host(z)


for N, V, D in ((4, 8, 8), (6, 9, 10), (3, 2, 5), (5, 4, 1)):  # whole tiles, ragged ones, less than one
    e, c = rng.standard_normal((N, D), dtype=np.float32), rng.standard_normal((V, D), dtype=np.float32)
    np.testing.assert_allclose(logits(tiled_kernel, T, e, c), reference.logits(e, c), rtol=1e-4, atol=1e-5)
print("it agrees with the reference")

# %% [markdown]
# ## Step through it
#
# The slider goes from barrier to barrier. Follow a slice of $e$ from the matrix into `e_smem`; then the sums grow by four terms
# each; then the next slice takes its place. Click at a thread: it *writes* one element of each slice, but *reads* a whole row
# of both. (In `Layout`, `held` are the variables of a thread at a barrier: what is drawn of its registers.)

# %%
N, V, D = 6, 9, 10
e, c = rng.standard_normal((N, D), dtype=np.float32), rng.standard_normal((V, D), dtype=np.float32)
layout = Layout(
    left=Shown("e", "e"),
    top=Shown("c", "c", turned=True),
    result=("z = e @ c.T", "z"),
    sums=lambda held, x, y: [(held["n0"] + y, held["v0"] + x, held["total"])],
    stored=Shown("z", "z"),
    shared=[Shown("e_smem", "e", words=1), Shown("c_smem", "c", words=1)],
    tile=lambda held: [(held["n0"], held["v0"], T, T)],
    say={
        "e_smem": "Each thread fetches one element of e and one of c",
        "z": "Each thread writes its sum, if its logit exists",
    },
    say_read={"e_smem": "The sums grow by the terms of the slice"},
)


def step_through(kernel, block=(1, 0)):
    z = np.zeros((N, V), np.float32)
    return walk(kernel, (-(-V // T), -(-N // T)), (T, T), {"e": e, "c": c, "z": z}, layout, block)


tiled = step_through(tiled_kernel)
tiled

# %% [markdown]
# Two steps of it, for places where the slider does not move: the second slice arrives, then it is used.

# %%
tiled.still(2)

# %%
tiled.still(3)

# %% [markdown]
# ## Count
#
# On paper, for this block: $T$ rows of $e$ and of $c$ travel once, $2 T D$ loads. In shared memory, each of the $T^2$ threads
# reads $2T$ numbers for each of the $\lceil D/T \rceil$ slices.

# %%
slices = -(-D // T)
budget = tiled.compare(e=T * D, c=T * D, write_e_smem=T * T * slices, e_smem=T**3 * slices, c_smem=T**3 * slices, write_z=T * T)
assert budget.holds
budget

# %%
seen = tiled.record
print(f"global loads for each logit: {seen.count('e', 'c') / T**2:.0f}; in lesson 3 it was {2 * D}")
print(f"loads of an element of e: {seen.reuse('e'):.0f}; reads of a staged one: {seen.reuse('e_smem') / slices:.0f}")

# %% [markdown]
# ## Why two barriers
#
# Take the first one away. Threads then begin to multiply while others are still fetching. On a GPU the result may even be
# right, by luck. The recorder does not need luck: it knows that, with no barrier in between, one thread wrote an element and
# another read it. Such a **race** is drawn in red.

# %%
one_barrier = step_through(edited(tiled_kernel, "cuda.syncthreads()  # all of the slice is there", "pass"))
print(f"{len(one_barrier.record.races())} races, the first of them: {one_barrier.record.races()[0]}")
one_barrier.still(0)

# %% [markdown]
# The second barrier looks less needed, and it is not: without it, a fast thread fetches the next slice while a slow one still
# reads this one.

# %%
late = step_through(edited(tiled_kernel, "cuda.syncthreads()  # nobody needs it any more", "pass"))
steps = sorted({race.step for race in late.record.races()})
print("races in steps", [step + 1 for step in steps])
assert steps
assert not tiled.record.races()
late.still(steps[0])

# %% [markdown]
# A wrong tile is seen as well. Here the block takes its rows of $e$ by `blockIdx.x`, where `blockIdx.y` belongs: the rows that
# are touched are not those in the frame.

# %%
wrong = step_through(edited(tiled_kernel, "e[n0 + y, d0 + x] if n0 + y < N", "e[v0 + y, d0 + x] if v0 + y < N"))
wrong.still(0)

# %% [markdown]
# ## Banks
#
# Shared memory has 32 **banks**. Word $i$ (4 bytes) lies in bank $i \bmod 32$, and each bank serves one word at a time. If the
# 32 threads of a warp want words of 32 different banks, they are served at once; the same word may go to many. But if they want
# different words of one bank, they wait for each other.
#
# In the kernel above, `c_smem[x, k]` is such a case, once tiles are as wide as a warp: threads with neighbouring $x$ read words
# that are $T = 32$ apart. All of these lie in one bank. The cure costs 128 bytes: rows of 33, of which the last element is
# never used.


# %%
@cuda.jit
def rows_of_32_kernel(out):
    c_smem = cuda.shared.array((32, 32), np.float32)
    x = cuda.threadIdx.x
    out[x] = c_smem[x, 5]


@cuda.jit
def rows_of_33_kernel(out):
    c_smem = cuda.shared.array((32, 33), np.float32)
    x = cuda.threadIdx.x
    out[x] = c_smem[x, 5]


out = {"out": np.zeros(32, np.float32)}
plain, padded = record(rows_of_32_kernel, 1, 32, out), record(rows_of_33_kernel, 1, 32, out)
assert plain.bank_conflicts("c_smem").worst == 32
assert padded.bank_conflicts("c_smem").worst == 1
drawings.banks(
    [
        ("c_smem (32, 32): a column", plain.of("c_smem").element, 32 * 32),
        ("c_smem (32, 33): a column", padded.of("c_smem").element, 32 * 33),
    ]
)

# %% [markdown]
# ## Measure it
#
# `padded_kernel` is `tiled_kernel` with rows of 33 words in `c_smem`.


# %%
np.testing.assert_allclose(logits(make_tiled_kernel(4, unused=1), 4, e, c), reference.logits(e, c), rtol=1e-4, atol=1e-5)

here = {}
if machine.has_gpu():
    n, v, d = 1024, 8192, 1024
    random = xp.random.default_rng(0)
    ee, cc = (random.standard_normal((rows, d), dtype=np.float32) for rows in (n, v))
    zz, sizes = xp.empty((n, v), np.float32), ((v // 32, n // 32), (32, 32))
    scale = 2048 * 32768 / (n * v)  # to the recorded shape, to which time is proportional
    for name, kernel in (("tiled_kernel", make_tiled_kernel(32)), ("padded_kernel", make_tiled_kernel(32, unused=1))):
        here[name] = scale * machine.gpu_ms(lambda kernel=kernel: kernel[sizes](ee, cc, zz), 5)
recorded = measured.ladder()
measured.Table(
    ("z = e @ c.T, N = 2048, V = 32768, D = 1024, float32", "ms here", f"ms, {recorded.gpu}"),
    [(name, here.get(name), ms) for name, ms in recorded.up_to("padded_kernel")],
    recorded.source,
)

# %% [markdown]
# Read the table from above. `tiled_kernel` loads a thirty-second of what lesson 3's `turned_kernel` loads, and wins little by
# it, since its threads queue for one bank. One unused column ends that: 74 -> 17 ms on an H200.
#
# ## Exercises
#
# 1. How many loads from global memory does a logit take with $T$ = 8, 16 and 32, and how much shared memory does a block need
#    then? Check one of your numbers with the recorder.
# 2. Write the kernel with **one** barrier a slice, without a race. Hint: with two buffers, a slice can be fetched into one
#    while the other is still being read.

# %% jupyter={"source_hidden": true}
# Exercise 1: 2 D / T loads, and two tiles of T * T float32 numbers.
for tile in (8, 16, 32):
    print(f"T = {tile}: {2 / tile:.4f} D loads for a logit, {2 * 4 * tile**2} bytes of shared memory")
big_e, big_c = rng.standard_normal((8, 16), dtype=np.float32), rng.standard_normal((8, 16), dtype=np.float32)
eight = record(make_tiled_kernel(8), (1, 1), (8, 8), {"e": big_e, "c": big_c, "z": np.zeros((8, 8), np.float32)})
assert eight.count("e", "c") / 64 == 2 / 8 * 16


# Exercise 2: a thread that is ahead writes to the other buffer. It cannot be two slices ahead: a barrier stands between.
def make_two_buffers_kernel(T):
    @cuda.jit
    def two_buffers_kernel(e, c, z):
        e_smem = cuda.shared.array((2, T, T), np.float32)
        c_smem = cuda.shared.array((2, T, T), np.float32)
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        n0, v0 = cuda.blockIdx.y * T, cuda.blockIdx.x * T
        N, V, D = e.shape[0], c.shape[0], e.shape[1]
        total = np.float32(0)
        for d0 in range(0, D, T):
            buffer = d0 // T % 2
            e_smem[buffer, y, x] = e[n0 + y, d0 + x] if n0 + y < N and d0 + x < D else np.float32(0)
            c_smem[buffer, y, x] = c[v0 + y, d0 + x] if v0 + y < V and d0 + x < D else np.float32(0)
            cuda.syncthreads()
            for k in range(T):
                total += e_smem[buffer, y, k] * c_smem[buffer, x, k]
        if n0 + y < N and v0 + x < V:
            z[n0 + y, v0 + x] = total

    return two_buffers_kernel


np.testing.assert_allclose(logits(make_two_buffers_kernel(4), 4, e, c), reference.logits(e, c), rtol=1e-4, atol=1e-5)
two = record(make_two_buffers_kernel(4), (3, 2), (4, 4), {"e": e, "c": c, "z": np.zeros((N, V), np.float32)})
assert not two.races()
print(f"exercise 2: {two.steps - 1} barriers instead of {tiled.record.steps - 1}, and no race")

# %% [markdown]
# ## What to take away
#
# * A block that fetches a tile together loads each element once: $2D/T$ loads a logit.
# * Whoever writes to shared memory for others needs a barrier before they read, and another before it is overwritten.
# * Races may give right results for years. Look for them; do not wait for them.
# * Words that a warp wants at once should lie in different banks. A padded row does it.
#
# Next: [lesson 5](05_register_blocking.ipynb). Global memory is quiet now, and shared memory has become the busy one.
