"""How a product becomes a logit: logit = cap(scale * (product + bias)), where cap(x) = softcap * tanh(x / softcap).

A product is the dot product of a token's embedding and a row of the classifier. The bias belongs to a vocabulary entry, the
scale to a token, the softcap to the whole problem. Each may be None, and then takes no part.

`finish` and `slope_of_cap` are for one number. They are plain Python, and `launch/inlined.py` registers them with Numba, so
that any kernel may call them, on a GPU and in the simulator. An argument that is None costs a compiled kernel nothing.
`finish_in_place` is for arrays.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_ONE = np.float32(1)  # with a float64 number it gives a float64 number, where an integer would also turn float32 into float64


def finish(product: Any, bias: Any, scale: Any, softcap: Any) -> Any:
    """The logit of a product; all of one floating-point dtype, and each but the product may be None.

    >>> finish(2.0, 1.0, None, None), round(finish(2.0, 1.0, 10.0, 5.0), 3)
    (3.0, 5.0)
    """
    logit = product
    if bias is not None:
        logit = logit + bias
    if scale is not None:
        logit = logit * scale
    if softcap is not None:
        logit = softcap * math.tanh(logit / softcap)
    return logit


def slope_of_cap(ratio: Any) -> Any:
    """The derivative of cap at x, where `ratio` is cap(x) / softcap, which is tanh(x / softcap).

    >>> float(slope_of_cap(0.5))
    0.75
    """
    return _ONE - ratio * ratio


def finish_in_place(products: Any, bias: Any, scale: Any, softcap: float | None) -> None:
    """Turns a NumPy or CuPy array of products, float32 or float64, into logits.

    bias and scale broadcast to its shape: for products (n, v) of n tokens, a bias is (v,) and a scale (n, 1). Each may be None.

    >>> z = np.array([[2.0, 3.0]])
    >>> finish_in_place(z, np.array([1.0, 0.0]), np.array([[10.0]]), None)
    >>> z
    array([[30., 30.]])
    """
    if bias is not None:
        products += bias.astype(products.dtype, copy=False)
    if scale is not None:
        products *= scale
    if softcap is not None:
        products /= products.dtype.type(softcap)
        np.tanh(products, out=products)  # on a CuPy array this is CuPy's
        products *= products.dtype.type(softcap)
