"""What functions return where there is more than a loss: named tuples, with None for what was not asked for."""

from __future__ import annotations

from typing import Any, NamedTuple


class Logprobs(NamedTuple):
    """What `linear_logprobs` finds. `(...)` is the shape of the tokens after the shift; float32, or float64 for float64 inputs.

    Attributes:
        logprobs: natural logarithms of the probabilities of the ids, in their shape after the shift; 0 where padded.
        lse: (...) natural-log log-sum-exp of the logits; 0 where a token is ignored, as in all below.
        entropy: (...) in nats.
        sum_squares: (...) sum of the squares of all probabilities. It has no gradient.
        top_logprobs: (..., k) the largest log-probabilities, in descending order. They have no gradient.
        top_ids: (..., k) int64, which entries these are; of equal ones the lower id comes first.
    """

    logprobs: Any
    lse: Any
    entropy: Any = None
    sum_squares: Any = None
    top_logprobs: Any = None
    top_ids: Any = None


class LossStatistics(NamedTuple):
    """What `linear_cross_entropy` returns if it is asked for more than the loss and the log-sum-exp.

    Attributes:
        loss: as without.
        lse, entropy, sum_squares, top_logprobs, top_ids: as in `Logprobs`.
    """

    loss: Any
    lse: Any
    entropy: Any = None
    sum_squares: Any = None
    top_logprobs: Any = None
    top_ids: Any = None
