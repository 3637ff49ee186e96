"""Recorded results as tables (for the terminal, by rich; for the README, in Markdown) and as pictures."""
