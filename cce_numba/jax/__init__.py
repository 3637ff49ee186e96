"""JAX: the loss and the log-probabilities for JAX's arrays, differentiated by `jax.grad`, under `jax.jit`.

Arrays on the CPU go through the NumPy path, arrays on CUDA through CuPy, neither with a copy: XLA hands its buffers to a Python
function (`jax.experimental.buffer_callback`), which writes its results into XLA's own. See `functional` for what the functions
do, `checks` for what they refuse, `derivatives` for how JAX differentiates them, `callbacks` for what runs when XLA does,
`buffers` for arrays in XLA's memory, `state` for what a backward needs of a forward.

>>> import jax
>>> import jax.numpy as jnp
>>> e, c, targets = jnp.zeros((2, 4)), jnp.ones((8, 4)), jnp.array([3, 5])
>>> loss, gradients = jax.jit(jax.value_and_grad(linear_cross_entropy, argnums=(0, 1)))(e, c, targets)
>>> round(float(loss), 4), gradients[1].shape
(2.0794, (8, 4))
"""

from cce_numba.jax.functional import linear_cross_entropy, linear_logprobs

__all__ = ["linear_cross_entropy", "linear_logprobs"]
