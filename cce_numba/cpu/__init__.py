"""The backend for NumPy arrays, with no GPU: blocks of logits through the BLAS, folded while they are in the cache.

Reading order:

    tiles      how a problem is cut, so that the workspace stays small at any vocabulary
    blocks     rows in the dtype that products are computed in; products become logits
    forward    a block of logits after the other goes to the folds
    folds/     what becomes of it; `max_sum` is the log-sum-exp
    backward   the surviving logits again, G from them, and the gradients from G
    invariant  products whose rows do not depend on their neighbours, for `batch_invariant`
    elements   loops over elements that Numba compiles: exponentials, G, sums of rows
    threads    how many threads a call takes, and how they share its work; `blas` limits those of the BLAS
    compiled   how functions are compiled, and kept on disk
    distillation   what a student's head is from a teacher's, and the gradients of that
    backend    what `backend.Backend` asks for

Words:

    block      of tokens or of the vocabulary: what one product of the BLAS computes
    survivor block    neighbouring tokens, out of those that count, that share survivor bits; a block of tokens has several
    tile       a part of a block of logits that a thread folds: one survivor block by one block of the vocabulary
    sweep      a pass over all blocks of the vocabulary in the backward
    column     a vocabulary entry, seen from the logits
    G          the gradient of the loss with respect to the logits
"""
