"""Where the tokens of one sequence are: in a batch, in a ragged row of sequences, or in pages."""

import triton
import triton.language as tl


@triton.jit
def ragged_bounds(b, starts_q_ptr, starts_k_ptr, used_ptr, HAS_USED: tl.constexpr):
    """Return the first query and key of sequence b, and how many of each it has."""
    first_q = tl.load(starts_q_ptr + b)
    first_k = tl.load(starts_k_ptr + b)
    len_q = tl.load(starts_q_ptr + b + 1) - first_q
    len_k = tl.load(starts_k_ptr + b + 1) - first_k
    if HAS_USED:
        len_k = tl.load(used_ptr + b)
    return first_q.to(tl.int64), first_k.to(tl.int64), len_q, len_k


# fmt: off
@triton.jit
def paged_rows(
    table_ptr, stride_tn, offs_n, mask_n, stride_kb, stride_kn, stride_vb, stride_vn,
    PAGE_SIZE: tl.constexpr,
):
    # fmt: on
    """Offsets of keys and values that lie in pages, each [BLOCK_N]."""
    pages = tl.load(table_ptr + offs_n // PAGE_SIZE * stride_tn, mask=mask_n, other=0).to(tl.int64)
    slots = (offs_n % PAGE_SIZE).to(tl.int64)
    return pages * stride_kb + slots * stride_kn, pages * stride_vb + slots * stride_vn
