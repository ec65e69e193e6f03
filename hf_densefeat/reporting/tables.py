"""The report on encoders: what was measured as one sentence, as tables, and as one HTML page that a person can send.

It holds numbers, names of columns and label values, and no text of a note, no patient id and no path.
"""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_densefeat.evaluation.geometry import geometry_state, variance_share
from hf_densefeat.evaluation.metrics import METRICS_OF, Estimate, metric_named
from hf_densefeat.evaluation.probes import ProbeResult


def direction(difference: Estimate, metric: str) -> str:
    """better, worse or equal: an interval on one side of zero, or not."""
    sign = 1 if metric_named(metric).higher_is_better else -1
    if difference.low <= 0 <= difference.high or not np.isfinite(difference.low):
        return "equal"
    return "better" if sign * difference.value > 0 else "worse"


def verdict(
    name: str, report: dict, differences: dict[str, dict[str, Estimate]] | None, results: dict, base: str
) -> dict:
    """One sentence: the state of the geometry, and better, equal or worse than the base.

    "better" and "worse" mean that at least one task's paired 95 % interval is on that side of zero and none on the
    other; "mixed" that both occur; "equal" that every interval holds zero, which is no proof of equality.
    """
    state = geometry_state(report)
    text = (
        f"{name} is {state} on these notes (centred effective rank {report['effective_rank_centered']:.0f} of "
        f"{report['attainable_rank']:.0f} attainable; {variance_share(report):.0%} of the squared length is variance)"
    )
    if not differences:
        return {"state": state, "against_base": None, "sentence": text + "."}
    metrics = {task: METRICS_OF[results[task].kind][0] for task in differences}
    directions = [direction(found[metrics[task]], metrics[task]) for task, found in differences.items()]
    better, equal, worse = (directions.count(word) for word in ("better", "equal", "worse"))
    against = ("mixed" if worse else "better") if better else ("worse" if worse else "equal")
    words = {
        "better": f"its probes are better than those of {base}",
        "worse": f"its probes are worse than those of {base}",
        "mixed": f"its probes are better on some tasks and worse on others than those of {base}",
        "equal": f"no difference to the probes of {base} is visible",
    }
    # The task quoted is the first that shows the direction named.
    wanted = {"better": "better", "mixed": "better", "worse": "worse", "equal": "equal"}[against]
    first = list(metrics)[directions.index(wanted)]
    metric = metrics[first]
    found = differences[first][metric]
    text += (
        f"; {words[against]} ({better} better, {equal} without a visible difference, {worse} worse; "
        f"{first}: {metric_named(metric).title} {found.value:+.3f}, 95 % interval {found.low:+.3f} to {found.high:+.3f})."
    )
    return {"state": state, "against_base": against, "sentence": text}


# ---- Tables ---------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    if value != value:
        return "n/a"
    if value and abs(value) < 0.01:
        return f"{value:.1e}" if abs(value) < 0.0005 else f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 20 else f"{value:.3f}"


def _interval(estimate: Estimate, signed: bool = False) -> str:
    if not np.isfinite(estimate.low):
        return f"{estimate.value:+.3f}" if signed else _number(estimate.value)
    if signed:
        return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
    return f"{_number(estimate.value)} [{_number(estimate.low)}, {_number(estimate.high)}]"


def geometry_table(reports: dict[str, dict[str, float]]) -> list[list[str]]:
    """Header, then one line a quantity; uncentred and centred side by side."""
    lines = [["geometry of all notes", *reports]]
    rows = (
        ("N, d, attainable rank", lambda r: f"{r['n']:,.0f}, {r['d']:.0f}, {r['attainable_rank']:.0f}"),
        ("effective rank, centred", lambda r: _number(r["effective_rank_centered"])),
        ("effective rank, uncentred", lambda r: _number(r["effective_rank"])),
        ("condition number, centred", lambda r: _condition(r, "condition_number_centered")),
        ("condition number, uncentred", lambda r: _condition(r, "condition_number")),
        ("largest over smallest resolved eigenvalue, centred", _resolved),
        ("largest over median eigenvalue, centred", lambda r: _condition(r, "condition_over_median_centered")),
        ("mean cosine of two random notes", lambda r: _number(r["mean_cosine"])),
        ("notes longer than the window", lambda r: f"{r['truncated']:.1%}"),
    )
    return lines + [[name, *(cell(report) for report in reports.values())] for name, cell in rows]


def _resolved(report: dict[str, float]) -> str:
    return f"{_number(report['condition_resolved_centered'])} ({report['resolved_rank_centered']:.0f} resolved)"


def _condition(report: dict[str, float], name: str) -> str:
    singular = report[name] >= 0.999 / report["condition_floor"]
    return f"≥ {1 / report['condition_floor']:.0e} (floor)" if singular else _number(report[name])


def subspace_table(pairs: dict[str, dict[str, float]], patients: dict[str, dict[str, float]]) -> list[list[str]]:
    """Adjacent notes pooled over patients, and within patients; always beside the noise floor."""
    first = next(iter(pairs.values()))
    lines = [[f"subspaces of adjacent notes, k = {first['k']:.0f} (centred)", *pairs]]
    rows = (
        ("distance, all pairs, which share notes (0 to 2k)", "subspace_distance_centered"),
        ("the same, normalised", "subspace_distance_normalized_centered"),
        ("distance, disjoint halves, normalised", "subspace_distance_half_normalized_centered"),
        ("noise floor of halves, normalised", "subspace_noise_floor_normalized_centered"),
        ("distance above the floor, normalised", "subspace_excess_normalized_centered"),
    )
    lines += [[name, *(_number(report[key]) for report in pairs.values())] for name, key in rows if key in first]
    used = next(iter(patients.values()))
    if used["patients"]:
        count = f"{used['patients']:.0f} patients with notes enough"
        lines.append(
            [f"per patient, normalised ({count})", *(_number(r["distance_normalized"]) for r in patients.values())]
        )
        lines.append(["per patient: noise floor", *(_number(r["noise_floor_normalized"]) for r in patients.values())])
    return lines


def probe_table(results: dict[str, dict[str, ProbeResult]], differences: dict[str, dict]) -> list[list[str]]:
    """One line a task and metric: each encoder with its interval, then differences to the first."""
    lines = [["probe", "metric", *results, *(f"{name} - {next(iter(results))}" for name in differences)]]
    for task, base in next(iter(results.values())).items():
        for metric in base.metrics:
            cells = [_interval(found[task].metrics[metric]) for found in results.values()]
            gains = [_interval(found[task][metric], signed=True) for found in differences.values()]
            arrow = " ↑" if metric_named(metric).higher_is_better else " ↓"
            lines.append([task, metric_named(metric).title + arrow, *cells, *gains])
    return lines


def rows_table(results: dict[str, ProbeResult]) -> list[list[str]]:
    """How many rows and patients stand behind each probe."""
    lines = [["probe", "kind", "train", "validation", "test", "patients in test", "rows without label"]]
    for task, found in results.items():
        counts = [found.rows[name] for name in ("train", "validation", "test", "patients", "unlabelled")]
        lines.append([task, found.kind, *(f"{count:,}" for count in counts)])
    return lines


def markdown(table: list[list[str]]) -> str:
    """A table as Markdown, padded so that it is legible as it is."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in table
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


# ---- The page -------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --line: #d0d7de; --card: #f6f8fa;
  --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa5b1; --paper: #12161c; --line: #343b44;
  --card: #1b2128; --mark: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.verdict { border-left: 5px solid var(--mark); background: var(--card); padding: .8rem 1rem; margin: 0 0 .6rem;
  font-size: 1.1rem; }
.note { color: var(--soft); font-size: .92rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
figure { margin: 0 0 1.4rem; } figcaption { color: var(--soft); font-size: .92rem; }
img { max-width: 100%; min-width: 34rem; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: 6px; }
@media print { body { max-width: none; } figure, table { break-inside: avoid; } }
"""

HOW_TO_READ = """
Collapsed: the centred effective rank is below 3 % of the attainable min(N - 1, d) (or below 3), or less than 5
% of the squared length of the embeddings is variance. Over-spread: above 60 % of the attainable rank. Healthy:
between. These are rules of thumb for these notes: few or templated notes lower the rank of any encoder. Better
and worse mean that a paired 95 % interval lies on one side of zero; a missing difference is no proof of
equality. Geometry is a means: what counts are the probes.
"""
METHOD = """
Probes are linear, on frozen embeddings: logistic regression or ridge, standardised on the training rows,
strength chosen on validation patients, scored once on test patients; ARI is k-means with k = number of classes
on all rows. Intervals: 2.5 and 97.5 percentiles over {bootstraps} redraws of the test patients, the same
redraws for every encoder, so differences are paired; they hold for these trained encoders and this split, not
for another training run. Subspace distances are squared projector distances; the noise floor is the distance of
random halves of one side, and is to be compared with the distance of disjoint halves, which has the same row
count.
"""
CAPTIONS = {
    "spectrum": "Flat is spread over many directions, steep is collapsed onto few.",
    "angles": "Circles above crosses: from note to note the leading directions change by more than sampling explains.",
    "shots": "Few labels: mean over three nested draws; bars are 95 % intervals over test patients.",
    "projection": "Two of many dimensions: distance here says little about what a linear probe can find.",
}


def _html_table(table: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(cells, "td") for cells in table[1:])
    return f'<div class="wide"><table><thead>{line(table[0], "th")}</thead><tbody>{body}</tbody></table></div>'


def render(
    verdicts: Sequence[str], tables: dict[str, list[list[str]]], pictures: Sequence[Path], facts: str, method: str
) -> str:
    """The report as one HTML file without any outside reference; pictures are PNGs whose stems `CAPTIONS` knows."""
    parts = ['<!doctype html><html lang="en"><head><meta charset="utf-8">']
    parts.append('<meta name="viewport" content="width=device-width, initial-scale=1">')
    parts.append(f"<title>Encoder report</title><style>{STYLE}</style></head><body><h1>Encoder report</h1>")
    parts += [f'<p class="verdict">{html.escape(sentence)}</p>' for sentence in verdicts]
    parts.append(f'<p class="note">{html.escape(facts)} {html.escape(HOW_TO_READ)}</p>')
    parts += [f"<h2>{html.escape(title)}</h2>{_html_table(table)}" for title, table in tables.items()]
    parts.append("<h2>Pictures</h2>")
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(
            f'<figure><div class="wide"><img alt="{picture.stem}" src="data:image/png;base64,{data}"></div>'
            f"<figcaption>{html.escape(CAPTIONS[picture.stem])}</figcaption></figure>"
        )
    parts.append(f'<h2>Method</h2><p class="note">{html.escape(method)}</p></body></html>')
    return "".join(parts)
