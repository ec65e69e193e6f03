"""Sums over ranks, without gradient, and the end of the processes: the only room that communicates."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from hf_densefeat.objective.moments import SECOND, PairMoments
from hf_densefeat.objective.precision import full_precision


@torch.no_grad()
def sum_over_ranks(pair: PairMoments, counts: Tensor) -> tuple[PairMoments, Tensor]:
    """Global moments of the pairs and global `counts` (m,): one all-reduce of one packed buffer, without gradient.

    The buffer holds the upper triangles of both sides: d^2 + 5 d + 5 + m numbers whatever the batch, d^2 more with the
    cross moment and 3 d^2 with the anchor's sums, in the dtype of the moments. All ranks must use the same shifts. A rank
    without rows takes part with zeros. One process: returned as they are.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return pair, counts
    d = len(pair.a.shift)
    upper = torch.triu_indices(d, d, device=pair.a.shift.device)
    halved = [value[upper[0], upper[1]] if i in SECOND else value for i, value in enumerate(pair.sums)]
    parts = [counts.to(pair.a.shift), *(value.flatten() for value in halved)]
    buffer = torch.cat(parts)
    dist.all_reduce(buffer)
    counts, *sums = torch.split(buffer, [len(part) for part in parts])
    sums = [value.view(part.shape) for value, part in zip(sums, halved, strict=True)]
    for i in SECOND:
        second = sums[i].new_zeros(d, d)
        second[upper[0], upper[1]] = sums[i]
        sums[i] = second + second.triu(1).mT
    return pair.with_sums(sums), counts


@torch.no_grad()
def mean_over_ranks(z: Tensor) -> Tensor:
    """Mean row (d,) of the rows on all ranks: a first shift, before any moments are known."""
    z = full_precision(z)
    sums = torch.cat([z.sum(0), z.new_tensor([float(len(z))])])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums[:-1] / sums[-1].clamp(min=1)


def end_processes() -> None:
    """End the process group, if there is one, and leave gloo's threads the time to let go of their last tensors.

    They do so under Python's lock: one that still waits for it when the interpreter ends aborts the process.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.5)
