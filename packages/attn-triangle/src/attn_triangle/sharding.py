"""Triangle attention with the rows of the pair tensor spread over the ranks of a device mesh.

Rows attend within themselves, so each rank computes its own and nothing is exchanged in the forward
pass. All rows share the bias, so in the backward pass its gradient is summed over the ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attn_core.checks import require_tensor
from attn_triangle.api import triangle_attention

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def triangle_attention_sharded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    mesh: DeviceMesh,
    mesh_dim: int | str = 0,
    **options: Any,
) -> Any:
    """Triangle attention of the rows that this rank owns.

    Every rank of the mesh dimension calls it together, in both passes.

    Parameters
    ----------
    q, k, v : Tensor, shape (*, H, R, M or N, D)
        This rank's rows; their number may differ from rank to rank.
    bias : Tensor, shape (*, H, M, N)
        The whole bias, the same on every rank.
    mask : Tensor, shape (*, R, N), optional
        Of this rank's rows.
    mesh : DeviceMesh
        The ranks, on the device type of the tensors.
    mesh_dim : int or str, default 0
        The dimension of the mesh that the rows are spread over.
    **options
        Those of `triangle_attention`.

    Returns
    -------
    Tensor or tuple of Tensor
        What `triangle_attention` returns, of this rank's rows. The gradient of `bias` is that of
        the rows of all ranks; it is summed in float32 at least.

    Raises
    ------
    ValueError
        The mesh is of another device type, or as for `triangle_attention`.

    Examples
    --------
    In a process of ``torchrun --nproc-per-node 2``, with `x` (B, H, N, N, D) whole on both::

        mesh = init_device_mesh("cuda", (2,))
        q, k, v = (shard_rows(x, mesh) for x in (q, k, v))
        out = triangle_attention_sharded(q, k, v, bias, mesh=mesh)
    """
    require_tensor("q", q)
    require_tensor("bias", bias)
    if mesh.device_type != q.device.type:
        raise ValueError(
            f"mesh must be of the device type of q, {q.device.type}, got {mesh.device_type}"
        )
    index = _index(mesh, mesh_dim)
    if bias.element_size() < 4:
        bias = bias.float()
    shared = _SumGradient.apply(bias, mesh.get_group(index))  # type: ignore[no-untyped-call]
    return triangle_attention(q, k, v, shared, mask, **options)


def shard_rows(
    x: torch.Tensor, mesh: DeviceMesh, *, mesh_dim: int | str = 0, dim: int = -3
) -> torch.Tensor:
    """Return this rank's part of the rows of a tensor that every rank holds.

    Parameters
    ----------
    x : Tensor
        The whole tensor.
    mesh : DeviceMesh
        The ranks.
    mesh_dim : int or str, default 0
        The dimension of the mesh that the rows are spread over.
    dim : int, default -3
        The dimension of the rows: -3 in q, k and v, -2 in a mask.

    Returns
    -------
    Tensor
        A view. The first ranks have one row more where the rows do not divide evenly.
    """
    return x.tensor_split(mesh.size(_index(mesh, mesh_dim)), dim)[mesh.get_local_rank(mesh_dim)]


def _index(mesh: DeviceMesh, mesh_dim: int | str) -> int:
    if isinstance(mesh_dim, int):
        return mesh_dim
    names = mesh.mesh_dim_names or ()
    if mesh_dim not in names:
        raise ValueError(f"mesh_dim must be a number or one of {names}, got {mesh_dim!r}")
    return names.index(mesh_dim)


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over the ranks of a process group."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        from torch.distributed import all_reduce

        total = grad.contiguous().clone()
        all_reduce(total, group=ctx.group)
        return total, None
