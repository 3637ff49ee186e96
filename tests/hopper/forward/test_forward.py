"""What the shared tests of backends do not reach: rounds, batches and copies made small, graphs, memory, the choice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cce_numba as cce
from tests.helpers.cases import DTYPES, make_case, sizes
from tests.helpers.checks import check_forward, check_survivors, expect
from tests.helpers.harness import SimulatorHarness

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("gpu"),
    pytest.mark.skipif(SimulatorHarness.is_active(), reason="about a real GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
BFLOAT16 = DTYPES[1]


def check(harness, case):
    expected, result = expect(case), harness.forward(case)
    check_forward(expected, harness.numbers(result))
    kept = harness.kept(result, len(case.c))
    if kept is not None:
        check_survivors(expected, kept, result._problem.options.filter_eps, 128)
    coarse = harness.kept_coarsely(result, len(case.c))
    if coarse is not None:
        check_survivors(expected, coarse, result.plan.coarse_eps, 128)
        assert not (coarse & ~kept).any(), "what dC is made for survives"
    return result


@settings(max_examples=40)
@given(data=st.data())
def test_rounds_batches_and_copies_however_small(hopper, data):
    """The limits that cut large problems, made small: rounds of 1 to 4 groups, batches of 256 tokens, copies of a few tiles."""
    from cce_numba.tensor_core import layout

    D = data.draw(st.sampled_from([7, 64, 72, 200]), label="D")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_CACHED_BYTES", data.draw(st.integers(1, 4), label="groups") * 2 * D * 256)
        patch.setattr(layout, "_SCRATCH_BYTES", data.draw(st.sampled_from([0, 200, 400]), label="scratch") * 1024)
        patch.setattr(layout, "_COPY_BYTES", data.draw(st.integers(1, 4), label="tiles") * 192 * 2 * (D + 8))
        case = make_case(
            data.draw(st.integers(0, 99), label="seed"),
            (data.draw(sizes((256, 512, 1024), 1500), label="N"),),
            V=data.draw(sizes((192, 384, 1536), 4000), label="V"),
            D=D,
            dtype=data.draw(st.sampled_from(DTYPES[:2]), label="dtype"),
            ignored=data.draw(st.sampled_from([0.0, 0.05, 0.9]), label="ignored"),
            filter_eps=(filter_eps := data.draw(st.sampled_from([2.0**-6, "auto", None]), label="filter_eps")),
            spread=8.0 if filter_eps == "auto" else 2.0,  # so that it drops something
        )
        check(hopper, case)


@pytest.mark.parametrize("ignored", ["first half", "every other", "all but one", "runs"])
def test_tokens_that_count_are_gathered_wherever_they_are(hopper, ignored):
    case = make_case(1, (1000,), 1000, 328, BFLOAT16, filter_eps=2.0**-8)
    n = np.arange(1000)
    out = {"first half": n < 500, "every other": n % 2 == 0, "all but one": n != 777, "runs": n // 90 % 2 == 0}[ignored]
    case.targets[out] = -100
    case.e[out] = np.nan  # whatever stands in their rows
    check(hopper, case)


@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 100.0, "ignored": 0.3}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_coarser_bits(hopper, dtype, options):
    """Of a filter that nobody chose: fewer, with all targets, and all of a block that lost a token."""
    V = 12_000  # so many tiles that most of them know a good bound
    case = make_case(8, (700,), V, 72, dtype, spread=16.0, check_targets=False, **options)
    counting = np.flatnonzero(case.targets >= 0)
    case.targets[counting[300]] = 10**6  # in the third block
    result = check(hopper, case)
    kept, coarse = hopper.kept(result, V), hopper.kept_coarsely(result, V)
    others = np.arange(len(kept)) // 128 != 2
    assert coarse[~others].all()
    assert 0.2 < coarse[others].mean() < 0.95 * kept[others].mean()
    assert coarse[others, case.targets[counting[others]]].all()
    given = hopper.forward(case.with_options(filter_eps=result._problem.options.filter_eps))
    np.testing.assert_array_equal(hopper.kept(given, V), kept)
    assert hopper.kept_coarsely(given, V) is None
    assert result.survivor_counts().tolist() == given.survivor_counts().tolist() == kept[::128].sum(axis=1).tolist()
    np.testing.assert_array_equal(result.dropped_mass().get(), given.dropped_mass().get())


def test_every_vocabulary_tile_and_step_counts(hopper):
    """Each entry stands out for one token, so that a tile or a step of the sum that is skipped is seen."""
    N, V, D = 300, 2000, 640
    case = make_case(2, (N,), V, D, BFLOAT16, spread=0.1, reduction="none")
    for n in range(N):
        case.e[n] = 0
        case.e[n, (n * 37) % D] = 8
        case.c[(n * 131) % V, (n * 37) % D] = 4
    check(hopper, case)


def test_16_bit_arrays_choose_it_and_others_are_told_why_not(hopper):
    import cupy

    for dtype, backend in zip(DTYPES, ("hopper", "hopper", "simt", "simt"), strict=True):
        e, c = cupy.zeros((4, 16), dtype), cupy.zeros((9, 16), dtype)
        plan = cce.explain(e, c, cupy.zeros(4, np.int64))
        assert plan.backend == backend
        if backend == "simt":
            assert "take float16 and bfloat16" in plan.rejected["hopper"]


def test_explain_says_what_is_copied_and_why(hopper):
    import cupy

    def plan(e, c):
        return cce.explain(e, c, cupy.zeros(4, np.int64))

    straight = plan(cupy.zeros((4, 16), BFLOAT16), cupy.zeros((900, 16), BFLOAT16))
    assert "copied" not in straight.how
    odd = plan(cupy.zeros((4, 15), BFLOAT16), cupy.zeros((900, 15), BFLOAT16))
    assert "e is copied, since its rows are 30 bytes apart" in odd.how
    assert "c is copied, 900 rows at a time, since its rows are 30 bytes apart" in odd.how
    assert odd.forward_bytes - straight.forward_bytes == (4 + 900) * 16 * 2
    assert "does not start at a multiple of 16 bytes" in plan(*(cupy.zeros((n, 24), BFLOAT16)[:, 1:17] for n in (4, 9))).how
    # Views that the copy engine can read are not copied: rows apart, and a few columns of wider rows.
    for view in (cupy.zeros((1800, 16), BFLOAT16)[::2], cupy.zeros((900, 24), BFLOAT16)[:, 8:21]):
        e = cupy.zeros((4, view.shape[1] + 3), BFLOAT16)[:, : view.shape[1]]
        assert "c is copied" not in plan(e, view).how


@pytest.mark.parametrize("with_grad", [False, True])
def test_a_call_can_be_captured_in_a_graph(hopper, with_grad):
    import cupy

    case = make_case(3, (300,), 3000, 256, BFLOAT16)
    e, c, targets = (cupy.asarray(x) for x in (case.e, case.c, case.targets))

    def call():
        if with_grad:
            result = cce.forward(e, c, targets)
            return result.loss, result._statistics.survivors
        return (cce.linear_cross_entropy(e, c, targets),)

    expected = [x.get() for x in call()]  # compiles
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        captured = call()
        graph = stream.end_capture()
        for x in captured:
            x[...] = 0
        graph.launch(stream)
    stream.synchronize()
    for got, want in zip(captured, expected, strict=True):
        np.testing.assert_array_equal(got.get(), want)


def test_a_graph_with_a_pool_of_its_own_leaves_the_memory_of_others_alone(hopper):
    """As the README has it. Temporaries of a capture go back to their pool, and a replay writes to them again."""
    import cupy

    case = make_case(7, (300,), 3000, 256, BFLOAT16)
    e, c, targets = (cupy.asarray(x) for x in (case.e, case.c, case.targets))
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        with cupy.cuda.using_allocator(pool.malloc):
            expected = cce.linear_cross_entropy(e, c, targets).get()
            stream.begin_capture()
            loss = cce.linear_cross_entropy(e, c, targets)
            graph = stream.end_capture()
        others = [cupy.full(size, 7, np.uint8) for size in (512, 2**12, 2**16, 2**18, 2**20)]
        graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(loss.get(), expected)
    assert all((other == 7).all() for other in others)


@pytest.mark.parametrize(("filter", "planes"), [("unbiased", 1), ("drop", 2)])
@pytest.mark.parametrize(("N", "D"), [(1, 64), (256, 16_384), (8192, 8192), (40_000, 64), (20_000, 12_288)])
def test_memory_stays_within_what_is_promised(hopper, N, D, filter, planes):
    """2 MiB and 20 bytes a token for the loss alone; the survivors' bits, of whole tiles, and 4 bytes beside."""
    import cupy

    from cce_numba.commands.measure import peak_memory

    V = 5000
    e, c = cupy.zeros((N, D), BFLOAT16), cupy.zeros((V, D), BFLOAT16)
    targets = cupy.zeros(N, np.int64)
    cce.linear_cross_entropy(e, c, targets)  # compiles
    cce.forward(e, c, targets, filter=filter)
    with peak_memory(on_device=True) as for_loss:
        cce.linear_cross_entropy(e, c, targets)
    assert 0 < for_loss.value <= 2**21 + 20 * N
    with peak_memory(on_device=True) as with_bits:
        cce.forward(e, c, targets, filter=filter)
    bits = planes * -(-N // 128) * -(-V // 192) * 24
    assert bits == cce.explain(e, c, targets, filter=filter).survivor_bytes
    assert bits < with_bits.value <= 2**21 + 24 * N + bits


@pytest.mark.parametrize("filter_eps", [2.0**-4, "auto"])
def test_rows_that_are_nobodys_flag_nothing_whatever_lies_in_shared_memory(hopper, filter_eps):
    """The second CTA of a cluster may have no tokens, and multiplies what it finds; here, infinities of another problem."""
    import cupy

    hot = make_case(4, (512,), 2000, 640, BFLOAT16, filter_eps=filter_eps)
    hot.e[...] = np.inf
    case = make_case(5, (300,), 2000, 640, BFLOAT16, spread=6.0, ignored=0.3, filter_eps=filter_eps)
    clean = check(hopper, case)
    hopper.forward(hot)
    after = check(hopper, case)
    bits = [result._statistics.survivors for result in (clean, after)]
    cupy.testing.assert_array_equal(*bits)
    blocks = -(-int(clean.n_valid) // 128)
    assert blocks < 3
    assert len(bits[0]) == (6 if filter_eps == "auto" else 3)
    for rows in (bits[0][:3], bits[0][3:]):
        assert not rows[blocks:].any()


def test_a_thread_of_its_own(hopper):
    import threading

    import cupy

    case = make_case(6, (40,), 300, 64, BFLOAT16)
    arrays = [cupy.asarray(x) for x in (case.e, case.c, case.targets)]
    expected, found = float(cce.linear_cross_entropy(*arrays)), []
    thread = threading.Thread(target=lambda: found.append(float(cce.linear_cross_entropy(*arrays))))
    thread.start()
    thread.join()
    assert found == [expected]


def test_views_of_torch_tensors(hopper):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    wide = torch.randn(2, 50, 3, 64, device="cuda").bfloat16()
    c = torch.randn(64, 300, device="cuda").bfloat16().T
    targets = torch.randint(0, 300, (50, 2), device="cuda").T
    e = wide[:, :, 1]
    loss = cce.linear_cross_entropy(e, c, targets, backend="hopper")
    exact = torch.nn.functional.cross_entropy((e.double() @ c.double().T).reshape(-1, 300), targets.reshape(-1))
    assert abs(loss.item() - exact.item()) <= 1e-5 * (1 + exact.item())
    one = torch.zeros(1, dtype=torch.int64, device="cuda").expand(5)  # stride 0
    assert torch.isfinite(cce.linear_cross_entropy(e[0, :5], c, one, backend="hopper"))
    assert cce.linear_cross_entropy(e[0, :0], c, one[:0], reduction="sum", backend="hopper").item() == 0
