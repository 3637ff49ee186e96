"""A small transformer and its training on one batch, for `training_step`. Imports PyTorch."""
