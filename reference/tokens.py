"""Which tokens take part, what belongs to each of them, and the way back to the shape that the caller's arrays have.

An id is a vocabulary entry. A token comes with one id, `ids (...)`, or with K of them, `ids (..., K)`. Inside, one id is K = 1.
"""

from dataclasses import dataclass

import numpy as np


def shifted(e, targets, shift):
    """Views of e without its last, and of targets without its first `shift` tokens: token t predicts token t + shift.

    targets: `(...)` or `(..., K)`, where e is `(..., D)`.

    >>> e, targets = shifted(np.zeros((2, 5, 3)), np.array([[10, 11, 12, 13, 14]] * 2), shift=1)
    >>> e.shape, targets[0].tolist()
    ((2, 4, 3), [11, 12, 13, 14])
    """
    shift = int(shift)
    if shift == 0:
        return e, targets
    sequences = (slice(None),) * (e.ndim - 2)
    return e[..., : max(e.shape[-2] - shift, 0), :], targets[(*sequences, slice(shift, None))]


def per_token(logit_scale, token_weights, shape, shift):
    """Both `(...)` as the loss sees them after the shift: the scale goes with e, the weight with the target; 1 where not given.

    >>> scale, weight = per_token(np.array([1.0, 2.0]), np.array([3.0, 4.0]), (2,), shift=1)
    >>> scale.tolist(), weight.tolist()
    ([1.0], [4.0])
    """
    scale = np.broadcast_to(np.asarray(1.0 if logit_scale is None else logit_scale, np.float64), shape)
    weight = np.broadcast_to(np.asarray(1.0 if token_weights is None else token_weights, np.float64), shape)
    scale, weight = shifted(scale[..., None], weight, shift)
    return scale[..., 0], weight


@dataclass(frozen=True)
class Tokens:
    """The n tokens that take part, in order; `(...)` is the shape of all tokens after the shift."""

    valid: np.ndarray  # (...) bool, which ones they are
    e: np.ndarray  # (n, D)
    scale: np.ndarray  # (n,) of their logits
    ids: np.ndarray  # (n, K), 0 where padded
    present: np.ndarray  # (n, K) bool, False where padded
    many: bool  # whether the caller's ids have an axis K

    def select(self, values):
        """Values `(...)`, or one for all, as those of the tokens that take part, `(n,)`."""
        return np.broadcast_to(np.asarray(values, np.float64), self.valid.shape)[self.valid]

    def select_ids(self, values):
        """Values in the shape of the ids, or one for all, as `(n, K)`; 0 where padded, whatever they are there."""
        values = np.asarray(values, np.float64)
        values = values[..., None] if values.ndim and not self.many else values
        values = np.broadcast_to(values, (*self.valid.shape, self.ids.shape[-1]))[self.valid]
        return np.where(self.present, values, 0.0)

    def everywhere(self, values):
        """Values `(n, ...)` of the tokens that take part as those of all tokens, `(..., ...)`: 0 for the others."""
        full = np.zeros(self.valid.shape + values.shape[1:], values.dtype)
        full[self.valid] = values
        return full

    def ids_everywhere(self, values):
        """Values `(n, K)` in the shape of the caller's ids: 0 where a token takes no part, or where padded."""
        full = self.everywhere(np.where(self.present, values, 0))
        return full if self.many else full[..., 0]

    def gradient_of_e(self, rows, shape, shift):
        """Rows `(n, D)` of the gradient of e as all of it, in e's shape: 0 where a token takes no part or is shifted away."""
        full = np.zeros(shape)
        shifted(full, np.zeros(shape[:-1]), shift)[0][self.valid] = rows
        return full


def counting(e, ids, *, ignore_index=-100, shift=0, logit_scale=None):
    """The tokens that take part: those with an id other than `ignore_index`. e `(..., D)`, ids `(...)` or `(..., K)`.

    >>> tokens = counting(np.zeros((3, 2)), np.array([[5, 6], [7, -100], [-100, -100]]))
    >>> tokens.valid.tolist(), tokens.ids.tolist(), tokens.present.tolist()
    ([True, True, False], [[5, 6], [7, 0]], [[True, True], [True, False]])
    """
    e, ids = np.asarray(e, np.float64), np.asarray(ids)
    many = ids.ndim == e.ndim
    if ids.shape[: e.ndim - 1] != e.shape[:-1] or ids.ndim > e.ndim:
        raise ValueError(f"ids have the shape {ids.shape}, which does not go with e of shape {e.shape}")
    scale, _ = per_token(logit_scale, None, e.shape[:-1], shift)
    e, ids = shifted(e, ids if many else ids[..., None], shift)
    present = ids != ignore_index
    valid = present.any(axis=-1)
    return Tokens(valid, e[valid], scale[valid], np.where(present, ids, 0)[valid], present[valid], many)
