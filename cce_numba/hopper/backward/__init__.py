"""The backward on tensor cores."""
