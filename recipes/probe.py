"""What an encoder makes of your notes: geometry report and linear probes, for one encoder or several side by side.

    python recipes/probe.py --model out/ --model answerdotai/ModernBERT-base \
        --notes notes.parquet --task died:binary --task specialty:multiclass --task age:regression

The first --model is the base that the others are compared with. A model is a folder, a Hub name or a
sentence-transformers folder, as `path` or `name=path`. A task is `label:kind` for a column of the notes, or
`label:kind:table` for a table of its own with a `text` column and, where there are such, a `patient_id` or
`subject_id` column (else every row is a patient) and a `split` column; kinds are binary, multiclass, regression and
clustering.

Written to --output: `report.html` (one file that can be sent to a colleague), `report.json`, `report.md` and the PNGs.
They hold numbers, names of columns and label values, and no note text, patient id or path.
"""

import argparse
import base64
import html
import io
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import numpy as np
import torch
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from hf_densefeat import AutoDenseModel, ProbeEvaluator, ProbeTask, adjacent_pairs, geometry_report, load_notes
from hf_densefeat.geometry import patient_subspaces, principal_angles, spectrum
from hf_densefeat.plots import COLOURS, STYLES
from hf_densefeat.probes import SHOTS, Estimate, ProbeResult, embed, encoder_key, paired_difference

logger = logging.getLogger("probe")

# The verdict, on the centred embeddings of all notes; `verdict` says how they are used.
COLLAPSED_RANK = 0.03
COLLAPSED_VARIANCE = 0.05
OVERSPREAD_RANK = 0.6
PRIMARY = {"binary": "auroc", "multiclass": "auroc", "regression": "rmse", "clustering": "ari"}
LOWER_IS_BETTER = {"rmse", "brier"}
METRIC_NAMES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "brier": "Brier",
    "macro_f1": "macro-F1",
    "rmse": "RMSE",
    "r2": "R²",
    "ari": "ARI",
    "nmi": "NMI",
}


# ------------------------------------------------------------------------------------------------ reading and encoding


@dataclass
class Encoder:
    """A model under the name that the report gives it, and how many tokens of a text it sees."""

    name: str
    model: Any
    tokenizer: Any
    max_length: int


class Lookup:
    """Embeddings that are already there, in the shape of an encoder."""

    def __init__(self, texts: Sequence[str], z: np.ndarray) -> None:
        self.rows, self.z = {text: row for row, text in enumerate(texts)}, z

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return self.z[[self.rows[text] for text in texts]]


def load_encoder(argument: str, names: set[str], max_length: int | None) -> Encoder:
    """A folder or Hub name, as `path` or `name=path`, that sees `max_length` tokens; the path is never the name."""
    name, _, source = argument.rpartition("=")
    name = name or Path(source).name or Path(source).resolve().name
    if name in names:
        raise ValueError(f"Two models would be called {name!r}: give names, --model first=PATH --model second=PATH.")
    config = json.loads(Path(_file(source, "config.json")).read_text())
    if _file(source, "modules.json", needed=False) and "densefeat" not in config:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(source)
        model.max_seq_length = min(max_length or model.max_seq_length, model.max_seq_length)
        return Encoder(name, model, model.tokenizer, model.max_seq_length)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoDenseModel.from_pretrained(source).to(device).eval()
    tokenizer = model._default_tokenizer()
    limits = (max_length, model.max_length, tokenizer.model_max_length)
    return Encoder(name, model, tokenizer, min(limit for limit in limits if limit))


def _file(source: str, name: str, needed: bool = True) -> str | None:
    return cached_file(source, name, _raise_exceptions_for_missing_entries=needed)


def parse_tasks(arguments: Sequence[str], notes: datasets.Dataset) -> list[ProbeTask]:
    """`label:kind` for a column of the notes, `label:kind:table` for a table of its own."""
    tasks = []
    for argument in arguments:
        label, kind, table = (*argument.split(":", 2), "")[:3] if argument.count(":") else (argument, "", "")
        if kind not in PRIMARY:
            raise ValueError(
                f"Expected --task label:kind or label:kind:table, kind one of {list(PRIMARY)}, got {argument!r}."
            )
        if not table:
            tasks.append(ProbeTask(label, notes, label, kind))
            continue
        data = read_table(table)
        patient = next((name for name in ("patient_id", "subject_id") if name in data.column_names), None)
        tasks.append(ProbeTask(f"{Path(table).stem} {label}", data, label, kind, patient=patient))
    names = [task.name for task in tasks]
    # One column may be both predicted and clustered.
    return [
        task if names.count(task.name) == 1 else ProbeTask(f"{task.name} {task.kind}", *_rest(task)) for task in tasks
    ]


def _rest(task: ProbeTask) -> tuple:
    return task.dataset, task.label, task.kind, task.patient, task.text, task.split


def read_table(path: str) -> datasets.Dataset:
    """A parquet, csv or jsonl file."""
    kinds = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}
    if Path(path).suffix not in kinds:
        raise ValueError(f"Expected a table with a name ending in {', '.join(kinds)} but got {Path(path).name!r}.")
    return datasets.load_dataset(kinds[Path(path).suffix], data_files=path, split="train")


def truncated_share(encoder: Encoder, texts: Sequence[str]) -> float:
    """Share of the texts that are longer than what the encoder sees."""
    lengths = encoder.tokenizer(list(texts), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    return float(np.mean([len(ids) > encoder.max_length for ids in lengths]))


# ----------------------------------------------------------------------------------------------------- the verdict


def geometry_state(report: dict[str, float]) -> str:
    """collapsed, healthy or over-spread, from the centred geometry of the notes alone.

    * collapsed: the centred effective rank is below 3 % of what is attainable (or below 3), or less than 5 % of the
      squared length of the embeddings is variance about their mean;
    * over-spread: the centred effective rank is above 60 % of what is attainable;
    * healthy: between.
    """
    attainable = max(report["attainable_rank"], 1)
    rank = report["effective_rank_centered"]
    variance = report["total_variance_centered"] / report["total_variance"] if report["total_variance"] else 0.0
    if rank < max(3, COLLAPSED_RANK * attainable) or variance < COLLAPSED_VARIANCE:
        return "collapsed"
    return "over-spread" if rank > OVERSPREAD_RANK * attainable else "healthy"


def direction(difference: Estimate, metric: str) -> str:
    """better, worse or equal: an interval on one side of zero, or not."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    if difference.low <= 0 <= difference.high or not np.isfinite(difference.low):
        return "equal"
    return "better" if sign * difference.value > 0 else "worse"


def compare(ours: dict[str, ProbeResult], base: dict[str, ProbeResult]) -> dict[str, dict[str, Estimate]]:
    """Task to metric to the paired difference."""
    return {task: paired_difference(result, base[task]) for task, result in ours.items()}


def verdict(
    name: str, report: dict, differences: dict[str, dict[str, Estimate]] | None, results: dict, base: str
) -> dict:
    """One sentence: the state of the geometry, and better, equal or worse than the base.

    "better" and "worse" mean that at least one task's paired 95 % interval is on that side of zero and none on the
    other; "mixed" that both occur; "equal" that every interval holds zero, which is no proof of equality.
    """
    state = geometry_state(report)
    variance = report["total_variance_centered"] / report["total_variance"] if report["total_variance"] else 0.0
    text = (
        f"{name} is {state} on these notes (centred effective rank {report['effective_rank_centered']:.0f} of "
        f"{report['attainable_rank']:.0f} attainable; {variance:.0%} of the squared length is variance)"
    )
    if not differences:
        return {"state": state, "against_base": None, "sentence": text + "."}
    metrics = {task: PRIMARY[results[task].kind] for task in differences}
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
        f"{first}: {METRIC_NAMES[metric]} {found.value:+.3f}, 95 % interval {found.low:+.3f} to {found.high:+.3f})."
    )
    return {"state": state, "against_base": against, "sentence": text}


# ------------------------------------------------------------------------------------------------------- pictures


def _axes(width: float = 6.4, height: float = 4.2, columns: int = 1):
    figure, axes = plt.subplots(1, columns, figsize=(width, height), dpi=150, layout="constrained", squeeze=False)
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25, linewidth=0.6)
    return figure, axes[0]


def _style(i: int) -> dict:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)], "linewidth": 2}


def plot_spectrum(spectra: dict[str, np.ndarray], reports: dict[str, dict[str, float]]):
    """Share of the variance by eigenvalue number, log scale, and its cumulative sum; down to the floor."""
    figure, (left, right) = _axes(9.6, 4.4, 2)
    for i, (name, values) in enumerate(spectra.items()):
        share = values[: max(1, int(reports[name]["resolved_rank_centered"]))] / max(values.sum(), 1e-300)
        number = np.arange(1, len(share) + 1)
        left.plot(number, np.maximum(share, 1e-12), label=name, **_style(i))
        right.plot(number, np.cumsum(share), **_style(i))
    most = max(report["attainable_rank"] for report in reports.values())
    left.axhline(1 / max(most, 1), color="0.45", linewidth=1)
    place = {"textcoords": "offset points", "xytext": (0, 4), "ha": "right", "color": "0.35", "fontsize": 8}
    left.annotate("isotropic", (most, 1 / max(most, 1)), **place)
    left.set(yscale="log", xlabel="eigenvalue number", ylabel="share of the variance", title="Spectrum (centred)")
    right.set(ylim=(0, 1.02), xscale="log", xlabel="eigenvalues taken, largest first")
    right.set(ylabel="cumulative share of the variance", title="Cumulative variance")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def plot_angles(angles: dict[str, tuple[np.ndarray, np.ndarray]]):
    """Principal angles of adjacent windows, and those between random halves of one window."""
    figure, (axes,) = _axes()
    for i, (name, (found, floor)) in enumerate(angles.items()):
        number, colour = np.arange(1, len(found) + 1), COLOURS[i % len(COLOURS)]
        axes.plot(
            number, np.degrees(found), marker="o", markersize=4, label=f"{name}: earlier against later", **_style(i)
        )
        axes.plot(
            number,
            np.degrees(floor),
            color=colour,
            linewidth=1,
            marker="x",
            markersize=4,
            linestyle=":",
            label=f"{name}: noise floor",
        )
    axes.set(ylim=(0, 92), xlabel="principal direction pair, closest first", ylabel="angle (degrees)")
    axes.set_title("Subspaces of adjacent notes, halves of equal size")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_shots(results: dict[str, dict[str, ProbeResult]], tasks: Sequence[str]):
    """AUROC by the number of training rows of each class, with intervals; the last point is all rows."""
    figure, axes = _axes(max(4.8, 3.6 * len(tasks)), 3.9, len(tasks))
    for one, task in zip(axes, tasks, strict=True):
        for i, (name, found) in enumerate(results.items()):
            curve = found[task].shots
            ks = [*curve, 2 * max(curve)]
            points = [*curve.values(), found[task].metrics["auroc"]]
            # Side by side rather than on top of each other.
            x = np.array(ks) * 1.05 ** (i - (len(results) - 1) / 2)
            low, high = ([getattr(p, side) for p in points] for side in ("low", "high"))
            one.vlines(x, low, high, color=COLOURS[i % len(COLOURS)], alpha=0.6, linewidth=1.5)
            one.plot(x, [p.value for p in points], marker="o", markersize=4, label=name, **_style(i))
        one.axhline(0.5, color="0.45", linewidth=1)
        one.set_xscale("log", base=2)
        one.set_xticks(ks, [*map(str, ks[:-1]), "all"])
        one.set(xlabel="training rows of each class", ylabel="AUROC", title=task)
        one.minorticks_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def plot_projection(z: dict[str, np.ndarray], y: np.ndarray, classes: list, label: str, kind: str):
    """First two principal components of each encoder, coloured by one label."""
    figure, axes = _axes(max(4.8, 4.0 * len(z)), 4.2, len(z))
    markers = "osv^D<>"
    for one, (name, rows) in zip(axes, z.items(), strict=True):
        centred = rows - rows.mean(0)
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        x, share = u[:, :2] * s[:2], s**2 / (s**2).sum()
        if kind == "regression":
            points = one.scatter(*x.T, c=y, cmap="cividis", s=10, linewidths=0)
        else:
            counts = np.bincount(y, minlength=len(classes))
            shown = np.argsort(-counts, kind="stable")[: len(COLOURS) - 1]
            rest = ~np.isin(y, shown)
            one.scatter(*x[rest].T, color="0.75", s=8, linewidths=0, label="others" if rest.any() else None)
            for i, c in enumerate(sorted(shown)):
                text = str(classes[c]) if len(str(classes[c])) <= 32 else f"class {c + 1}"
                one.scatter(
                    *x[y == c].T, color=COLOURS[i], marker=markers[i], s=12, alpha=0.45, linewidths=0, label=text
                )
        one.set(
            title=name, xlabel=f"component 1 ({share[0]:.0%} of the variance)", ylabel=f"component 2 ({share[1]:.0%})"
        )
        one.grid(False)
    if kind == "regression":
        figure.colorbar(points, ax=axes[-1], label=label)
    else:
        axes[-1].legend(frameon=False, fontsize=8, title=label, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# ------------------------------------------------------------------------------------------------------- tables


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
            arrow = " ↓" if metric in LOWER_IS_BETTER else " ↑"
            lines.append([task, METRIC_NAMES[metric] + arrow, *cells, *gains])
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


# --------------------------------------------------------------------------------------------------------- the page

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
    verdicts: Sequence[str], tables: dict[str, list[list[str]]], pictures: dict[str, bytes], facts: str, method: str
) -> str:
    """The report as one HTML file without any outside reference."""
    parts = ['<!doctype html><html lang="en"><head><meta charset="utf-8">']
    parts.append('<meta name="viewport" content="width=device-width, initial-scale=1">')
    parts.append(f"<title>Encoder report</title><style>{STYLE}</style></head><body><h1>Encoder report</h1>")
    parts += [f'<p class="verdict">{html.escape(sentence)}</p>' for sentence in verdicts]
    parts.append(f'<p class="note">{html.escape(facts)} {html.escape(HOW_TO_READ)}</p>')
    parts += [f"<h2>{html.escape(title)}</h2>{_html_table(table)}" for title, table in tables.items()]
    parts.append("<h2>Pictures</h2>")
    for name, png in pictures.items():
        caption = html.escape(CAPTIONS[name.split("_")[0]])
        data = base64.b64encode(png).decode()
        parts.append(
            f'<figure><div class="wide"><img alt="{name}" src="data:image/png;base64,{data}"></div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    parts.append(f'<h2>Method</h2><p class="note">{html.escape(method)}</p></body></html>')
    return "".join(parts)


# ---------------------------------------------------------------------------------------------------------- the run


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (np.floating, float)):
        return float(value) if np.isfinite(value) else None
    return value


def _angles_with_floor(z: torch.Tensor, z_next: torch.Tensor, patients: torch.Tensor, k: int, seed: int):
    """Angles between patients' halves, earlier against later, and earlier against earlier: equal row counts.

    Halves are of patients, because a note is the later one of a pair and the earlier one of the next.
    Means over four draws.
    """
    generator = torch.Generator().manual_seed(seed)
    found: tuple[list, list] = ([], [])
    count = int(patients.max()) + 1
    for _ in range(4):
        first = torch.randperm(count, generator=generator)[: count // 2]
        half = torch.isin(patients, first)
        for angles, other in zip(found, (z_next, z), strict=True):
            angles.append(principal_angles(z[half], other[~half], k, center=True).numpy())
    return tuple(np.mean(angles, axis=0) for angles in found)


def run(arguments: argparse.Namespace) -> dict:
    """Encode, measure, write; returns what `report.json` holds."""
    notes = load_notes(arguments.notes)
    tasks = parse_tasks(arguments.task, notes)
    evaluator = (
        ProbeEvaluator(tasks, arguments.bootstraps, arguments.shots, cache=False, seed=arguments.seed)
        if tasks
        else None
    )
    pairs = adjacent_pairs(notes)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    texts = list(notes["text"])
    own = set(texts)
    others = sorted({t for rows in (evaluator.rows.values() if evaluator else ()) for t in rows.texts if t not in own})

    embeddings: dict[str, np.ndarray] = {}
    geometry, subspaces, per_patient, spectra, angles, results, seconds = {}, {}, {}, {}, {}, {}, {}
    for argument in arguments.model:
        encoder = load_encoder(argument, set(embeddings), arguments.max_length)
        start = time.perf_counter()
        options = (encoder.tokenizer, arguments.batch_size, encoder.max_length, not arguments.no_cache)
        key = encoder_key(encoder.model, encoder.tokenizer)
        # Apart, so that another task does not cost another pass over the notes.
        z = embed(encoder.model, texts, *options, key)
        if others:
            z = np.concatenate([z, embed(encoder.model, others, *options, key)])
        seconds[encoder.name] = time.perf_counter() - start
        name, rows = encoder.name, torch.from_numpy(z[: len(texts)])
        logger.info("%s: %d texts in %.0f s", name, len(z), seconds[name])
        embeddings[name] = z
        geometry[name] = geometry_report(rows, k=arguments.k, seed=arguments.seed)
        geometry[name]["truncated"] = truncated_share(encoder, texts)
        spectra[name] = spectrum(rows, center=True).numpy()
        if len(pairs) > 3:
            earlier, later = rows[pairs.earlier], rows[pairs.later]
            groups = torch.from_numpy(pairs.patient)
            subspaces[name] = geometry_report(earlier, later, arguments.k, groups, arguments.seed)
            codes = torch.from_numpy(np.unique(np.asarray(notes["patient_id"]), return_inverse=True)[1])
            per_patient[name] = patient_subspaces(rows, codes, arguments.k, seed=arguments.seed)
            if subspaces[name]["k"]:
                angles[name] = _angles_with_floor(earlier, later, groups, int(subspaces[name]["k"]), arguments.seed)
        if evaluator:
            results[name] = evaluator.evaluate(Lookup(texts + others, z))

    base, *compared = embeddings
    differences = {name: compare(results[name], results[base]) for name in compared} if evaluator else {}
    verdicts = {
        name: verdict(name, geometry[name], differences.get(name), results.get(name, {}), base) for name in embeddings
    }
    # The newest encoder first: that is what the reader asks about.
    sentences = [verdicts[name]["sentence"] for name in reversed(verdicts)]

    tables = {"Geometry": geometry_table(geometry)}
    if subspaces:
        tables["Subspaces of adjacent notes"] = subspace_table(subspaces, per_patient)
    if evaluator:
        tables["Probes"] = probe_table(results, differences)
        tables["Rows behind the probes"] = rows_table(results[base])
    pictures = {"spectrum": _png(plot_spectrum(spectra, geometry))}
    if angles:
        pictures["angles"] = _png(plot_angles(angles))
    curves = [task for task, found in results.get(base, {}).items() if found.shots]
    if curves:
        pictures["shots"] = _png(plot_shots(results, curves))
    if evaluator:
        task = tasks[0]
        rows = evaluator.rows[task.name]
        chosen = np.random.default_rng(arguments.seed).permutation(len(rows.y))[:2000]
        sets = {name: Lookup(texts + others, z).encode(rows.texts)[chosen] for name, z in embeddings.items()}
        pictures["projection"] = _png(plot_projection(sets, rows.y[chosen], rows.classes, task.label, task.kind))

    facts = f"{len(notes):,} notes of {pairs.patients:,} patients, {len(pairs):,} adjacent pairs."
    method = METHOD.format(bootstraps=f"{arguments.bootstraps:,}")
    text = "\n\n".join(
        [*sentences, facts, *(f"## {title}\n\n{markdown(table)}" for title, table in tables.items()), method.strip()]
    )
    report = {
        "verdicts": verdicts,
        "notes": {"notes": len(notes), "patients": pairs.patients, "pairs": len(pairs)},
        "geometry": geometry,
        "adjacent": subspaces,
        "per_patient": per_patient,
        "probes": {name: {task: _result(found) for task, found in tasks.items()} for name, tasks in results.items()},
        "differences": {
            name: {task: {m: asdict(e) for m, e in found.items()} for task, found in tasks.items()}
            for name, tasks in differences.items()
        },
        "encode_seconds": seconds,
        "settings": {
            "k": arguments.k,
            "bootstraps": arguments.bootstraps,
            "shots": list(arguments.shots),
            "seed": arguments.seed,
        },
    }
    (output / "report.md").write_text(text + "\n")
    (output / "report.json").write_text(json.dumps(_plain(report), indent=1) + "\n")
    (output / "report.html").write_text(render(sentences, tables, pictures, facts, method))
    for name, png in pictures.items():
        (output / f"{name}.png").write_bytes(png)
    print(text)
    return report


def _result(found: ProbeResult) -> dict:
    return {
        "kind": found.kind,
        "metrics": {name: asdict(estimate) for name, estimate in found.metrics.items()},
        "shots": {k: asdict(estimate) for k, estimate in found.shots.items()},
        "rows": found.rows,
        "strength": found.strength,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", action="append", required=True, help="PATH or NAME=PATH; the first is the base")
    found.add_argument("--notes", required=True, help="table of notes, see load_notes")
    found.add_argument("--task", action="append", default=[], help="label:kind or label:kind:table")
    found.add_argument("--output", default="probe_report", help="folder to write")
    found.add_argument("--k", type=int, default=20, help="subspace dimension")
    found.add_argument("--bootstraps", type=int, default=1000, help="redraws of the test patients")
    found.add_argument("--shots", type=int, nargs="*", default=SHOTS, help="few-shot sizes; none: --shots")
    found.add_argument("--batch_size", type=int, default=32)
    found.add_argument("--max_length", type=int, help="tokens of a note, default: what the encoder can see")
    found.add_argument("--no_cache", action="store_true", help="do not keep embeddings under HF_HOME/hf_densefeat")
    found.add_argument("--seed", type=int, default=0)
    return found


def main(argv: Sequence[str] | None = None) -> dict:
    """Read the command line and run."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("sentence_transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    return run(parser().parse_args(argv))


if __name__ == "__main__":
    main()
