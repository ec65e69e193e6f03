"""Rows of different lengths cut into batches of which little is padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

CACHED_TOKENS = 2048  # tokens of a batch whose hidden states stay in a processor's cache; by `benchmark.py encode`


def batches_by_length(lengths: Sequence[int], batch_size: int, device: torch.device) -> Iterator[list[int]]:
    """Yield row numbers, longest rows first, at most `batch_size` at once and on a CPU at most 2,048 positions.

    A row that is longer than that is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        rows = batch_size
        if device.type == "cpu":
            rows = min(rows, max(1, CACHED_TOKENS // max(lengths[order[start]], 1)))
        yield order[start : start + rows]
        start += rows
