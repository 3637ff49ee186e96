"""Hugging Face transformers: causal language models whose training loss is computed without the logits.

A patched model runs its own `forward`. For that time its output head is a stand-in, which returns a stand-in for the logits.
That takes the steps that models put between head and loss (scale, softcap, bias, casts, views, slices). When the steps end in
`torch.nn.functional.cross_entropy`, the head runs, and `cce_numba.torch.linear_cross_entropy` computes the loss within it. Any
other use of the stand-in is refused. So the model's own code says what its loss is, and there is no list of models.

It depends on how the models of transformers behave, not on what they are: `get_output_embeddings`, `training`, `labels` among
the arguments of `forward`, and a `ModelOutput` or tuple out of it.

The parts, from the outside in:

- `patching`: `patch` and `unpatch`, and what stays on a model in between;
- `trainer`: what `transformers.Trainer` is taught, which else computes some losses from stored logits;
- `calls`: one call of a patched model, in training and in evaluation;
- `views`: a module with one part replaced, for one call and one thread, without a write to the module;
- `logits`: the stand-in for the logits, between head and loss;
- `head`: what the head computes, adapters included, and the loss of it.
"""

from cce_numba.transformers.patching import patch, unpatch

__all__ = ["patch", "unpatch"]
