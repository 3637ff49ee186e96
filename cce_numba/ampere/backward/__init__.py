"""The backward on `mma.sync`: a survey of what survives, then one persistent kernel that computes gradients in rounds.

Let G (N, V) be the gradient of the loss with respect to the logits. The kernel recomputes the surviving logits of a round,
stores their G in the workspace, and multiplies G: by e, which completes rows of dC, and by c, which adds to dE. The words are
those of the survey (`tensor_core.survey`), and:

    buffer      room in the workspace for the G of one round; round r has buffer r % buffers
    slot        room in a buffer for one column of G of one block: 128 numbers. A list has neighbouring slots
    job         a matrix product whose result is a tile of 128 x 192 numbers. Its kind says of what: LOGITS, of G, for 192
                columns of a list; D_E, of dE; D_C, of dC
    phase       jobs that may run at the same time: G(r), which computes the G of round r, or P(r), which multiplies it
    stage, use  as in `ampere`
    unit        what a stage holds: 64 terms of the job's sums

All eight warps of a CTA copy, multiply and store. Between jobs the first of them finds out what the next job is. (A warp of its
own for that would leave the others 168 registers a thread, which are too few.)

A sum of dE goes on in registers from where the round before has left it, and in an exact problem the rounds follow the
vocabulary. So how these are cut changes no bit of dE, and `Options.batch_invariant` asks for nothing more here.

    tiles       sizes: every product runs through the same stages
    records     what the kernel takes, and what its functions hand each other
    workspace   the memory, and how it cuts the backward into rounds
    scheduler   a warp takes a job off the queue, and describes it to the others
    fill        what the eight warps copy to a stage, for each kind of job
    loop        a job's products, stage by stage
    store       what becomes of a tile of sums: G, sums of dE, rows of dE and dC
    kernel      the kernel that these make
    host        all launches
"""
