"""The programs of `python -m benchmarks`, one file for each.

A program is a module of this package with two functions. `add_arguments(parser)` adds its options to an `argparse` parser.
`run(arguments)` does the work and returns an exit code, or None if all is well. The module's docstring is what `--help` prints.
To add a program, add its file here and its line to `PROGRAMS`.
"""

from __future__ import annotations

PROGRAMS = {  # name: what `--help` says of it
    "quick": "forward and backward in under two minutes on an H100, one short table: run it before and after a change",
    "table1": "the paper's Table 1: time, memory and errors of all methods, validated first; and over sizes and models",
    "figure3": "how probability falls with the rank, and how much of a vocabulary survives a filter",
    "figure4": "a pretrained model is fine-tuned with each way to the gradients: do its losses differ?",
    "figure5": "a model learns from scratch with each way to the gradients: do its losses differ?",
    "memory": "what a training step of a real model takes, with each method",
    "comparison": "loss and gradients against PyTorch's over 216 shapes of cu_cce's comparison test, and ragged ones",
    "forward": "the loss on tensor cores against cuBLAS's one product",
    "backward": "loss and gradients on tensor cores against cuBLAS's one product",
    "ampere": "the mma.sync kernels beside Hopper's and the paper's, the limit of mma.sync, and float32 on tensor cores",
    "distributions": "what entropy, best entries and batch invariance cost beside the loss, and entropy's gradient",
    "autograd": "what PyTorch's autograd adds to a call",
    "several_gpus": "a vocabulary in shards on several GPUs, against one of them",
    "jit": "what JAX adds to a call, and whether XLA copies arrays",
    "training_step": "the steps of a small transformer, against stored logits",
    "learning": "a small transformer learns text, with gradients filtered in several ways: which learn as exact ones do",
    "simt": "the portable kernels against cuBLAS in float32",
    "cpu": "the CPU backend against NumPy that stores the logits",
    "sanitize": "every kernel on small problems, checked against the reference: what compute-sanitizer runs",
    "calibrated": "how closely made-up inputs match the sparsity of a real model",
    "demo_file": "turn an archive of a real last layer into a file for `python -m cce_numba demo --data`",
    "readme": "print a table of the README from recorded results",
    "predictions": "print the table of docs/which_kernels.md: what other GPUs are predicted to take",
    "picture": "draw the README's picture from recorded results",
}
