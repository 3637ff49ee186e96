# %% [markdown]
# # 6 · The fused forward: a tile of logits is folded, and gone
#
# Lesson 5 left a tile of logits in the registers of a block. Until now we wrote it to memory. In this lesson you will
#
# * fold it instead, into two numbers a token, by the law of lesson 2,
# * step through the kernel that this package ships, the very same source,
# * see how several blocks share a token's vocabulary, and merge what they found.

# %%
import lessons

machine = lessons.begin()

# %%
import numpy as np

import cce_numba as cce
import reference
from lessons import measured, shipped

xp = machine.array_module()  # CuPy on a GPU (NumPy's functions, for arrays in its memory), else NumPy

# %% [markdown]
# ## NumPy first
#
# Everything so far in two loops. On a GPU, the rounds of the outer one run at the same time: each is a block of threads, and
# has some tokens for itself. The rounds of the inner one are tiles of the vocabulary. They come one after the other, and each
# is used up before the next one comes.


# %%
def fused_lse(e, c, block_n=4, block_v=8):
    """Log-sum-exp of each token; never more than block_n x block_v logits at a time."""
    lse = np.empty(len(e))
    for n0 in range(0, len(e), block_n):  # on a GPU: blocks
        rows = e[n0 : n0 + block_n]
        largest, total = np.full(len(rows), -np.inf), np.zeros(len(rows))
        for v0 in range(0, len(c), block_v):  # in a block: a loop
            tile = rows @ c[v0 : v0 + block_v].T  # lessons 4 and 5
            new = np.maximum(largest, tile.max(axis=1))  # lesson 2
            total = total * np.exp(largest - new) + np.exp(tile - new[:, None]).sum(axis=1)
            largest = new
        lse[n0 : n0 + block_n] = largest + np.log(total)
    return lse


rng = np.random.default_rng(0)
N, V, D = 6, 20, 10
e = rng.standard_normal((N, D), dtype=np.float32)
c = rng.standard_normal((V, D), dtype=np.float32)
targets = rng.integers(0, V, N)
assert np.allclose(fused_lse(e, c), reference.forward(e, c, targets).lse)

# %% [markdown]
# ## The kernel
#
# This is the forward's kernel as it is shipped, in `cce_numba/simt/forward.py`. You know nearly all of it:
#
# * A **CTA** is a block of threads, by NVIDIA's other name for it (*cooperative thread array*). It has `block_n` tokens, and
#   takes tiles of `block_v` entries.
# * `products_tile` is the blocked product of lesson 5, for rows that are picked by number. It leaves the tile in `acc`, in the
#   registers of the block's threads.
# * Then products become logits, which in some models takes a bias for each entry, a scale, or a *softcap* $s$ that bends large
#   logits down, $s \tanh(z / s)$. Columns beyond the last entry become $-\infty$, which adds 0 to a sum of exponentials.
# * `step` folds the tile into the running states of the block's tokens, and `write` writes what is left at the end.
# * In training, some tokens have no target (the padding behind a text, say) and are *ignored*. `tokens.listed` are the numbers
#   of the others, `tokens.n_valid[0]` is how many there are. So ignored tokens cost nothing.
# * Arguments come in *records*, such as `tokens`: named tuples of arrays and numbers.

# %%
print(shipped.source("lse_kernel", "forward"))

# %% [markdown]
# What happens to a tile is not written into the kernel. A **fold** says it, with five functions: `begin` makes a state in
# shared memory, `step` folds a tile into it, and `row` takes out of it what is left of one token; for splits, which come below,
# `merge` makes one of two such rows, and `store` stores the result. The kernel is made for a tuple of folds. The first is
# always the log-sum-exp, with lesson 2's pair (`largest`, `sum`) for each token. Here is its step. A row's logits are spread
# over several threads, so each thread first finds the largest of its own, and says so in `partial`; after a barrier, one thread
# takes the largest of these; then the same for the sums. The thread at (x, y) holds `tile.logits`, `thread_n` rows by
# `thread_v` columns.

# %%
print(shipped.source("step", "folds.max_sum"))

# %% [markdown]
# `lost` is Kahan's sum from lesson 2: what rounding took away is kept, and put back with the next tile.
#
# A second fold is the smallest one there is: whichever thread finds a token's target among its columns stores that logit. So
# the loss, $\text{lse} - z_\text{target}$, takes no second pass. Here is its step; the barrier at the end is for the next fold.

# %%
print(shipped.source("step", "folds.target_logit"))

# %% [markdown]
# ## Step through it
#
# The table at the right is the state of each token: the running max and sum. Watch it when a tile is complete: the maximum
# moves, the sum is rescaled, the exponentials join. When the next tile comes, the logits of the last one are nowhere any more.
# They are drawn as dashed boxes, in memory of them. (Slices lie in shared memory as in lesson 5: a row for each term. The
# columns at their right, which nobody uses, keep threads off each other's banks.)
#
# The green row at the bottom are **survivor bits**, one for each column and block of tokens. A third fold sets them: may this
# column have a probability of at least `filter_eps` for some token of the block? (That is the question of the filter that
# drops; lesson 7 has another.) Lesson 7 says why one wants to know that, and what the third column of the table is for, a
# *bound*: a number that the log-sum-exp is known not to be below.

# %%
walked = shipped.forward(e, c, targets, filter="drop", filter_eps=2.0**-4)
walked

# %% [markdown]
# Three moments of it: the first tile's sums are complete; its maxima are known; the last tile, the others gone.

# %%
first_fold = walked.step_that_writes("row_max", 1)
walked.still(first_fold - 2)

# %%
walked.still(first_fold)

# %%
walked.still(walked.step_that_writes("survivor_bits", 2))

# %% [markdown]
# ## Count
#
# For each tile of $4 \times 8$ logits the block reads 4 rows of $e$ and 8 of $c$, $D$ elements each. There are 3 tiles. Rows of
# $c$ beyond the last entry are read as copies of the last one, and their logits become $-\infty$: that is cheaper than asking
# each time.

# %%
tiles, block_n, block_v = 3, 4, 8
budget = walked.compare(
    e=tiles * block_n * D, c=tiles * block_v * D,
    write_part_max=block_n, write_part_sum=block_n, write_target_logit=block_n, write_survivor_bits=tiles,
)  # fmt: skip
assert budget.holds
budget

# %% [markdown]
# What is written is three numbers for each token (max, sum and the target's logit) and one byte for each tile of eight columns.
# Stored logits would be 80 numbers.
#
# At full size, tiles of 128 tokens by 128 columns read $2D/128$ numbers for each logit. How much memory it takes, the package
# can be asked:

# %%
big_e, big_c = np.zeros((8192, 1), np.float32), np.zeros((131072, 1), np.float32)
plan = cce.explain(big_e, big_c, np.zeros(8192, int), backend="cpu")
print(f"stored logits {plan.stored_logits_bytes / 2**20:,.0f} MiB, survivor bits {plan.survivor_bytes / 2**20:.1f} MiB")

# %% [markdown]
# ## Splits
#
# Blocks of 128 tokens are few when there are few tokens. With $N = 256$ there would be two of them, for 132 multiprocessors. So
# several CTAs share the same block of tokens, and each takes a part of the vocabulary: a **split**. Here two of them share the
# first four tokens, and this is the second. It begins in the middle of the vocabulary, and knows nothing of the first.

# %%
second = shipped.forward(e, c, targets, filter="drop", filter_eps=2.0**-4, split=1, splits=2)
second.still(-2)

# %% [markdown]
# Each split leaves a (max, sum) for each token. A tiny kernel, `finish_kernel`, merges them by the law of lesson 2. Here is
# that merge in NumPy, on what the shipped kernel left in memory:

# %%
largest, total = second.record.results["part_max"], second.record.results["part_sum"]  # (splits, N) each
m, s = reference.merge((largest[0], total[0]), (largest[1], total[1]))
merged = reference.to_lse(m, s)
np.testing.assert_allclose(merged, reference.forward(e, c, targets).lse, rtol=1e-6)
measured.Table(
    ("token", "split 0: max, sum", "split 1: max, sum", "merged: max, sum", "log-sum-exp"),
    [
        (n, *(f"{largest[i, n]:.3f}, {total[i, n]:.3f}" for i in range(2)), f"{m[n]:.3f}, {s[n]:.3f}", f"{merged[n]:.4f}")
        for n in range(4)
    ],
)

# %% [markdown]
# ## Test it
#
# Against the reference, with a bias, a softcap and an ignored token. On a GPU this very cell runs there.

# %%
for N_, V_, D_ in ((6, 20, 10), (4, 8, 4), (1, 1, 1), (5, 17, 3)):
    ee, cc = rng.standard_normal((N_, D_), dtype=np.float32), rng.standard_normal((V_, D_), dtype=np.float32)
    tt, bias = rng.integers(0, V_, N_), rng.standard_normal(V_).astype(np.float32)
    tt[0] = -100 if N_ > 4 else tt[0]  # an ignored token
    options = {"softcap": 4.0, "bias": bias}
    right = reference.forward(ee, cc, tt, **options)
    result = cce.forward(*map(xp.asarray, (ee, cc, tt)), backend="simt", softcap=4.0, bias=xp.asarray(bias))
    np.testing.assert_allclose(machine.to_host(result.lse), right.lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(float(result.loss), right.loss, rtol=1e-5, atol=1e-5)
print("the shipped kernels agree with the reference")

# %% [markdown]
# ## Measure it

# %%
recorded = measured.benchmark("simt_h100")
here = {}
if machine.has_gpu():
    p = recorded["problem"]
    random = xp.random.default_rng(0)
    ee, cc = (random.standard_normal((rows, p["D"]), dtype=np.float32) / p["D"] ** 0.25 for rows in (p["N"], p["V"]))
    tt, zz = random.integers(0, p["V"], p["N"]), xp.empty((p["N"], p["V"]), np.float32)
    here["cuBLAS e @ c.T, fp32"] = machine.gpu_ms(lambda: xp.matmul(ee, cc.T, out=zz))
    here["linear_logsumexp"] = machine.gpu_ms(lambda: cce.linear_logsumexp(ee, cc, backend="simt"))
    here["forward (indexed dot, lse, survivor bits)"] = machine.gpu_ms(lambda: cce.forward(ee, cc, tt, backend="simt"))
names = ("cuBLAS e @ c.T, fp32", "linear_logsumexp", "forward (indexed dot, lse, survivor bits)")
measured.Table(
    ("N = 2048, V = 32768, D = 1024, float32", "ms here", "ms, H100"),
    [(name, here.get(name), recorded["results"][name]["median_ms"]) for name in names],
    measured.source(recorded),
)

# %% [markdown]
# cuBLAS only multiplies, and leaves 268 MB of logits behind, which somebody would have to read again. (The "indexed dot" of the
# last line is a small kernel that computes the target's logit before the first tile, as a bound for the survivor bits.)
#
# ## Exercises
#
# 1. Write another fold in NumPy: the number of the largest logit of each token (what a greedy decoder wants). What is its
#    state, how do two states merge, and what about ties? Test it with two splits.
# 2. An H100 wants about 4 blocks on each of its 132 multiprocessors. How many splits does that make for $N = 256$ and for $N =
#    8192$, with blocks of 128 tokens? Compare with `cce_numba.simt.forward.count_splits`.


# %% jupyter={"source_hidden": true}
def begin(rows):
    return np.full(rows, -np.inf), np.full(rows, -1)


def merge_best(left, right):
    """Of two parts of the vocabulary, in order: the larger logit, and where it stands; of equals, the earlier one."""
    wins = right[0] > left[0]
    return np.where(wins, right[0], left[0]), np.where(wins, right[1], left[1])


def step(state, tile, v0):
    return merge_best(state, (tile.max(axis=1), v0 + tile.argmax(axis=1)))


def best(e, c, splits, block_v=4):
    total = begin(len(e))
    parts = np.array_split(np.arange(0, len(c), block_v), splits)
    for part in parts:
        state = begin(len(e))
        for v0 in part:
            state = step(state, e @ c[v0 : v0 + block_v].T, v0)
        total = merge_best(total, state)
    return total[1]


for splits in (1, 2, 3):
    assert (best(e, c, splits) == reference.logits(e, c).argmax(axis=1)).all()
assert best(np.zeros((1, 3)), np.zeros((9, 3)), 3)[0] == 0  # all are equal: the first, whoever saw it

# Exercise 2: 4 * 132 blocks, shared by N / 128 blocks of tokens.
for tokens in (256, 8192):
    print(f"N = {tokens}: {-(-4 * 132 // (tokens // 128))} splits")

# %% [markdown]
# ## What to take away
#
# * A fold turns a tile of logits into a small state, so a tile lives only as long as it takes to fold it.
# * Blocks that share a token's vocabulary need no talk: their states merge afterwards.
# * This kernel's source runs in a simulator, on any NVIDIA GPU, and in these pictures. The tensor-core kernels (lessons 10 and
#   11) do the same with faster parts.
#
# Next: [lesson 7](07_softmax_is_sparse.ipynb). Most of what the backward could compute is too small to matter, and the forward
# already knows.
