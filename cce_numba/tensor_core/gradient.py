"""The gradient of the loss with respect to one logit: what an entry of G is."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.launch.inlined import finish, slope_of_cap
from cce_numba.ptx import arithmetic
from cce_numba.tensor_core.exponentials import LOG2E

exp2, fma, maximum = arithmetic.exp2, arithmetic.fma, arithmetic.maximum
_LOWEST = np.float32(-1000)  # 2 to the power of less is 0; in place of -inf, whose product with 0 would be NaN


@functools.cache
def make_gradient(capped: bool, scaled: bool, smoothed: bool, finished: bool = False, entropic: bool = False) -> Any:
    """The device function `g = gradient(x, entry, token, softcap, class_weight)`, a float32.

    x, float32, is the product of a token's row of e and an entry's row of c, plus the entry's bias. The logit that it becomes,
    and the gradient of the loss with respect to scale * x, are

        z = cap(token.scale * x)                        as `cce_numba.logit` says
        g = ((token.softmax + token.entropy * (log2(e) * z - token.shift)) * 2^(log2(e) * z - token.shift)
             - token.target_weight * (entry == token.target)
             - token.uniform * class_weight) * cap'(token.scale * x)

    The weights contain the derivative with respect to x, which is another token.scale.

    Args:
        capped: there is a softcap; else cap(y) = y.
        scaled: logits have a scale; else it is 1.
        smoothed: there is a uniform weight; else it is 0.
        finished: the function is given z instead of x.
        entropic: there is a weight of p * log(p); else it is 0.

    `token` is a `records.RowWeights`. g is 0 for entry -1, which is nobody's, and for a token all of whose weights are 0,
    whatever its logits are: not even a NaN gets through.
    """

    @cuda.jit(device=True, forceinline=True)
    def gradient(z: Any, entry: Any, token: Any, softcap: Any, class_weight: Any) -> Any:
        """See `make_gradient`; z, float32, begins as the product x with its bias, and becomes the logit."""
        if scaled and not finished:
            z = finish(z, None, token.scale, None)
        if capped and not finished:
            z = finish(z, None, None, softcap)
        power, of_softmax = fma(z, LOG2E, -token.shift), token.softmax
        if entropic:
            of_softmax = fma(token.entropy, maximum(power, _LOWEST), of_softmax)
        g = of_softmax * exp2(power)
        if entry == token.target:
            g -= token.target_weight
        if smoothed:
            g -= token.uniform * class_weight
        if capped:
            g *= slope_of_cap(z / softcap)
        a, b, uniform = token.softmax, token.target_weight, token.uniform
        no_more = (not smoothed or uniform == np.float32(0)) and (not entropic or token.entropy == np.float32(0))
        if entry < 0 or (a == np.float32(0) and b == np.float32(0) and no_more):
            g = np.float32(0)
        return g

    return gradient
