"""Arrays of other libraries go in without a copy, and results come back as the caller's kind."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cce_numba as cce
from cce_numba import interchange
from tests.helpers.cases import make_case

CASE = make_case(0, (6,), 20, 8)


class OnlyDlpack:
    """The least that a library may offer."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **named):
        return self._array.__dlpack__(**named)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class OnAnotherDevice(OnlyDlpack):
    def __dlpack_device__(self):
        return (4, 0)  # OpenCL


def test_dlpack_is_enough_and_shares_memory():
    array = np.ones((2, 3))
    assert np.shares_memory(interchange.take("e", OnlyDlpack(array)), array)
    loss = cce.linear_cross_entropy(OnlyDlpack(CASE.e), OnlyDlpack(CASE.c), OnlyDlpack(CASE.targets))
    assert loss == cce.linear_cross_entropy(CASE.e, CASE.c, CASE.targets)


def test_another_device_is_an_error():
    with pytest.raises(TypeError, match=r"c: must be an array .* got .*OnAnotherDevice"):
        cce.linear_cross_entropy(CASE.e, OnAnotherDevice(CASE.c), CASE.targets)


def test_subclasses_are_their_library_s():
    class Mine(np.ndarray):
        pass

    e = CASE.e.astype(ml_dtypes.bfloat16)
    _, grads = cce.linear_cross_entropy_with_grad(e.view(Mine), CASE.c.astype(e.dtype), CASE.targets)
    assert type(grads.e) is np.ndarray
    assert grads.e.dtype == e.dtype


def test_numpy_results_are_numpy_arrays_even_when_0_d():
    loss = cce.linear_cross_entropy(CASE.e, CASE.c, CASE.targets)
    assert type(loss) is np.ndarray
    assert loss.shape == ()


class TestTorchOnTheHost:
    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch", reason="PyTorch is not installed")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_tensors_in_and_out(self, torch, dtype):
        e, c = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in (CASE.e, CASE.c))
        loss, lse, grads = cce.linear_cross_entropy_with_grad(
            e, c, torch.from_numpy(CASE.targets), return_lse=True, bias=c.sum(1), reduction="none"
        )
        assert {type(x) for x in (loss, lse, grads.e, grads.c, grads.bias)} == {torch.Tensor}
        assert grads.e.dtype == grads.c.dtype == grads.bias.dtype == e.dtype
        assert loss.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        numpy_dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
        e_numpy, c_numpy = (x.to(torch.float64).numpy().astype(numpy_dtype) for x in (e, c))
        bias = c.sum(1).to(torch.float64).numpy().astype(numpy_dtype)
        expected, expected_grads = cce.linear_cross_entropy_with_grad(
            e_numpy, c_numpy, CASE.targets, bias=bias, reduction="none"
        )
        np.testing.assert_array_equal(loss.numpy(), expected)
        np.testing.assert_array_equal(grads.c.to(torch.float64).numpy(), expected_grads.c.astype(np.float64))

    def test_no_copy_on_the_way_in(self, torch):
        tensor = torch.ones(3, 4, dtype=torch.bfloat16)
        assert interchange.take("e", tensor).__array_interface__["data"][0] == tensor.data_ptr()

    def test_autograd_is_pointed_elsewhere(self, torch):
        e = torch.from_numpy(CASE.e).requires_grad_()
        with pytest.raises(TypeError, match=r"e: requires grad.*e.detach\(\)"):
            cce.linear_cross_entropy(e, torch.from_numpy(CASE.c), torch.from_numpy(CASE.targets))
        with torch.no_grad():
            assert cce.linear_cross_entropy(e, torch.from_numpy(CASE.c), torch.from_numpy(CASE.targets)) > 0

    def test_a_backward_where_autograd_is_on(self, torch):
        e = torch.from_numpy(CASE.e).requires_grad_()
        with torch.no_grad():
            result = cce.forward(e, torch.from_numpy(CASE.c), torch.from_numpy(CASE.targets))
        assert cce.backward(result).e.abs().max() > 0

    def test_a_subclass_of_tensor(self, torch):
        class Mine(torch.Tensor):
            pass

        e = torch.from_numpy(CASE.e).as_subclass(Mine)
        loss = cce.linear_cross_entropy(e, torch.from_numpy(CASE.c), torch.from_numpy(CASE.targets))
        assert isinstance(loss, torch.Tensor)

    def test_a_tensor_whose_memory_is_not_its_values(self, torch):
        """On a GPU the memory of such a view would be read as it lies, with the wrong sign."""
        e, c, targets = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])
        with pytest.raises(TypeError, match=r"e: must be a strided tensor .* got a view that negates another's elements"):
            cce.linear_cross_entropy(torch._neg_view(e), c, targets)
        with pytest.raises(TypeError, match=r"c: must be a strided tensor .* got layout torch.sparse_coo"):
            cce.linear_cross_entropy(e, c.to_sparse(), targets)

    def test_a_device_that_is_neither(self, torch):
        with pytest.raises(TypeError, match="e: must be on the CPU or an NVIDIA GPU, got a tensor on meta"):
            cce.linear_cross_entropy(torch.ones(2, 3, device="meta"), CASE.c, CASE.targets)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_gradients_into_tensors(self, torch, dtype):
        """As PyTorch accumulates them: into `.grad` of a parameter, in place."""
        e = torch.from_numpy(CASE.e).to(getattr(torch, dtype))
        weight = torch.nn.Parameter(torch.from_numpy(CASE.c).to(e.dtype))
        weight.grad = torch.zeros_like(weight)
        d_e = torch.empty(len(e), 12, dtype=torch.float32)[:, 2:10]
        targets = torch.from_numpy(CASE.targets)
        out = cce.Gradients(e=d_e, c=weight.grad)
        with torch.no_grad():
            _, plain = cce.linear_cross_entropy_with_grad(e, weight, targets, accum_e_fp32=True)
            cce.linear_cross_entropy_with_grad(e, weight, targets, out=out)
            assert torch.equal(d_e, plain.e)
            assert torch.equal(weight.grad, plain.c)
            _, grads = cce.linear_cross_entropy_with_grad(e, weight, targets, out=out, accumulate=True)
        assert grads.e is d_e
        assert grads.c is weight.grad
        torch.testing.assert_close(d_e, 2 * plain.e, rtol=1e-6, atol=1e-7)
        assert torch.equal(weight.grad, 2 * plain.c)

    def test_a_tensor_whose_elements_share_memory(self, torch):
        e, c, targets = (torch.from_numpy(x) for x in (CASE.e, CASE.c, CASE.targets))
        with pytest.raises(ValueError, match=r"out\.e: elements must not share memory"):
            cce.linear_cross_entropy_with_grad(e, c, targets, out=cce.Gradients(e=torch.zeros(1, 8).expand(6, 8)))


class TestTorchOnCuda:
    """With tensors of the CPU, which say that they are on a device; nothing reads them."""

    @pytest.fixture(autouse=True)
    def torch(self):
        pytest.importorskip("cupy", reason="CuPy is not installed")
        return pytest.importorskip("torch", reason="PyTorch is not installed")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "bool", "uint8", "int32", "int64"])
    @pytest.mark.parametrize("shape", [(), (3,), (4, 6), (0,), (0, 5)])
    def test_an_array_has_the_tensor_s_memory_and_form(self, torch, monkeypatch, dtype, shape):
        monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 3)
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        views = [tensor.transpose(0, -1), tensor[..., 1::2]] if shape else []
        for x in (tensor, *views, tensor.expand(2, *shape)):
            array = interchange.of_cuda_tensor(x)
            assert array.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
            assert (array.shape, array.data.ptr, array.device.id) == (x.shape, x.data_ptr(), 3)
            assert x.numel() == 0 or array.strides == tuple(step * x.element_size() for step in x.stride())

    def test_a_result_needs_no_event(self, torch):
        """CuPy works on PyTorch's stream: it is told to order nothing."""
        asked = []

        class Result:
            dtype = np.dtype(np.float32)

            def __dlpack__(self, stream):
                asked.append(stream)
                return torch.utils.dlpack.to_dlpack(torch.ones(3))

        assert interchange._export_torch(Result()).tolist() == [1, 1, 1]
        assert asked == [-1]


class Bfloat16ByArrayAlone:
    """An array of a library that, as JAX, has bfloat16 on the host, which NumPy neither takes nor gives by DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return (1, 0)

    def __array__(self, dtype=None, copy=None):
        return self.array

    def __array_namespace__(self):
        return Namespace


class Namespace:
    @staticmethod
    def asarray(array):
        return Bfloat16ByArrayAlone(array)

    @staticmethod
    def from_dlpack(array):
        array.__dlpack__()  # raises BufferError for bfloat16
        return Bfloat16ByArrayAlone(array)


def test_bfloat16_gradients_reach_a_library_that_has_them():
    e, c = (Bfloat16ByArrayAlone(x.astype(ml_dtypes.bfloat16)) for x in (CASE.e, CASE.c))
    with pytest.raises(BufferError):
        e.array.__dlpack__()
    loss, grads = cce.linear_cross_entropy_with_grad(e, c, CASE.targets)
    assert isinstance(loss, Bfloat16ByArrayAlone)
    assert grads.e.array.dtype == grads.c.array.dtype == ml_dtypes.bfloat16
    want = cce.linear_cross_entropy_with_grad(e.array, c.array, CASE.targets)[1]
    np.testing.assert_array_equal(grads.c.array, want.c)


def test_bfloat16_gradients_reach_jax():
    jnp = pytest.importorskip("jax.numpy", reason="JAX is not installed")
    e, c = (jnp.asarray(x, jnp.bfloat16) for x in (CASE.e, CASE.c))
    _, grads = cce.linear_cross_entropy_with_grad(e, c, CASE.targets)
    assert (type(grads.e), grads.e.dtype) == (type(e), jnp.bfloat16)
