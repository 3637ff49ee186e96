"""PyTorch: `cut_cross_entropy`'s interface on these kernels, with autograd, `torch.compile` and autocast.

Tensors on the CPU go through the NumPy path, tensors on CUDA through CuPy, neither with a copy; see `functional` for what the
functions do, `checks` for what they refuse, `autograd` for who records them, `operators` and `fakes` for how compilers see
them, `call` for what they compute, `memory` for whose memory they take, `on_ranks` for several processes that share a
vocabulary.

>>> import torch
>>> e, weight = torch.zeros(2, 4, requires_grad=True), torch.ones(8, 4, requires_grad=True)
>>> loss = linear_cross_entropy(e, weight, torch.tensor([3, 5]))
>>> loss.backward()
>>> round(loss.item(), 4), weight.grad.shape
(2.0794, torch.Size([8, 4]))
"""

from cce_numba.torch.distillation import linear_distillation
from cce_numba.torch.functional import (
    LinearCrossEntropy,
    compute_z_loss,
    linear_cross_entropy,
    linear_cross_entropy_backward,
)
from cce_numba.torch.logprobs import linear_logprobs
from cce_numba.torch.vocab_parallel import VocabParallelOptions

__all__ = [
    "LinearCrossEntropy",
    "VocabParallelOptions",
    "compute_z_loss",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "linear_distillation",
    "linear_logprobs",
]
