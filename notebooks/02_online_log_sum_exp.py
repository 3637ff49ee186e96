# %% [markdown]
# # 2 · Online log-sum-exp: a sum that never overflows, in any order
#
# Lesson 1 needs $\log \sum_v e^{z_v}$ of each row of logits, one tile of the row at a time. In this lesson you will
#
# * see where float32 breaks, and why everybody subtracts the maximum,
# * do without knowing the maximum in advance: a running pair (max, sum),
# * find that such pairs merge in any order, which is what lets a GPU share out the work.

# %%
import lessons

machine = lessons.begin()

# %%
import math

import numpy as np
from numba import cuda

import reference
from lessons import drawings, figures, measured

xp = machine.array_module()  # CuPy on a GPU (NumPy's functions, for arrays in its memory), else NumPy

# %% [markdown]
# ## Where float32 breaks
#
# GPUs compute in float32, numbers of 32 bits. float32 ends at $3.4 \cdot 10^{38}$, and $e^{89}$ is beyond that. It also has a
# smallest positive number, about $10^{-45}$, so $e^{-104}$ is 0. Logits of real models reach 30, and nothing keeps them from
# reaching 100.


# %%
def naive_lse(z):
    return np.log(np.exp(z).sum(axis=-1))


def safe_lse(z):
    top = z.max(axis=-1, keepdims=True)
    return np.log(np.exp(z - top).sum(axis=-1)) + top[..., 0]


row = np.array([1.0, 2.0, 3.0], np.float32)
with np.errstate(all="ignore"):
    for shift in (0, 100, -120):
        z = row + np.float32(shift)
        print(f"logits {z}: naive {naive_lse(z):.3f}, safe {safe_lse(z):.3f}, truth {reference.logsumexp(z):.3f}")

# %% [markdown]
# Subtracting the maximum $m$ changes nothing in mathematics, since $\log \sum e^{z_v} = m + \log \sum e^{z_v - m}$. On a
# computer it changes everything: the largest term is now $e^0 = 1$, so the sum lies between 1 and $V$. Terms that vanish were
# too small to matter.

# %% jupyter={"source_hidden": true}
shifts = np.linspace(-140, 140, 561).astype(np.float32)
z = row + shifts[:, None]
with np.errstate(all="ignore"):
    naive = naive_lse(z).astype(np.float64)
naive[~np.isfinite(naive)] = np.nan
figure, axes = figures.new(6.6, 2.6)
axes.plot(shifts, safe_lse(z), color=figures.light("z"), label="maximum subtracted")
axes.plot(shifts, naive, "--", color=figures.light("trouble"), label="naive, where it is a number at all")
axes.axvspan(85.5, 140, color=figures.light("trouble"), alpha=0.1, lw=0)
axes.axvspan(-140, -106, color=figures.light("trouble"), alpha=0.1, lw=0)
axes.text(112, -60, "overflows", ha="center")
axes.text(-123, 60, "all terms\nare 0", ha="center")
axes.set(xlabel="added to the logits 1, 2, 3", ylabel="log-sum-exp", title="float32 has an upper and a lower end")
axes.legend(loc="lower right", bbox_to_anchor=(0.82, 0.02))
figures.show(figure, "Log-sum-exp of shifted logits, naive and safe")

# %% [markdown]
# ## Without knowing the maximum in advance
#
# The maximum of a row is known when the whole row has been seen, and we do not want to keep it until then. So keep two numbers:
# $m$, the largest logit so far, and $s$, the sum of $e^{z - m}$ so far. When a larger logit turns up, the old sum is rescaled:
#
# $$ m' = \max(m, z), \qquad s' = s\, e^{m - m'} + e^{z - m'} $$
#
# Begin with $m = -\infty$ and $s = 0$. In the end $\text{lse} = m + \log s$.


# %%
def fold(state, tile):
    """The state (m, s) after one more tile of logits."""
    m, s = state
    larger = max(m, tile.max())
    return larger, s * math.exp(m - larger) + np.exp(tile - larger).sum()


logits = np.array([1.0, 0.0, 3.0, -2.0, 2.0, 5.0, 4.0, 1.0])
tiles = logits.reshape(4, 2)
state, history = (-math.inf, 0.0), []
for tile in tiles:
    state = fold(state, tile)
    history.append(state)

m, s = state
assert np.isclose(m + math.log(s), reference.logsumexp(logits))
drawings.states(tiles.tolist(), history)

# %% [markdown]
# Watch the third tile: 5 is larger than all before it, so the old sum shrinks by $e^{3-5}$ before the new terms join.
#
# ## The merge law
#
# Two workers may each have seen a part of the row. Their states $(m_1, s_1)$ and $(m_2, s_2)$ merge by the same rule. Write
# $\oplus$ for "merged with", and $M$ for the larger of the two maxima:
#
# $$ (m_1, s_1) \oplus (m_2, s_2) = \big(M,\; s_1 e^{m_1 - M} + s_2 e^{m_2 - M}\big), \qquad M = \max(m_1, m_2) $$
#
# A single logit is the state $(z, 1)$, no logits at all are $(-\infty, 0)$. The law does not care about order or grouping. Here
# are a thousand random ways to fold one row: it is cut in pieces, and neighbours merge in random order until one state is left.

# %%
rng = np.random.default_rng(0)
row = (rng.standard_normal(64) * 2).astype(np.float32)
truth = float(reference.logsumexp(row))


def merge(left, right):
    top = max(left[0], right[0])
    return top, left[1] * np.exp(left[0] - top) + right[1] * np.exp(right[0] - top)


def folded_at_random():
    states = [(z, np.float32(1)) for z in row]
    while len(states) > 1:
        i = rng.integers(len(states) - 1)
        states[i : i + 2] = [merge(states[i], states[i + 1])]
    ((m, s),) = states
    return float(m + np.log(s))


found = np.array([folded_at_random() for _ in range(1000)])
assert np.abs(found - truth).max() < 1e-5
print(f"truth {truth:.8f}, a thousand orders: from {found.min():.8f} to {found.max():.8f}")

# %% [markdown]
# The results differ in the last digits: float32 sums are rounded, and rounding does depend on the order. That matters later:
# this package always adds in the same order, so that the same inputs give the same bits (lesson 8).
#
# ## Rounding in long sums
#
# A vocabulary may have 256 000 entries. Adding that many terms one by one in float32 loses digits: float32 keeps 24 binary
# digits of the sum, and what a small term has beyond them is rounded away. There are two remedies, and the shipped kernels have
# both. Add in tiles first, which makes a sum of sums. And keep what rounding took away, to put it back with the next tile: that
# is Kahan's sum. (In the kernel the variable is called `lost`.)


# %%
def one_by_one(terms):
    return np.cumsum(terms, dtype=np.float32)[-1]  # cumsum adds in order, where np.sum would pair terms up


def in_tiles(terms, tile=128):
    return one_by_one(np.array([one_by_one(part) for part in np.array_split(terms, -(-len(terms) // tile))], np.float32))


def kahan(terms, tile=128):
    total = lost = np.float32(0)
    for part in np.array_split(terms, -(-len(terms) // tile)):
        more = one_by_one(part) - lost
        new = total + more
        lost = (new - total) - more  # what did not fit into the digits of `new`
        total = new
    return total


ways = {"one by one": one_by_one, "in tiles": in_tiles, "in tiles, with Kahan's sum": kahan}
sizes = [2**k for k in range(8, 19)]
errors = {name: [] for name in ways}
for V in sizes:
    terms = [rng.random(V, dtype=np.float32) for _ in range(4)]
    for name, way in ways.items():
        errors[name].append(np.mean([abs(float(way(t)) / t.sum(dtype=np.float64) - 1) for t in terms]))
assert errors["in tiles"][-1] < errors["one by one"][-1]

# %% jupyter={"source_hidden": true}
figure, axes = figures.new(6.6, 2.8)
for (name, values), colour in zip(errors.items(), ("trouble", "c", "survivor"), strict=True):
    axes.loglog(sizes, np.maximum(values, 1e-9), "o-", ms=3.5, color=figures.light(colour), label=name)
axes.axhline(2**-24, color=figures.light("quiet"), lw=0.8)
beside = {"transform": axes.get_yaxis_transform(), "va": "center", "color": figures.light("quiet")}
axes.text(1.01, 2**-24, "rounding\nonce: $2^{-24}$", **beside)
axes.set(xlabel="terms in the sum, V", ylabel="relative error", title="What rounding does to long float32 sums")
axes.legend()
figures.show(figure, "Relative error of float32 sums by length, added in three ways")

# %% [markdown]
# ## As a kernel
#
# A **kernel** is a function that very many threads of a GPU run at the same time. `@cuda.jit` makes one out of a Python
# function. Here each thread takes one row, and asks for its own number with `cuda.grid(1)`. Lesson 3 explains how threads are
# launched; for now read it as the body of a loop over rows. (`[1, 8]` launches one block of eight threads, of which five have a
# row.) A kernel returns nothing: it writes its results into an array that it is given. `np.float32(0)` instead of `0.0` keeps
# Numba from computing in float64, Python's own numbers.


# %%
@cuda.jit
def online_lse_kernel(z, lse):
    """lse (N,) = log-sum-exp of each row of z (N, V), in one pass; one thread a row."""
    n = cuda.grid(1)
    if n < z.shape[0]:
        m, s = np.float32(-math.inf), np.float32(0)
        for v in range(z.shape[1]):
            x = z[n, v]
            if x > m:
                s = s * math.exp(m - x) + np.float32(1)
                m = x
            elif x != -math.inf:  # its term is 0, and -inf - -inf would be NaN
                s += math.exp(x - m)
        lse[n] = m + math.log(s) if s > 0 else s + m


z = (rng.standard_normal((5, 40)) * 30).astype(np.float32)
z[1] += 1000  # would overflow
z[2] = -math.inf  # an empty sum
z[3, 7] = math.nan  # must not get lost
lse = xp.empty(5, np.float32)
online_lse_kernel[1, 8](xp.asarray(z), lse)
machine.to_host(lse)

# %%
np.testing.assert_allclose(machine.to_host(lse), reference.logsumexp(z.astype(np.float64)), rtol=1e-6)

# %% [markdown]
# Two details of that kernel are worth a look. NaN fails every comparison, so it is never a maximum, but it does enter the sum:
# a wrong number is not hidden. And a row of nothing but $-\infty$ gives $-\infty$, as it should.
#
# ## Measure it
#
# Reading stored logits once, and not once for the maximum and once more for the sum, is what the online form was invented for
# ([Milakov and Gimelshein, 2018](https://arxiv.org/abs/1805.02867)). Here it is something else: a tile of logits is needed
# once, so it need not be stored at all. What that is worth, you will see in lesson 6. The time of this little kernel mostly
# shows how *not* to use a GPU: few threads, each reading far from its neighbours. It takes some two hundred times as long as
# the GPU's memory needs to deliver the logits. Why that is so, lesson 3 explains.

# %%
N, V = 1024, 32768
recorded = measured.lesson("ladder")
gpu = measured.gpu(recorded)
bandwidth = measured.BANDWIDTH[gpu]
if machine.has_gpu():
    many = xp.random.default_rng(0).standard_normal((N, V), dtype=np.float32)
    out = xp.empty(N, np.float32)
    here = machine.gpu_ms(lambda: online_lse_kernel[N // 64, 64](many, out))
else:
    here = None
measured.Table(
    ("log-sum-exp of stored logits, 1024 × 32768", "ms here", f"ms, {gpu}"),
    [
        ("one thread a row", here, recorded["online_lse_ms"]),
        (f"reading them once at {bandwidth} TB/s, the {gpu}'s data sheet", None, 1e3 * N * V * 4 / (1e12 * bandwidth)),
    ],
    measured.source(recorded),
)

# %% [markdown]
# ## Exercises
#
# 1. GPUs have an instruction for $2^x$, but none for $e^x$. Rewrite `fold` so that it uses `np.exp2` alone, and find out at
#    which single place the logits must be multiplied by $\log_2 e$, and what has to be undone in the end.
# 2. Merging must have a neutral state. Show with the law that $(-\infty, 0)$ is one, and find where the law as written gives
#    NaN.

# %% jupyter={"source_hidden": true}
LOG2_E = math.log2(math.e)


def fold2(state, tile):
    """In base 2: m is the largest logit times log2(e), s the sum of 2^(z log2(e) - m)."""
    m, s = state
    tile = tile * LOG2_E  # the only place
    larger = max(m, tile.max())
    return larger, s * np.exp2(m - larger) + np.exp2(tile - larger).sum()


state = (-math.inf, 0.0)
for tile in tiles:
    state = fold2(state, tile)
m, s = state
assert np.isclose((m + np.log2(s)) / LOG2_E, reference.logsumexp(logits))  # undone: back to the natural logarithm

# Exercise 2: with (m, s) and (-inf, 0), M = m, and the second term is 0 * e^-inf = 0. But if both are (-inf, 0), M = -inf, and
# -inf - -inf is NaN: an empty state must be looked for. reference.merge anchors the exponentials at 0 there.
none = (np.array([-math.inf]), np.array([0.0]))
with np.errstate(invalid="ignore"):
    assert np.isnan(merge(none, none)[1])
assert reference.merge(none, none)[1] == 0
print("exercise 1:", (m + np.log2(s)) / LOG2_E, "  exercise 2:", reference.merge(none, none))

# %% [markdown]
# ## What to take away
#
# * Two numbers per row, (max, sum), hold all that a log-sum-exp needs of the logits seen so far.
# * They merge in any order: over tiles, over threads, over parts of the vocabulary, over GPUs.
# * Float32 is enough, if the maximum is subtracted and long sums are added in tiles.
#
# Next: [lesson 3](03_a_first_kernel.ipynb), a first kernel for the logits themselves.
