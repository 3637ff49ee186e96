"""What only a GPU can show: streams, no waiting, device-side checks, other libraries' device arrays, 64-bit indexing."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cce_numba as cce
import reference
from tests.helpers.cases import make_case
from tests.helpers.harness import SimulatorHarness

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("gpu"),
    pytest.mark.skipif(SimulatorHarness.is_active(), reason="about a real GPU"),
]


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


@pytest.fixture
def case():
    return make_case(0, (200,), 700, 48, np.dtype(np.float32))


def on_device(cupy, case):
    return cupy.asarray(case.e), cupy.asarray(case.c), cupy.asarray(case.targets)


def test_device_arrays_choose_the_gpu(cupy, case):
    plan = cce.explain(*on_device(cupy, case))
    assert plan.backend != "cpu"
    with pytest.raises(cce.BackendUnavailable, match=r"'cpu' cannot run this: the arrays are on cuda:0"):
        cce.linear_cross_entropy(*on_device(cupy, case), backend="cpu")
    with pytest.raises(cce.BackendUnavailable, match=r"cupy\.asarray"):
        cce.linear_cross_entropy(case.e, case.c, case.targets, backend="simt")


@pytest.mark.parametrize("name", ["c", "targets", "bias"])
def test_arrays_on_different_devices(cupy, case, name):
    e, c, targets = on_device(cupy, case)
    arrays = {"c": c, "targets": targets, "bias": cupy.zeros(700, np.float32)}
    arrays[name] = arrays[name].get()
    with pytest.raises(ValueError, match=f"{name}: must be on the device of e, cuda:0, got cpu"):
        cce.linear_cross_entropy(e, arrays["c"], arrays["targets"], bias=arrays["bias"])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("terms", ["none", "every", "under a softcap"])
def test_work_is_ordered_on_the_current_stream_and_the_host_does_not_wait(cupy, terms, dtype):
    case, options = make_case(0, (200,), 700, 48, np.dtype(dtype)), {}
    if terms != "none":
        weights = {"class_weights": cupy.linspace(0, 2, 700), "token_weights": cupy.arange(200) % 3 > 0}
        options = {"label_smoothing": 0.1, "z_loss": 1e-3, **weights}
    if terms == "under a softcap":
        options |= {"softcap": 20.0, "logit_scale": cupy.linspace(0.5, 1.5, 200)}
    expected = cce.linear_cross_entropy_with_grad(*on_device(cupy, case), **options)  # compiles, too
    spin = cupy.RawKernel(
        'extern "C" __global__ void spin(long long cycles) {'
        " long long start = clock64(); while (clock64() - start < cycles); }",
        "spin",
    )
    stream = cupy.cuda.Stream(non_blocking=True)
    e, c, targets = on_device(cupy, case)
    late_e = cupy.zeros_like(e)
    cupy.cuda.Device().synchronize()
    with stream:
        spin((1,), (1,), (np.int64(2_000_000_000),))  # about a second, before the input exists
        late_e[...] = e
        loss, grads = cce.linear_cross_entropy_with_grad(late_e, c, targets, **options)
        assert not stream.done, "the host waited for the device"
    stream.synchronize()
    cupy.testing.assert_array_equal(loss, expected[0])
    for ours, before in ((grads.e, expected[1].e), (grads.c, expected[1].c)):
        cupy.testing.assert_array_equal(ours.astype(np.float32), before.astype(np.float32))


def test_a_target_out_of_range_is_nan_without_looking(cupy, case):
    case.targets[3] = 700
    e, c, targets = on_device(cupy, case)
    loss = cce.linear_cross_entropy(e, c, targets, reduction="none").get()
    assert np.isnan(loss[3])
    assert np.isfinite(np.delete(loss, 3)).all()
    with pytest.raises(ValueError, match="got 700 for token 3"):
        cce.linear_cross_entropy(e, c, targets, check_targets=True)


def test_numba_device_arrays_in_and_out(case, cupy):
    from numba import cuda

    e, c, targets = (cuda.to_device(x) for x in (case.e, case.c, case.targets))
    loss, grads = cce.linear_cross_entropy_with_grad(e, c, targets)
    assert type(loss) is type(grads.e) is type(e)
    exact = reference.forward(case.e, case.c, case.targets).loss
    np.testing.assert_allclose(loss.copy_to_host(), exact, rtol=1e-5)


def test_gradients_into_numba_device_arrays(case, cupy):
    from numba import cuda

    e, c, targets = (cuda.to_device(x) for x in (case.e, case.c, case.targets))
    _, plain = cce.linear_cross_entropy_with_grad(e, c, targets)
    out = cce.Gradients(e=cuda.device_array_like(e), c=cuda.device_array_like(c))
    _, grads = cce.linear_cross_entropy_with_grad(e, c, targets, out=out)
    assert grads.e is out.e
    np.testing.assert_array_equal(out.e.copy_to_host(), plain.e.copy_to_host())
    np.testing.assert_array_equal(out.c.copy_to_host(), plain.c.copy_to_host())


def test_gradients_cannot_go_to_the_host(case, cupy):
    with pytest.raises(ValueError, match=r"out\.e: must be on the device of e, cuda:0, got cpu"):
        cce.linear_cross_entropy_with_grad(*on_device(cupy, case), out=cce.Gradients(e=np.zeros_like(case.e)))
    columns_apart = cupy.zeros((200, 96), np.float32)[:, ::2]
    with pytest.raises(ValueError, match=r"out\.e: its last dimension must be contiguous on a device, got a stride of 8 bytes"):
        cce.linear_cross_entropy_with_grad(*on_device(cupy, case), out=cce.Gradients(e=columns_apart))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_into_torch_tensors(case, cupy, dtype):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    e, c = (torch.from_numpy(x).cuda().to(getattr(torch, dtype)) for x in (case.e, case.c))
    targets = torch.from_numpy(case.targets).cuda()
    _, plain = cce.linear_cross_entropy_with_grad(e, c, targets, accum_c_fp32=True)
    out = cce.Gradients(e=torch.full_like(e, float("nan")), c=torch.zeros(c.shape, device="cuda"))
    cce.linear_cross_entropy_with_grad(e, c, targets, out=out)
    assert torch.equal(out.e, plain.e)
    assert torch.equal(out.c, plain.c)
    cce.linear_cross_entropy_with_grad(e, c, targets, out=cce.Gradients(c=out.c), wrt="c", accumulate=True)
    torch.testing.assert_close(out.c, 2 * plain.c, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_tensors_on_their_current_stream(case, cupy, dtype):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    e, c = (torch.from_numpy(x).cuda().to(getattr(torch, dtype)) for x in (case.e, case.c))
    targets = torch.from_numpy(case.targets).cuda()
    with torch.cuda.stream(torch.cuda.Stream()):
        cce.linear_cross_entropy_with_grad(e * 1, c, targets)  # compiles, loads modules, fills memory pools: all may wait
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)
        loss, grads = cce.linear_cross_entropy_with_grad(e * 1, c, targets)
        assert loss.is_cuda
        assert grads.e.dtype == e.dtype
        assert not torch.cuda.current_stream().query(), "the host waited for the device"
        value = loss.item()
    exact = torch.nn.functional.cross_entropy(e.double() @ c.double().T, targets)
    assert abs(value - exact.item()) <= 1e-5 * (1 + exact.item())


def lse_of_rows(cupy, e, c, rows):
    z = e[rows].astype(np.float64) @ c.astype(np.float64).T
    top = z.max(axis=1)
    return (top + cupy.log(cupy.exp(z - top[:, None]).sum(axis=1))).get()


def test_more_than_2_to_the_31_logits(cupy):
    """N * V = 2.8e9, and N * chunk in the backward's workspace as well as the last rows of everything must be right."""
    N, V, D = 70_000, 40_000, 4
    rng = cupy.random.default_rng(0)
    e, c = rng.standard_normal((N, D), dtype=np.float32), rng.standard_normal((V, D), dtype=np.float32)
    targets = rng.integers(0, V, N)
    result = cce.forward(e, c, targets, reduction="sum")
    grads = cce.backward(result)
    rows = cupy.asarray([0, 1, N // 2, N - 2, N - 1])
    np.testing.assert_allclose(result.lse[rows].get(), lse_of_rows(cupy, e, c, rows), rtol=1e-5)
    p = cupy.exp(e[rows].astype(np.float64) @ c.astype(np.float64).T - result.lse[rows][:, None])
    exact_e = p @ c.astype(np.float64) - c[targets[rows]]
    cupy.testing.assert_allclose(grads.e[rows], exact_e, rtol=1e-3, atol=1e-4)
    columns = cupy.asarray([0, V // 2, V - 1])
    q = cupy.exp(e.astype(np.float64) @ c[columns].astype(np.float64).T - result.lse[:, None].astype(np.float64))
    q -= targets[:, None] == columns[None, :]
    cupy.testing.assert_allclose(grads.c[columns], q.T @ e.astype(np.float64), rtol=1e-3, atol=1e-3)


def test_a_classifier_of_more_than_2_to_the_31_numbers(cupy):
    """V * D = 2.2e9: the last rows of c are found, and the last rows of dC written."""
    if (free := cupy.cuda.runtime.memGetInfo()[0]) < 14 * 2**30:
        pytest.skip(f"takes 14 GiB of GPU memory, and {free / 2**30:.1f} are free")
    N, V, D = 3, 268_000, 8192
    block = (cupy.random.default_rng(1).standard_normal((1000, D), dtype=np.float32) / 32).astype(ml_dtypes.bfloat16)
    c = cupy.concatenate([block] * 268)
    assert c.size > 2**31
    e = cupy.ones((N, D), dtype=np.float32).astype(ml_dtypes.bfloat16)
    targets = cupy.asarray([0, V - 1, V // 2])
    loss, grads = cce.linear_cross_entropy_with_grad(e, c, targets, wrt="c", filter_eps=None, reduction="none")
    z = e[:1].astype(np.float32) @ block.astype(np.float32).T
    lse = float(cupy.log(cupy.exp(z - z.max()).sum()) + z.max()) + np.log(268)
    np.testing.assert_allclose(loss.get(), lse - z[0, [0, 999, 0]].get(), rtol=1e-4, atol=1e-4)
    last = grads.c[V - 1].astype(np.float32).get()
    expected = 3 * np.exp(float(z[0, 999]) - lse) - 1
    np.testing.assert_allclose(last, np.full(D, expected), rtol=1e-2)
