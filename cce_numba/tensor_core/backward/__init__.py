"""What the backwards on tensor cores of all generations share.

phases         in which order rounds are computed and multiplied
lists          which columns of a block survive
records        what device functions hand each other
row_weights    what makes G of a token's logits, and of an entry's
chance         which columns survive by chance
divergence     what makes G of the logits of a student and a teacher
several        the targets of tokens that have several
partial_sums   tiles of dE that are not complete
gradient_rows  complete tiles of dE and dC, added to what is there, and stored as float32
column_sums    the gradient of the bias
passes         the host's part: what is filtered for which gradient, and the survey

The words are those of `tensor_core.survey`.
"""
