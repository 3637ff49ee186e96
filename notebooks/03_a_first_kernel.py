# %% [markdown]
# # 3 · A first kernel: one thread for each logit
#
# In this lesson you will
#
# * launch a kernel: a grid of blocks of threads, one thread for each logit,
# * count what it reads, with a tool that watches a block of threads at work,
# * find out why the same number of reads can be cheap or dear: memory comes in pieces of 32 bytes.

# %%
import lessons

machine = lessons.begin()

# %%
import numpy as np
from numba import cuda

import reference
from lessons import drawings, measured
from lessons.stepper import Layout, Shown, record, walk

xp = machine.array_module()  # CuPy on a GPU (NumPy's functions, for arrays in its memory), else NumPy

# %% [markdown]
# ## NumPy first
#
# Logits are dot products of rows of `e (N, D)` with rows of `c (V, D)`. Written as three loops:


# %%
def logits_in_loops(e, c):
    N, V, D = len(e), len(c), e.shape[1]
    z = np.zeros((N, V), np.float32)
    for n in range(N):
        for v in range(V):
            for d in range(D):
                z[n, v] += e[n, d] * c[v, d]
    return z


N, V, D = 6, 20, 10
rng = np.random.default_rng(0)
e = rng.standard_normal((N, D), dtype=np.float32)
c = rng.standard_normal((V, D), dtype=np.float32)
assert np.allclose(logits_in_loops(e, c), reference.logits(e, c), atol=1e-5)

# %% [markdown]
# No round of the two outer loops depends on another: every logit could be computed at the same time as every other. That is
# what a GPU is for. An H100 has 132 processors (*streaming multiprocessors*), each of which keeps up to 2048 threads going.
#
# ## Blocks and threads
#
# A kernel is launched over a **grid** of **blocks**, each of which has the same number of **threads**. A block runs on one
# multiprocessor. Blocks run in any order, so they cannot wait for each other; threads of one block can. We cover $z$ with
# blocks of 8 × 4 threads, and give each thread one logit.

# %%
drawings.launch((N, V), (8, 4))

# %% [markdown]
# A thread's two numbers in the picture are its (x, y) within the block.
#
# The kernel is the body of the two outer loops. `cuda.grid(2)` is the thread's position in the whole grid, as (x, y); it is
# `blockIdx.x * blockDim.x + threadIdx.x`, and the same for y. Since the grid is larger than $z$, a thread first asks whether
# there is anything for it to do. `kernel[grid, block](...)` launches a kernel: `grid` says how many blocks, `block` how many
# threads each of them has, both as (x, y).


# %%
@cuda.jit
def naive_kernel(e, c, z):
    """z (N, V) = e (N, D) @ c (V, D).T; one thread for each element of z."""
    v, n = cuda.grid(2)
    if n < z.shape[0] and v < z.shape[1]:
        total = np.float32(0)
        for d in range(e.shape[1]):
            total += e[n, d] * c[v, d]
        z[n, v] = total


block = 8, 4  # threads along x (vocabulary) and y (tokens)
grid = -(-V // block[0]), -(-N // block[1])  # rounded up
z = xp.zeros((N, V), np.float32)
naive_kernel[grid, block](xp.asarray(e), xp.asarray(c), z)
np.testing.assert_allclose(machine.to_host(z), reference.logits(e, c), rtol=1e-4, atol=1e-5)
print("the kernel agrees with the reference")

# %% [markdown]
# ## Watch it
#
# `walk` runs the same source in Numba's simulator, records what the threads of one block read and wrote, and draws it. Click at
# a thread in the picture to see its own reads: one row of $e$ and one row of $c$, that is, one column in the picture, where $c$
# lies on its side so that rows meet columns where their logit is. "e × 320" means that elements of $e$ were read 320 times.
# (You need not learn `Layout`, which says what is drawn where.)

# %%
picture = Layout(
    left=Shown("e", "e"),  # the array, and its colour
    top=Shown("c", "c", turned=True),
    result=("z = e @ c.T", "z"),
    stored=Shown("z", "z"),
)
naive = walk(naive_kernel, grid, block, {"e": e, "c": c, "z": np.zeros_like(e @ c.T)}, picture, block=(1, 0))
naive

# %%
naive.still(0)

# %% [markdown]
# There is only one step, because nobody waits for anybody. Now count. On paper: each of the block's 32 threads reads $D$
# elements of $e$ and $D$ of $c$, and writes one logit.

# %%
budget = naive.compare(e=32 * D, c=32 * D, write_z=32)
assert budget.holds
budget

# %% [markdown]
# So two numbers are loaded for each multiplication. But look at how few *different* ones there are:

# %%
seen = naive.record
print(f"loads {seen.count('e', 'c')}, of different elements {seen.distinct('e', 'c')}")
print(f"an element of e was read {seen.reuse('e'):.0f} times, one of c {seen.reuse('c'):.0f} times")

# %% [markdown]
# Over the whole grid, every element of $e$ is read $V$ times, and every element of $c$ $N$ times. Take a larger problem: $N =
# 2048$ tokens, $V = 32768$ entries, $D = 1024$. How long would all these loads take, if each of them went to the GPU's memory?

# %%
N_, V_, D_ = 2048, 32768, 1024
loads_gb = 2 * N_ * V_ * D_ * 4 / 1e9
inputs_gb = (N_ + V_) * D_ * 4 / 1e9
print(f"{loads_gb:.0f} GB of loads for {1000 * inputs_gb:.0f} MB of inputs")
for gpu, bandwidth in measured.BANDWIDTH.items():
    print(f"{gpu}, which reads {bandwidth} TB a second, says its data sheet: {loads_gb / bandwidth:.0f} ms")

# %% [markdown]
# NVIDIA's own library needs 3 ms for the same product, loads and arithmetic together. A GPU has caches, small memories that
# keep what was read last, and they catch many of the loads. And yet this kernel takes even longer than the loads would at full
# speed: 275 ms on an H200, as you will see below. So it is not only the number of loads that counts.

# %% [markdown]
# ## Memory comes in pieces
#
# 32 threads of a block with neighbouring numbers (first along $x$, then along $y$) are a **warp**. They run the same
# instruction at the same time, and when that is a load, their 32 addresses become one request. Memory answers in pieces of 32
# bytes, eight float32 numbers. If the 32 threads want 32 neighbouring numbers, 4 pieces will do. If they want numbers that are
# far apart, it takes 32 pieces, of which seven eighths are thrown away.
#
# In `naive_kernel`, neighbouring threads have neighbouring $v$. So at each step of the loop they want `c[v, d]`, `c[v + 1, d]`,
# ...: one number of each row, and rows lie one after the other in memory. The cure would be a $c$ that is turned around, `(D,
# V)`: then the same numbers are neighbours in one row. The recorder knows what each warp asked for, so compare both. For this
# picture $c$ has 32 rows of 16.

# %%
warp_e = rng.standard_normal((1, 16), dtype=np.float32)
warp_c = rng.standard_normal((32, 16), dtype=np.float32)


@cuda.jit
def turned_kernel(e, c_turned, z):
    """The same, but c_turned is (D, V): neighbouring threads read neighbouring elements."""
    v, n = cuda.grid(2)
    if n < z.shape[0] and v < z.shape[1]:
        total = np.float32(0)
        for d in range(e.shape[1]):
            total += e[n, d] * c_turned[d, v]
        z[n, v] = total


warp_z = np.zeros((1, 32), np.float32)
plain = record(naive_kernel, (1, 1), (32, 1), {"e": warp_e, "c": warp_c, "z": warp_z})
turned = record(turned_kernel, (1, 1), (32, 1), {"e": warp_e, "c_turned": warp_c.T.copy(), "z": warp_z})
of_c = next(plain.requests("c"))
of_c_turned = next(turned.requests("c_turned"))
drawings.requests(
    [
        ("c (V, D): a request of naive_kernel", "c", (32, 16), of_c.element),
        ("c_turned (D, V): one of turned_kernel", "c", (16, 32), of_c_turned.element),
    ]
)

# %%
for name, seen, array in (("naive_kernel", plain, "c"), ("turned_kernel", turned, "c_turned")):
    pieces, loads = seen.sectors(array), seen.count(array)
    print(f"{name}: {loads} loads of c fetch {pieces} pieces, {32 * pieces / (4 * loads):.1f} bytes for each byte that is used")
assert plain.sectors("c") == 32 * 16
assert turned.sectors("c_turned") == 4 * 16

# %% [markdown]
# For $e$ it is the other way round: all 32 threads want the *same* element `e[n, d]`. That is one piece, told to all of them.
#
# Requests that fall into few pieces are called **coalesced**. We cannot simply turn $c$ around, as it comes from the user as
# `(V, D)`. Lesson 4 finds another way: read it coalesced, along its rows, and turn it in shared memory.
#
# ## Measure it

# %%
here = {}
if machine.has_gpu():
    n, v, d = 1024, 8192, 1024
    random = xp.random.default_rng(0)
    ee, cc = (random.standard_normal((rows, d), dtype=np.float32) for rows in (n, v))
    cc_turned, zz = xp.ascontiguousarray(cc.T), xp.empty((n, v), np.float32)
    sizes = (v // 32, n // 8), (32, 8)
    scale = N_ * V_ / (n * v)  # to the recorded shape, to which time is proportional
    here["naive_kernel"] = scale * machine.gpu_ms(lambda: naive_kernel[sizes](ee, cc, zz), 5)
    here["turned_kernel"] = scale * machine.gpu_ms(lambda: turned_kernel[sizes](ee, cc_turned, zz), 5)
    here["cuBLAS"] = scale * machine.gpu_ms(lambda: xp.matmul(ee, cc_turned, out=zz), 5)
recorded = measured.ladder()
measured.Table(
    ("z = e @ c.T, N = 2048, V = 32768, D = 1024, float32", "ms here", f"ms, {recorded.gpu}"),
    [(name, here.get(name), ms) for name, ms in recorded.up_to("turned_kernel")],
    recorded.source,
)

# %% [markdown]
# Turning $c$ around makes the kernel nearly three times as fast, with the very same loads. (A dash stands for what has not been
# measured.) cuBLAS is NVIDIA's library for matrix products, and the measure of this project: a loss cannot take less than its
# product. It is still some 35 times as fast as `turned_kernel`. Lessons 4 and 5 go most of that way.
#
# ## Exercises
#
# 1. Exchange the roles of x and y in `naive_kernel`, so that neighbouring threads have neighbouring $n$. Predict how many
#    pieces a warp's request for $e$ and for $c$ touches now, then count.
# 2. Write a kernel in which a thread computes the log-sum-exp of a token without storing logits: lesson 2's loop, with a dot
#    product inside. How many loads does it make for each logit?

# %% jupyter={"source_hidden": true}
import math


@cuda.jit
def exchanged_kernel(e, c, z):
    n, v = cuda.grid(2)
    if n < z.shape[0] and v < z.shape[1]:
        total = np.float32(0)
        for d in range(e.shape[1]):
            total += e[n, d] * c[v, d]
        z[n, v] = total


# Now 32 threads want e[n, d] for 32 rows n: 32 pieces, and all of them the same c[v, d]: one piece.
exchanged = record(exchanged_kernel, (1, 1), (32, 1), {"e": warp_c, "c": warp_e, "z": warp_z.T.copy()})
assert exchanged.sectors("e") == 32 * 16
assert exchanged.sectors("c") == 16


@cuda.jit
def lse_kernel(e, c, lse):
    n = cuda.grid(1)
    if n < e.shape[0]:
        m, s = np.float32(-math.inf), np.float32(0)
        for v in range(c.shape[0]):
            x = np.float32(0)
            for d in range(e.shape[1]):
                x += e[n, d] * c[v, d]
            if x > m:
                s = s * math.exp(m - x) + np.float32(1)
                m = x
            elif x != -math.inf:
                s += math.exp(x - m)
        lse[n] = m + math.log(s) if s > 0 else s + m


# As many loads a logit as before, 2 * D. But nothing is written except N numbers.
lse = xp.empty(N, np.float32)
lse_kernel[1, 8](xp.asarray(e), xp.asarray(c), lse)
np.testing.assert_allclose(machine.to_host(lse), reference.logsumexp(reference.logits(e, c)), rtol=1e-5)
print("exercise 1: 32 and 1 pieces, where it was 1 and 32; exercise 2:", machine.to_host(lse).round(3))

# %% [markdown]
# ## What to take away
#
# * A kernel says what one thread does; a launch says how many there are. Every 32 neighbouring threads of a block are a warp.
# * One thread a logit needs two loads for every multiplication. The arithmetic waits for memory.
# * Neighbouring threads should read neighbouring addresses.
#
# Next: [lesson 4](04_tiles_in_shared_memory.ipynb), where the threads of a block fetch together what they all need.
