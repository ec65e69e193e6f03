"""What was measured, as tables: similarity, geometry, subspaces, probes; for pages, cards and the terminal."""

import textwrap
from collections.abc import Callable, Mapping, Sequence

from hf_densefeat.evaluation.geometry import geometry_state, variance_share
from hf_densefeat.evaluation.metrics import CODES, METRICS, WITH_WORDS, Estimate
from hf_densefeat.evaluation.probes import ProbeResult
from hf_densefeat.evaluation.similarity import SimilarityResult
from hf_densefeat.reporting.comparison import ARROWS, WORDS, Comparison, Measured, comparisons, direction, judged
from hf_densefeat.reporting.formats import Table, interval, number

Report = dict[str, float]
BESIDE = ("accuracy_at_16", "mrr_binary")
"""Metrics that the table of before and after has beside the headlines."""


def before_after_table(measured: Sequence[Measured], *, wide: bool = False) -> Table:
    """Similarity first, then geometry, then probes: a column an encoder, and the last one minus the first in `change`.

    The change has its paired 95 % interval and ↑ for better, ↓ for worse, · for no visible difference. Unknown values are
    n/a. With one encoder there is no such column. Of an encoder with views it is the change of the view that gains more.

    Args:
        measured: encoders, and words where these are measured.
        wide: also the last one minus words, with its interval; a terminal has no room for it.
    """
    last, missing = judged(measured), Estimate(float("nan"))
    names = [one["name"] for one in measured]
    rows = comparisons([*measured, last] if last["name"] not in names else measured, variants=True)
    rows = [row for row in rows if row.headline or row.fused or row.metric in BESIDE]
    compared = {"change": "differences"} if len(measured) > 1 else {}
    if wide and last.get("against_words"):
        compared[f"{last['name']} − words"] = "against_words"

    def line(row: Comparison) -> list[str]:
        cells = [number(row.values.get(name, missing).value) for name in names]
        for part in compared.values():
            gap = getattr(row, part).get(last["name"])
            change = f"{interval(gap, digits=3, signed=True)} {ARROWS[direction(gap, row.metric)]}" if gap else "n/a"
            cells.append(change)
        return [row.title, *cells]

    lines = [["held-out notes", *names, *compared]]
    lines += [line(row) for row in rows if row.group == "similarity"]
    attainable = f"effective rank, of {last['geometry']['attainable_rank']:.0f}"
    for title, key in (("mean cosine of two notes", "mean_cosine"), (attainable, "effective_rank_centered")):
        *values, after = (one.get("geometry", {}).get(key, float("nan")) for one in [*measured, last])
        digits = 3 if key == "mean_cosine" else 1
        gaps = [number(after - values[0], digits=digits, signed=True), "n/a"][: len(compared)]
        lines.append([title, *(number(value, digits=digits) for value in values), *gaps])
    return lines + [line(row) for row in rows if row.group != "similarity"]


def terminal(table: Table, width: int = 80) -> str:
    """A table as lines of at most `width` characters, values to the right; long titles and heads go on in the next line."""
    gap, columns = 2, range(1, len(table[0]))
    widths = [max(len(line[i]) for line in table) for i in columns]
    if width - sum(widths) - gap * len(widths) < max(len(line[0]) for line in table):
        widths = [max(7, *(len(line[i]) for line in table[1:])) for i in columns]  # the heads are broken
    first = max(12, min(max(len(line[0]) for line in table), width - sum(widths) - gap * len(widths)))

    # the last column gives way where all of it together is still too wide
    widths[-1] = max(8, min(widths[-1], width - first - sum(widths[:-1]) - gap * len(widths)))

    def line(cells: Sequence[str]) -> list[str]:
        parts = [_broken(cell, one) for cell, one in zip(cells, (first, *widths), strict=True)]
        rows = [[part[i] if i < len(part) else "" for part in parts] for i in range(max(map(len, parts)))]
        texts = (
            (" " * gap).join([row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], widths, strict=True))])
            for row in rows
        )
        return [text[:width].rstrip() for text in texts]

    rule = "-" * min(width, first + sum(widths) + gap * len(widths))
    return "\n".join([*line(table[0]), rule, *(text for cells in table[1:] for text in line(cells))])


def _broken(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  " if width > 12 else "") or [""]


# ---- The page -------------------------------------------------------------------------------------------------------


def comparison_table(measured: Sequence[Measured], groups: Sequence[str], title: str) -> Table:
    """One line a metric: every encoder with its interval, then each later one minus the first, and each minus words.

    Args:
        measured: encoders, the first is the base.
        groups: keys of `GROUPS` that the table has.
        title: head of the first column.

    Returns:
        The header alone where nothing of these groups was measured.
    """
    names, missing = [one["name"] for one in measured], Estimate(float("nan"))
    rows = [row for row in comparisons(measured, variants=True) if row.group in groups]
    rows = [row for row in rows if row.metric in METRICS or row.metric.endswith(WITH_WORDS)]
    compared = [(name, names[0], "differences") for name in names[1:]]
    compared += [(name, "words", "against_words") for name in names if names[0] != "words"]
    compared = [
        (name, other, part) for name, other, part in compared if any(name in getattr(row, part) for row in rows)
    ]
    lines = [[title, *names, *(f"{name} − {other}" for name, other, _ in compared)]]
    for row in rows:
        cells = [interval(row.values.get(name, missing)) for name in names]
        for name, _, part in compared:
            gap = getattr(row, part).get(name)
            cells.append(f"{interval(gap, signed=True)} {WORDS[direction(gap, row.metric)]}" if gap else "n/a")
        lines.append([row.title, *cells])
    return lines


def code_table(measured: Sequence[Measured]) -> Table:
    """Each similarity task's headline metric by code and number of dimensions; one line a task and encoder."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    rows = comparisons(measured, variants=True)
    for plain in (row for row in rows if row.headline and row.group == "similarity"):
        for row in rows:
            variant = row.metric.removeprefix(plain.metric)
            if row.group != "similarity" or row.task != plain.task or not row.metric.startswith(plain.metric):
                continue
            if row.metric == plain.metric or not (row.metric in METRICS or row.fused):
                for name, estimate in row.values.items():
                    cells = found.setdefault((plain.title, name), {})
                    cells[variant[1:].replace("_over_", "/") or CODES[0]] = number(estimate.value)
    variants = list(dict.fromkeys(variant for cells in found.values() for variant in cells))
    lines = [["similarity with fewer bits or dimensions", "encoder", *variants]]
    if variants == [CODES[0]]:
        return lines
    return lines + [[*key, *(cells.get(variant, "n/a") for variant in variants)] for key, cells in found.items()]


def geometry_table(measured: Sequence[Measured]) -> Table:
    """Header, then one line a quantity; uncentred and centred."""
    rows: tuple[tuple[str, Callable[[Report], str]], ...] = (
        ("state", geometry_state),
        ("N, d, attainable rank", lambda r: f"{r['n']:,.0f}, {r['d']:.0f}, {r['attainable_rank']:.0f}"),
        ("mean cosine of two random notes", lambda r: number(r["mean_cosine"])),
        ("share of the squared length that is variance", lambda r: f"{variance_share(r):.0%}"),
        ("effective rank, centred", lambda r: number(r["effective_rank_centered"], digits=1)),
        ("effective rank, uncentred", lambda r: number(r["effective_rank"], digits=1)),
        ("condition number, centred", lambda r: _condition(r, "condition_number_centered")),
        ("condition number, uncentred", lambda r: _condition(r, "condition_number")),
        ("largest over smallest resolved eigenvalue, centred", _resolved),
        ("largest over median eigenvalue, centred", lambda r: _condition(r, "condition_over_median_centered")),
    )
    measured = [one for one in measured if one.get("geometry")]  # words have none
    lines = [["geometry", *(one["name"] for one in measured)]]
    return lines + [[name, *(cell(one["geometry"]) for one in measured)] for name, cell in rows]


def _resolved(report: Report) -> str:
    return f"{number(report['condition_resolved_centered'])} ({report['resolved_rank_centered']:.0f} resolved)"


def _condition(report: Report, name: str) -> str:
    # at the floor the smallest eigenvalue is rounding: the number is a bound, and is shown as one
    singular = report[name] >= 0.999 / report["condition_floor"]
    return f"≥ {1 / report['condition_floor']:.0e} (floor)" if singular else number(report[name])


def subspace_table(pairs: Mapping[str, Report], patients: Mapping[str, Report] | None = None) -> Table:
    """Adjacent notes pooled over patients and, where it was measured, within patients; always beside the noise floor.

    Args:
        pairs: encoder to `geometry_report` of the earlier and the later notes.
        patients: encoder to `patient_subspaces`.
    """
    first = next(iter(pairs.values()))
    lines = [[f"subspaces of adjacent notes, k = {first['k']:.0f}, centred, 0 to 1", *pairs]]
    rows = (
        ("distance, all pairs, which share notes", "subspace_distance_normalized_centered"),
        ("distance, disjoint halves", "subspace_distance_half_normalized_centered"),
        ("noise floor of halves", "subspace_noise_floor_normalized_centered"),
        ("distance above the floor", "subspace_excess_normalized_centered"),
    )
    lines += [[name, *(number(report[key]) for report in pairs.values())] for name, key in rows if key in first]
    used = next(iter(patients.values())) if patients else {"patients": 0}
    if patients and used["patients"]:
        title = f"per patient ({used['patients']:.0f} patients with notes enough)"
        lines.append([title, *(number(r["distance_normalized"]) for r in patients.values())])
        lines.append(["per patient: noise floor", *(number(r["noise_floor_normalized"]) for r in patients.values())])
    return lines


def rows_table(results: Mapping[str, SimilarityResult] | Mapping[str, ProbeResult]) -> Table:
    """How many rows and patients stand behind each number."""
    lines = [["task", "kind", "scored rows", "their patients", "other rows"]]
    for task, found in results.items():
        rows = dict(found.rows)
        scored, patients = rows.pop("scored", rows.pop("test", 0)), rows.pop("patients", 0)
        others = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in rows.items() if count)
        lines.append([task, found.kind, f"{scored:,}", f"{patients:,}", others or "none"])
    return lines
