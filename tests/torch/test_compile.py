"""`torch.compile(fullgraph=True)`: one graph, the numbers of eager mode, sizes that change, errors that can be read."""

from __future__ import annotations

import shutil

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
cct = pytest.importorskip("cce_numba.torch")
from cce_numba.options import DEFAULTS  # noqa: E402

N, V, D = 40, 3000, 16


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem(device, n=N, dtype=torch.float32):
    torch.manual_seed(n)
    e, c, bias = torch.randn(2, n, D), torch.randn(V, D) / 2, torch.randn(V)
    targets = torch.randint(0, V, (2, n))
    targets[:, ::5] = -100
    return *(x.to(device, dtype).requires_grad_() for x in (e, c)), targets.to(device), bias.to(device).requires_grad_()


def results(function, tensors):
    loss, lse = function(*tensors)
    differentiable = [x for x in tensors if x.requires_grad]
    return loss, lse, *torch.autograd.grad(loss.sum() + 0.1 * lse.sum(), differentiable)


def assert_same(actual, expected, rtol=1e-6):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-2 * rtol)


OPTIONS = [
    {},
    {"filter_eps": 2.0**-4, "shift": True, "reduction": "none"},
    {"impl": "cce_kahan_full_c", "reduction": "sum", "ignore_index": -100},
    {"softcap": 5.0, "label_smoothing": 0.1},
    {"z_loss": 0.01, "logit_scale": 0.5},
    {"impl": "torch_compile", "shift": 1, "softcap": 5.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_as_eager(device, options, dtype):
    def function(e, c, targets, bias):
        return cct.linear_cross_entropy(e * 2, c, targets, bias, return_lse=True, **options)

    tensors = problem(device, dtype=dtype)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, tensors), results(function, tensors))


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's compiler needs g++")
def test_inductor(device):
    """The default compiler, with operations around it."""

    def function(e, c, targets, bias):
        loss, lse = cct.linear_cross_entropy(torch.nn.functional.silu(e), c, targets, bias, shift=1, return_lse=True)
        return loss + 1e-3 * cct.compute_z_loss(lse, targets, 1), lse

    tensors = problem(device)
    # What it makes of the operations around is rounded otherwise.
    assert_same(results(torch.compile(function, fullgraph=True), tensors), results(function, tensors), rtol=1e-5)


def test_tensor_options(device):
    def function(e, c, targets, bias, scale, classes, tokens):
        return cct.linear_cross_entropy(
            e, c, targets, bias, return_lse=True, logit_scale=scale, class_weights=classes, token_weights=tokens
        )  # fmt: skip

    more = (torch.rand(2, N, device=device) + 0.5, torch.rand(V, device=device), torch.rand(2, N, device=device) > 0.5)
    tensors = (*problem(device), *more)
    assert_same(results(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors), results(function, tensors))


@pytest.mark.parametrize(
    "options",
    [{"reduction": "none", "filter_eps": 2.0**-4}, {"reduction": "mean", "softcap": 5.0, "label_smoothing": 0.1}],
    ids=str,
)
def test_sizes_that_change_are_compiled_once(device, options):
    graphs, compiler = [], torch._dynamo.lookup_backend("aot_eager")

    def count(graph, inputs):
        graphs.append(graph)
        return compiler(graph, inputs)

    def function(e, c, targets, bias):
        return cct.linear_cross_entropy(e, c, targets, bias, shift=1, return_lse=True, **options)

    compiled, new = torch.compile(function, fullgraph=True, backend=count, dynamic=True), []
    for n in (100, 101, 70, 300):
        known, tensors = len(graphs), problem(device, n)
        assert_same(results(compiled, tensors), results(function, tensors))
        new.append(len(graphs) > known)
    assert new == [True, False, False, False]


def test_options_that_change(device):
    def function(e, c, targets, bias, shift, softcap, z_loss):
        return cct.linear_cross_entropy(e, c, targets, bias, shift=shift, softcap=softcap, z_loss=z_loss, return_lse=True)

    tensors = problem(device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for shift, softcap, z_loss in ((0, None, 0.0), (1, 5.0, 0.1), (2, 7.0, 0.2), (3, 9.0, 0.3)):

        def same(*tensors, options=(shift, softcap, z_loss), call=function):
            return call(*tensors, *options)

        assert_same(results(lambda *t, o=(shift, softcap, z_loss): compiled(*t, *o), tensors), results(same, tensors))


@pytest.fixture
def compiled_once(device):
    """Compiles a function and says of how many programs: `graphs`."""
    compiler = torch._dynamo.lookup_backend("aot_eager")

    def compiled(function):
        def count(graph, inputs):
            compiled.graphs += 1
            return compiler(graph, inputs)

        compiled.graphs = 0
        return torch.compile(function, fullgraph=True, backend=count)

    return compiled


@pytest.mark.parametrize("names", [("logit_scale", "z_loss"), ("softcap", "label_smoothing", "filter_eps")], ids="+".join)
def test_numbers_that_change_in_each_step(device, compiled_once, names):
    """As schedules make them: the second value says that there will be more, and from then on they are inputs."""

    def function(e, c, targets, bias, *numbers):
        options = dict(zip(names, numbers, strict=True))
        return cct.linear_cross_entropy(e, c, targets, bias, return_lse=True, **options)

    compiled, tensors = compiled_once(function), problem(device)
    before = {"softcap": 5.0, "filter_eps": 0.001}
    for step in range(12):  # more than the 8 programs that a compiler makes of one function
        numbers = [before.get(name, 0.0) + 0.03 * (step + 1) for name in names]
        actual, expected = (results(lambda *t, f=f, n=numbers: f(*t, *n), tensors) for f in (compiled, function))
        assert_same(actual, expected)
    assert compiled_once.graphs <= 2
    numbers = [DEFAULTS[name] if name != "filter_eps" else None for name in names]  # and back to what leaves them out
    actual, expected = (results(lambda *t, f=f: f(*t, *numbers), tensors) for f in (compiled, function))
    assert_same(actual, expected)


def test_a_number_that_changes_is_checked_when_it_runs(compiled_once):
    compiled = compiled_once(lambda *tensors, scale: cct.linear_cross_entropy(*tensors, logit_scale=scale))
    tensors = problem("cpu")
    for scale in (0.5, 0.6, 0.7):
        compiled(*tensors, scale=scale)
    with pytest.raises(ValueError, match="logit_scale: must be positive and finite in float32, or None, got -1"):
        compiled(*tensors, scale=-1.0)


class Tail(torch.nn.Module):
    """A head with its loss; the weights require grad."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.loss = torch.nn.Linear(D, 300), cct.LinearCrossEntropy(return_lse=True, **options)

    def forward(self, e, targets):
        return self.loss(e, self.head.weight, targets, self.head.bias)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", [{"shift": 1}, {"reduction": "none", "filter_eps": None}], ids=str)
def test_export_of_any_batch(strict, options):
    """In one program for all batches and lengths, though survivors' memory follows from both."""
    batch, length = (
        torch.export.Dim("batch"),
        torch.export.Dim("length", min=3),
    )  # of a slice PyTorch asks whether it is of length 1

    def inputs(*shape):
        return torch.randn(*shape, D), torch.randint(0, 300, shape)

    module, sizes = Tail(**options), {0: batch, 1: length}
    program = torch.export.export(module, inputs(3, 9), dynamic_shapes=(sizes, sizes), strict=strict).module()
    for shape in ((3, 9), (1, 3), (4, 200)):
        given = inputs(*shape)
        actual, expected = (
            [*of(*given), *torch.autograd.grad(of(*given)[0].sum(), of.parameters())] for of in (program, module)
        )
        assert_same(actual, expected)


def test_the_module_and_autocast(device):
    criterion = cct.LinearCrossEntropy(shift=1, return_lse=True)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    tensors = problem(device)
    with torch.autocast(device.type, torch.bfloat16):
        actual, expected = compiled(*tensors), criterion(*tensors)
    assert_same(actual, expected)


def test_without_grad(device):
    compiled = torch.compile(cct.LinearCrossEntropy(), fullgraph=True, backend="aot_eager")
    tensors = problem(device)
    with torch.no_grad():
        loss = compiled(*tensors)
    assert not loss.requires_grad
    assert torch.equal(loss, cct.linear_cross_entropy(*tensors).detach())


def test_a_step_that_is_compiled_in_parts(device):
    """Loss and backward run in eager mode between compiled parts."""
    loss_of = torch.compiler.disable(cct.linear_cross_entropy)

    def step(e, c, targets, bias):
        loss = loss_of(e * 2, c, targets, bias)
        loss.backward()
        return loss * 2

    tensors, expected = problem(device), problem(device)
    losses = torch.compile(step, backend="aot_eager")(*tensors), step(*expected)
    assert_same(losses[:1], losses[1:])
    assert_same([x.grad for x in tensors if x.requires_grad], [x.grad for x in expected if x.requires_grad])


def test_checkpointing(device):
    from torch.utils.checkpoint import checkpoint

    def function(e, c, targets, bias):
        return checkpoint(cct.LinearCrossEntropy(return_lse=True), e, c, targets, bias, use_reentrant=False)

    tensors = problem(device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, tensors), results(function, tensors))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"c": torch.ones(V, D + 1)}, r"c: must have shape \(V, D\)"),
        ({"targets": torch.zeros(2, N - 1, dtype=torch.long)}, "targets: must have the shape of e"),
        ({"bias": torch.ones(V + 1)}, r"bias: must have shape \(V,\) = \(3000,\)"),
        ({"impl": "triton"}, "impl: must be one of"),
        ({"reduction": "avg"}, "reduction: must be one of"),
        ({"softcap": 0.0}, "softcap: must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_errors_name_the_argument(changed, message):
    e, c, targets, bias = problem("cpu")
    given = {"e": e, "c": c, "targets": targets, "bias": bias} | changed
    compiled = torch.compile(lambda: cct.linear_cross_entropy(**given), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=message):
        compiled()
