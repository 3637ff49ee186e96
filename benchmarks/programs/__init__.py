"""The programs of `python -m benchmarks`, one file for each.

A program is a module of this package with two functions. `add_arguments(parser)` adds its options to an `argparse` parser.
`run(arguments)` does the work and returns an exit code, or None if all is well. The module's docstring is what `--help` prints.
To add a program, add its file here and its line to `PROGRAMS`.
"""

from __future__ import annotations

PROGRAMS = {  # name: what `--help` says of it
    "quick": "forward and backward in under two minutes on an H100, one short table: run it before and after a change",
    "forward": "the loss on tensor cores against cuBLAS's one product",
    "backward": "loss and gradients on tensor cores against cuBLAS's one product",
    "autograd": "what PyTorch's autograd adds to a call",
    "several_gpus": "a vocabulary in shards on several GPUs, against one of them",
    "training_step": "the steps of a small transformer, against stored logits",
    "learning": "a small transformer learns text, with gradients filtered in several ways: which learn as exact ones do",
    "simt": "the portable kernels against cuBLAS in float32",
    "cpu": "the CPU backend against NumPy that stores the logits",
    "sanitize": "every kernel on small problems, checked against the reference: what compute-sanitizer runs",
    "calibrated": "how closely made-up inputs match the sparsity of a real model",
    "demo_file": "turn an archive of a real last layer into a file for `python -m cce_numba demo --data`",
    "readme": "print a table of the README from recorded results",
    "picture": "draw the README's picture from recorded results",
}
