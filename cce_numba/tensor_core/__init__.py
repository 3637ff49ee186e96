"""What the kernels for tensor cores of all generations share."""
