"""Which ranks share a vocabulary, as PyTorch's users say it: a process group, `cut_cross_entropy`'s options, or DTensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cce_numba.parallel.agreement import Agreement
from cce_numba.parallel.shard import rows_of_rank
from cce_numba.ranks import Sharing


@dataclass
class VocabParallelOptions:
    """`cut_cross_entropy`'s own, for `linear_cross_entropy(vocab_parallel_options=)`: this rank's rows of the classifier.

    Attributes:
        start: the first entry whose row this rank has.
        stop: the entry after the last one.
        group: the process group that shares the vocabulary; None for the default one.
        reduce_e_grad: whether the gradient of e is summed over the group. False leaves each rank its part, for a body that sums
            it by itself.
    """

    start: int
    stop: int
    group: Any = None
    reduce_e_grad: bool = True

    @classmethod
    def from_vocab(cls, vocab_size: int, group: Any = None, reduce_e_grad: bool = True) -> VocabParallelOptions:
        """Those of this rank, where the group splits a vocabulary as evenly as it goes: `cce_numba.parallel.rows_of_rank`."""
        import torch.distributed as dist  # not every PyTorch has it

        start, stop = rows_of_rank(vocab_size, dist.get_rank(group), dist.get_world_size(group))
        return cls(start, stop, group, reduce_e_grad)


def sharing_of(process_group: Any, options: Any, tokens_axis: int | None, on_device: bool) -> Sharing:
    """How the ranks of a call share their work.

    Raises TypeError or ValueError for options that do not fit.
    """
    if process_group is None and options is None:
        raise ValueError("tokens_axis: needs a process_group, got None")
    if options is not None and process_group is not None:
        raise ValueError("process_group: must be None with vocab_parallel_options, which have a group")
    reduce_e_grad = True
    if options is not None:
        for name in ("start", "stop", "group"):
            if not hasattr(options, name):
                raise TypeError(f"vocab_parallel_options: must be a VocabParallelOptions, got {type(options).__qualname__}")
        process_group, reduce_e_grad = options.group, bool(getattr(options, "reduce_e_grad", True))
    from cce_numba.torch.communicator import communicator_of  # not every PyTorch has torch.distributed

    communicator = communicator_of(process_group)
    start = None if options is None else int(options.start)
    return Sharing(communicator, tokens_axis, start, reduce_e_grad, agreement=Agreement(communicator, on_device))


def check_rows(options: Any, c: torch.Tensor) -> None:
    """Raises ValueError unless c has as many rows as the options say; nothing to do without options."""
    if options is not None and c.shape[0] != options.stop - options.start:
        raise ValueError(
            f"c: must have the rows of [{options.start}, {options.stop}) that vocab_parallel_options say, got {c.shape[0]} rows"
        )
