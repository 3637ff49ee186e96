"""Other ways to compute the same loss, which ours is compared with."""
