"""The report of `densefeat probe`: page, Markdown, JSON and pictures of what was found."""

import datetime
import importlib.metadata
import json
import textwrap
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from hf_densefeat.commands.examine import Found, Reading
from hf_densefeat.data.notes import copied
from hf_densefeat.evaluation.probes import ProbeResult, meds_predictions
from hf_densefeat.evaluation.words import NAME as WORDS
from hf_densefeat.reporting.comparison import plain_numbers, verdict
from hf_densefeat.reporting.page import METHOD, render, render_markdown, report_sections
from hf_densefeat.reporting.plots import Picture, plot_projection
from hf_densefeat.reporting.tables import before_after_table, rows_table, terminal


def draw_projection(found: dict[str, Found], reading: Reading, output: Path) -> Picture | None:
    """The first probe's rows in the plane."""
    if reading.probes is None:
        return None
    task = reading.probes.tasks[0]
    rows = reading.probes.rows[task.name]
    some = np.random.default_rng(reading.settings.seed).permutation(len(rows.y))[:2000]
    sets = {name: one.known.encode(rows.texts)[some] for name, one in found.items()}
    return plot_projection(sets, rows.y[some], rows.classes, label=task.label, path=output / "projection.png")


def plain(found: ProbeResult) -> dict:
    """A probe's numbers, without the replicates."""
    metrics, shots = ({key: asdict(one) for key, one in part.items()} for part in (found.metrics, found.shots))
    return {"kind": found.kind, "metrics": metrics, "shots": shots, "rows": found.rows, "strength": found.strength}


def write_report(found: dict[str, Found], reading: Reading) -> dict:
    """Page, Markdown, JSON and pictures; returns what the JSON holds."""
    settings, base = reading.settings, next(iter(found.values()))
    output, measured = Path(settings.output), [one.measured for one in found.values()]
    place = 0 if reading.first is reading.of_words else 1  # words come first where they are what is compared with
    measured[place:place] = reading.beside()
    others = [one for one in measured[1:] if one["name"] != WORDS] or measured
    # The newest encoder first: that is what the reader asks about.
    verdicts = {one["name"]: verdict(one, measured[0] if measured[1:] else None) for one in reversed(others)}
    angles = {name: one.angles for name, one in found.items() if one.angles is not None}
    sections = report_sections(
        measured,
        output,
        adjacent={name: one.adjacent for name, one in found.items()} if base.adjacent else None,
        per_patient={name: one.per_patient for name, one in found.items()} if base.per_patient else None,
        angles=angles,
        shots=few_shot_curves(found),
        projection=draw_projection(found, reading, output),
        rows=rows_table(base.results.similarity) + rows_table(base.results.probes)[1:],
    )
    counts = {"notes": len(reading.notes), "notes_left_out": reading.left_out}
    counts |= {"patients": reading.pairs.num_patients, "pairs": len(reading.pairs), "copied": copied(reading.notes)}
    how = {
        "facts": facts_of(found, counts, reading),
        "method": METHOD.format(bootstraps=f"{settings.bootstraps:,}"),
    }
    report = {
        "verdicts": {name: asdict(one) | {"sentence": one.sentence} for name, one in verdicts.items()},
        "notes": counts,
        "measured": measured,
        "adjacent": {name: one.adjacent for name, one in found.items()},
        "per_patient": {name: one.per_patient for name, one in found.items()},
        "probes": {name: {task: plain(r) for task, r in one.results.probes.items()} for name, one in found.items()},
        "encode_seconds": {name: one.seconds for name, one in found.items()},
        "settings": {name: getattr(settings, name) for name in ("k", "bootstraps", "seed")}
        | {"shots": reading.probes.shots if reading.probes else []},
    }
    text = render_markdown(list(verdicts.values()), sections, **how)
    (output / "report.md").write_text(text)
    (output / "report.json").write_text(json.dumps(plain_numbers(report), indent=1) + "\n")
    (output / "report.html").write_text(render(list(verdicts.values()), sections, **how))
    return report


def facts_of(found: dict[str, Found], counts: dict[str, int], reading: Reading) -> str:
    """When, with what, on what and with which options, in a paragraph."""
    encoders = []
    for name, one in found.items():
        length, cut = one.max_length, one.measured["geometry"].get("truncated", 0.0)
        seen = f"{length:,} tokens, which cut {cut:.1%} of the notes" if length else "vectors as given"
        encoders.append(f"{name}: {one.known.width} dimensions, {seen}")
    encoders += [reading.fitted] if reading.fitted else []
    left_out = (
        f" (whole patients drawn at random; {reading.left_out:,} notes are left out)" if reading.left_out else ""
    )
    whose = " of patients that no model was trained on" if reading.record else ""
    copies = (
        f"{counts['copied']:,} of the notes have a text that the same patient has at another time, white space aside: "
        "they lift what finds a patient's own notes, and --drop_copies leaves them out. "
    )
    return (
        f"{datetime.date.today().isoformat()}, hf_densefeat {importlib.metadata.version('hf_densefeat')}. "
        f"{counts['notes']:,} notes of {counts['patients']:,} patients{left_out}, {counts['pairs']:,} adjacent pairs{whose}. "
        f"{copies if counts['copied'] else ''}{'; '.join(encoders)}. "
        f"Subspaces of {reading.k} dimensions, seed {reading.settings.seed}. {different_lengths(found)}"
    )


def different_lengths(found: dict[str, Found]) -> str:
    """What to know where the models do not see the same of a note; nothing where they do."""
    seen = [one for one in found.values() if one.max_length]
    limits = [one.max_length for one in seen if one.measured["geometry"]["truncated"] and one.max_length]
    if len({one.max_length for one in seen}) < 2 or not limits:
        return ""
    return f"The models do not see the same of a note: --max_length {min(limits)} makes them comparable."


def show(report: dict, found: dict[str, Found], output: str) -> None:
    """Print the table, the verdicts, what to know beside them, and where the report is."""
    verdicts = ("\n" + textwrap.fill(one["sentence"], 80) for one in report["verdicts"].values())
    print(terminal(before_after_table(report["measured"])), *verdicts, sep="\n")
    if different_lengths(found):
        print(f"\n{different_lengths(found)}")
    for task, one in next(iter(report["probes"].values()), {}).items():
        untrained = one["rows"].get("classes_without_training_rows")
        if untrained:
            print(f"\n{task}: {untrained} classes of the test rows have no training row, and an AUROC of .500 each.")
    print(f"\nWritten to {output}: report.html, one file that can be sent, report.md and report.json.")


def few_shot_curves(found: dict[str, Found]) -> dict:
    """Task to encoder to number of rows of a class to `Estimate`, the last for all rows."""
    curves: dict[str, dict] = {}
    for name, encoder in found.items():
        for task, one in encoder.results.probes.items():
            if one.shots:
                curves.setdefault(task, {})[name] = one.shots | {"all": one.metrics["auroc"]}
    return curves


def write_predictions(output: str, reading: Reading, found: dict[str, Found]) -> None:
    """One parquet file an encoder and binary task, readable by the user alone: unlike the report, they hold patient ids."""
    for name, one in found.items():
        for task in reading.probes.tasks if reading.probes else ():
            if task.kind == "binary":
                path = Path(output) / f"{name} {task.name}.parquet"
                path.touch(mode=0o600)
                pq.write_table(meds_predictions(task, one.results.probes[task.name]), path)
