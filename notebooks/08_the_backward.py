# %% [markdown]
# # 8 · The backward: three products, and one owner for each result
#
# The forward left a log-sum-exp for each token, and bits that say which columns matter. In this lesson you will
#
# * derive the gradients, and see that they are three matrix products,
# * step through the kernels that compute them: logits again, rows of $c$ that are picked by number,
# * learn why no two blocks ever add to the same number, and see what happens if they do.

# %%
import lessons

machine = lessons.begin()

# %%
import numpy as np
from numba import cuda

import cce_numba as cce
import reference
from lessons import measured, shipped

xp = machine.array_module()  # CuPy on a GPU, else NumPy

# %% [markdown]
# ## NumPy first
#
# The loss of a token is $\text{lse} - z_\text{target}$. The derivative of a log-sum-exp is the softmax, and that of the
# target's logit is 1 at the target and 0 elsewhere. So the gradient with respect to the logits is
#
# $$ G = \text{softmax}(z) - \text{onehot}(\text{target}) $$
#
# and since $z = e\,c^\top$, the chain rule gives the rest as two products:
#
# $$ dE = G\, c \qquad\qquad dC = G^\top e $$

# %%
rng = np.random.default_rng(0)
N, V, D = 6, 16, 10
e = rng.standard_normal((N, D), dtype=np.float32)
c = rng.standard_normal((V, D), dtype=np.float32)
targets = rng.integers(0, V, N)


def plain_gradients(e, c, targets):
    G = reference.softmax(e @ c.T) - reference.onehot(targets, len(c))  # (N, V): stored!
    return G @ c, G.T @ e


d_e, d_c = plain_gradients(e, c, targets)
right = reference.backward(e, c, targets, reduction="sum")
np.testing.assert_allclose(d_e, right.e, atol=1e-5)
np.testing.assert_allclose(d_c, right.c, atol=1e-5)

# %% [markdown]
# Do not believe a formula, nudge it: one element of $e$ a little up and a little down, and the loss must change by what the
# gradient says.


# %%
def loss_with(nudge):
    nudged = e.astype(np.float64)
    nudged[2, 3] += nudge
    return reference.forward(nudged, c, targets, reduction="sum").loss


slope = (loss_with(1e-4) - loss_with(-1e-4)) / 2e-4
print(f"nudged {slope:.6f}, by the formula {right.e[2, 3]:.6f}")
assert np.isclose(slope, right.e[2, 3], atol=1e-6)

# %% [markdown]
# $G$ is as large as the logits. So it is made in **chunks** of the vocabulary, out of logits that are computed once more, and
# only where a column survives. A chunk gives its rows of $dC$ completely, since all tokens are there. To $dE$ it adds its
# share.


# %%
def chunked_gradients(e, c, targets, lse, chunk=8):
    d_e, d_c = np.zeros(e.shape), np.zeros(c.shape)
    for v0 in range(0, len(c), chunk):
        some = slice(v0, v0 + chunk)
        G = np.exp(e @ c[some].T - lse[:, None])  # 1. logits again: softmax needs no second pass, lse is known
        G -= targets[:, None] == np.arange(v0, v0 + len(c[some]))
        d_c[some] = G.T @ e  # 2. complete
        d_e += G @ c[some]  # 3. a share
    return d_e, d_c


lse = reference.forward(e, c, targets).lse
for chunked, plain in zip(chunked_gradients(e, c, targets, lse), (d_e, d_c), strict=True):
    np.testing.assert_allclose(chunked, plain, atol=1e-5)

# %% [markdown]
# ## First product: G
#
# This is `gradient_of_logits_kernel` of the package. It is lesson 6's product again, but the rows of $c$ are **gathered**: the
# block has a list of the columns that the forward flagged, made of the survivor bits, and takes eight of them at a time,
# wherever they are. At the end each sum becomes a logit $z$, and each logit an element of $G$. With lesson 2's maximum $m$ and
# sum $s$, its softmax is $e^{(z - m) - \log s}$. The forward left $m$ and $\log s$ apart for that. Added up, they would be
# rounded: where logits are in the thousands, a float32 log-sum-exp has but three digits after the point.
#
# We take the filter that drops, which is the simpler one: what is flagged is kept. For roulette (lesson 7) the kernel is the
# same, with one more step before it stores: the block finds each column's largest probability in its logits, and multiplies the
# column of $G$ by 0, by 1, or by more.

# %%
options = {"filter": "drop", "filter_eps": 2.0**-4, "reduction": "sum"}
of_logits = shipped.gradient_of_logits(e, c, targets, **options)
of_logits

# %%
of_logits.still(3)

# %%
of_logits.still(-1)

# %% [markdown]
# What did not survive was neither read nor written:

# %%
columns = sorted({int(v) for v in of_logits.record.of("c").element // D})
print(f"of {V} columns, this block computes {columns}")
budget = of_logits.compare(e=4 * D, c=8 * D, write_g=4 * 8)
assert budget.holds
budget

# %% [markdown]
# ## Second product: dC
#
# `d_c_kernel`: a block owns a tile of $dC$, 4 entries by 8 of the $D$ dimensions, and sums over the tokens. $G$ is stored
# column by column, so in this product it lies as it should, with tokens along its rows. If none of the tile's entries survives
# in a block of tokens, that block is skipped.

# %%
of_c = shipped.gradient_of_c(e, c, targets, **options)
of_c.still(5)

# %%
of_c.still(-1)

# %% [markdown]
# ## Third product: dE
#
# `d_e_kernel`: a block owns a tile of $dE$, and sums over the columns that survive. Now it is the *terms of the sum* that are
# picked from a list: four columns of $G$ and the four rows of $c$ that belong to them, at a time.

# %%
of_e = shipped.gradient_of_e(e, c, targets, **options)
of_e

# %%
of_e.still(5)

# %% [markdown]
# ## One owner
#
# In all three kernels each element of the result is written by one thread, once. One could do it differently: give the blocks
# other work, and let each *add* its share to the result with an atomic addition. Then the order of the additions is up to the
# hardware. Rounding depends on the order, as you saw in lesson 2, and so the same call gives other bits each time. Here is what
# the order does to one sum over 8192 tokens in float32:

# %%
terms = (rng.standard_normal(8192) * rng.random(8192) ** 4).astype(np.float32)
sums = {float(np.cumsum(rng.permutation(terms))[-1]) for _ in range(200)}
print(f"200 orders of the same 8192 terms: {len(sums)} different sums, from {min(sums):.6f} to {max(sums):.6f}")
assert len(sums) > 20

# %% [markdown]
# None of them is wrong. But two training runs that should be equal drift apart, a test cannot compare bits, and a bug hides in
# the noise. On a GPU you can watch it: this kernel adds up with atomics.


# %%
@cuda.jit
def atomic_sum_kernel(terms, total):
    """total (1,) += the sum of terms; threads add whenever they come."""
    i = cuda.grid(1)
    if i < terms.shape[0]:
        cuda.atomic.add(total, 0, terms[i])


def atomic_sum(terms):
    total = xp.zeros(1, np.float32)
    atomic_sum_kernel[-(-len(terms) // 256), 256](xp.asarray(terms), total)
    return float(machine.to_host(total)[0])


recorded = measured.lesson("atomics")
if machine.has_gpu():
    print(f"100 runs on this GPU: {len({atomic_sum(terms) for _ in range(100)})} different sums")
else:
    print(f"100 runs, {measured.source(recorded)}: {recorded['different_sums']} different sums")

# %% [markdown]
# The package promises the same bits for the same inputs on the same device. Check it:


# %%
def gradients():
    _, grads = cce.linear_cross_entropy_with_grad(*map(xp.asarray, (e, c, targets)), backend="simt", **options)
    return machine.to_host(grads.e), machine.to_host(grads.c)


first, second = gradients(), gradients()
assert all((a.view(np.uint32) == b.view(np.uint32)).all() for a, b in zip(first, second, strict=True))
print("two runs, the same bits")

# %% [markdown]
# ## Test it
#
# Without a filter, the gradients are those of the reference. With one that drops, a token's row of $dE$ is off by at most the
# probability that was dropped, times the longest row of $c$. That bound is no tolerance somebody chose: it follows from what
# the filter does.

# %%
_, exact = cce.linear_cross_entropy_with_grad(
    *map(xp.asarray, (e, c, targets)), backend="simt", filter_eps=None, reduction="sum"
)
np.testing.assert_allclose(machine.to_host(exact.e), right.e, atol=1e-5)
np.testing.assert_allclose(machine.to_host(exact.c), right.c, atol=1e-5)

mass = machine.to_host(cce.forward(*map(xp.asarray, (e, c, targets)), backend="simt", **options).dropped_mass())
bound = mass * np.linalg.norm(c, axis=1).max()
error = np.linalg.norm(first[0] - right.e, axis=1)
assert (error <= bound + 1e-5).all()
measured.Table(
    ("token", "probability dropped", "error of its row of dE", "bound"),
    [(n, float(mass[n]), float(error[n]), float(bound[n])) for n in range(N)],
)

# %% [markdown]
# ## Measure it

# %%
simt, hopper = measured.benchmark("simt_h100"), measured.benchmark("backward_h100")
rows = [("portable, float32", "gradients, exact", "2048, 32768, 1024", simt["results"]["backward, exact"]["median_ms"], None)]
for row in hopper["rows"]:
    if row["data"] == "calibrated":
        shape = f"{row['N']}, {row['V']}, {row['D']}"
        rows.append(
            (
                "tensor cores, bfloat16",
                f"loss and gradients, {row['name']}" if row["wrt"] else "loss, with survivors",
                shape,
                row["call"]["median_ms"],
                row["x"]["median"],
            )
        )
measured.Table(
    ("kernels", "what", "N, V, D", "ms, H100", "× cuBLAS's e @ c.T"),
    rows,
    f"Portable: {measured.source(simt)}; tensor cores: {measured.source(hopper)}",
)

# %% [markdown]
# An exact loss with gradients is four products: one in the forward, three in the backward. It takes as long as 4.25 products by
# cuBLAS. The default filter leaves less than a tenth of the columns in this problem, and about a third of that time. "Frozen
# classifier" is a call that does not want the gradient of $c$, "frozen body" one that does not want that of $e$.
#
# ## Exercises
#
# 1. With a softcap the logits are $z = s \tanh(x / s)$ of the products $x$. What is $G$ with respect to $x$? Write it, and test
#    it against `reference.backward(..., softcap=s)`.
# 2. Which of the three products are needed when the classifier is frozen, and which when the body is?

# %% jupyter={"source_hidden": true}
s = 5.0
x = e.astype(np.float64) @ c.T
z = s * np.tanh(x / s)
G = (reference.softmax(z) - reference.onehot(targets, V)) * (1 - (z / s) ** 2)  # the derivative of the softcap
capped = reference.backward(e, c, targets, softcap=s, reduction="sum")
np.testing.assert_allclose(G @ c, capped.e, atol=1e-10)
np.testing.assert_allclose(G.T @ e, capped.c, atol=1e-10)

# Exercise 2: both gradients are made of G, so the first product is needed in any case. Frozen classifier: logits again, and
# G @ c. Frozen body: logits again, and G.T @ e.
frozen = cce.linear_cross_entropy_with_grad(e, c, targets, wrt="e", backend="cpu")[1]
assert frozen.c is None
print("exercise 1 agrees; exercise 2: two of the three products, the first and one of the others")

# %% [markdown]
# ## What to take away
#
# * $G = \text{softmax} - \text{onehot}$, and two products with it. $G$ is made again in chunks, where it matters.
# * Gathered rows and lists of terms let a product run over the few columns that survive.
# * One owner for each result: no atomics, the same bits every time, and bugs have no noise to hide in.
#
# Next: [lesson 9](09_property_based_testing.ipynb). How does one test all this?
