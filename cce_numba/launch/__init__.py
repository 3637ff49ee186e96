"""Kernels on their way to a GPU: what they take, how they are compiled, kept on disk and launched."""
