"""CuPy's arrays in PyTorch's blocks, and back: with tensors of the CPU in the place of CUDA's, as far as that goes."""

from __future__ import annotations

import types
import weakref

import numpy as np
import pytest

import cce_numba as cce
from tests.helpers.harness import SimulatorHarness

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
memory = pytest.importorskip("cce_numba.torch.memory")
cct = pytest.importorskip("cce_numba.torch")
pytestmark = pytest.mark.skipif(SimulatorHarness.is_active(), reason="about PyTorch and CuPy alone")


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy", reason="CuPy is not installed")


def array_in_block(cupy, shape, dtype, offset_bytes=0):
    """A CuPy array (nothing reads it) in a block that is given out as on a device."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize + offset_bytes
    pointer = memory.allocate(torch.device("cpu"), n_bytes)
    return cupy.ndarray(shape, dtype, pointer + offset_bytes)


def test_a_block_lives_as_long_as_its_arrays(cupy, monkeypatch):
    blocks = []
    empty = torch.empty

    def watched(*args, **named):
        tensor = empty(*args, **named)
        blocks.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(torch, "empty", watched)
    array = array_in_block(cupy, (4,), np.float32)
    view = array[2:]
    (block,) = blocks
    assert block() is not None
    assert block().data_ptr() == array.data.ptr
    del array
    assert block() is not None
    del view
    assert block() is None


def test_no_bytes_are_a_block_too():
    pytest.importorskip("cupy", reason="CuPy is not installed")
    assert memory.allocate(torch.device("cpu"), 0).mem.size == 0


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "int32", "int64"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0,)])
def test_a_tensor_shares_the_block(cupy, dtype, shape):
    array = array_in_block(cupy, shape, dtype, offset_bytes=16)
    tensor = memory.tensor_of(array)
    assert tensor.dtype == getattr(torch, dtype)
    assert tensor.shape == shape
    assert tensor.is_contiguous()
    if array.size:
        assert tensor.data_ptr() == array.data.ptr
    address, values = tensor.data_ptr(), tensor.fill_(7).clone()
    del array
    assert tensor.data_ptr() == address
    assert torch.equal(tensor, values)
    tensor.resize_(0)  # its storage is one that PyTorch owns


def test_two_tensors_of_one_block_are_told_apart(cupy):
    both = array_in_block(cupy, (2, 3), np.float32)
    other = array_in_block(cupy, (3,), np.float32)
    first, second, third = memory.tensors_of([both[0], both[1], other])
    storages = {x.untyped_storage().data_ptr() for x in (first, second, third)}
    assert len(storages) == 3
    assert first.data_ptr() == both.data.ptr
    assert third.data_ptr() == other.data.ptr


def test_arrays_of_numpy():
    array = np.arange(6.0).reshape(2, 3)
    assert memory.tensor_of(array).data_ptr() == array.__array_interface__["data"][0]
    transposed = memory.tensor_of(array.T)
    assert transposed.is_contiguous()
    assert transposed.tolist() == array.T.tolist()
    assert memory.tensor_of(np.asarray(3.0)).shape == ()


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "int32", "int64"])
def test_an_array_of_a_tensor_shares_its_memory(dtype):
    tensor = torch.arange(6).to(getattr(torch, dtype)).reshape(2, 3)
    array = memory.array_of(tensor.requires_grad_(tensor.is_floating_point()))
    assert array.dtype == dtype
    assert array.tolist() == tensor.tolist()
    assert array.__array_interface__["data"][0] == tensor.data_ptr()


def tensors_of_a_problem():
    torch.manual_seed(0)
    shapes = {"e": (6, 4), "c": (50, 4), "bias": (50,), "logit_scale": (6,), "class_weights": (50,), "token_weights": (6,)}
    tensors = {name: torch.rand(shape) + 0.5 for name, shape in shapes.items()}
    tensors = {name: x.requires_grad_(name in ("e", "c", "bias")) for name, x in tensors.items()}
    return tensors | {"targets": torch.randint(0, 50, (6,))}


def with_grad(**tensors):
    with torch.no_grad():
        cce.linear_cross_entropy_with_grad(**tensors)


def with_result(**tensors):
    with torch.no_grad():
        cce.backward(cce.forward(**tensors))


CALLS = {
    "autograd": lambda **tensors: cct.linear_cross_entropy(**tensors).backward(),
    "operators": lambda **tensors: torch.autograd.grad(cct.linear_cross_entropy(**tensors), tensors["c"], create_graph=True),
    "into .grad": cct.linear_cross_entropy_backward,
    "arrays in one call": with_grad,
    "arrays in two calls": with_result,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
def test_storages_stay_resizable(call, dtype):
    """After `tensor.numpy()` PyTorch never resizes a storage again, as FSDP does with those of parameters."""
    tensors = tensors_of_a_problem()
    for name in ("e", "c", "bias"):
        tensors[name] = tensors[name].detach().to(dtype).requires_grad_()
    CALLS[call](**tensors)
    for tensor in (*tensors.values(), *(x.grad for x in tensors.values() if x.grad is not None)):
        tensor.untyped_storage().resize_(0)
        tensor.untyped_storage().resize_(tensor.nbytes)
    spoilt = torch.rand(3)
    spoilt.numpy()
    with pytest.raises(RuntimeError, match="not resizable"):  # as long as PyTorch is so
        spoilt.untyped_storage().resize_(0)


def test_the_allocator_is_set_for_the_call_alone(monkeypatch):
    """With a stand-in for CuPy that records what it is told."""
    events = []

    class UsingAllocator:
        def __init__(self, allocator):
            self.allocator = allocator

        def __enter__(self):
            events.append(self.allocator(24))

        def __exit__(self, *error):
            events.append("left")

    cuda = types.SimpleNamespace(
        using_allocator=UsingAllocator,
        UnownedMemory=lambda pointer, size, owner, device: (pointer, size, owner, device),
        MemoryPointer=lambda mem, offset: (mem, offset),
    )
    monkeypatch.setattr(memory.gpu, "cupy", lambda: types.SimpleNamespace(cuda=cuda))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **named: empty(*size, **named))
    with pytest.raises(KeyError), memory.from_pytorch(torch.device("cuda", 3)):
        raise KeyError
    ((pointer, size, owner, device), offset), left = events
    assert (pointer, size, device, offset, left) == (owner.data_ptr(), 24, 3, 0, "left")
    assert owner.dtype == torch.uint8
    with memory.from_pytorch(torch.device("cpu")):
        assert len(events) == 2
