"""The forward on Hopper tensor cores."""
