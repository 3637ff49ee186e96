"""Logit scales and label smoothing under a softcap on tensor cores: what the kernels cost, and on a GPU what they compute."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cce_numba as cce
from cce_numba import gpu
from cce_numba import plan as planning
from cce_numba.interchange import BFLOAT16
from cce_numba.options import Options
from cce_numba.tensor_core.backward.form import GradientForm
from tests.helpers import offline
from tests.helpers.cases import DROPPING, DTYPES, cases, filters, make_case, with_terms
from tests.helpers.checks import check_forward, check_gradients, check_survivors, expect
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba import survivors
from cce_numba.hopper import backend
from cce_numba.hopper.backward.kernel import make_backward_kernel
from cce_numba.hopper.backward.tiles import BackwardTiles
from cce_numba.hopper.forward.kernel import make_forward_kernel
from cce_numba.hopper.tiles import MAX_SMEM_BYTES, HopperTiles
from cce_numba.tensor_core.folds import (
    ENTROPY,
    GROUP_MAXIMA,
    MAX_SUM,
    MEAN_LOGIT,
    SEVERAL_TARGET_LOGITS,
    SUM_SQUARES,
    SURVIVORS,
    SURVIVORS_BY_CHANCE,
    TARGET_LOGIT,
)
from cce_numba.tensor_core.indexed_dot import make_indexed_dot_kernel
from cce_numba.tensor_core.merge import make_merge_kernel
from cce_numba.tensor_core.survey.listing import make_list_kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
on_gpu = pytest.mark.gpu

FLOAT16, FLOAT32 = DTYPES[0], np.dtype(np.float32)
TILES = HopperTiles()
PLAIN, RECORDING, SMOOTHED, BY_CHANCE, WITH_ENTROPY = (
    (MAX_SUM, TARGET_LOGIT, *more)
    for more in (
        (),
        (SURVIVORS,),
        (MEAN_LOGIT,),
        (SURVIVORS_BY_CHANCE,),
        (ENTROPY,),
    )
)
WITH_ALL = MAX_SUM, SEVERAL_TARGET_LOGITS, ENTROPY, SUM_SQUARES, GROUP_MAXIMA, SURVIVORS
# Of what consumers keep from tile to tile, most of it with a softcap, a scale and survivors; none of it is in the loop over the
# stages.
FORWARD_SPILLED_BYTES, BACKWARD_SPILLED_BYTES = 384, 3072
FORWARD_WITH_ALL_SPILLED_BYTES = 704  # with all that a call may ask for at the same time
DEFAULT_SPILLED_BYTES = 1280  # by the backward of the default filter, without further terms


# ---- compiled for a real GPU without one


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("dtype", "bias", "capped", "scaled", "folds"),
    [
        (BFLOAT16, None, False, True, RECORDING),
        (BFLOAT16, FLOAT32, True, True, RECORDING),
        (FLOAT16, FLOAT16, False, True, PLAIN),
        (FLOAT16, None, True, False, SMOOTHED),
        (BFLOAT16, BFLOAT16, True, True, SMOOTHED),
        (BFLOAT16, None, True, True, SMOOTHED),
        (BFLOAT16, None, False, False, BY_CHANCE),
        (BFLOAT16, None, False, False, WITH_ENTROPY),
        (BFLOAT16, FLOAT32, True, True, WITH_ALL),
    ],
)
def test_the_forward(dtype, bias, capped, scaled, folds):
    kernel = make_forward_kernel(TILES, dtype, bias, capped, scaled, folds)
    compiled = offline.compile_hopper(kernel)
    assert compiled.notices == []
    assert compiled.registers == 65536 // 384 // 8 * 8 == 168
    most = {BY_CHANCE: 0, WITH_ENTROPY: 0, WITH_ALL: FORWARD_WITH_ALL_SPILLED_BYTES}
    assert compiled.spilled_bytes <= most.get(folds, FORWARD_SPILLED_BYTES)
    assert compiled.count(r"(ld|st)\.local\S*") == 0, "no array has an index at run time"
    assert compiled.count(r"call(\.uni)?") == 0
    assert compiled.count(r"wgmma\.mma_async\S+") == 8
    assert compiled.smem_bytes == 0
    assert kernel.smem_bytes == TILES.smem_bytes <= MAX_SMEM_BYTES
    # Totals: of each row of a thread, to a slot of its own.
    assert compiled.count(r"st\.global\.f32") >= (8 if folds is SMOOTHED else 4)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        (FLOAT16, GradientForm(capped=True, with_sums=True, scaled=True, smoothed=True, entropic=True)),
        (BFLOAT16, GradientForm(by_chance=True)),
        (BFLOAT16, GradientForm(by_chance=True, entropic=True)),
        (BFLOAT16, GradientForm(capped=True, with_sums=True, scaled=True, by_chance=True, entropic=True, several=True)),
    ],
    ids=str,
)
def test_the_backward(dtype, form):
    compiled = offline.compile_hopper(make_backward_kernel(BackwardTiles(), dtype, form))
    assert compiled.notices == []
    assert compiled.registers == 168
    is_default = form == GradientForm(by_chance=True)
    assert compiled.spilled_bytes <= (DEFAULT_SPILLED_BYTES if is_default else BACKWARD_SPILLED_BYTES)
    assert compiled.count(r"(ld|st)\.local\S*") == 0
    assert compiled.count(r"call(\.uni)?") == 0
    assert compiled.count(r"wgmma\.mma_async\S+") == 3 * 8


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "kernel",
    [
        make_indexed_dot_kernel(BFLOAT16, FLOAT32, True, True),
        make_indexed_dot_kernel(FLOAT16, None, False, True),
        make_merge_kernel(TILES.group_n, SMOOTHED),
        make_list_kernel(True),
    ],
    ids=["dot", "dot of rows that are not aligned", "merge", "list"],
)
def test_what_is_small(kernel):
    compiled = offline.compile_hopper(kernel)
    assert compiled.spilled_bytes == compiled.stack_bytes == 0
    assert compiled.registers <= 65536 // kernel.threads
    assert compiled.count(r"(atom|red)\.(?!global\.or|shared)\S*") == 0, "sums are in the same order each time"


PAIRS = list(itertools.product((False, True), repeat=2))


@pytest.mark.parametrize(
    ("make", "told", "more"),
    [
        (make_forward_kernel, (TILES, BFLOAT16, None, True), list(itertools.product((False, True), (PLAIN, SMOOTHED)))),
        (make_backward_kernel, (BackwardTiles(), BFLOAT16), [(GradientForm(*terms),) for terms in PAIRS]),
        (make_indexed_dot_kernel, (BFLOAT16, None, True), [(), (True,)]),
        (make_merge_kernel, (TILES.group_n,), [(PLAIN,), (SMOOTHED,)]),
        (make_list_kernel, (), [(), (True,)]),
    ],
)
def test_each_choice_of_terms_is_kept_under_a_name_of_its_own(make, told, more):
    kernels = [make(*told, *terms) for terms in more]
    identities = {kernel.identity for kernel in kernels}
    assert None not in identities
    assert len(identities) == len(kernels)
    assert len({str(kernel.signature) for kernel in kernels}) == 1, "a term that is not there is an address of 0"


# ---- the plan


class _OnDevice:
    """An array as plans look at it."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype, self.itemsize = shape, np.dtype(dtype), np.dtype(dtype).itemsize
        self.strides, self.data = (shape[-1] * self.itemsize, self.itemsize), SimpleNamespace(ptr=1024)


@pytest.fixture
def an_h100(monkeypatch):
    monkeypatch.setattr(gpu, "current", lambda: gpu.Gpu((9, 0), 132))
    monkeypatch.setattr(backend, "_plans", {})
    monkeypatch.setattr(backend.gpu, "why_not", lambda on_device: None)


def problem(**given):
    """Of 1000 tokens and 50 000 entries."""
    N, V, D, scale = 1000, 50_000, 64, given.pop("logit_scale", None)
    return SimpleNamespace(
        N=N, V=V, D=D, K=None, e=_OnDevice((N, D), BFLOAT16), c=_OnDevice((V, D), BFLOAT16), bias=None, dtype=BFLOAT16,
        device="cuda:0",
        targets=np.zeros(N, np.int64), options=Options.of(BFLOAT16, DROPPING | given), on_device=True, extras=frozenset(),
        logits_bytes=4 * N * V,
        logit_scale=scale, class_weights=None, shard=None,
    )  # fmt: skip


@pytest.mark.usefixtures("an_h100")
@pytest.mark.parametrize("given", [{"logit_scale": True}, {"softcap": 30.0, "label_smoothing": 0.1}])
def test_it_is_planned_for_tensor_cores(given):
    plan = planning.choose(problem(**given), None)
    assert plan.backend == "hopper"
    assert not plan.rejected
    assert ("nothing is filtered" in plan.filter) == ("softcap" in given)


@pytest.mark.usefixtures("an_h100")
def test_adding_up_logits_takes_memory():
    plain, smoothed = (backend.plan(problem(softcap=30.0, label_smoothing=x)) for x in (0.0, 0.1))
    # A number of each row between workers. A result of each token stands in for the bound that survivors begin with.
    assert smoothed.forward_bytes == plain.forward_bytes + 4 * plain.layout.part_numbers
    assert smoothed.survivor_bytes == 0 < plain.survivor_bytes


# ---- on a GPU


@pytest.fixture(autouse=True, scope="module")
def never_dense():
    """What was recorded is what is kept, even where nearly all was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survivors, "DENSE_SHARE", 1.0)
        yield


def scales_of(kind, shape, seed=0):
    """A number, or one for each token, some of them below 0."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0.2, 1.8, shape) * np.where(rng.random(shape) < 0.1, -1, 1) if kind == "each" else kind


def check(harness, case, d_loss=None, d_lse=None):
    """Loss, log-sum-exp, survivors and gradients; the latter are given back."""
    expected, result = expect(case), harness.forward(case)
    check_forward(expected, harness.numbers(result))
    kept = harness.kept(result, len(case.c))
    if kept is not None:
        check_survivors(expected, kept, result._problem.options.filter_eps, 128)
    grads = harness.backward(result, d_loss, d_lse)
    check_gradients(expected, grads, kept, d_loss, d_lse, coarse_eps=result.plan.coarse_eps)
    return grads


@on_gpu
@pytest.mark.parametrize("filter_eps", [None, 2.0**-8])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [None, "same", "float32"])
@pytest.mark.parametrize("scale", [0.25, 3.0, "each"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_scales(hopper, dtype, scale, bias, softcap, filter_eps):
    case = make_case(1, (300,), 1000, 136, dtype, ignored=0.3, bias=bias is not None, softcap=softcap, filter_eps=filter_eps)
    if bias == "float32":
        case.options["bias"] = case.options["bias"].astype(np.float32)
    check(hopper, case.with_options(logit_scale=scales_of(scale, (300,))), d_lse=0.25)


SIZES = [(1, 1, 8), (129, 191, 250), (257, 193, 64), (700, 5000, 7), (33 * 128 + 5, 6000, 72)]


@on_gpu
@pytest.mark.parametrize(("N", "V", "D"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_scales_at_sizes_around_tiles(hopper, dtype, N, V, D):
    """Of many rounds in the backward, and of tokens of more than one launch."""
    case = make_case(N + V, (N,), V, D, dtype, ignored=0.1, reduction="sum")
    for filter_eps in ("auto", None):
        check(hopper, case.with_options(logit_scale=scales_of("each", (N,)), filter_eps=filter_eps))


@on_gpu
@pytest.mark.parametrize("scale", [None, 0.5, "each"])
@pytest.mark.parametrize("weighed", [False, True], ids=["", "class weights"])
@pytest.mark.parametrize(("N", "V", "D"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_smoothing_under_a_softcap(hopper, dtype, N, V, D, weighed, scale):
    case = make_case(N + V, (N,), V, D, dtype, ignored=0.1, bias=N % 2 == 1, softcap=6.0, label_smoothing=0.3, reduction="sum")
    if weighed:
        weights = np.random.default_rng(2).uniform(0, 2, V)
        weights[:: V // 3 + 1] = 0
        case = case.with_options(class_weights=weights)
    check(hopper, case.with_options(logit_scale=scales_of(scale, (N,))))


@on_gpu
@settings(max_examples=60)
@given(data=st.data())
def test_any_terms(hopper, data):
    """Any sizes and options, with a scale, or smoothing under a softcap, or both."""
    case = data.draw(with_terms(data.draw(cases(hopper.edges)).with_options(**data.draw(filters()))))
    which = data.draw(st.sampled_from(["scale", "smoothing", "both"]), label="which")
    if which != "smoothing":
        kind = data.draw(st.sampled_from([0.3, 2.5, "each"]), label="scale")
        case = case.with_options(logit_scale=scales_of(kind, case.targets.shape))
    if which != "scale":
        case = case.with_options(label_smoothing=0.4, softcap=data.draw(st.sampled_from([3.0, 20.0]), label="cap"))
    d_lse = data.draw(st.sampled_from([None, 0.5]), label="d_lse")
    check(hopper, case, None if case.options["reduction"] == "none" else 1.5, d_lse)


@on_gpu
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_scales_of_1_change_no_bit(hopper, dtype, softcap):
    case = make_case(3, (300,), 1500, 200, dtype, bias=True, softcap=softcap, filter_eps=2.0**-8)
    plain, scaled = (hopper.forward(x) for x in (case, case.with_options(logit_scale=np.ones(300))))
    assert scaled._problem.logit_scale is not None
    for name, number in hopper.numbers(plain).items():
        np.testing.assert_array_equal(hopper.numbers(scaled)[name], number)
    np.testing.assert_array_equal(hopper.kept(scaled, 1500), hopper.kept(plain, 1500))
    grads = hopper.backward(plain), hopper.backward(scaled)
    for name in ("e", "c", "bias"):
        assert getattr(grads[0], name).tobytes() == getattr(grads[1], name).tobytes()


@on_gpu
def test_the_same_bits_each_time(hopper):
    case = make_case(4, (1000,), 3000, 192, BFLOAT16, softcap=5.0, label_smoothing=0.2, bias=True)
    case = case.with_options(logit_scale=scales_of("each", (1000,)), class_weights=np.linspace(0, 2, 3000))
    results = [hopper.forward(case) for _ in range(3)]
    losses = [hopper.numbers(result)["loss"].tobytes() for result in results]
    grads = [hopper.backward(result) for result in results]
    assert len(set(losses)) == 1
    for name in ("e", "c", "bias"):
        assert len({getattr(x, name).tobytes() for x in grads}) == 1


@on_gpu
def test_the_loss_alone(hopper):
    """Without gradients nothing is recorded, and c is copied part by part where its rows are not aligned."""
    case = make_case(5, (500,), 4000, 33, BFLOAT16, softcap=5.0, label_smoothing=0.2, logit_scale=0.5)
    exact = expect(case).forward
    loss = hopper.host(cce.linear_cross_entropy(*hopper._arrays(case), **hopper._options(case)))
    np.testing.assert_allclose(loss, exact.loss, rtol=1e-5)
    lse = hopper.call("linear_logsumexp", make_case(5, (500,), 4000, 33, BFLOAT16, softcap=5.0, logit_scale=0.5), targets=False)
    np.testing.assert_allclose(lse, exact.lse, rtol=1e-5, atol=1e-5)
