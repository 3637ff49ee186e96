"""Measurements of `cce_numba`. `python -m benchmarks --help`, from the repository's root, lists the programs.

    programs/     one file for each program
    data/         inputs: random, an archive of a real model's last layer, made up to be as sparse as a real model's
    measure/      device, times, memory, kernels, and the record of a measurement with its surroundings
    validate/     what is right, which every program checks before it times anything
    peers/        other ways to compute the same loss
    training/     the small transformer that is trained
    proof/        what the commands that prove share: records that grow, methods in turns, training runs in pieces
    small_cases/  small problems for every kernel, which `sanitize` runs under compute-sanitizer
    tables/       recorded results as tables and pictures
    results/      recorded results
    NOTES.md      what was tried, and what it gave

Names: N tokens, V vocabulary entries, D hidden size; e (N, D) and c (V, D) are multiplied to logits; dE and dC are their
gradients. X is a time divided by cuBLAS's time for the one product `e @ c.T` in the same run.
"""
