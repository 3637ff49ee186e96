"""Tiny kernels, each for a few instructions, whose results NumPy can tell. The GPU runs them; without one, they compile."""

from __future__ import annotations

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.launch.kernel import Kernel, pointer_to
from cce_numba.ptx import arithmetic, cluster, control, mbarrier, memory, mma, tma, wgmma
from cce_numba.ptx import fragment as fragments
from cce_numba.ptx.pointers import address_of, view_as

F32_ARRAY, I32_ARRAY, U32_ARRAY = pointer_to(np.float32), pointer_to(np.int32), pointer_to(np.uint32)
BOX_ROWS, ROW_BYTES = 128, 128  # of a swizzled box: 64 16-bit numbers a row
BOX_BYTES = BOX_ROWS * ROW_BYTES
_ALIGNMENT_BYTES = 1024  # where the swizzle's pattern begins
_BARRIER_BYTES = 8


@cuda.jit(device=True)
def aligned_smem():
    """The first address of dynamic shared memory where a swizzled box may lie."""
    return (memory.shared_address(cuda.shared.array(0, np.uint8)) + np.uint32(1023)) & np.uint32(0xFFFFFC00)


@cuda.jit(device=True)
def init_barrier(barrier, arrivals):
    """By all threads of a CTA."""
    if cuda.threadIdx.x == 0:
        mbarrier.init(barrier, arrivals)
        mbarrier.fence_init()
    cuda.syncthreads()


def make_elementwise(function, dtype=np.float32):
    """out[i] = function(x[i], y[i], z[i]), in float32, of arrays whose length is a multiple of 128."""
    run = cuda.jit(device=True)(function)

    def elementwise_kernel(out, x, y, z):
        i = cuda.blockIdx.x * 128 + cuda.threadIdx.x
        out[i] = run(x[i], y[i], z[i])

    array = pointer_to(dtype)
    return Kernel(elementwise_kernel, (F32_ARRAY, array, array, array), threads=128)


def make_load_box():
    """out = a box of a matrix as it lies in shared memory, its first element at (row, column)."""

    def load_box_kernel(tensor_map, out, row, column):
        thread, smem = cuda.threadIdx.x, aligned_smem()
        barrier = smem + np.uint32(BOX_BYTES)
        init_barrier(barrier, 1)
        if thread == 0:
            tma.fence_tensor_map(tensor_map)
            mbarrier.arrive_expect_tx(barrier, BOX_BYTES)
            tma.load_2d(smem, tensor_map, barrier, column, row)
        mbarrier.wait(barrier, 0)
        for i in range(thread, BOX_BYTES // 4, 128):
            out[i] = memory.load_shared_f32(smem + np.uint32(4 * i))

    parameters = (types.uint64, F32_ARRAY, types.int32, types.int32)
    return Kernel(load_box_kernel, parameters, threads=128, smem_bytes=_ALIGNMENT_BYTES + BOX_BYTES + _BARRIER_BYTES)


def make_multicast():
    """out[cta] = the first box, of which each of two CTAs has fetched half, for both."""

    def multicast_kernel(tensor_map, out):
        thread, rank, smem = cuda.threadIdx.x, np.int32(cluster.cta_rank()), aligned_smem()
        barrier = smem + np.uint32(BOX_BYTES)
        init_barrier(barrier, 1)
        cluster.sync()  # before the other writes here
        if thread == 0:
            tma.fence_tensor_map(tensor_map)
            mbarrier.arrive_expect_tx(barrier, BOX_BYTES)
            half = smem + np.uint32(rank * BOX_BYTES // 2)
            tma.load_2d_multicast(half, tensor_map, barrier, 0, rank * BOX_ROWS // 2, 3)
        mbarrier.wait(barrier, 0)
        for i in range(thread, BOX_BYTES // 4, 128):
            out[cuda.blockIdx.x * (BOX_BYTES // 4) + i] = memory.load_shared_f32(smem + np.uint32(4 * i))
        cluster.sync()  # nobody leaves while the other still writes here

    smem_bytes = _ALIGNMENT_BYTES + BOX_BYTES + _BARRIER_BYTES
    return Kernel(multicast_kernel, (types.uint64, F32_ARRAY), threads=128, cluster=2, smem_bytes=smem_bytes)


def make_product(n, dtype, a_m_major=False, b_n_major=False):
    """out[thread] = its fragment of a @ b; twice that if accumulate is 1, since the product runs twice.

    a (64, 64) and b (64, n) lie in memory as a and b.T, with rows that run along k; a.T if a_m_major, b if b_n_major.
    """
    zeros, mma, wait_all = (
        fragments.zeros(n),
        wgmma.mma(n, dtype, a_m_major=a_m_major, b_n_major=b_n_major),
        wgmma.wait_group(0),
    )
    a_bytes, b_bytes, panels = 64 * ROW_BYTES, n * ROW_BYTES, n // 64
    a_form, b_form = (wgmma.SWIZZLE_128B_PANELS if major else wgmma.SWIZZLE_128B for major in (a_m_major, b_n_major))
    # 16 terms, in units of 16 bytes: 32 bytes of each row, or 16 rows.
    a_step, b_step = (16 * ROW_BYTES // 16 if major else 32 // 16 for major in (a_m_major, b_n_major))

    @cuda.jit(device=True)
    def descriptor(form, address):
        return form | np.uint64((np.uint32(address) & np.uint32(0x3FFFF)) >> np.uint32(4))

    def product_kernel(a_map, b_map, accumulate, out):
        thread, smem = cuda.threadIdx.x, aligned_smem()
        barrier = smem + np.uint32(a_bytes + b_bytes)
        init_barrier(barrier, 1)
        if thread == 0:
            tma.fence_tensor_map(a_map)
            tma.fence_tensor_map(b_map)
            mbarrier.arrive_expect_tx(barrier, a_bytes + b_bytes)
            tma.load_2d(smem, a_map, barrier, 0, 0)
            if b_n_major:
                for p in range(panels):
                    panel = smem + np.uint32(a_bytes + p * wgmma.PANEL_BYTES)
                    tma.load_2d(panel, b_map, barrier, 64 * p, 0)
            else:
                tma.load_2d(smem + np.uint32(a_bytes), b_map, barrier, 0, 0)
        mbarrier.wait(barrier, 0)
        a, b = descriptor(a_form, smem), descriptor(b_form, smem + np.uint32(a_bytes))
        fragment = zeros()
        for turn in range(2):
            wgmma.fence()
            fragment = mma(fragment, a, b, np.uint32(turn & accumulate))
            for k in range(1, 4):
                fragment = mma(fragment, a + np.uint64(a_step * k), b + np.uint64(b_step * k), np.uint32(1))
            wgmma.commit_group()
            wait_all()
        out[thread] = fragment

    out = types.CPointer(wgmma.fragment_type(n))
    parameters = (types.uint64, types.uint64, types.int32, out)
    return Kernel(product_kernel, parameters, threads=128, smem_bytes=_ALIGNMENT_BYTES + a_bytes + b_bytes + _BARRIER_BYTES)


def make_copy_async(copy):
    """out[i] = 16 bytes at source + 16 * i, of which only counts[i] are copied; or, as `copy` takes it, all if it is not 0."""
    wait_all = memory.copy_async_wait(0)

    def copy_async_kernel(source, counts, out):
        thread = cuda.threadIdx.x
        smem = aligned_smem() + np.uint32(16 * thread)
        for i in range(4):
            memory.store_shared_f32(smem + np.uint32(4 * i), np.float32(1))  # what a copy of fewer bytes must not leave
        cuda.syncthreads()
        copy(smem, source + np.uint64(16 * thread), counts[thread])
        memory.copy_async_commit()
        wait_all()
        for i in range(4):
            out[4 * thread + i] = memory.load_shared_f32(smem + np.uint32(4 * i))

    parameters = (types.uint64, U32_ARRAY, F32_ARRAY)
    return Kernel(copy_async_kernel, parameters, threads=32, smem_bytes=_ALIGNMENT_BYTES + 32 * 16)


def make_copy_async_of_row():
    """out[i] = 16 bytes of row rows[i] of a matrix whose rows are so many bytes apart, or zeros if it is negative."""
    wait_all = memory.copy_async_wait(0)

    def copy_async_of_row_kernel(source, pitch_bytes, rows, out):
        thread = cuda.threadIdx.x
        smem = aligned_smem() + np.uint32(16 * thread)
        for i in range(4):
            memory.store_shared_i32(smem + np.uint32(4 * i), np.int32(-1))  # what must not be left
        cuda.syncthreads()
        memory.copy_async_16_of_row(smem, source, rows[thread], pitch_bytes)
        memory.copy_async_commit()
        wait_all()
        for i in range(4):
            out[4 * thread + i] = memory.load_shared_i32(smem + np.uint32(4 * i))

    parameters = (types.uint64, types.int32, I32_ARRAY, I32_ARRAY)
    return Kernel(copy_async_of_row_kernel, parameters, threads=32, smem_bytes=_ALIGNMENT_BYTES + 32 * 16)


def make_copy_async_arrive():
    """out[i] = 16 bytes at source + 16 * (31 - i), which another thread has copied: the barrier tells when they are there."""

    def copy_async_arrive_kernel(source, out):
        thread, smem = cuda.threadIdx.x, aligned_smem()
        barrier = smem + np.uint32(32 * 16)
        init_barrier(barrier, 32)
        memory.copy_async_16(smem + np.uint32(16 * thread), source + np.uint64(16 * thread), 16)
        memory.copy_async_arrive(barrier)
        mbarrier.wait(barrier, 0)
        for i in range(4):
            out[4 * thread + i] = memory.load_shared_i32(smem + np.uint32(16 * (31 - thread) + 4 * i))

    parameters = (types.uint64, I32_ARRAY)
    return Kernel(copy_async_arrive_kernel, parameters, threads=32, smem_bytes=_ALIGNMENT_BYTES + 32 * 16 + _BARRIER_BYTES)


def make_shared():
    """x backwards, through shared memory: by loads that stay where they are, and by those that may move."""

    def shared_kernel(x_i32, x_f32, out_i32, freely_i32, freely_f32):
        i, smem = cuda.threadIdx.x, aligned_smem()
        memory.store_shared_i32(smem + np.uint32(4 * i), x_i32[i])
        memory.store_shared_f32(smem + np.uint32(4 * (64 + i)), x_f32[i])
        cuda.syncthreads()
        address = np.uint32(arithmetic.opaque_u32(smem) + np.uint32(4 * (63 - i)))
        out_i32[i] = memory.load_shared_i32(address)
        freely_i32[i] = memory.load_shared_i32_freely(address)
        freely_f32[i] = memory.load_shared_f32_freely(address + np.uint32(4 * 64))

    parameters = (I32_ARRAY, F32_ARRAY, I32_ARRAY, I32_ARRAY, F32_ARRAY)
    return Kernel(shared_kernel, parameters, threads=64, smem_bytes=_ALIGNMENT_BYTES + 2 * 64 * 4)


def make_shared_vectors():
    """x backwards, a thread's numbers at a time, through shared memory: words by fours, the others by twos."""

    def shared_vectors_kernel(x_u32, x_i32, x_f32, out_u32, out_i32, out_f32):
        i, smem = cuda.threadIdx.x, aligned_smem()
        others = smem + np.uint32(16 * 32)
        for j in range(4):
            memory.store_shared_i32(smem + np.uint32(4 * (4 * i + j)), np.int32(x_u32[4 * i + j]))
        for j in range(2):
            memory.store_shared_i32(others + np.uint32(4 * (2 * i + j)), x_i32[2 * i + j])
            memory.store_shared_f32(others + np.uint32(8 * 32 + 4 * (2 * i + j)), x_f32[2 * i + j])
        cuda.syncthreads()
        words = memory.load_shared_4_u32(smem + np.uint32(16 * (31 - i)))
        address = np.uint32(arithmetic.opaque_u32(others) + np.uint32(8 * (31 - i)))
        integers, floats = (
            memory.load_shared_2_i32_freely(address),
            memory.load_shared_2_f32_freely(address + np.uint32(8 * 32)),
        )
        for j in range(4):
            out_u32[4 * i + j] = words[j]
        for j in range(2):
            out_i32[2 * i + j] = integers[j]
            out_f32[2 * i + j] = floats[j]

    arrays = U32_ARRAY, I32_ARRAY, F32_ARRAY
    return Kernel(shared_vectors_kernel, (*arrays, *arrays), threads=32, smem_bytes=_ALIGNMENT_BYTES + 32 * 32)


def make_store_matrices(store):
    """out = 32 rows of 16 bytes of shared memory, of which places[lane] is the one whose address the lane gives."""

    def store_matrices_kernel(words, places, out):
        lane, smem = cuda.threadIdx.x, aligned_smem()
        row = smem + np.uint32(16 * places[lane])
        store(row, words[4 * lane], words[4 * lane + 1], words[4 * lane + 2], words[4 * lane + 3])
        cuda.syncwarp()
        for i in range(4):
            out[4 * lane + i] = memory.load_shared_i32(smem + np.uint32(4 * (4 * lane + i)))

    parameters = (U32_ARRAY, I32_ARRAY, I32_ARRAY)
    return Kernel(store_matrices_kernel, parameters, threads=32, smem_bytes=_ALIGNMENT_BYTES + 32 * 16)


def make_warp_product(dtype):
    """out[lane] = its four sums of a @ b.T, of a (16, 16) and b (8, 16) 16-bit numbers, plus 1; by one warp."""
    load_a, load_b, product = mma.load_matrices(4), mma.load_matrices(2), mma.mma(dtype)

    def warp_product_kernel(a, b, out):
        lane, smem = cuda.threadIdx.x, aligned_smem()
        for i in range(4):
            memory.store_shared_i32(smem + np.uint32(4 * (32 * i + lane)), a[32 * i + lane])
        for i in range(2):
            memory.store_shared_i32(smem + np.uint32(512 + 4 * (32 * i + lane)), b[32 * i + lane])
        cuda.syncwarp()
        # Matrices 0 and 1 of a are rows 0-7 and 8-15 of its first eight columns, 2 and 3 the same of the others.
        words_a = load_a(smem + np.uint32(32 * (lane & 15) + 16 * (lane >> 4)))
        words_b = load_b(smem + np.uint32(512 + 32 * (lane & 7) + 16 * ((lane >> 3) & 1)))
        one = np.float32(1)
        sums = product(words_a[0], words_a[1], words_a[2], words_a[3], words_b[0], words_b[1], one, one, one, one)
        for i in range(4):
            out[4 * lane + i] = sums[i]

    return Kernel(warp_product_kernel, (I32_ARRAY, I32_ARRAY, F32_ARRAY), threads=32, smem_bytes=_ALIGNMENT_BYTES + 768)


def make_warp_product_tf32():
    """out[lane] = its four sums of a @ b.T, of a (16, 8) and b (8, 8) float32 numbers that tf32 holds; by one warp."""
    product = mma.mma("tf32")

    def warp_product_tf32_kernel(a, b, out):
        lane = cuda.threadIdx.x
        row, k, zero = lane >> 2, lane & 3, np.float32(0)
        sums = product(
            a[8 * row + k], a[8 * (row + 8) + k], a[8 * row + k + 4], a[8 * (row + 8) + k + 4], b[8 * row + k],
            b[8 * row + k + 4], zero, zero, zero, zero,
        )  # fmt: skip
        for i in range(4):
            out[4 * lane + i] = sums[i]

    return Kernel(warp_product_tf32_kernel, (U32_ARRAY, U32_ARRAY, F32_ARRAY), threads=32)


def make_load_matrices(count, transposed):
    """out[lane] = its words of `count` matrices in shared memory, which are 8 rows of 16 bytes each, one after the other."""
    load = mma.load_matrices(count, transposed)

    def load_matrices_kernel(x, out):
        lane, smem = cuda.threadIdx.x, aligned_smem()
        for i in range(4):
            memory.store_shared_i32(smem + np.uint32(4 * (32 * i + lane)), x[32 * i + lane])
        cuda.syncwarp()
        words = load(smem + np.uint32(16 * lane))
        if count == 1:
            out[lane] = words
        else:
            for i in range(count):
                out[count * lane + i] = words[i]

    return Kernel(load_matrices_kernel, (I32_ARRAY, U32_ARRAY), threads=32, smem_bytes=_ALIGNMENT_BYTES + 512)


def make_transpose_matrix():
    """out[lane] = its word of the transposed 8 x 8 matrix of 16-bit numbers."""

    def transpose_matrix_kernel(x, out):
        out[cuda.threadIdx.x] = mma.transpose_matrix(x[cuda.threadIdx.x])

    return Kernel(transpose_matrix_kernel, (U32_ARRAY, U32_ARRAY), threads=32)


def make_or_of_warp():
    """out[i] = the union of the bits of the warp of thread i."""

    def or_of_warp_kernel(x, out):
        out[cuda.threadIdx.x] = control.or_of_warp(x[cuda.threadIdx.x])

    return Kernel(or_of_warp_kernel, (U32_ARRAY, U32_ARRAY), threads=64)


def make_max_of_warp():
    """out[i] = the largest number of the warp of thread i."""

    def max_of_warp_kernel(x, out):
        out[cuda.threadIdx.x] = control.max_of_warp(x[cuda.threadIdx.x])

    return Kernel(max_of_warp_kernel, (U32_ARRAY, U32_ARRAY), threads=64)


def make_shuffle_of_lane():
    """out[i] = x of that lane of the same warp."""

    def shuffle_of_lane_kernel(x, lane, out):
        out[cuda.threadIdx.x] = control.shuffle_i32(x[cuda.threadIdx.x], lane)

    return Kernel(shuffle_of_lane_kernel, (I32_ARRAY, types.int32, I32_ARRAY), threads=64)


def make_shuffle():
    """out[i] = x[i ^ mask] of the same warp."""

    def shuffle_kernel(x, mask, out):
        out[cuda.threadIdx.x] = control.shuffle_xor_f32(x[cuda.threadIdx.x], mask)

    return Kernel(shuffle_kernel, (F32_ARRAY, types.int32, F32_ARRAY), threads=64)


def make_or_global():
    """words[i % 2] |= bits[i], by many threads at once."""

    def or_global_kernel(words, bits):
        i = cuda.blockIdx.x * 128 + cuda.threadIdx.x
        memory.or_global_u32(words + np.uint64(4 * (i % 2)), bits[i])

    return Kernel(or_global_kernel, (types.uint64, U32_ARRAY), threads=128)


def make_conditional():
    """Where wanted, loaded[i] = x[i]; where not, 0, and the address is nobody's."""

    def conditional_kernel(x, wanted, loaded):
        i = cuda.threadIdx.x
        loaded[i] = memory.load_if_u32(np.uint64(np.uint64(wanted[i]) * (x + np.uint64(4 * i))), wanted[i])

    return Kernel(conditional_kernel, (types.uint64, U32_ARRAY, U32_ARRAY), threads=32)


def make_conditional_vectors(store):
    """As `make_conditional`, four words at a time; and stored where wanted, as words and the first two as float32."""

    def conditional_vectors_kernel(x, wanted, loaded, out, out_f32):
        i = cuda.threadIdx.x
        mine = np.uint64(wanted[i])
        found = memory.load_if_4_u32(np.uint64(mine * (x + np.uint64(16 * i))), wanted[i])
        for j in range(4):
            loaded[4 * i + j] = found[j]
        store(np.uint64(mine * (out + np.uint64(16 * i))), found[0], found[1], found[2], found[3], wanted[i])
        first, second = arithmetic.float_of_bits(found[0]), arithmetic.float_of_bits(found[1])
        memory.store_if_2_f32(np.uint64(mine * (out_f32 + np.uint64(8 * i))), first, second, wanted[i])

    parameters = (types.uint64, U32_ARRAY, U32_ARRAY, types.uint64, types.uint64)
    return Kernel(conditional_vectors_kernel, parameters, threads=32)


def make_stores_to_global():
    """out_u32 = x_u32, out_f32 = x_f32, by their addresses; and out_4_f32 = x_f32, by a quarter of the threads.

    These read what they stored, and store it once more.
    """

    def stores_to_global_kernel(x_u32, x_f32, out_u32, out_f32, out_4_f32):
        i = cuda.threadIdx.x
        memory.store_global_u32(out_u32 + np.uint64(4 * i), x_u32[i])
        memory.store_global_f32(out_f32 + np.uint64(4 * i), x_f32[i])
        if i < 8:
            memory.store_4_f32(
                out_4_f32 + np.uint64(16 * i), x_f32[4 * i], x_f32[4 * i + 1], x_f32[4 * i + 2], x_f32[4 * i + 3]
            )
            x_0, x_1, x_2, x_3 = memory.load_4_f32(out_4_f32 + np.uint64(16 * i))
            memory.store_4_f32(out_4_f32 + np.uint64(16 * i), x_0, x_1, x_2, x_3)

    parameters = (U32_ARRAY, F32_ARRAY, types.uint64, types.uint64, types.uint64)
    return Kernel(stores_to_global_kernel, parameters, threads=32)


def make_add_vectors():
    """sums[i % 2] += x[i], four numbers each, by many threads at once."""

    def add_vectors_kernel(sums, x):
        i = cuda.blockIdx.x * 128 + cuda.threadIdx.x
        memory.add_4_f32(sums + np.uint64(16 * (i % 2)), x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3])

    return Kernel(add_vectors_kernel, (types.uint64, F32_ARRAY), threads=128)


def make_add_integers():
    """sums[i % 2] += x[i], and out[i] = the lower half of x[i], by many threads at once."""

    def add_integers_kernel(sums, x, out):
        i = cuda.blockIdx.x * 128 + cuda.threadIdx.x
        memory.add_global_s64(sums + np.uint64(8 * (i % 2)), x[i])
        memory.store_global_u16(out + np.uint64(2 * i), np.uint32(x[i] & 0xFFFFFFFF))

    return Kernel(add_integers_kernel, (types.uint64, types.CPointer(types.int64), types.uint64), threads=128)


def make_counters():
    """tickets[cta] = how many came before; out = what each had stored before it counted itself, as the first CTA reads it."""

    def counters_kernel(counters, stored, tickets, out):
        cta, ctas = cuda.blockIdx.x, cuda.gridDim.x
        if cuda.threadIdx.x == 0:
            tickets[cta] = memory.fetch_add_u32(counters, 1)
            memory.store_global_u32(stored + np.uint64(4 * cta), np.uint32(100 + cta))
            memory.add_release_u32(counters + np.uint64(4), 1)
            if cta == 0:
                while memory.load_acquire_u32(counters + np.uint64(4)) < ctas:
                    cuda.nanosleep(np.uint32(100))
                for i in range(ctas):
                    out[i] = memory.load_if_u32(stored + np.uint64(4 * i), 1)

    return Kernel(counters_kernel, (types.uint64, types.uint64, U32_ARRAY, U32_ARRAY), threads=32)


def make_load_global():
    """Element i of four arrays, by its address."""

    def load_global_kernel(x_u64, x_f32, x_i32, x_u16, out_u64, out_f32, out_i32, out_u32):
        i = cuda.threadIdx.x
        out_u64[i] = memory.load_global_u64(x_u64 + np.uint64(8 * i))
        out_f32[i] = memory.load_global_f32(x_f32 + np.uint64(4 * i))
        out_i32[i] = memory.load_global_i32(x_i32 + np.uint64(4 * i))
        out_u32[i] = memory.load_global_u16(x_u16 + np.uint64(2 * i))

    out = pointer_to(np.uint64), F32_ARRAY, pointer_to(np.int32), U32_ARRAY
    return Kernel(load_global_kernel, (*[types.uint64] * 4, *out), threads=32)


def make_pointers():
    """Element i of x: read at its address, its bits through a view; and its bits stored through a view of `out`."""
    as_bits = view_as(types.uint32)

    def pointers_kernel(x, by_address, bits, out):
        i = cuda.threadIdx.x
        by_address[i] = memory.load_global_f32(address_of(x) + np.uint64(4 * i))
        bits[i] = as_bits(x)[i]
        as_bits(out)[i] = bits[i]

    return Kernel(pointers_kernel, (F32_ARRAY, F32_ARRAY, U32_ARRAY, F32_ARRAY), threads=32)


def make_handover(rounds):
    """out[32 * i + lane] = 100 * i + 31 - lane: from one warp to another, through the same shared memory each round."""

    def handover_kernel(out):
        thread, smem = cuda.threadIdx.x, aligned_smem()
        lane, full, empty = thread & 31, smem + np.uint32(128), smem + np.uint32(136)
        init_barrier(full, 32)
        init_barrier(empty, 32)
        for i in range(rounds):
            if thread < 32:
                mbarrier.wait(empty, i & 1 ^ 1)  # the phase before the first counts as complete
                memory.store_shared_f32(smem + np.uint32(4 * lane), np.float32(100 * i + lane))
                mbarrier.arrive(full)
            else:
                mbarrier.wait(full, i & 1)
                out[32 * i + lane] = memory.load_shared_f32(smem + np.uint32(4 * (31 - lane)))
                cuda.syncwarp()
                if lane == 0:
                    mbarrier.arrive_many(empty, 32)

    return Kernel(handover_kernel, (F32_ARRAY,), threads=64, smem_bytes=_ALIGNMENT_BYTES + 128 + 2 * _BARRIER_BYTES)


def make_named_barrier(masked):
    """out[i] = 63 - i through shared memory; a third warp never comes to the barrier. masked: the barrier gives all bits."""

    def named_barrier_kernel(out):
        thread, smem = cuda.threadIdx.x, aligned_smem()
        if thread < 64:
            memory.store_shared_f32(smem + np.uint32(4 * thread), np.float32(thread))
            mask = np.uint32(0xFFFFFFFF)
            if masked:
                mask = control.barrier_mask(1, 64)
            else:
                control.barrier_sync(1, 64)
            out[thread] = memory.load_shared_f32(smem + np.uint32(np.uint32(4 * (63 - thread)) & mask))

    return Kernel(named_barrier_kernel, (F32_ARRAY,), threads=96, smem_bytes=_ALIGNMENT_BYTES + 64 * 4)


def make_cluster():
    """out[cta] = its rank in a cluster of two, once the other has arrived at its barrier."""

    def cluster_kernel(out):
        thread, rank, smem = cuda.threadIdx.x, cluster.cta_rank(), aligned_smem()
        init_barrier(smem, 1)
        cluster.sync()
        if thread == 0:
            mbarrier.arrive_cluster(cluster.map_shared(smem, rank ^ np.uint32(1)))
        mbarrier.wait(smem, 0)
        if thread == 0:
            out[cuda.blockIdx.x] = rank
        cluster.sync()

    return Kernel(cluster_kernel, (U32_ARRAY,), threads=32, cluster=2, smem_bytes=_ALIGNMENT_BYTES + _BARRIER_BYTES)


def make_mail():
    """out[cta] = 7 + the rank of the cluster's other CTA, which that one has stored here."""

    def mail_kernel(out):
        thread, rank, smem = cuda.threadIdx.x, cluster.cta_rank(), aligned_smem()
        init_barrier(smem, 1)
        cluster.sync()
        if thread == 0:
            mbarrier.arrive_expect_tx(smem, np.uint32(4))
            other = rank ^ np.uint32(1)
            there, barrier = cluster.map_shared(smem + np.uint32(16), other), cluster.map_shared(smem, other)
            cluster.store_async(there, np.uint32(7) + rank, barrier)
        mbarrier.wait(smem, 0)
        if thread == 0:
            out[cuda.blockIdx.x] = memory.load_shared_i32(smem + np.uint32(16))
        cluster.sync()

    return Kernel(mail_kernel, (U32_ARRAY,), threads=32, cluster=2, smem_bytes=_ALIGNMENT_BYTES + 2 * _BARRIER_BYTES + 4)


def make_register_exchange():
    """out[i] = i: one warpgroup gives registers away, and the other takes them."""
    lower, raise_ = control.lower_registers(40), control.raise_registers(232)

    def register_exchange_kernel(out):
        if cuda.threadIdx.x < 128:
            lower()
        else:
            raise_()
        out[cuda.threadIdx.x] = np.uint32(cuda.threadIdx.x)

    return Kernel(register_exchange_kernel, (U32_ARRAY,), threads=384)
