"""The backward on tensor cores: a survey of what survives, then one persistent kernel that computes gradients in rounds.

Let G (N, V) be the gradient of the loss with respect to the logits. The kernel recomputes the surviving logits of a round,
stores their G in the workspace, and multiplies G: by e, which completes rows of dC, and by c, which adds to dE. The words:

    active, block, column, dense, live, needed, pair, survive, tile, whole
                are those of the survey, see `tensor_core.survey`
    round       live tiles of sorted columns whose G is in the workspace at the same time
    list        the columns of a round that survive in a block
    buffer      room in the workspace for the G of one round; round r has buffer r % buffers
    slot        room in a buffer for one column of G of one block: 128 numbers. A list has neighbouring slots
    job         a matrix product whose result is a tile of 128 x 192 numbers. Its kind says of what: LOGITS, of G, for 192
                columns of a list; D_E, of dE; D_C, of dC
    phase       jobs that may run at the same time: G(r), which computes the G of round r, or P(r), which multiplies it
    stage       room in shared memory for the operands A and B of 64 terms of a product's sum; the stages of a CTA are its ring
    use         the uses of stages are numbered: use i is of stage i % stages (`hopper.ring`)
    panel       64 rows of 128 bytes of a stage: A has two panels, B three
    producer    the warpgroup that fills stages: the copying thread, the scheduling warp, the gathering warps
    consumer    one of two warpgroups that multiply what is in stages. They take *turns* at the tensor cores
    part        the sum of a column of G over 16 tokens, for the gradient of the bias
    parked      a teacher's logarithms of probabilities are parked in memory until the student's logits are there. A job LOGITS
                then has the teacher's stages first
    lost        a token is lost if its target is out of range or its logits are no numbers. Its gradient is NaN

Read in this order:

    tiles       sizes: every product runs through the same stages
    records     what the kernel takes, and what its functions hand each other
    phases      the order of phases, and how CTAs wait for them
    jobs        how CTAs take jobs, and how the warps of a CTA learn of them
    scheduler   the scheduling warp works out what each job is; `lists` finds its columns
    bulk_copy   the copying thread fetches rows that are neighbours
    gather      the gathering warps copy all other rows; `rows` is what one thread does
    multiply    a consumer's loop over stages, and its turns
    consumer    what a consumer does for each kind of job
    store_g     a tile of logits becomes G; `tensor_core.gradient` says what G is, and `tensor_core.backward.divergence` what it
                is of a divergence from a teacher
    partial_sums, finish_rows
                what becomes of tiles of dE that are not complete, and of complete tiles of dE and dC
    column_sums the gradient of the bias
    kernel      the kernel that these make
    begin, workspace, host
                the kernel that comes first, the memory, and all launches
"""
