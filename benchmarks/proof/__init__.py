"""What `table1`, `figure3`, `figure4`, `figure5`, `memory` and `comparison` share, whose results others are to believe.

book      a record that is written after each part of it, and that a later run goes on with
session   options of these commands, the time that is left, and how far they have come
problems  which problems `table1` measures, in the order of their importance
operands  a problem's tensors, and what float32 mathematics makes of them
rows      one method on one problem: whether it is right, and the memory that it takes
turns     times of methods that take turns with the product `e @ c.T`

A cell is what is measured and written at once: a row of a table, a round of times, a stretch of a training run.
"""
