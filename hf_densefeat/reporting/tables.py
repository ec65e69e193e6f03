"""What was measured, as tables: similarity, geometry, subspaces, probes; for pages, cards and the terminal."""

import textwrap
from collections.abc import Callable, Mapping, Sequence

from hf_densefeat.evaluation.geometry import geometry_state, variance_share
from hf_densefeat.evaluation.metrics import CODES, WITH_WORDS, Estimate, Result
from hf_densefeat.reporting.comparison import ARROWS, WORDS, Measured, comparisons, judged, known_metrics
from hf_densefeat.reporting.formats import Table, interval, number

Report = dict[str, float]
BESIDE = ("accuracy_at_16", "mrr_binary")
"""Metrics that the table of before and after has beside the headlines."""
UNKNOWN = Estimate(float("nan"))


def before_after_table(measured: Sequence[Measured], *, wide: bool = False) -> Table:
    """Similarity first, then geometry, then probes: a column an encoder, and the last one minus the first in `change`.

    The change has its paired 95 % interval and ↑ for better, ↓ for worse, · for no visible difference. Unknown values are
    n/a. With one encoder there is no such column. Of an encoder with views it is the change of the view that gains more.
    A `wide` table also has the last one minus words, with its interval; a terminal has no room for it.
    """
    last, names = judged(measured), [encoder["name"] for encoder in measured]
    rows = comparisons([*measured, last] if last["name"] not in names else measured)
    compared = {"change": "differences"} if len(measured) > 1 else {}
    if wide and last.get("against_words"):
        compared[f"{last['name']} − words"] = "against_words"
    lines: dict[str, Table] = {"similarity": [["held-out notes", *names, *compared]], "geometry": [], "probes": []}
    for row in rows:
        if row.headline or row.fused or row.metric in BESIDE:
            cells = [number(row.values.get(name, UNKNOWN).value) for name in names]
            cells += [row.difference(last["name"], part, ARROWS, digits=3) for part in compared.values()]
            lines["similarity" if row.group == "similarity" else "probes"].append([row.title, *cells])
    attainable = f"effective rank, of {last['geometry']['attainable_rank']:.0f}"
    for title, key, digits in (
        ("mean cosine of two notes", "mean_cosine", 3),
        (attainable, "effective_rank_centered", 1),
    ):
        *values, after = (encoder.get("geometry", {}).get(key, float("nan")) for encoder in [*measured, last])
        gaps = [number(after - values[0], digits=digits, signed=True), "n/a"][: len(compared)]
        lines["geometry"].append([title, *(number(value, digits=digits) for value in values), *gaps])
    return [line for part in lines.values() for line in part]


def terminal(table: Table, width: int = 80) -> str:
    """A table as lines of at most `width` characters, values to the right; long titles and heads go on in the next line."""
    longest = [max(map(len, column)) for column in zip(*table, strict=True)]
    first, widths, gaps = longest[0], longest[1:], 2 * (len(longest) - 1)
    if first + sum(widths) + gaps > width:  # the heads are broken
        widths = [max(7, *(len(line[i]) for line in table[1:])) for i in range(1, len(longest))]
    first = max(12, min(first, width - sum(widths) - gaps))
    # the last column gives way where all of it together is still too wide
    widths[-1] = max(8, min(widths[-1], width - first - sum(widths[:-1]) - gaps))

    def broken(cells: Sequence[str]) -> list[str]:
        parts = [
            textwrap.wrap(cell, room, subsequent_indent="  " if room > 12 else "") or [""]
            for cell, room in zip(cells, (first, *widths), strict=True)
        ]
        rows = [[part[i] if i < len(part) else "" for part in parts] for i in range(max(map(len, parts)))]
        values = [[cell.rjust(room) for cell, room in zip(row[1:], widths, strict=True)] for row in rows]
        texts = ["  ".join([row[0].ljust(first), *cells]) for row, cells in zip(rows, values, strict=True)]
        return [text[:width].rstrip() for text in texts]

    rule = "-" * min(width, first + sum(widths) + gaps)
    return "\n".join([*broken(table[0]), rule, *(text for cells in table[1:] for text in broken(cells))])


# ---- The page -------------------------------------------------------------------------------------------------------


def comparison_table(measured: Sequence[Measured], groups: Sequence[str], title: str) -> Table:
    """One line a metric of these `GROUPS`: every encoder with its interval, then each minus the first, and minus words.

    The title heads the first column. It is the header alone where nothing of these groups was measured.
    """
    names = [encoder["name"] for encoder in measured]
    rows = [row for row in comparisons(measured) if row.group in groups]
    rows = [row for row in rows if row.metric in known_metrics() or row.metric.endswith(WITH_WORDS)]
    compared = [(name, names[0], "differences") for name in names[1:]]
    compared += [(name, "words", "against_words") for name in names if names[0] != "words"]
    compared = [one for one in compared if any(one[0] in getattr(row, one[2]) for row in rows)]
    lines = [[title, *names, *(f"{name} − {other}" for name, other, _ in compared)]]
    for row in rows:
        cells = [interval(row.values.get(name, UNKNOWN)) for name in names]
        cells += [row.difference(name, part, WORDS) for name, _, part in compared]
        lines.append([row.title, *cells])
    return lines


def code_table(measured: Sequence[Measured]) -> Table:
    """Each similarity task's headline metric by code and number of dimensions; one line a task and encoder."""
    values: dict[tuple[str, str], dict[str, str]] = {}
    rows = [row for row in comparisons(measured) if row.group == "similarity"]
    for plain in (row for row in rows if row.headline):
        variants = [row for row in rows if row.task == plain.task and row.metric.startswith(f"{plain.metric}_")]
        for row in [plain, *(row for row in variants if not (row.metric in known_metrics() or row.fused))]:
            variant = row.metric.removeprefix(plain.metric)[1:].replace("_over_", "/") or CODES[0]
            for name, estimate in row.values.items():
                values.setdefault((plain.title, name), {})[variant] = number(estimate.value)
    columns = list(dict.fromkeys(variant for cells in values.values() for variant in cells))
    lines = [["similarity with fewer bits or dimensions", "encoder", *columns]]
    if columns == [CODES[0]]:
        return lines
    return lines + [[*key, *(cells.get(variant, "n/a") for variant in columns)] for key, cells in values.items()]


def geometry_table(measured: Sequence[Measured]) -> Table:
    """Header, then one line a quantity; uncentred and centred."""

    def condition(name: str) -> Callable[[Report], str]:
        # at the floor the smallest eigenvalue is rounding: the number is a bound, and is shown as one
        return lambda r: (
            f"≥ {1 / r['condition_floor']:.0e} (floor)" if r[name] >= 0.999 / r["condition_floor"] else number(r[name])
        )

    def resolved(r: Report) -> str:
        return f"{number(r['condition_resolved_centered'])} ({r['resolved_rank_centered']:.0f} resolved)"

    rows: dict[str, Callable[[Report], str]] = {
        "state": geometry_state,
        "N, d, attainable rank": lambda r: f"{r['n']:,.0f}, {r['d']:.0f}, {r['attainable_rank']:.0f}",
        "mean cosine of two random notes": lambda r: number(r["mean_cosine"]),
        "share of the squared length that is variance": lambda r: f"{variance_share(r):.0%}",
        "effective rank, centred": lambda r: number(r["effective_rank_centered"], digits=1),
        "effective rank, uncentred": lambda r: number(r["effective_rank"], digits=1),
        "condition number, centred": condition("condition_number_centered"),
        "condition number, uncentred": condition("condition_number"),
        "largest over smallest resolved eigenvalue, centred": resolved,
        "largest over median eigenvalue, centred": condition("condition_over_median_centered"),
    }
    measured = [encoder for encoder in measured if encoder.get("geometry")]  # words have none
    lines = [["geometry", *(encoder["name"] for encoder in measured)]]
    return lines + [[name, *(cell(encoder["geometry"]) for encoder in measured)] for name, cell in rows.items()]


def subspace_table(pairs: Mapping[str, Report], patients: Mapping[str, Report] | None = None) -> Table:
    """Adjacent notes by encoder, pooled over patients (`geometry_report`) and within patients (`patient_subspaces`)."""
    first = next(iter(pairs.values()))
    lines = [[f"subspaces of adjacent notes, k = {first['k']:.0f}, centred, 0 to 1", *pairs]]
    rows = [
        ("distance, all pairs, which share notes", pairs, "subspace_distance_normalized_centered"),
        ("distance, disjoint halves", pairs, "subspace_distance_half_normalized_centered"),
        ("noise floor of halves", pairs, "subspace_noise_floor_normalized_centered"),
        ("distance above the floor", pairs, "subspace_excess_normalized_centered"),
    ]
    if patients:
        used = next(iter(patients.values()))["patients"]
        title = f"per patient ({used:.0f} patients with notes enough)"
        rows += [(title, patients, "distance_normalized")]
        rows += [("per patient: noise floor", patients, "noise_floor_normalized")]
    return lines + [
        [title, *(number(report[key]) for report in reports.values())]
        for title, reports, key in rows
        if key in next(iter(reports.values()))
    ]


def rows_table(results: Mapping[str, Result]) -> Table:
    """How many rows and patients stand behind each number."""
    lines = [["task", "kind", "scored rows", "their patients", "other rows"]]
    for task, result in results.items():
        rows = dict(result.rows)
        scored, patients = rows.pop("scored", rows.pop("test", 0)), rows.pop("patients", 0)
        others = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in rows.items() if count)
        lines.append([task, result.kind, f"{scored:,}", f"{patients:,}", others or "none"])
    return lines
