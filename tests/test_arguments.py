"""Bad input gets a clear error before anything runs: which argument, what came, what must come."""

from __future__ import annotations

import numpy as np
import pytest

import cce_numba as cce
from cce_numba import arguments, interchange

e = np.ones((3, 4), np.float32)
c = np.ones((5, 4), np.float32)
targets = np.array([0, 1, 4])


def error_of(kind, *arrays, **options):
    with pytest.raises(kind) as caught:
        cce.linear_cross_entropy(*arrays, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "arrays", "says"),
    [
        (ValueError, (e[:, :3], c, targets), ["e:", "hidden size D = 4", "(3, 3)"]),
        (ValueError, (e[0, 0], c, targets), ["e:", "(..., D)", "0-d"]),
        (ValueError, (e, c[0], targets), ["c:", "(V, D)", "(4,)"]),
        (ValueError, (e, c[:0], targets), ["c:", "V >= 1", "(0, 4)"]),
        (ValueError, (e[:, :0], c[:, :0], targets), ["c:", "D >= 1", "(5, 0)"]),
        (ValueError, (e, c, targets[:2]), ["targets:", "(3,)", "(2,)"]),
        (ValueError, (e, c, targets[:, None]), ["targets:", "(3,)", "(3, 1)"]),
        (TypeError, (e.astype(np.float64), c, targets), ["c:", "float64", "float32"]),
        (TypeError, (e.astype(np.int32), c, targets), ["e:", "bfloat16", "int32"]),
        (TypeError, (e.astype(np.complex64), c, targets), ["e:", "complex64"]),
        (TypeError, (e.astype(">f4"), c, targets), ["e:", ">f4"]),
        (TypeError, (e, c, targets.astype(np.float32)), ["targets:", "integers", "float32"]),
        (TypeError, (e, c, targets.astype(np.float32)), ["if they are whole numbers, pass targets.astype(int)"]),
        (TypeError, (e, c, targets == 1), ["targets:", "integers", "bool"]),
        (TypeError, (e, c, np.eye(5)[targets]), ["targets:", "float64", "pass targets.argmax(-1)", "probabilities cannot"]),
        (ValueError, (e, c, np.eye(5, dtype=int)[targets]), ["targets:", "(3,)", "(3, 5)", "pass targets.argmax(-1)"]),
        (
            TypeError,
            (e, c.astype(np.int8), targets),
            ["c:", "float32", "int8", "quantized weights must be made floating-point"],
        ),
        (TypeError, (e, targets, c), ["c:", "int64", "targets come third"]),
        (ValueError, (c, e, targets), ["targets:", "(5,)", "(3,)", "e and c look exchanged: the embeddings come first"]),
        (ValueError, (c, e[None], targets[None]), ["c:", "(1, 3, 4)", "e and c look exchanged: the embeddings come first"]),
        (ValueError, (e @ c.T, c, targets), ["e:", "D = 4", "(3, 5)", "or e are logits"]),
        (TypeError, (e.tolist(), c, targets), ["e:", "array", "builtins.list"]),
        (TypeError, (e, None, targets), ["c:", "array", "NoneType"]),
        (TypeError, (e, c, [0, 1, 4]), ["targets:", "array", "numpy.asarray", "list"]),
        (TypeError, (e, c, None), ["targets:", "array", "NoneType"]),
        (ValueError, (e, np.ones((4, 9), np.float32), targets), ["e:", "transposed", "c.T"]),
        (TypeError, (np.ma.masked_array(e), c, targets), ["e:", "masked"]),
        (ValueError, (e, c, np.array([0, 5, 1])), ["targets:", "[0, 5)", "got 5", "token 1", "1 of 3"]),
        (ValueError, (e, c, np.array([0, -2, -1])), ["targets:", "ignore_index = -100", "got -2", "2 of 3"]),
        (ValueError, (e, c, np.array([2**64 - 100, 0, 0], np.uint64)), ["targets:", "[0, 5)", "token 0"]),
    ],
)
def test_arrays_that_do_not_fit(kind, arrays, says):
    message = error_of(kind, *arrays)
    assert all(part in message for part in says), message


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (TypeError, {"soft_cap": 3.0}, ["soft_cap", "softcap"]),
        (TypeError, {"frobnicate": 1}, ["frobnicate", "options are", "ignore_index"]),
        (ValueError, {"reduction": "max"}, ["reduction", "'mean'", "'sum'", "'none'", "'max'"]),
        (ValueError, {"softcap": 0.0}, ["softcap", "positive", "0.0"]),
        (ValueError, {"softcap": -1}, ["softcap", "positive", "-1"]),
        (ValueError, {"softcap": float("nan")}, ["softcap", "nan"]),
        (ValueError, {"softcap": float("inf")}, ["softcap", "finite"]),
        (ValueError, {"softcap": 1e-40}, ["softcap", "float32", "1e-40"]),
        (ValueError, {"softcap": 1e39}, ["softcap", "float32", "1e+39"]),
        (ValueError, {"reduction": np.zeros(2)}, ["reduction", "'mean'"]),
        (TypeError, {"return_lse": 3}, ["return_lse", "True or False"]),
        (TypeError, {"softcap": "30"}, ["softcap", "number", "'30'"]),
        (TypeError, {"ignore_index": 1.5}, ["ignore_index", "integer", "1.5"]),
        (ValueError, {"ignore_index": 2**70}, ["ignore_index", "64 bits"]),
        (ValueError, {"shift": -1}, ["shift", ">= 0", "-1"]),
        (TypeError, {"shift": 0.5}, ["shift", "integer", "0.5"]),
        (ValueError, {"filter": "fair"}, ["filter", "'drop'", "'unbiased'", "'fair'"]),
        (ValueError, {"filter": None}, ["filter", "'drop'", "None"]),
        (TypeError, {"filter_seed": 1.5}, ["filter_seed", "integer", "1.5"]),
        (TypeError, {"filter_seed": None}, ["filter_seed", "integer", "None"]),
        (TypeError, {"filter_seed": np.array(1.5)}, ["filter_seed", "0-d array", "float64"]),
        (ValueError, {"filter_seed": np.array([1])}, ["filter_seed", "0-d array", "(1,)"]),
        (ValueError, {"filter_seed": 2**70}, ["filter_seed", "64 bits"]),
        (ValueError, {"filter_eps": "high"}, ["filter_eps", "'auto'", "'high'"]),
        (ValueError, {"filter_eps": 0.0}, ["filter_eps", "(0, 1)", "0.0"]),
        (ValueError, {"filter_eps": 10**400}, ["filter_eps", "(0, 1)", "1000"]),
        (ValueError, {"filter_eps": 1.0}, ["filter_eps", "(0, 1)", "1.0"]),
        (ValueError, {"filter_eps": float("nan")}, ["filter_eps", "nan"]),
        (TypeError, {"filter_eps": [0.1]}, ["filter_eps", "[0.1]"]),
        (TypeError, {"filter_e_grad": "yes"}, ["filter_e_grad", "True or False", "'yes'"]),
        (TypeError, {"accum_c_fp32": 1}, ["accum_c_fp32", "True or False", "1"]),
        (TypeError, {"check_targets": "no"}, ["check_targets", "True or False"]),
        (ValueError, {"backend": "tpu"}, ["backend", "'cpu'", "'simt'", "'tpu'"]),
        (ValueError, {"bias": np.ones(4, np.float32)}, ["bias", "(5,)", "(4,)"]),
        (TypeError, {"bias": np.ones(5)}, ["bias", "float32", "float64"]),
        (TypeError, {"bias": [0.0] * 5}, ["bias", "array", "list"]),
        (ValueError, {"softcap": 10**400}, ["softcap", "finite"]),
        (ValueError, {"label_smoothing": 1.1}, ["label_smoothing", "[0, 1]", "1.1"]),
        (ValueError, {"label_smoothing": -0.1}, ["label_smoothing", "[0, 1]", "-0.1"]),
        (ValueError, {"label_smoothing": float("nan")}, ["label_smoothing", "[0, 1]", "nan"]),
        (TypeError, {"label_smoothing": "0.1"}, ["label_smoothing", "number", "'0.1'"]),
        (TypeError, {"label_smoothing": True}, ["label_smoothing", "number", "True"]),
        (TypeError, {"label_smoothing": None}, ["label_smoothing", "number", "None"]),
        (TypeError, {"label_smoothing": np.full(3, 0.1)}, ["label_smoothing", "number"]),
        (ValueError, {"z_loss": -1e-4}, ["z_loss", ">= 0", "-0.0001"]),
        (ValueError, {"z_loss": float("inf")}, ["z_loss", "finite", "inf"]),
        (ValueError, {"z_loss": 1e39}, ["z_loss", "finite", "1e+39"]),
        (TypeError, {"z_loss": np.ones(3)}, ["z_loss", "number"]),
        (TypeError, {"z_loss": False}, ["z_loss", "number", "False"]),
        (ValueError, {"logit_scale": 0.0}, ["logit_scale", "positive", "0.0"]),
        (ValueError, {"logit_scale": -2}, ["logit_scale", "positive", "-2"]),
        (ValueError, {"logit_scale": float("nan")}, ["logit_scale", "nan"]),
        (ValueError, {"logit_scale": np.float32(np.inf)}, ["logit_scale", "finite", "inf"]),
        (ValueError, {"logit_scale": np.array(0.0)}, ["logit_scale", "positive"]),
        (ValueError, {"logit_scale": 1e39}, ["logit_scale", "float32", "1e+39"]),
        (TypeError, {"logit_scale": "2"}, ["logit_scale", "number", "array", "'2'"]),
        (TypeError, {"logit_scale": True}, ["logit_scale", "number", "True"]),
        (TypeError, {"logit_scale": [1.0, 2.0, 3.0]}, ["logit_scale", "array", "list"]),
        (TypeError, {"logit_scale": np.ones(3, bool)}, ["logit_scale", "real numbers", "bool"]),
        (TypeError, {"logit_scale": np.ones(3, complex)}, ["logit_scale", "real numbers", "complex128"]),
        (ValueError, {"logit_scale": np.ones(5)}, ["logit_scale", "(3,)", "(5,)"]),
        (ValueError, {"logit_scale": np.ones((3, 1))}, ["logit_scale", "(3,)", "(3, 1)"]),
        (ValueError, {"class_weights": np.ones(3)}, ["class_weights", "(V,) = (5,)", "(3,)"]),
        (ValueError, {"class_weights": np.ones(())}, ["class_weights", "(V,)", "()"]),
        (TypeError, {"class_weights": 2.0}, ["class_weights", "array", "float"]),
        (TypeError, {"class_weights": np.ones(5, bool)}, ["class_weights", "real numbers", "bool"]),
        (TypeError, {"class_weights": np.ones(5, complex)}, ["class_weights", "real numbers", "complex128"]),
        (ValueError, {"token_weights": np.ones(5)}, ["token_weights", "targets", "(3,)", "(5,)"]),
        (ValueError, {"token_weights": np.ones(2), "shift": 1}, ["token_weights", "targets", "(3,)", "(2,)"]),
        (TypeError, {"token_weights": 0.5}, ["token_weights", "array", "float"]),
        (TypeError, {"token_weights": np.array(["a", "b", "c"])}, ["token_weights", "real numbers or booleans", "<U1"]),
        (TypeError, {"weight": np.ones(5)}, ["weight", "did you mean 'class_weights' (one weight for each entry"]),
        (TypeError, {"ce_weight": np.ones(5)}, ["ce_weight", "did you mean 'class_weights'"]),
        (TypeError, {"temperature": 2.0}, ["temperature", "did you mean 'logit_scale' (which is 1 / temperature)"]),
        (TypeError, {"lse_square_scale": 2.0}, ["lse_square_scale", "did you mean 'z_loss'"]),
        (TypeError, {"num_items_in_batch": 2}, ["num_items_in_batch", "did you mean 'reduction'='sum'"]),
    ],
)
def test_options_that_do_not_fit(kind, options, says):
    message = error_of(kind, e, c, targets, **options)
    assert all(part in message for part in says), message


def test_options_that_mean_nothing_to_a_building_block():
    takes = "bias, softcap, logit_scale, shift, allow_tf32, backend"
    with pytest.raises(TypeError, match=f"reduction: means nothing here; this function takes {takes}"):
        cce.linear_logsumexp(e, c, reduction="sum")
    for name in ("label_smoothing", "z_loss", "class_weights", "token_weights"):
        with pytest.raises(TypeError, match=f"{name}: means nothing here"):
            cce.linear_logsumexp(e, c, **{name: 0})
        with pytest.raises(TypeError, match=f"{name}: means nothing here"):
            cce.indexed_dot(e, c, targets, **{name: 0})
    with pytest.raises(TypeError, match="filter_eps: means nothing here"):
        cce.indexed_dot(e, c, targets, filter_eps=None)


def test_shift_needs_an_axis():
    message = error_of(ValueError, e[0], c, targets[0], shift=1)
    assert "shift" in message
    assert "(4,)" in message


@pytest.mark.parametrize("length", [0, 1, 3])
@pytest.mark.parametrize("rows", [(), (2,)])
def test_a_shift_leaves_a_token_to_each_sequence(length, rows):
    """Of none there is no mean: it would be nan."""
    embeddings, ids = np.ones((*rows, length, 4), np.float32), np.zeros((*rows, length), int)
    for shift in (length, length + 1, True) if length == 1 else (length, length + 1):
        if shift:
            message = error_of(ValueError, embeddings, c, ids, shift=shift)
            assert f"shift: must be less than the number of tokens of a sequence, {length} of e" in message
            with pytest.raises(ValueError, match="shift: must be less"):
                cce.linear_logsumexp(embeddings, c, shift=shift)
    if length > 1:
        cce.linear_cross_entropy(embeddings, c, ids, shift=length - 1)


@pytest.mark.parametrize("name", ["c", "targets", "bias", "logit_scale", "class_weights", "token_weights"])
def test_arrays_on_different_devices(monkeypatch, name):
    options = {name: np.ones(3, np.float32) for name in ("logit_scale", "token_weights")}
    options |= {name: np.ones(5, np.float32) for name in ("bias", "class_weights")}
    arrays = {"c": c, "targets": targets, **options}
    elsewhere = arrays[name]
    monkeypatch.setattr(interchange, "device_of", lambda x: "cuda:1" if x is elsewhere else "cpu")
    message = error_of(ValueError, e, c, targets, **options)
    assert message == f"{name}: must be on the device of e, cpu, got cuda:1"


def test_the_one_on_another_device_is_e(monkeypatch):
    monkeypatch.setattr(interchange, "device_of", lambda x: "cpu" if x is e else "cuda:1")
    message = error_of(ValueError, e, c, targets)
    assert message == "e: must be on the device of c and targets, cuda:1, got cpu"
    with pytest.raises(ValueError, match="c: must be on the device of e, cpu, got cuda:1"):  # nobody can tell
        cce.linear_logsumexp(e, c)


def test_weights_of_any_real_dtype_and_scales_of_any_number():
    """As floats of the compute dtype; token weights may be a mask."""
    half = arguments.problem(e, c, targets, {"token_weights": np.array([True, False, True]), "class_weights": np.arange(5)})
    assert half.token_weights.tolist() == [1, 0, 1]
    assert half.class_weights.dtype == half.token_weights.dtype == np.float32
    for two in (2, 2.0, np.float16(2), np.array(2.0), np.full(3, 2, np.int8), np.full(3, 2, interchange.BFLOAT16)):
        scale = arguments.problem(e, c, targets, {"logit_scale": two}).logit_scale
        assert scale.dtype == np.float32
        assert scale.tolist() == [2, 2, 2]
    for one in (None, 1, 1.0, np.array(1.0)):
        assert arguments.problem(e, c, targets, {"logit_scale": one}).logit_scale is None


def test_weights_shift_with_the_targets_and_scales_do_not():
    given = {"token_weights": np.array([1.0, 2.0, 3.0]), "logit_scale": np.array([4.0, 5.0, 6.0]), "shift": 1}
    p = arguments.problem(e, c, targets, given)
    assert p.targets.tolist() == [1, 4, -100]
    assert p.token_weights.tolist() == [2, 3, 0]
    assert p.logit_scale.tolist() == [4, 5, 6]


def test_nothing_is_changed_by_a_bad_call_or_a_good_one():
    copies = e.copy(), c.copy(), targets.copy()
    error_of(ValueError, e, c, np.array([0, 5, 1]))
    cce.linear_cross_entropy_with_grad(e, c, targets, shift=1)
    assert all((a == b).all() for a, b in zip(copies, (e, c, targets), strict=True))


class TestBackward:
    result = cce.forward(e, c, targets)
    per_token = cce.forward(e, c, targets, reduction="none")

    @pytest.mark.parametrize(
        ("kind", "named", "says"),
        [
            (ValueError, {"d_loss": np.ones(3)}, ["d_loss", "scalar or have shape ()", "(3,)"]),
            (ValueError, {"d_lse": np.ones(2)}, ["d_lse", "(3,)", "(2,)"]),
            (TypeError, {"d_loss": "1"}, ["d_loss", "array", "str"]),
            (TypeError, {"d_lse": np.array([1j, 0, 0])}, ["d_lse", "real", "complex128"]),
            (TypeError, {"wrt": 5}, ["wrt", "'e'", "5"]),
            (ValueError, {"d_loss": 10**400}, ["d_loss", "float32"]),
            (ValueError, {"wrt": "d"}, ["wrt", "'e'", "'d'"]),
            (ValueError, {"wrt": ("e", "bias")}, ["wrt", "no bias was given"]),
        ],
    )
    def test_upstream_that_does_not_fit(self, kind, named, says):
        with pytest.raises(kind) as caught:
            cce.backward(self.result, **named)
        assert all(part in str(caught.value) for part in says), caught.value

    def test_only_a_result_has_a_backward(self):
        with pytest.raises(TypeError, match="result: must be what forward returned, got float"):
            cce.backward(1.0)

    def test_scalars_of_all_kinds(self):
        expected = cce.backward(self.per_token, d_loss=2.0).e
        for two in (2, np.float32(2), np.float16(2), np.array(2.0), np.full(3, 2)):
            np.testing.assert_array_equal(cce.backward(self.per_token, d_loss=two).e, expected)

    def test_survivors_of_an_exact_result(self):
        assert cce.forward(e, c, targets, filter_eps=None).survivor_counts().tolist() == [5]
