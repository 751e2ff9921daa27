"""One line for each package: its operator on real data, against float64 and plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.benchmark import Timer

import attn_evo
import attn_flash
import attn_paged
import attn_triangle
import attn_vulkan
from attn_core import backends
from attn_evo import reference as evo_reference
from attn_flash import reference as flash_reference
from attn_triangle import reference as triangle_reference
from vit import SIDE, Digits, ViT

CRAMBIN = Path(__file__).parent / "data" / "1crn_ca.txt"
BLOCK_SIZE = 8  # tokens of a block of the paged cache
SECONDS_PER_TIMING = 0.2


@dataclass(frozen=True)
class Row:
    """What one operator did: `error` is its largest difference from float64."""

    package: str
    what: str
    backend: str
    shape: str
    error: float
    tolerance: float
    seconds: float
    plain_seconds: float


def rows(model: ViT, data: Digits) -> list[Row]:
    """Run attn-flash, -paged, -triangle and -evo on the device of the data."""
    with torch.no_grad():
        return [
            flash(model, data),
            paged(model, data),
            triangle(data.test_images.device),
            evo(data),
        ]


def flash(model: ViT, data: Digits) -> Row:
    """Self-attention of the trained ViT's last block over all held-out digits."""
    q, k, v = model.last_qkv(data.test_images).unbind(2)

    def plain(*qkv: torch.Tensor) -> torch.Tensor:
        return flash_reference.attention(*qkv, q.shape[-1] ** -0.5, (-1, -1))[0]

    return _row(
        "attn-flash",
        "the ViT on held-out digits",
        attn_flash.ops.ATTENTION,
        attn_flash.flash_attn_func,
        plain,
        (q, k, v),
    )


def paged(model: ViT, data: Digits) -> Row:
    """Patches of 4 digits decoded one by one from a paged cache, against full causal attention."""
    images = data.test_images[:4]
    q, k, v = model.last_qkv(images).unbind(2)

    def decode(q, k, v):
        sequences, length, heads, dim = q.shape
        blocks = sequences * math.ceil(length / BLOCK_SIZE)
        cache = attn_paged.PagedKVCache(blocks, BLOCK_SIZE, heads, dim, device=q.device)
        names = [cache.allocate() for _ in range(sequences)]
        outs = []
        for token in range(length):
            for name in names:
                cache.append(name, 1)
            batch = cache.batch(names)
            cache.write(0, k[:, token], v[:, token], batch)
            outs.append(cache.attend(0, q[:, token], batch))
        return torch.stack(outs, dim=1)

    def plain(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        outs = [
            F.scaled_dot_product_attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1])
            for i in range(q.shape[2])
        ]
        return torch.cat(outs, dim=2).transpose(1, 2)

    def full(q, k, v):
        return flash_reference.attention(q, k, v, q.shape[-1] ** -0.5, (-1, 0))[0]

    return _row(
        "attn-paged",
        "digits decoded token by token",
        attn_paged.ops.ATTENTION,
        decode,
        plain,
        (q, k, v),
        exact=full,
    )


def triangle(device: torch.device) -> Row:
    """Triangle attention over the distances within crambin, far pairs masked out."""
    distances = crambin_distances().to(device)
    pair = _soft_bins(distances)  # [N, N, C]
    weights = torch.Generator().manual_seed(0)
    project = torch.randn(3, 4, pair.shape[-1], 32, generator=weights).to(device)
    q, k, v = torch.einsum("ijc,xhcd->xhijd", pair, project)[:, None].unbind(0)
    bias = -distances[None, None] / torch.tensor([2.0, 4, 8, 16], device=device)[:, None, None]
    mask = (distances > 20)[None]  # True leaves a pair out

    def plain(q, k, v, bias, mask):
        return triangle_reference.attention(q, k, v, bias, mask, 32**-0.5, "mean")[0]

    return _row(
        "attn-triangle",
        "distances within crambin",
        attn_triangle.ops.ATTENTION,
        attn_triangle.triangle_attention,
        plain,
        (q, k, v, bias, mask),
    )


def evo(data: Digits) -> Row:
    """EvoAttention over the rows of the training digits, as one long sequence."""
    v = data.train_images.reshape(1, 1, -1, SIDE)

    def plain(v):
        weights = attn_evo.EvoWeights.identity(SIDE, dtype=v.dtype, device=v.device)
        return evo_reference.attention(v, weights, causal=True)[0]

    return _row(
        "attn-evo",
        "rows of all training digits",
        attn_evo.ops.ATTENTION,
        attn_evo.evo_attention,
        plain,
        (v,),
    )


def vulkan() -> str:
    """Name the Vulkan devices, or say why there is none."""
    try:
        devices = attn_vulkan.devices()
    except (attn_vulkan.LoaderNotFound, attn_vulkan.VulkanError) as reason:
        return f"attn-vulkan: {reason}"
    if not devices:
        return "attn-vulkan: the Vulkan loader is here, but no driver finds a device"
    found = ", ".join(f"{device.name} (Vulkan {device.api_version})" for device in devices)
    return f"attn-vulkan: {found}"


def crambin_distances() -> torch.Tensor:
    """Distances between the C-alpha atoms of crambin's 46 residues, in angstrom: (46, 46)."""
    lines = CRAMBIN.read_text(encoding="utf-8").splitlines()
    atoms = [line.split()[1:] for line in lines if not line.startswith("#")]
    positions = torch.tensor([[float(x) for x in atom] for atom in atoms])
    return torch.cdist(positions, positions)


def _soft_bins(distances: torch.Tensor) -> torch.Tensor:
    """Each distance as 16 features, one for each of as many centres: (N, N, 16)."""
    centres = torch.linspace(2, 32, 16, device=distances.device)
    return torch.exp(-(((distances[..., None] - centres) / 2) ** 2))


def _row(
    package: str,
    what: str,
    op: str,
    compute: Callable[..., torch.Tensor],
    plain: Callable[..., torch.Tensor],
    tensors: tuple[torch.Tensor, ...],
    *,
    exact: Callable[..., torch.Tensor] | None = None,
    tolerance: float = 1e-4,
) -> Row:
    first = tensors[0]
    reference = (exact or plain)(*(x.double() if x.is_floating_point() else x for x in tensors))
    error = (compute(*tensors) - reference).abs().max().item()
    return Row(
        package,
        what,
        _backend(op, first),
        "x".join(map(str, first.shape)),
        error,
        tolerance,
        _median_seconds(compute, tensors),
        _median_seconds(plain, tensors),
    )


def _backend(op: str, tensor: torch.Tensor) -> str:
    typical = backends.operators()[op](tensor.device)
    return backends.resolve(op, typical._replace(dtype=tensor.dtype, needs_grad=False))


def _median_seconds(compute: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...]):
    timer = Timer(
        "compute(*tensors)",
        globals={"compute": compute, "tensors": tensors},
        num_threads=torch.get_num_threads(),
    )
    return timer.blocked_autorange(min_run_time=SECONDS_PER_TIMING).median
