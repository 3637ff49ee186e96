"""What only a GPU can show: PyTorch's stream, its allocator, CUDA graphs, and that nothing waits."""

from __future__ import annotations

import pytest

import cce_numba as cce

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
cct = pytest.importorskip("cce_numba.torch")
pytestmark = pytest.mark.gpu

N, V, D = 512, 20_000, 256


@pytest.fixture
def tensors(cuda):
    torch.manual_seed(0)
    e, c = torch.randn(N, D, device=cuda), torch.randn(V, D, device=cuda) / 8
    targets = torch.randint(0, V, (N,), device=cuda)
    targets[::7] = -100
    return e.bfloat16().requires_grad_(), c.bfloat16().requires_grad_(), targets


def step(e, c, targets, **options):
    """Loss and gradients, without `.grad`."""
    loss = cct.linear_cross_entropy(e, c, targets, **options)
    return loss, *torch.autograd.grad(loss, (e, c))


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("filter_eps", "filter_c_grad"), [(0.01, True), ("auto", True), ("auto", False)])
@pytest.mark.parametrize(("backend", "scale"), [("simt", 1.0), ("hopper", 1.0), ("", 1.0), ("", 0.5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_forms_of_the_backends(tensors, backend, scale, dtype, filter_eps, filter_c_grad):
    """The fakes' shapes are those of each backend's statistics, whatever N and V are."""
    from cce_numba.torch import operators

    for n, v in ((N, V), (129, 193), (1, 7)):
        e, c, targets = tensors[0][:n].detach().to(dtype), tensors[1][:v].detach().to(dtype), tensors[2][:n] % v
        try:
            cce.explain(e, c, targets, backend=backend or None)
        except cce.BackendUnavailable as why:
            pytest.skip(str(why))
        given = {"backend": backend, "logit_scale": scale, "filter_eps": filter_eps, "filter_c_grad": filter_c_grad}
        arguments = (e, c, targets, *[None] * 6, *operators._encoded(given), "e,c")
        torch.library.opcheck(operators.forward_op, arguments, test_utils="test_faketensor")


def test_on_the_current_stream_without_waiting(tensors):
    expected = step(*tensors)
    e, c, targets = tensors
    with torch.cuda.stream(torch.cuda.Stream()):
        step(e, c, targets)
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)
        actual = step(e, c, targets)
        assert not torch.cuda.current_stream().query(), "the host waited for the device"
        torch.cuda.current_stream().synchronize()
    assert_equal(actual, expected)


def test_memory_comes_from_pytorch(tensors):
    import cupy

    step(*tensors)
    torch.cuda.synchronize()
    before, held = torch.cuda.memory_allocated(), cupy.get_default_memory_pool().used_bytes()
    torch.cuda.reset_peak_memory_stats()
    results = step(*tensors)
    torch.cuda.synchronize()
    assert cupy.get_default_memory_pool().used_bytes() == held
    outputs = sum(x.nbytes for x in results)
    assert torch.cuda.max_memory_allocated() - before > outputs, "workspaces are not in PyTorch's peak"
    del results
    assert torch.cuda.memory_allocated() == before, "a block was not given back"


def test_survivors_go_with_the_graph(tensors):
    before = torch.cuda.memory_allocated()
    loss = cct.linear_cross_entropy(*tensors)
    kept = torch.cuda.memory_allocated() - before
    assert kept <= 64 * N + 2 * (N // 128) * V // 8 + 16384
    del loss
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("options", [{}, {"filter_eps": None}, {"shift": 1, "softcap": 20.0}], ids=str)
def test_cuda_graph(tensors, options):
    """Forward and backward captured; a replay computes with what the inputs then hold."""
    e, c, targets = tensors
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(e, c, targets, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(e, c, targets, **options)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            e.copy_(torch.randn(N, D, device=e.device))
            targets.copy_(torch.randint(0, V, (N,), device=e.device))
        graph.replay()
        actual = [x.clone() for x in captured]
        assert_equal(actual, step(e, c, targets, **options))


def test_compiled_with_cuda_graphs(tensors):
    torch._dynamo.reset()
    e, c, targets = tensors
    compiled = torch.compile(cct.LinearCrossEntropy(), fullgraph=True, mode="reduce-overhead")
    expected = step(e, c, targets)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(e, c, targets)
        actual = [loss.clone(), *(x.clone() for x in torch.autograd.grad(loss, (e, c)))]
        assert_equal(actual, expected)


class Transformer(torch.nn.Module):
    """A block of causal attention and a head, which is the embedding; gives the loss."""

    def __init__(self):
        super().__init__()
        self.embedding, self.qkv = torch.nn.Embedding(2000, 64), torch.nn.Linear(64, 192)
        torch.nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, tokens, targets, criterion):
        x = self.embedding(tokens)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4).unbind()
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return criterion(x + attended.transpose(1, 2).flatten(-2), self.embedding.weight, targets)


def stored_logits(e, c, targets):
    return torch.nn.functional.cross_entropy((e @ c.T).float().flatten(0, -2), targets.flatten())


def optimizer_step(optimizer, loss):
    """One step by this loss, of which no gradient and no graph is left."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)], ids=str)
def test_a_training_step_compiled_and_captured(cuda, dtype, rtol):
    """Replays on new batches learn what the same steps with stored logits do, which nothing compiles or captures."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    batches = torch.randint(0, 100, (8, 4, 65), device=cuda)  # what there is to learn: the other entries do not occur
    model = Transformer().to(cuda, dtype)
    first = [x.clone() for x in model.state_dict().values()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True)
    compiled = torch.compile(model, fullgraph=True)
    tokens, targets = batches[0, :, :-1].clone(), batches[0, :, 1:].clone()

    def start_again():
        for parameter, value in zip(model.state_dict().values(), first, strict=True):
            parameter.copy_(value)
        for state in optimizer.state.values():
            for x in state.values():
                x.zero_()

    expected = [float(optimizer_step(optimizer, model(b[:, :-1], b[:, 1:], stored_logits))) for b in batches]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer_step(optimizer, compiled(tokens, targets, cct.linear_cross_entropy))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = optimizer_step(optimizer, compiled(tokens, targets, cct.linear_cross_entropy))
    start_again()
    actual = []
    for batch in batches:
        tokens.copy_(batch[:, :-1])
        targets.copy_(batch[:, 1:])
        graph.replay()
        actual.append(float(loss))
    assert actual == pytest.approx(expected, rel=rtol)
    assert actual[-1] < (1 - 10 * rtol) * actual[0], "too little was learned to tell"


def test_a_target_out_of_range_is_nan_without_looking(tensors):
    e, c, targets = tensors
    targets[3] = V
    loss = cct.linear_cross_entropy(e, c, targets, reduction="none")
    assert loss[3].isnan()
    assert loss.isnan().sum() == 1
    with pytest.raises(ValueError, match="targets: must lie in"):
        cct.linear_cross_entropy(e, c, targets, check_targets=True)


def test_devices_that_differ(tensors):
    e, c, targets = tensors
    with pytest.raises(ValueError, match="c: must be on the device of e, cuda:0, got cpu"):
        cct.linear_cross_entropy(e, c.cpu(), targets)
