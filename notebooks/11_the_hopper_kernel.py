# %% [markdown]
# # 11 · The Hopper kernel: who waits for whom
#
# On an H100 the forward of this package takes as long as cuBLAS's product alone, log-sum-exp included. In this lesson you will
#
# * meet the warps of its kernel, each with one job,
# * see why two consumers that take turns hide all the work beside the products,
# * look at cycle counters of the running kernel,
# * follow the ladder of what was tried, and what each step taught.

# %%
import lessons

machine = lessons.begin(simulator=False)

# %%
import numpy as np

from cce_numba.hopper.tiles import HopperTiles
from cce_numba.tensor_core import schedule
from lessons import counters, drawings, figures, measured

# %% [markdown]
# ## The cast
#
# A block of the forward has 384 threads, twelve warps:
#
# | warps | job | registers a thread |
# |---|---|---|
# | 1 of 4 | **producer**: one of its threads starts bulk copies into the ring (lesson 10) | 40 |
# | 4 | **consumer A**: a tile of 128 tokens × 192 entries, in its registers | 232 |
# | 4 | **consumer B**: another such tile | 232 |
#
# (Two more warps of the first four fetch rows of $e$ one by one, where the tokens that count are not neighbours.) A
# multiprocessor's 65536 registers are dealt out unevenly on purpose: the producer gives away what it does not need. A
# consumer's tile takes 192 of its 232 registers in every thread. The tile sizes live in one place, which checks them and
# explains itself:

# %%
tiles = HopperTiles()
print(
    f"a tile: {tiles.block_n} x {tiles.block_v} logits, {tiles.block_n * tiles.block_v // 128} sums in each thread's registers"
)
print(f"a stage: {tiles.block_d} terms, {tiles.stage_bytes // 1024} KiB; {tiles.stages} stages")
print(f"shared memory: {tiles.smem_bytes / 1024:.1f} KiB of 227")
try:
    HopperTiles(stages=6)
except ValueError as error:
    print("six stages:", str(error).split(": ", 1)[1])

# %% [markdown]
# ## Why two consumers take turns
#
# When a tile is complete it must be folded (lesson 6): maxima, exponentials, sums, survivor bits. The tensor cores cannot do
# that, and a consumer that folds does not feed them. With one consumer they would idle meanwhile. With two that multiply at the
# same time, each would get half of the tensor cores, and both would fold at the same time: nothing gained. So they take turns.
# While A folds, B has the tensor cores to itself, for 36 stages of 768 cycles at $D = 2304$.
#
# Here are both, simulated. The fold is drawn as 6000 cycles; only its order of magnitude matters.


# %%
def schedule_of(consumers, tiles, multiply=36 * 768, fold=6000):
    """When each tile is multiplied and folded: (consumer, start, products done, folded)."""
    free, times = 0, []  # when the tensor cores are free
    ready = [0] * consumers  # when a consumer is
    for tile in range(tiles):
        consumer = tile % consumers
        start = max(free, ready[consumer])
        free = start + multiply
        ready[consumer] = free + fold
        times.append((consumer, start, free, ready[consumer]))
    return times


def chart(consumers, tiles=6):
    times = schedule_of(consumers, tiles)
    rows = [(f"consumer {'AB'[i]}", []) for i in range(consumers)]
    for tile, (consumer, start, done, folded) in enumerate(times):
        rows[consumer][1].extend([(start, done, "z", f"tile {tile}"), (done, folded, "row", "fold")])
    busy = 100 * tiles * 36 * 768 / times[-1][2]
    title = f"{consumers} consumer{'s' if consumers > 1 else ''}: tensor cores busy {busy:.0f} %"
    return drawings.gantt(rows, title, "cycles", until=200_000, key=KEY)


KEY = ("z", "products of a tile"), ("row", "fold")


chart(1)

# %%
chart(2)

# %%
assert schedule_of(2, 50)[-1][2] == 50 * 36 * 768  # no gap at all, as long as a fold is shorter than the other's products
assert schedule_of(1, 50)[-1][2] > 1.2 * 50 * 36 * 768

# %% [markdown]
# ## As it runs
#
# `record_on_gpu.py` makes the shipped kernel with a few more instructions: at some places a thread of one block writes the
# multiprocessor's cycle counter to memory. That costs a dozen instructions and no waiting, so the kernel hardly notices.

# %%
recorded = measured.lesson("timeline")
first, last = 60_000, 260_000  # cycles since the kernel began
drawings.gantt(
    counters.consumers(recorded, first, last),
    f"as measured: {measured.source(recorded)}",
    "cycles",
    until=last - first,
    key=KEY,
)

# %% [markdown]
# It is the picture of the simulation: the tensor cores go from one consumer's tile to the other's. How long does each part
# take?

# %%
parts = counters.medians(recorded)
measured.Table(
    ("a consumer", "cycles, median", "simulated above"),
    [
        ("products of a tile", round(parts["products"]), 36 * 768),
        ("fold", round(parts["fold"]), 6000),
        ("waits for its turn", round(parts["waits"]), 36 * 768 - 6000),
    ],
    measured.source(recorded),
)

# %%
assert parts["waits"] > parts["fold"]  # so the fold could take several times as long, and cost nothing

# %% [markdown]
# And the producer? It asks for an empty stage, waits until it gets one, and starts the next copies. If it *always* has to wait,
# the ring is full: the copies are ahead of the products, as they should be. If the products had to wait for copies, the
# producer would find an empty stage at once.

# %%
waits, stage = counters.producer_waits(recorded), counters.stage_cycles(recorded)
print(f"the producer waits {np.median(waits):.0f} cycles for an empty stage (median)")
print(f"{100 * (waits > 100).mean():.0f} % of its waits are longer than 100 cycles")
print(f"a stage's products take {np.median(stage):.0f} cycles (median), of at least 768")

# %% [markdown]
# So the products never wait for a copy, and the tensor cores come within a tenth of their own rate.

# %% [markdown]
# ## Everyone at about the same place
#
# 66 clusters of two blocks work on 32 groups of 256 tokens. Who takes what decides what stays in the cache, and so how much is
# read from memory. The schedule goes in **rounds**: 11 groups at a time, 6 clusters on each, which take the group's tiles of
# the vocabulary in turn. The 13 MB of these groups' rows of $e$ stay in the L2 cache (50 MB) while $c$ streams by; and all
# clusters read about the same rows of $c$ at about the same time.
#
# The schedule is plain Python, which the kernels call. So here it is, called from here.


# %%
def pieces(worker, workers=66, groups=32, per_round=11, n_tiles=1334):
    index = 0
    while True:
        group, first, last, step, slot = map(int, schedule.segment(index, worker, workers, groups, per_round, n_tiles))
        if slot == schedule.NO_SLOT:
            return
        yield group, first, last, step
        index += 1


times = np.zeros((32, 1334), int)
for worker in range(66):
    for group, first, last, step in pieces(worker):
        times[group, first:last:step] += 1
assert (times == 1).all()  # each tile of each group, once
work = [sum(-(-(last - first) // step) for _, first, last, step in pieces(worker)) for worker in range(66)]
print(f"42688 tiles, and each of 66 clusters takes {min(work)} to {max(work)}")

# %% jupyter={"source_hidden": true}
figure, axes = figures.new(7.0, 3.0)
for worker in range(66):
    at = 0
    for group, first, last, step in pieces(worker):
        count = -(-(last - first) // step)
        colour = ("e", "c", "z")[min(group // 11, 2)]
        axes.barh(worker, count, left=at, height=0.9, color=figures.light(colour), alpha=0.35 + 0.5 * (group % 11) / 10, lw=0)
        at += count
axes.set(xlabel="tiles, in the order in which they are taken", ylabel="cluster", ylim=(65.5, -0.5))
axes.set_title("Three rounds; a shade is a group")
axes.grid(False)
figures.show(figure, "Which cluster works on which group of tokens, in three rounds")

# %% [markdown]
# ## The ladder, forward
#
# $X$ is the time of cuBLAS for the one product in the same run, so 1.00 is the floor. Each step was measured at $N = 8192$, $V
# = 256000$, $D = 2304$, in bfloat16 (`benchmarks/NOTES.md`).


# %% jupyter={"source_hidden": true}
def ladder(steps, floor, title, xlabel, width=7.2):
    figure, axes = figures.new(width, 0.36 * len(steps) + 0.9)
    places = np.arange(len(steps))[::-1]
    colours = [figures.light("z" if kept else "line") for _, _, kept in steps]
    axes.barh(places, [value for _, value, _ in steps], color=colours, height=0.62)
    for place, (_, value, _) in zip(places, steps, strict=True):
        axes.text(value + 0.01 * max(v for _, v, _ in steps), place, f"{value:.2f}", va="center")
    axes.axvline(floor, color=figures.light("survivor"), lw=1.2)
    axes.set_yticks(places, [name for name, _, _ in steps])
    axes.set(xlabel=xlabel, title=title, xlim=(0, 1.18 * max(value for _, value, _ in steps)))
    axes.grid(False, axis="y")
    return figures.show(figure, title)


forward = [
    ("two consumers in turn, clusters share c, 5 stages", 1.11, True),
    ("tried: 4 stages", 1.18, False),
    ("tried: 160 columns, 6 stages", 1.23, False),
    ("each cluster its own tokens, all of e in flight (38 MB)", 1.05, True),
    ("rounds of 11 groups (13 MB of e stay in the cache)", 0.99, True),
    ("tried: rounds of 6 groups (7 MB)", 1.03, False),
]
ladder(forward, 1.0, "The forward, step by step (grey: tried, and left)", "time in X; the green line is cuBLAS")

# %% [markdown]
# The steps tell a story with a twist:
#
# 1. **Folds hide.** A consumer has the tensor cores for 25 to 50 thousand cycles at a time, and its fold needs some 1500
#    instructions a warp. So folding was never the problem; 1.11 had another reason.
# 2. **Wide tiles.** Fewer columns make room for more stages, but more reads of $e$ for each product. 192 columns it is. cuBLAS
#    itself chose 192 × 192.
# 3. **Traffic is power, and power is speed.** The profiler showed three times cuBLAS's reads from memory, and a *lower clock*:
#    an H100 under full load runs at its power limit, and every byte that moves takes power from the arithmetic. Working in
#    rounds moves less.
# 4. **What is shared hardly matters then.** Clusters that fetch $c$ together gained 1 %, once $e$ stayed in the cache.
#
# ## The ladder, backward
#
# The backward's gradients alone, with the filter that drops, at $2^{-16}$, on data as sparse as a real model's. The floor is
# 0.35 $X$, if all its products ran as fast as cuBLAS's.

# %% jupyter={"source_hidden": true}
backward = [
    ("one kernel, jobs off one queue, rows gathered by two warps", 1.50, True),
    ("the next job asked for ahead of time", 1.20, True),
    ("loads with predicates, not branches", 1.15, True),
    ("tiles leave through shared memory, in rows of 128 bytes", 1.0, True),
    ("row numbers in registers, two stages ahead; fewer spills", 0.78, True),
    ("sums of dE are added in the L2 cache", 0.59, True),
]
ladder(backward, 0.35, "The backward's gradients, step by step", "time in X; the green line is the floor")

# %% [markdown]
# Counters in the kernel led the way here, too: storing $dE$ took 80 000 cycles of a job whose products take 15 000 to 30 000,
# until it left by rows of 128 bytes, and then not at all, but as additions in the cache. Fifty spilled registers made storing
# three times slower, since with 228 KiB of shared memory there is hardly any cache left to spill to.
#
# And what is left on the table? A stage of gathered rows takes 1250 to 1450 cycles, where its products take 796. The copies are
# asked for one row at a time, and the multiprocessor cannot ask faster.
#
# ## Measure it

# %%
here = {}
if machine.capability()[0] == 9:
    import cupy

    import cce_numba as cce

    random = cupy.random.default_rng(0)
    N, V, D = 8192, 65536, 2304
    bfloat16 = measured.bfloat16()
    e = random.standard_normal((N, D), dtype=np.float32).astype(bfloat16)
    c = (random.standard_normal((V, D), dtype=np.float32) * (2 / D**0.5)).astype(bfloat16)
    targets = random.integers(0, V, N)
    product = machine.gpu_ms(lambda: e @ c.T)
    here = {"cuBLAS": product, "loss": machine.gpu_ms(lambda: cce.linear_cross_entropy(e, c, targets))}
    print(f"here, at {N}, {V}, {D}: product {here['cuBLAS']:.2f} ms, loss {here['loss']:.2f} ms")
forward_h100 = measured.benchmark("forward_h100")
measured.Table(
    ("N, V, D, bfloat16", "data", "loss in X", "with survivor bits"),
    [
        (
            f"{p['N']}, {p['V']}, {p['D']}",
            p["data"].split(" ")[0],
            p["calls"]["loss"]["x"]["median"],
            p["calls"]["loss and survivor bits"]["x"]["median"],
        )
        for p in forward_h100["problems"]
    ],
    measured.source(forward_h100),
)

# %% [markdown]
# ## Exercises
#
# 1. With $D = 128$ a tile's products take only two stages. In the simulated schedule, how busy are the tensor cores then, with
#    a fold of 6000 cycles? How many consumers would hide it?
# 2. A round of 11 groups keeps 13 MB of $e$ in the cache. At $D = 4096$, how many groups fit into as many bytes, and how often
#    must $c$ be read from memory then, at $N = 8192$? Compare with NOTES.

# %% jupyter={"source_hidden": true}
multiply = 2 * 768
for consumers in (1, 2, 3, 5):
    times = schedule_of(consumers, 60, multiply=multiply)
    print(f"exercise 1: {consumers} consumers, busy {100 * 60 * multiply / times[-1][2]:.0f} %")
# Five: while one folds for 6000 cycles, four others multiply for 1536 each. The registers have room for two.
assert schedule_of(5, 60, multiply=multiply)[-1][2] < 1.02 * 60 * multiply

bytes_of_group = 256 * 4096 * 2
fit = 13e6 // bytes_of_group
print(f"exercise 2: {fit:.0f} groups of {bytes_of_group / 1e6:.1f} MB")
print(f"32 groups take {-(-32 // fit):.0f} rounds, each of which reads c once")

# %% [markdown]
# ## What to take away
#
# * Give each warp one job, and let barriers carry the work between them.
# * Two consumers in turn hide whatever stands beside the products, as long as it is shorter than they are.
# * Measure with counters in the kernel; believe the clock, the cache and the power meter before the plan.
#
# Next: [lesson 12](12_train_with_it.ipynb), the last one: train something.
