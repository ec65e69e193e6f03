"""Rows of different lengths cut into batches of which little is padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

SLICE, CHARACTERS = 1000, 4_000_000  # texts, and characters, whose tokens are in memory at once
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


def slices_by_length(texts: Sequence[str]) -> Iterator[list[int]]:
    """Yield places of texts, longest texts first, of 1,000 texts or fewer and of 4,000,000 characters or one text."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    start = 0
    while start < len(order):
        rows = min(SLICE, max(1, CHARACTERS // max(len(texts[order[start]]), 1)))
        yield order[start : start + rows]
        start += rows
