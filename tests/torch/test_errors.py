"""Every misuse names the argument, what came, and what must come."""

from __future__ import annotations

import numpy as np
import pytest

import cce_numba as cce

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
cct = pytest.importorskip("cce_numba.torch")


def arguments(**changed):
    e, c, targets = torch.ones(2, 3, 4), torch.ones(8, 4), torch.zeros(2, 3, dtype=torch.long)
    return {"e": e, "c": c, "targets": targets} | changed


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"e": np.ones((2, 3, 4))},
            TypeError,
            r"e: must be a torch\.Tensor, got numpy\.ndarray; pass torch\.from_numpy\(e\) \(cce_num",
        ),
        ({"c": [1.0]}, TypeError, r"c: must be a torch\.Tensor, got builtins\.list"),
        ({"targets": None}, TypeError, r"targets: must be a torch\.Tensor, got builtins\.NoneType"),
        ({"bias": 1.0}, TypeError, r"bias: must be a torch\.Tensor, got builtins\.float"),
        ({"class_weights": np.ones(8)}, TypeError, r"class_weights: must be a torch\.Tensor, got numpy"),
        (
            {"e": torch.ones(2, 3, 4, dtype=torch.int32)},
            TypeError,
            r"e: dtype must be one of torch\.float16, .*, got torch\.int32",
        ),
        ({"e": torch.ones(2, 3, 4).to(torch.float8_e4m3fn)}, TypeError, r"e: dtype must be one of torch\.float16, .*float8_e4"),
        ({"c": torch.ones(8, 4, dtype=torch.bool)}, TypeError, r"c: dtype must be one of torch\.float16, .*, got torch\.bool"),
        ({"e": torch.ones(2, 3, 4).to_sparse()}, TypeError, r"e: must be a strided tensor, got layout torch\.sparse_coo"),
        ({"c": torch.nested.nested_tensor([torch.ones(8, 4)])}, TypeError, "c: must be a strided tensor, got a nested one"),
        ({"e": torch._neg_view(torch.ones(2, 3, 4))}, TypeError, r"e: is a view that negates .*; pass e\.resolve_neg\(\)"),
        ({"targets": torch.zeros(2, 3)}, TypeError, r"targets: must be integers, the ids of entries, got dtype float32"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, ValueError, r"targets: must have the shape of e without .* \(2, 3\)"),
        ({"targets": torch.full((2, 3), 8)}, ValueError, r"targets: must lie in \[0, V\) = \[0, 8\) .*, got 8 for token 0"),
        ({"c": torch.ones(4, 8)}, ValueError, r"e: last dimension must be .* D = 8 .*c looks transposed, pass c\.T"),
        ({"c": torch.ones(4)}, ValueError, r"c: must have shape \(V, D\), got shape \(4,\)"),
        ({"bias": torch.ones(7)}, ValueError, r"bias: must have shape \(V,\) = \(8,\), got shape \(7,\)"),
        ({"c": torch.ones(8, 4, device="meta")}, ValueError, "c: must be on the device of e, cpu, got meta"),
        ({"targets": torch.zeros(2, 3, device="meta")}, ValueError, "targets: must be on the device of e, cpu"),
        ({"softcap": -1.0}, ValueError, "softcap: must be positive"),
        ({"softcap": "30"}, TypeError, "softcap: must be a positive number or None, got '30'"),
        ({"reduction": "avg"}, ValueError, "reduction: must be one of 'mean', 'sum', 'none', got 'avg'"),
        ({"reduction": ["mean"]}, ValueError, "reduction: must be one of 'mean'"),
        ({"shift": -1}, ValueError, "shift: must be False, True or an integer >= 0, got -1"),
        ({"shift": 1.0}, TypeError, r"shift: must be an integer, got 1\.0"),
        ({"shift": torch.tensor(1)}, TypeError, r"shift: must be an integer, not a tensor, got tensor\(1\)"),
        ({"ignore_index": None}, TypeError, "ignore_index: must be an integer, got None"),
        ({"filter_eps": 2.0}, ValueError, r"filter_eps: must be 'auto', a number in \(0, 1\) or None"),
        ({"filter_c_grad": 1}, TypeError, "filter_c_grad: must be True or False, got 1"),
        ({"accum_e_fp32": None}, TypeError, "accum_e_fp32: must be True or False, got None"),
        ({"return_lse": 1}, TypeError, "return_lse: must be True or False, got 1"),
        ({"check_targets": "yes"}, TypeError, "check_targets: must be True or False, got 'yes'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: must be a number in \[0, 1\], got 1\.5"),
        ({"logit_scale": "2"}, TypeError, r"logit_scale: must be a number or a torch\.Tensor, got '2'"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale: must be positive"),
        ({"class_weights": torch.ones(7)}, ValueError, r"class_weights: must have shape \(V,\) = \(8,\)"),
        ({"token_weights": torch.ones(7)}, ValueError, "token_weights: must have the shape of targets"),
        ({"class_weights": torch.ones(8, requires_grad=True)}, ValueError, r"class_weights: requires grad.*class_weights\.det"),
        ({"token_weights": torch.ones(2, 3, requires_grad=True)}, ValueError, r"token_weights: requires .*reduction='none'"),
        ({"logit_scale": torch.ones((), requires_grad=True)}, ValueError, r"logit_scale: requires .* e \* logit_scale"),
        ({"impl": "triton"}, ValueError, "impl: must be one of 'cce', 'cce_exact', .*'torch_compile', got 'triton'"),
        ({"impl": ["cce"]}, ValueError, r"impl: must be one of .*, got \['cce'\]"),
        ({"impl": "torch_compile", "z_loss": 0.1}, ValueError, "z_loss: is not in the baseline"),
        ({"impl": "torch_compile", "targets": torch.zeros(2, 3)}, TypeError, "targets: must be integers, the ids of"),
        ({"impl": "torch_compile", "targets": torch.zeros(3).long()}, ValueError, "targets: must have the shape of e without"),
        ({"impl": "torch_compile", "bias": torch.ones(1)}, ValueError, r"bias: must have shape \(V,\) = \(8,\), got \(1,\)"),
        ({"impl": "torch_compile", "c": torch.ones(4, 8)}, ValueError, r"c: must have shape \(V, D\) for e \(\.\.\., D\)"),
        ({"backend": "cuda"}, ValueError, "backend: must be one of 'hopper', 'ampere', 'simt', 'cpu' or None, got 'cuda'"),
        ({"backend": "hopper"}, cce.BackendUnavailable, "backend: 'hopper' cannot run this"),
        ({"use_rms_norm": None}, TypeError, "use_rms_norm: is not an option; options are bias"),
        ({"vocab_parallel_options": 3}, TypeError, "vocab_parallel_options: must be a VocabParallelOptions, got int"),
        ({"tokens_axis": 0}, ValueError, "tokens_axis: needs a process_group, got None"),
        ({"process_group": 1}, RuntimeError, r"process_group: torch\.distributed\.init_process_group must be called before"),
        (
            {"weight": torch.ones(8)},
            TypeError,
            r"weight: .* did you mean 'class_weights' \(one weight for each entry; the class",
        ),
        ({"ce_weight": torch.ones(8)}, TypeError, "ce_weight: is not an option; did you mean 'class_weights'"),
        ({"temperature": 2.0}, TypeError, r"temperature: .* did you mean 'logit_scale' \(which is 1 / temperature\)"),
        ({"lse_square_scale": 0.1}, TypeError, "lse_square_scale: is not an option; did you mean 'z_loss'"),
        ({"return_z_loss": True}, TypeError, r"return_z_loss: .* did you mean 'return_lse' \(of which .*compute_z_loss"),
        ({"num_items_in_batch": 4}, TypeError, r"num_items_in_batch: .* did you mean 'reduction'='sum' \(and divide"),
        (
            {"c": torch.nn.Linear(4, 8)},
            TypeError,
            r"c: must be a torch\.Tensor, got .*Linear; pass its tensor, c\.weight, and bias=",
        ),
        ({"c": torch.nn.Linear(4, 8, bias=False)}, TypeError, r"c: .*Linear; pass its tensor, c\.weight$"),
        ({"c": torch.nn.Embedding(8, 4)}, TypeError, r"c: .*Embedding; pass its tensor, c\.weight$"),
        ({"c": torch.nn.Sequential(torch.nn.Linear(4, 8))}, TypeError, "c: .*Sequential; pass the tensor that it has$"),
        ({"bias": torch.nn.Linear(4, 8)}, TypeError, r"bias: .*Linear; pass its tensor, bias\.bias$"),
        ({"targets": np.zeros((2, 3), int)}, TypeError, r"targets: .*got numpy\.ndarray; pass torch\.from_numpy\(targets\)"),
        ({"targets": [[0] * 3] * 2}, TypeError, r"targets: .*got builtins\.list; pass torch\.as_tensor\(targets\)"),
        ({"targets": torch.zeros(2, 3)}, TypeError, r"targets: .* whole numbers, pass targets\.long\(\)$"),
        ({"targets": torch.zeros(2, 3, dtype=torch.bool)}, TypeError, "targets: must be integers, .* got dtype bool"),
        ({"targets": torch.zeros(2, 3, 8)}, TypeError, r"targets: .*argmax\(-1\); probabilities cannot be targets here"),
        (
            {"targets": torch.zeros(2, 3, 8).long()},
            ValueError,
            r"targets: .*, got \(2, 3, 8\); of one-hot rows pass targets\.arg",
        ),
        (
            {"c": torch.ones(8, 4, dtype=torch.int8)},
            TypeError,
            "c: .*got torch.int8; if these are quantized weights, pass what",
        ),
        ({"c": torch.ones(16, 1, dtype=torch.uint8)}, TypeError, "c: .*got torch.uint8; if these are quantized weights"),
        ({"c": torch.ones(8, 4).to(torch.float8_e4m3fn)}, TypeError, "c: .*got torch.float8_e4m3fn; if these are quantized"),
        ({"bias": torch.ones(8).to(torch.float8_e5m2)}, TypeError, "bias: .*got torch.float8_e5m2; if these are quantized"),
        ({"c": torch.zeros(2, 3).long(), "targets": torch.ones(8, 4)}, TypeError, "c: .*c and targets look exchanged: targets"),
        ({"e": torch.ones(8, 4), "c": torch.ones(2, 3, 4)}, ValueError, r"c: .*got shape \(2, 3, 4\); e and c look exchanged"),
        (
            {"e": torch.ones(8, 4), "c": torch.ones(6, 4), "targets": torch.zeros(6).long()},
            ValueError,
            r"targets: .*, \(8,\), got \(6,\); e and c look exchanged: the embeddings come first",
        ),
        (
            {"e": torch.ones(2, 3, 8)},
            ValueError,
            r"e: last dimension .* \(or e are logits: pass the embeddings that they are made",
        ),
        (
            {"e": torch.ones(2, 3, 4, device="meta")},
            ValueError,
            "e: must be on the device of c and targets, cpu, got meta",
        ),
        ({"shift": 3}, ValueError, r"shift: must be less than the number of tokens of a sequence, 3 of e \(2, 3, 4\), got 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_misuse(changed, error, message):
    with pytest.raises(error, match=message):
        cct.linear_cross_entropy(**arguments(**changed))


def test_a_sharded_tensor():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            return self

    with pytest.raises(TypeError, match=r"c: must be a plain tensor, got a DTensor; pass c\.full_tensor\(\), or, .* FSDP"):
        cct.linear_cross_entropy(**arguments(c=torch.ones(8, 4).as_subclass(Sharded)))


@pytest.mark.filterwarnings("ignore")  # PyTorch's own of its quantized tensors
def test_a_quantized_tensor():
    quantized = torch.quantize_per_tensor(torch.ones(8, 4), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"c: .*got torch\.qint8; pass c\.dequantize\(\)"):
        cct.linear_cross_entropy(**arguments(c=quantized))


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        (
            "c",
            torch.nn.Linear(4, 8),
            r"c: .*got torch\.nn\.modules\.linear\.Linear; pass its tensor, c\.weight, and bias=c\.bias",
        ),
        ("c", torch.nn.Linear(4, 8, bias=False), r"c: .*; pass its tensor, c\.weight$"),
        ("e", torch.nn.Identity(), "e: .*Identity; pass the tensor that it has$"),
        ("bias", torch.nn.Linear(4, 8), r"bias: .*; pass its tensor, bias\.bias$"),
        ("c", torch.Size([8, 4]), r"c: must be an array or a tensor, got torch\.Size$"),
    ],
)
def test_the_functions_for_arrays_know_modules(name, module, message):
    with pytest.raises(TypeError, match=message):
        cce.linear_cross_entropy(**arguments(**{name: module}))


def test_numbers_of_numpy_are_numbers():
    options = {"softcap": np.float32(5), "shift": np.int64(1), "ignore_index": np.int32(3), "label_smoothing": np.float32(0.25)}
    plain = {"softcap": 5.0, "shift": 1, "ignore_index": 3, "label_smoothing": 0.25, "logit_scale": 0.5}
    options["logit_scale"] = np.float32(0.5)
    e = torch.rand(2, 3, 4)
    actual = cct.linear_cross_entropy(**arguments(e=e), **options, filter_e_grad=np.True_)
    assert torch.equal(actual, cct.linear_cross_entropy(**arguments(e=e), **plain))


def test_another_kind_of_device(monkeypatch):
    """Of a machine that is not there."""
    monkeypatch.setattr(torch.Tensor, "device", torch.device("xpu:0"))
    with pytest.raises(
        ValueError, match=r"e: must be on the CPU or on CUDA \(or meta, for shapes alone\), got a tensor on xpu:0"
    ):
        cct.linear_cross_entropy(**arguments())


def test_the_module_s_options():
    with pytest.raises(ValueError, match="softcap: must be positive"):
        cct.LinearCrossEntropy(softcap=0)
    with pytest.raises(TypeError, match="softcap: must be a positive number or None, got tensor"):
        cct.LinearCrossEntropy(softcap=torch.tensor(3.0))
    with pytest.raises(TypeError, match="zloss: is not an option; did you mean 'z_loss'"):
        cct.LinearCrossEntropy(zloss=0.1)
    with pytest.raises(TypeError, match=r"class_weights: must be a torch\.Tensor, got numpy\.ndarray; pass torch\.from_numpy"):
        cct.LinearCrossEntropy(class_weights=np.ones(8))
    with pytest.raises(TypeError, match=r"token_weights: must be a torch\.Tensor, got builtins\.float"):
        cct.LinearCrossEntropy(token_weights=0.5)
    with pytest.raises(TypeError, match="weight: is not an option; did you mean 'class_weights'"):
        cct.LinearCrossEntropy(weight=torch.ones(8))
    with pytest.raises(TypeError, match="bias: is given when the module is called"):
        cct.LinearCrossEntropy(bias=torch.ones(8))


def test_a_gradient_that_is_not_there_yet():
    weight = torch.ones(8, 4, requires_grad=True)
    given = arguments(c=weight.detach()) | {"wrt": "c", "accumulate": True}
    with pytest.raises(ValueError, match=r"out\.c: .*pass one, of zeros like c if there is none yet \(as a tensor's \.grad is"):
        cce.linear_cross_entropy_with_grad(**given, out=cce.Gradients(c=weight.grad))
    weight.grad = torch.zeros_like(weight)
    for _ in range(2):
        cce.linear_cross_entropy_with_grad(**given, out=cce.Gradients(c=weight.grad))
    twice = cct.linear_cross_entropy(**arguments(c=weight)) * 2
    assert torch.allclose(weight.grad, torch.autograd.grad(twice, weight)[0])


def test_backward_into_grad():
    with pytest.raises(TypeError, match=r"softcap: must be a positive number or None, got 'x'"):
        cct.linear_cross_entropy_backward(**arguments(), softcap="x")
    c = torch.ones(8, 4, requires_grad=True)
    c.grad = torch.zeros(4, 8).T
    before = c.grad.clone()
    cct.linear_cross_entropy_backward(**arguments(c=c))  # strides are welcome
    assert not torch.equal(c.grad, before)
    with pytest.raises(ValueError, match="d_loss: must be a scalar"):
        cct.linear_cross_entropy_backward(**arguments(c=c), d_loss=torch.ones(5))
    with pytest.raises(TypeError, match=r"c\.grad: dtype must be float32, got float16"):
        cct.linear_cross_entropy_backward(**arguments(c=c.detach().half().requires_grad_()))
    with pytest.raises(ValueError, match=r"e\.grad: must not overlap c\.grad"):
        cct.linear_cross_entropy_backward(c, c, torch.zeros(8, dtype=torch.long))
    c.grad = c.grad.to_sparse()
    with pytest.raises(TypeError, match=r"c\.grad: must be a strided tensor, got layout torch\.sparse_coo"):
        cct.linear_cross_entropy_backward(**arguments(c=c))


def test_tf32_is_refused_where_there_is_none():
    with pytest.raises(NotImplementedError, match="allow_tf32: backend 'cpu' does not have it yet"):
        cct.linear_cross_entropy(**arguments(), allow_tf32=True)
    with pytest.raises(ValueError, match="allow_tf32: is not in the baseline"):
        cct.linear_cross_entropy(**arguments(), allow_tf32=True, impl="torch_compile")
    cct.linear_cross_entropy(**arguments(e=torch.ones(2, 3, 4).double()), allow_tf32=True)  # it means nothing there
