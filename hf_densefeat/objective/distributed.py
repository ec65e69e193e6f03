"""Sums over ranks, without gradient: the only room that communicates."""

import torch
import torch.distributed as dist
from torch import Tensor

from hf_densefeat.objective.moments import Moments, PairMoments
from hf_densefeat.objective.precision import full_precision


@torch.no_grad()
def sum_over_ranks(pair: PairMoments, counts: Tensor) -> tuple[PairMoments, Tensor]:
    """Global moments of the pairs and global `counts` (m,): one all-reduce of one packed buffer, without gradient.

    The buffer holds the upper triangles of both sides: d^2 + 5 d + 5 + m numbers whatever the batch, and d^2 more with
    the cross moment, in the dtype of the moments. All ranks must use the same shifts. A rank without rows takes part
    with zeros. One process: returned as they are.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return pair, counts
    d = len(pair.a.shift)
    upper = torch.triu_indices(d, d, device=pair.a.shift.device)
    parts = [counts.to(pair.a.shift)]
    for side in (pair.a, pair.b):
        parts += [side.count[None], side.first, side.second[upper[0], upper[1]]]
        parts += [side.square_weighted_sum, side.quartic_sum[None]]
    parts.append(pair.product_sum[None])
    if pair.cross is not None:
        parts.append(pair.cross.flatten())
    buffer = torch.cat(parts)
    dist.all_reduce(buffer)
    counts, *sums = torch.split(buffer, [len(part) for part in parts])
    sides = []
    for side, (n, first, triangle, square_weighted, quartic) in zip(
        (pair.a, pair.b), (sums[:5], sums[5:10]), strict=True
    ):
        second = first.new_zeros(d, d)
        second[upper[0], upper[1]] = triangle
        second = second + second.triu(1).mT
        sides.append(Moments(side.shift, n[0], first, second, square_weighted, quartic[0]))
    cross = None if pair.cross is None else sums[11].view(d, d)
    return PairMoments(sides[0], sides[1], sums[10][0], cross), counts


@torch.no_grad()
def mean_over_ranks(z: Tensor) -> Tensor:
    """Mean row (d,) of the rows on all ranks: a first shift, before any moments are known."""
    z = full_precision(z)
    sums = torch.cat([z.sum(0), z.new_tensor([float(len(z))])])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums[:-1] / sums[-1].clamp(min=1)
