"""Exact gradients of logits that the forward has kept: as those of logits that are computed again, whatever was kept."""

from __future__ import annotations

import numpy as np
import pytest

import cce_numba as cce
from tests.helpers import offline
from tests.helpers.cases import DTYPES, make_case
from tests.helpers.checks import check_gradients, expect
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.hopper.backward.kernel import make_backward_kernel
from cce_numba.hopper.backward.tiles import BackwardTiles
from cce_numba.hopper.forward.kernel import make_forward_kernel
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.tensor_core.backward.form import GradientForm
from cce_numba.tensor_core.folds import KEPT_LOGITS, MAX_SUM, TARGET_LOGIT

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FLOAT16, BFLOAT16 = DTYPES[:2]
TILE_BYTES = 49_664  # of 128 tokens and 192 entries
N, V = 300, 5000  # three blocks, 27 tiles
ALL, SOME = 3 * 26 * TILE_BYTES, 3 * 10 * TILE_BYTES


# ---- compiled for a real GPU without one


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("bias", "capped", "scaled"), [(None, False, False), (np.dtype(np.float32), True, True)])
def test_the_forward(bias, capped, scaled):
    compiled = offline.compile_hopper(
        make_forward_kernel(HopperTiles(), BFLOAT16, bias, capped, scaled, (MAX_SUM, TARGET_LOGIT, KEPT_LOGITS))
    )
    assert compiled.notices == []
    assert compiled.spilled_bytes == 0
    assert compiled.count(r"st\.global\.cs\.v4\.u32") == 2 * 12, "of two halves, 12 times 16 columns"


@pytest.mark.usefixtures("compiler")
def test_the_backward():
    compiled = offline.compile_hopper(make_backward_kernel(BackwardTiles(cluster=2), BFLOAT16, GradientForm(), keeps=True))
    assert compiled.notices == []
    assert compiled.spilled_bytes <= 1024
    assert compiled.count(r"(ld|st)\.local\S*") == 0
    assert compiled.count(r"wgmma\.mma_async\S+") == 3 * 8
    assert compiled.count(r"ld\.global\.nc\.L1::no_allocate\.v4\.u32") == 2 * 12


# ---- on a GPU


@pytest.fixture
def small_rounds(monkeypatch):
    """A function that cuts problems into rounds of few tiles of columns."""
    from cce_numba.hopper.backward import workspace

    def cut(g_bytes):
        monkeypatch.setattr(workspace, "_G_BYTES", (g_bytes, g_bytes))
        monkeypatch.setattr(workspace, "_SHARE", 0.0)
        monkeypatch.setattr(workspace, "_BORROWED_BYTES", 0)
        workspace._known.cache_clear()

    yield cut
    workspace._known.cache_clear()


def check(harness, case, room, **named):
    """The gradients agree with the reference's, and with those of logits that are computed again."""
    expected, result = expect(case), harness.forward(case.with_options(workspace_bytes=room))
    kept = result._statistics.kept_logits
    assert kept is not None
    assert kept.nbytes == result.plan.kept_bytes == result.plan.memory()["kept logits"] <= room
    grads = harness.backward(result, **named)
    check_gradients(expected, grads, None)
    return grads


@pytest.mark.gpu
@pytest.mark.parametrize("room", [ALL, SOME, 3 * 2 * TILE_BYTES], ids=["all", "some", "two tiles"])
@pytest.mark.parametrize("g_bytes", [0, 3 * 2**20], ids=["rounds of two tiles", "rounds of six or so"])
@pytest.mark.parametrize("D", [200, 136], ids=["pairs", "single CTAs"])
def test_gradients(hopper, small_rounds, D, g_bytes, room):
    small_rounds(g_bytes)
    check(hopper, make_case(1, (N,), V, D, BFLOAT16, ignored=0.2, filter_eps=None), room)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"softcap": 4.0},
        {"logit_scale": 0.6},
        {"softcap": 4.0, "label_smoothing": 0.1, "bias": True},
        {"z_loss": 0.01, "entropy": True},
        {"accum_e_fp32": True, "accum_c_fp32": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_gradients_with_options(hopper, options, dtype):
    check(hopper, make_case(2, (N,), V, 200, dtype, filter_eps=None, **options), SOME)


@pytest.mark.gpu
@pytest.mark.parametrize("exact", ["filter_e_grad", "filter_c_grad"])
def test_one_exact_gradient_beside_a_filtered_one(hopper, exact):
    """The exact one is of kept logits, the other the same as ever."""
    case = make_case(3, (N,), V, 200, BFLOAT16, spread=8.0, filter="drop", **{exact: False})
    name = "e" if exact == "filter_e_grad" else "c"
    plain, kept = (hopper.backward(hopper.forward(case.with_options(workspace_bytes=room))) for room in (0, ALL))
    other = "c" if name == "e" else "e"
    np.testing.assert_array_equal(getattr(kept, other), getattr(plain, other))
    wide = getattr(plain, name).astype(np.float64)
    difference = np.linalg.norm(getattr(kept, name) - wide) / np.linalg.norm(wide)
    assert difference < 2.0**-8


@pytest.mark.gpu
def test_logits_of_all_sizes(hopper):
    """Confident tokens, tokens that believe in another entry, -inf by a bias, and large logits."""
    case = make_case(4, (N,), V, 200, BFLOAT16, spread=30.0, bias=True, filter_eps=None)
    case.options["bias"][100:2000] = -np.inf
    case.targets[:] = case.targets % 100
    grads = check(hopper, case, ALL)
    assert not grads.c[100:2000].any()


@pytest.mark.gpu
def test_a_lost_token_loses_its_row(hopper):
    case = make_case(5, (N,), V, 200, BFLOAT16, filter_eps=None)
    case.e[200, 3] = np.nan
    grads = hopper.backward(hopper.forward(case.with_options(workspace_bytes=ALL)))
    assert np.isnan(grads.e[200].astype(np.float32)).all()
    assert np.isfinite(np.delete(grads.e, 200, axis=0).astype(np.float32)).all()


@pytest.mark.gpu
def test_nothing_is_kept_for_nothing(hopper):
    """Where all gradients are filtered, or no backward follows, or there is no room for two tiles of each block."""
    case = make_case(6, (N,), V, 200, BFLOAT16, filter_eps=None)
    for options in ({"filter_eps": "auto", "workspace_bytes": ALL}, {"workspace_bytes": 3 * 2 * TILE_BYTES - 1}):
        result = hopper.forward(case.with_options(**options))
        assert result._statistics.kept_logits is None
        assert result.plan.kept_bytes == 0
    arrays = [hopper.device(array) for array in (case.e, case.c, case.targets)]
    assert cce.explain(*arrays, workspace_bytes=ALL, filter_eps=None).kept_bytes == ALL
