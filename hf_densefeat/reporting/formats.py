"""How numbers, intervals and tables are written, in reports, cards, terminals and the study alike."""

import re
from collections.abc import Sequence

import numpy as np

from hf_densefeat.evaluation.metrics import Estimate

Table = list[list[str]]
"""A header and its lines, all of the same length."""

_NUMERIC = re.compile(r"[-+−≥]?\*{0,2}[\d.].*|n/a||–")


def number(value: float, *, digits: int | None = None, signed: bool = False) -> str:
    """A value in about three digits: 0.812, 22.8, 4,310, 0.0041, 2.0e-05; n/a for NaN.

    ``digits`` are places after the point, where a column is to have the same everywhere. A difference is ``signed``.
    """
    if not np.isfinite(value):
        return "n/a"
    sign, size = "+" if signed else "", abs(value)
    if digits is None:
        if 0 < size < 0.0005 and not signed:
            return f"{value:.1e}"
        digits = 0 if size >= 1000 else 1 if size >= 20 else 4 if 0 < size < 0.01 and not signed else 3
    return f"{value:{sign},.{digits}f}"


def interval(estimate: Estimate, *, digits: int | None = None, signed: bool = False) -> str:
    """A value and its 95 % interval, 0.812 [0.790, 0.833]; the value alone where there is no interval."""
    value, low, high = (
        number(one, digits=digits, signed=signed) for one in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]" if np.isfinite(estimate.low) else value


def markdown(table: Table) -> str:
    """A table as Markdown, padded so that it is legible as it is; columns of numbers are aligned to the right."""
    table = [[cell.replace("|", "\\|") for cell in line] for line in table]
    widths = [max(3, *(len(line[i]) for line in table)) for i in range(len(table[0]))]
    numeric = [i > 0 and all(_NUMERIC.fullmatch(line[i]) for line in table[1:]) for i in range(len(table[0]))]

    def line(cells: Sequence[str]) -> str:
        parts = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True))
        return f"| {' | '.join(parts)} |"

    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)]
    return "\n".join([line(table[0]), line(rule), *map(line, table[1:])])
