"""Keys and values gathered from their pages, where a gradient is asked for.

No backward kernel reads pages. The gather is differentiable, so gradients find their way back to
the pages, added up where sequences share one.
"""

from __future__ import annotations

import torch

from attn_flash.options import Options


def gathered(
    k: torch.Tensor, v: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor, Options]:
    """Lay the pages of each sequence one after the other; return k, v and the options for them.

    Every sequence gets room for `max_seqlen_k` keys, so that no length has to reach the host.
    """
    starts, table, room = options.cu_seqlens_k, options.block_table, options.max_seqlen_k
    assert starts is not None
    assert table is not None
    lengths = starts.diff() if options.seqused_k is None else options.seqused_k
    j = torch.arange(room, device=k.device)
    page_size = k.shape[1]
    slots = table[:, j // page_size].long() * page_size + j % page_size  # [B, max_seqlen_k]
    slots = torch.where(j < lengths[:, None], slots, 0).flatten()
    dense = options._replace(
        block_table=None,
        cu_seqlens_k=room * torch.arange(len(starts), dtype=torch.int32, device=k.device),
        seqused_k=lengths.to(torch.int32).contiguous(),
    )
    return k.flatten(0, 1)[slots], v.flatten(0, 1)[slots], dense
