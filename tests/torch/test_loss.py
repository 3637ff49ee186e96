"""The adapter's loss and gradients: PyTorch's own on stored logits, and bit for bit those of the functions it calls."""

from __future__ import annotations

import copy
import enum
import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cce_numba as cce
from cce_numba.options import DEFAULTS
from tests.torch.stored_logits import stored_logits_loss

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
cct = pytest.importorskip("cce_numba.torch")
pytestmark = pytest.mark.usefixtures("way")

# What is drawn: sizes around the blocks of 128 tokens and bytes of 8 entries, every option, and what it may meet.
OPTIONS = st.fixed_dictionaries(
    {
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "shift": st.sampled_from([0, 0, 1, True, 3]),
        "softcap": st.sampled_from([None, None, 5.0]),
        "ignore_index": st.sampled_from([-100, -100, 0]),
    },
    optional={
        "logit_scale": st.sampled_from([1.0, 0.5, "tokens"]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "z_loss": st.sampled_from([0.0, 0.01]),
        "class_weights": st.just("entries"),
        "token_weights": st.just("tokens"),
    },
)
PROBLEMS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**16),
        "shape": st.sampled_from([(7,), (2, 4), (130,), (1,), (2, 3, 5)]),
        "V": st.sampled_from([2, 7, 8, 9, 150, 1500]),
        "D": st.sampled_from([1, 5, 16]),
        "ignored": st.sampled_from([0.0, 0.3, 1.0]),
        "bias": st.booleans(),
    }
)


def make(problem, options, dtype=torch.float64, device="cpu"):
    """Inputs that require grad, targets, and the options with their tensors."""
    generator = torch.Generator().manual_seed(problem["seed"])

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape, V, D = problem["shape"], problem["V"], problem["D"]
    if options.get("shift") and not options["shift"] < shape[-1]:  # which is an error
        options = options | {"shift": 0}
    inputs = {"e": normal(*shape, D), "c": normal(V, D) * 2 / D**0.5}
    if problem["bias"]:
        inputs["bias"] = normal(V)
    inputs = {name: x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
    targets = torch.randint(0, V, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < problem["ignored"]] = options.get("ignore_index", -100)
    sized = {"tokens": shape, "entries": (V,)}
    tensors = {
        name: (torch.rand(sized[value], generator=generator, dtype=torch.float64) + 0.5).to(device, dtype)
        for name, value in options.items()
        if isinstance(value, str) and value in sized
    }
    return inputs, targets.to(device), options | tensors


def gradients(inputs, *losses):
    """Of a weighted sum, so that no token's gradient is another's."""
    total = 0
    for loss in losses:
        weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        total = total + (loss * weights.to(loss.device)).sum()
    return dict(zip(inputs, torch.autograd.grad(total, list(inputs.values()), allow_unused=True), strict=True))


def relative(actual, exact):
    """Frobenius norm of the error, relative; of an exact 0, absolute. NaN if there is one."""
    exact = exact.double()
    return float((actual.cpu().double() - exact).norm() / (exact.norm() or 1))


@settings(max_examples=60)
@given(problem=PROBLEMS, options=OPTIONS, dtype=st.sampled_from(["float64", "float32", "bfloat16", "float16"]))
def test_agrees_with_stored_logits(device, problem, options, dtype):
    inputs, targets, options = make(problem, options, getattr(torch, dtype), device)
    loss, lse = cct.linear_cross_entropy(**inputs, targets=targets, return_lse=True, filter_eps=None, **options)
    wide = {name: x.detach().double().cpu().requires_grad_() for name, x in inputs.items()}
    on_host = {name: x.double().cpu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    exact_loss, exact_lse = stored_logits_loss(**wide, targets=targets.cpu(), **on_host)

    compute = 1e-12 if dtype == "float64" else 1e-5
    assert loss.dtype == lse.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    torch.testing.assert_close(loss.cpu().double(), exact_loss, rtol=compute, atol=compute, equal_nan=True)
    torch.testing.assert_close(lse.cpu().double(), exact_lse, rtol=compute, atol=compute)
    if exact_loss.isnan().any():
        return  # no token counts: PyTorch has gradients of nan then, and these of 0
    # One rounding to the gradient's dtype, twice where label smoothing adds a part of it by itself; its cancellation.
    rounding = {"float64": 1e-11, "float32": 1e-4, "bfloat16": 3 * 2.0**-9, "float16": 3 * 2.0**-12}[dtype]
    exact = gradients(wide, exact_loss, exact_lse)
    for name, actual in gradients(inputs, loss, lse).items():
        assert actual.dtype == inputs[name].dtype
        assert actual.shape == inputs[name].shape
        assert relative(actual, exact[name]) <= rounding + (1e-6 if dtype == "float16" else 0), name  # and its subnormals


@settings(max_examples=60)
@given(
    problem=PROBLEMS,
    options=OPTIONS,
    dtype=st.sampled_from(["float64", "float32", "bfloat16", "float16"]),
    filters=st.fixed_dictionaries(
        {
            "filter_eps": st.sampled_from(["auto", None, 2.0**-4, 2.0**-8]),
            "filter_e_grad": st.booleans(),
            "filter_c_grad": st.booleans(),
        }
    ),
    lse_too=st.booleans(),
)
def test_is_the_functions_that_it_calls_bit_for_bit(device, problem, options, dtype, filters, lse_too):
    """What goes through autograd as tensors (the survivors among it) loses nothing."""
    inputs, targets, options = make(problem, options, getattr(torch, dtype), device)
    loss, lse = cct.linear_cross_entropy(**inputs, targets=targets, return_lse=True, **options, **filters)
    actual = gradients(inputs, loss, *([lse] if lse_too else []))
    with torch.no_grad():
        result = cce.forward(**inputs, targets=targets, **options, **filters)
        d_loss, d_lse = (torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape).to(device) for x in (loss, lse))
        expected = cce.backward(result, d_loss, d_lse if lse_too else None)
    assert torch.equal(loss.nan_to_num(7), result.loss.nan_to_num(7))
    assert torch.equal(lse, result.lse)
    for name, grad in actual.items():
        assert torch.equal(grad, getattr(expected, name)), name


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "shift": 1}, {"label_smoothing": 0.1, "z_loss": 0.1}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(device, options, reduction):
    problem = {"seed": 3, "shape": (2, 4), "V": 11, "D": 3, "ignored": 0.3, "bias": True}
    inputs, targets, _ = make(problem, {}, torch.float64, device)

    def function(e, c, bias):
        return cct.linear_cross_entropy(
            e, c, targets, bias, reduction=reduction, filter_eps=None, return_lse=True, **options
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


# Three blocks of tokens; at FILTERED's threshold some 500 entries survive in each.
SOME = {"seed": 0, "shape": (300,), "V": 3000, "D": 16, "ignored": 0.2, "bias": True}
FILTERED = {"filter_eps": 2.0**-4}


@pytest.mark.parametrize(
    ("impl", "same"),
    [
        ("cce", {}),
        ("cce_kahan", {}),
        ("cce_exact", {"filter_eps": None}),
        ("cce_kahan_full", {"filter_eps": None}),
        ("cce_kahan_full_c_full_e", {"filter_eps": None}),
        ("cce_kahan_full_c", {"filter_c_grad": False}),
        ("cce_kahan_full_e", {"filter_e_grad": False}),
    ],
)
def test_presets(impl, same):
    inputs, targets, _ = make(SOME | {"seed": 5}, {}, torch.bfloat16)
    member = enum.Enum("Impl", [impl.upper()])[impl.upper()]
    actual = gradients(inputs, cct.linear_cross_entropy(**inputs, targets=targets, impl=impl))
    named = gradients(inputs, cct.linear_cross_entropy(**inputs, targets=targets, impl=member, accum_c_fp32=True))
    expected = gradients(inputs, cct.linear_cross_entropy(**inputs, targets=targets, **same))
    for name in inputs:
        assert torch.equal(actual[name], expected[name])
        assert torch.equal(named[name], expected[name])
        assert actual[name].abs().max() > 0


def test_a_preset_takes_the_place_of_the_filter_options():
    inputs, targets, _ = make(SOME, {}, torch.float32)
    coarse = gradients(inputs, cct.linear_cross_entropy(**inputs, targets=targets, **FILTERED))
    exact = gradients(inputs, cct.linear_cross_entropy(**inputs, targets=targets, filter_eps=None))
    assert not torch.equal(coarse["c"], exact["c"])
    preset = gradients(inputs, cct.linear_cross_entropy(**inputs, targets=targets, impl="cce_exact", **FILTERED))
    assert torch.equal(preset["c"], exact["c"])


@settings(max_examples=30)
@given(problem=PROBLEMS, options=OPTIONS)
def test_the_baseline(problem, options):
    options = {name: options[name] for name in ("reduction", "shift", "softcap", "ignore_index")}
    inputs, targets, options = make(problem, options)
    actual = cct.linear_cross_entropy(**inputs, targets=targets, return_lse=True, impl="torch_compile", **options)
    expected = stored_logits_loss(**inputs, targets=targets, **options)
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_the_order_of_the_arguments_is_that_of_cut_cross_entropy():
    names = "e c targets bias ignore_index softcap reduction shift return_lse filter_eps accum_e_fp32 accum_c_fp32"
    names = [*names.split(), "filter_e_grad", "filter_c_grad", "impl"]
    parameters = inspect.signature(cct.linear_cross_entropy).parameters
    assert [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == names
    of_ranks = dict.fromkeys(("process_group", "tokens_axis", "vocab_parallel_options"))
    assert set(parameters) == {"e", "c", "targets", "return_lse", "impl", "others", *DEFAULTS, *of_ranks}
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == {**DEFAULTS, **of_ranks, "return_lse": False, "impl": "cce"}
    module = [*inspect.signature(cct.LinearCrossEntropy).parameters]
    assert module == [*(name for name in names[4:] if name != "return_lse"), "return_lse", "options"]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (3,), (1, 1)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_small_and_empty(device, shape, reduction):
    problem = {"seed": 0, "shape": shape, "V": 9, "D": 4, "ignored": 1.0, "bias": True}
    inputs, targets, _ = make(problem, {}, torch.float32, device)
    loss, lse = cct.linear_cross_entropy(**inputs, targets=targets, reduction=reduction, return_lse=True)
    assert loss.shape == (shape if reduction == "none" else ())
    assert lse.shape == shape
    assert loss.isnan().all() == (reduction == "mean" or not loss.numel())
    for grad in gradients(inputs, loss).values():
        assert not grad.any()


@pytest.mark.parametrize("impl", ["cce", "torch_compile"])
@pytest.mark.parametrize("shift", [3, 5])
def test_a_shift_beyond_the_end(impl, shift):
    """Theirs is nan, since it is a mean of none."""
    inputs, targets, _ = make(SOME | {"shape": (2, 3)}, {})
    with pytest.raises(ValueError, match=rf"shift: must be less than the number of tokens of a sequence, 3 of .*got {shift}"):
        cct.linear_cross_entropy(**inputs, targets=targets, shift=shift, impl=impl)


def test_the_module(device):
    inputs, targets, _ = make(SOME | {"shape": (2, 50)}, {}, torch.float32, device)
    e, c, bias = inputs.values()
    weights = torch.rand(3000, device=device)
    options = {"shift": 1, "reduction": "sum", "softcap": 20.0, "class_weights": weights, "label_smoothing": 0.1}
    module = cct.LinearCrossEntropy(return_lse=True, **options)
    expected = cct.linear_cross_entropy(e, c, targets, bias, return_lse=True, **options)
    for actual, other in zip(module(e, c, targets, bias), expected, strict=True):
        assert torch.equal(actual, other)
    assert not list(module.parameters())
    assert "softcap=20.0" in repr(module)
    assert "filter_eps" not in repr(module)
    assert repr(cct.LinearCrossEntropy()) == "LinearCrossEntropy()"
    assert "class_weights=<torch.float32 (3000,)>" in repr(module)
    assert repr(module).count("\n") == 0


def test_the_module_s_options_are_attributes_and_its_tensors_move_with_it():
    inputs, targets, _ = make(SOME, {}, torch.float32)
    weights = torch.rand(3000)
    module = copy.deepcopy(cct.LinearCrossEntropy(class_weights=weights, reduction="sum"))
    assert (module.reduction, module.ignore_index, module.impl) == ("sum", -100, "cce")
    assert torch.equal(module.class_weights, weights)
    assert module.to(torch.float64).class_weights.dtype == torch.float64
    assert module.to("meta").class_weights.is_meta
    assert not module.state_dict()
    module.reduction, module.class_weights = "none", None
    e, c, bias = inputs.values()
    expected = cct.linear_cross_entropy(e, c, targets, bias, reduction="none")
    assert torch.equal(module(e, c, targets, bias), expected)


class TestZLoss:
    def test_counts_the_tokens_that_count(self):
        lse = torch.tensor([[1.0, 2.0], [3.0, 0.0]], requires_grad=True)
        targets = torch.tensor([[9, 4, 5], [9, 6, -100]])
        assert cct.compute_z_loss(lse, targets, shift=True).item() == pytest.approx(14 / 3)
        assert cct.compute_z_loss(lse, targets, 1, reduction="sum").item() == 14
        assert cct.compute_z_loss(lse).item() == 14 / 4
        assert cct.compute_z_loss(lse, targets, 1, reduction="none").tolist() == [[1, 4], [9, 0]]
        assert cct.compute_z_loss(lse, torch.full((2, 2), 7), ignore_index=7).isnan()

    def test_is_the_option_z_loss(self, device):
        inputs, targets, _ = make(SOME | {"shape": (2, 50)}, {}, torch.float64, device)
        loss, lse = cct.linear_cross_entropy(**inputs, targets=targets, shift=1, return_lse=True, filter_eps=None)
        apart = loss + 0.1 * cct.compute_z_loss(lse, targets, shift=1)
        together = cct.linear_cross_entropy(**inputs, targets=targets, shift=1, z_loss=0.1, filter_eps=None)
        torch.testing.assert_close(apart, together)
        ours, theirs = gradients(inputs, together), gradients(inputs, apart)
        for name in inputs:
            torch.testing.assert_close(ours[name], theirs[name])

    def test_errors(self):
        with pytest.raises(ValueError, match=r"targets: must have, after the shift, the shape of lse, \(3,\), got \(4,\)"):
            cct.compute_z_loss(torch.ones(3), torch.ones(4, dtype=torch.long))
        with pytest.raises(ValueError, match="reduction: must be one of 'mean'"):
            cct.compute_z_loss(torch.ones(3), reduction="avg")
        with pytest.raises(TypeError, match=r"lse: must be a torch\.Tensor, got builtins\.list"):
            cct.compute_z_loss([1.0])
        with pytest.raises(TypeError, match=r"lse: must be of a floating-point dtype, got torch\.int64"):
            cct.compute_z_loss(torch.ones(3, dtype=torch.long))
        with pytest.raises(TypeError, match="targets: must be integers, the ids of entries, got dtype float32"):
            cct.compute_z_loss(torch.ones(3), torch.ones(3))
        with pytest.raises(TypeError, match="ignore_index: must be an integer, got None"):
            cct.compute_z_loss(torch.ones(3), torch.ones(3, dtype=torch.long), ignore_index=None)
        with pytest.raises(ValueError, match="shift: must be False, True or an integer >= 0, got -1"):
            cct.compute_z_loss(torch.ones(3), torch.ones(4, dtype=torch.long), shift=-1)
