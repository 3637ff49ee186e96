"""The forward on tensor cores: log-sum-exp and survivor bits (paper section 4.2).

    producer warpgroup      one thread fetches tiles of e and c into a ring of stages (bulk copies by tensor maps); if the
                            tokens of a block are not neighbours, two more warps fetch their rows of e instead
    consumer warpgroups     two, each with a tile of 128 tokens x 192 vocabulary entries in registers. They take turns: one
                            multiplies while the other folds its tile into each row's (max, sum) and notes the survivors

CTAs of a cluster own neighbouring blocks of tokens and meet the same vocabulary at the same time, so each fetches a part of a
tile of c and multicasts it. Clusters are persistent workers; `schedule` says which tiles each takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.hopper.forward.consumer import further_bytes, make_consume
from cce_numba.hopper.forward.producer import make_gather, make_produce
from cce_numba.hopper.ring import make_ring
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.ptx import cluster, control, memory
from cce_numba.tensor_core.schedule import quotient


@kernel_factory
def make_lse_kernel(
    tiles: HopperTiles,
    dtype: np.dtype,
    bias_dtype: np.dtype | None,
    capped: bool,
    record: bool,
    scaled: bool = False,
    smoothed: bool = False,
) -> Kernel:
    """The kernel for 16-bit `dtype`; with or without bias, softcap and survivors, so that nobody pays for what others need.

    scaled: with a logit scale for each token. smoothed: logits are added up as well.
    """
    produce, gather = make_produce(tiles), make_gather(tiles)
    consume = make_consume(tiles, "f16" if dtype == np.float16 else "bf16", bias_dtype, capped, record, scaled, smoothed)
    init, ring_bytes = make_ring(tiles).init, np.uint32(tiles.ring_bytes)
    lower_registers = control.lower_registers(tiles.producer_registers)
    raise_registers = control.raise_registers(tiles.consumer_registers)
    block_v, block_d, first_gatherer = tiles.block_v, tiles.block_d, 128 - 32 * tiles.gatherers

    def lse_kernel(
        maps: Any,  # tensor maps of e and c, 128 bytes each
        e: Any,  # address of e, for rows that are fetched one by one
        e_pitch_bytes: Any,
        tokens: Any,  # address of (N,) rows of e, the first n_valid[0] count
        n_valid: Any,  # (1,)
        first_token: Any,  # of the list, at a multiple of group_n
        most_tokens: Any,
        per_round: Any,  # groups, see `schedule`
        bias: Any,  # address of (V,)
        softcap: Any,
        target_logit: Any,  # (N,) by row of e
        lse: Any,  # (N,) by row of e; what earlier launches have found, if has_lse
        has_lse: Any,
        part: Any,  # (slots, cluster, block_n) log-sum-exps
        survivors: Any,  # address of (blocks, pitch_words) words, zeroed
        pitch_words: Any,
        coarse_survivors: Any,  # address of as many, for a higher threshold, or 0
        log_eps: Any,
        log_coarser: Any,  # by how much their threshold is higher
        first_v_tile: Any,
        n_tiles: Any,
        first_row: Any,  # of c, that its tensor map begins with
        V: Any,
        D: Any,
        logit_scale: Any,  # (address of (N,) by row of e,), or () if not scaled
        smoothing: Any,  # (address of (V,) class weights or 0, address of totals in the order of part), or () if not smoothed
    ) -> None:
        """Grid of workers * cluster CTAs. Writes part (see `schedule`), and sets bits of survivors.

        tokens, survivors begin with those of first_token.
        """
        ring = (memory.shared_address(cuda.shared.array(0, np.uint8)) + np.uint32(1023)) & np.uint32(0xFFFFFC00)
        thread = np.int32(cuda.threadIdx.x)
        warpgroup = thread >> 7
        n_listed = np.int32(min(max(n_valid[0] - first_token, 0), most_tokens))
        k_steps = quotient(D + block_d - 1, block_d)
        if thread == 0:
            init(ring)
        cluster.sync()
        if warpgroup == 0:
            lower_registers()
            if thread == 0:
                first_v = np.int32(first_v_tile * block_v - first_row)
                produce(ring, maps, maps + np.uint64(128), tokens, n_listed, per_round, first_v, n_tiles, k_steps)
            elif thread >= first_gatherer:
                gather(ring, thread - first_gatherer, e, e_pitch_bytes, tokens, n_listed, per_round, n_tiles, k_steps, D)
        else:
            raise_registers()
            consume(
                ring, ring + ring_bytes, np.int32(warpgroup - 1), np.int32(thread & 127), tokens, n_listed, per_round,
                target_logit, bias, softcap, lse, has_lse, part, survivors, pitch_words, coarse_survivors,
                log_eps, log_coarser, first_v_tile, n_tiles, k_steps, V, logit_scale, smoothing,
            )  # fmt: skip
        cuda.syncwarp()
        cluster.sync()  # nobody leaves while others still write to its shared memory

    smem_bytes = tiles.smem_bytes + (further_bytes(tiles) if scaled or smoothed else 0)
    f32, i32, i64, u64 = types.float32, types.int32, types.int64, types.uint64
    p_f32 = pointer_to(np.float32)
    signature = types.void(
        *(u64, u64, i64, u64, pointer_to(np.int64), i64, i32, i32, u64, f32, p_f32, p_f32, i32, p_f32, u64, i64, u64, f32, f32),
        *(i32, i32, i32, i32, i32, types.UniTuple(u64, int(scaled)), types.UniTuple(u64, 2 * smoothed)),
    )
    return Kernel(lse_kernel, signature, threads=tiles.threads, cluster=tiles.cluster, smem_bytes=smem_bytes)
