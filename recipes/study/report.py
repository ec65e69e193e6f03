"""What is printed and written: the report, the numbers, the plots."""

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from benchmarks.timing import machine
from domains import Domain

from study.directions import table_variance
from study.methods import METHODS, Method
from study.plots import plot_missing, plot_pareto, plot_trade
from study.results import Results
from study.runs import Study
from study.similarity import maps_of
from study.tables import (
    parts,
    table_1,
    table_2,
    table_3,
    table_4,
    table_5,
    table_codes,
    table_maps,
    table_rank,
    table_robust,
    table_rows,
    table_short,
    table_sweep,
    table_tasks,
    verdict,
    verdict_similarity,
)


def report(study: Study, results: Results, methods: dict[str, Method], arguments: argparse.Namespace) -> dict:
    """Tables that were asked for; with all of them the plots. Returns what the JSON holds."""
    domain, whole = study.domain, arguments.table == "all"
    tables = {
        "1": ("Table 1. Effective rank and condition number", lambda: table_1(results)),
        "2": ("Table 2. Subspace distance between adjacent windows", lambda: table_2(results)),
        "3": ("Table 3. Linear probes on frozen embeddings", lambda: table_3(results)),
        "4": ("Table 4. Ablation", lambda: table_4(results)),
        "tasks": ("Every probe", lambda: table_tasks(results)),
        "robust": ("Few labels, missing parts, shift", lambda: table_robust(results, study.measures)),
        "rank": ("Effective rank and probes: Spearman's correlation", lambda: table_rank(results)),
        "rows": ("Rows behind the probes", lambda: table_rows(study.measures)),
    }
    if not domain.tasks:
        tables = {name: tables[name] for name in ("1", "2")}
    if domain.similarity:
        tables |= {
            "short": ("In short", lambda: table_short(results, domain, arguments.reference)),
            "maps": ("By every map", lambda: table_maps(results, domain, arguments.reference)),
            "5": ("Table 5. Similarity, cosine as it is", lambda: table_5(results, "as it is", domain)),
            **{
                title: (f"Table 5, {title}", partial(table_5, results, title, domain)) for title in maps_of(domain)[1:]
            },
            "codes": ("Fewer bits, fewer dimensions", lambda: table_codes(results)),
            "variance": ("What the variance is of", lambda: table_variance(study, methods)),
        }
    asked = tables.values() if whole else [tables[arguments.table]]
    head = conditions(study, results, arguments)
    if domain.tasks:
        head += f" The supervised encoder has seen the training patients' labels of {domain.supervised_task}."
    sentences = verdict(results) if domain.tasks else []
    if domain.similarity:
        sentences = [*verdict_similarity(results, arguments.reference, domain), *sentences]
    text = "\n\n".join([head, *sentences, *(f"## {title}\n\n{table()}" for title, table in asked)])
    numbers = numbers_of(study, results, arguments)
    stem = write(arguments.output, domain.name + ("" if whole else f"-table-{arguments.table}"), text, numbers)
    if whole and domain.tasks:
        points = {name: (results.titles[name], *results.point(name)) for name in results.shown}
        plot_pareto(points, f"{stem}-pareto.png")
        plot_missing(results, domain.primary, f"{stem}-missing.png")
    elif whole:
        plot_trade(trade(results, domain), f"{stem}.png")
    return numbers


def report_sweep(study: Study, results: Results, arguments: argparse.Namespace) -> dict:
    """One row and one point a setting. Returns what the JSON holds."""
    domain = study.domain
    table = table_sweep(results) if domain.tasks else table_short(results, domain, arguments.reference)
    numbers = numbers_of(study, results, arguments)
    stem = write(
        arguments.output, f"{domain.name}-sweep", f"{conditions(study, results, arguments)}\n\n{table}", numbers
    )
    if domain.tasks:
        plot_pareto({name: (results.titles[name], *results.point(name)) for name in results.shown}, f"{stem}.png")
    else:
        plot_trade(trade(results, domain), f"{stem}.png")
    return numbers


def trade(results: Results, domain: Domain) -> dict[str, tuple[str, list[tuple[float, float]]]]:
    """Method → title and (content, form) as it is, and where there are views by the content and the form view."""
    shown = [title for title in maps_of(domain) if title in ("as it is", "content view", "form view")]
    places = [[parts(results, domain, title)[part] for part in ("content", "form")] for title in shown]
    return {
        name: (results.titles[name], [tuple(results.array(name, keys)[0] for keys in both) for both in places])
        for name in results.shown
    }


def conditions(study: Study, results: Results, arguments: argparse.Namespace) -> str:
    """Data, steps, seeds, and what they took on which machine."""
    took = [name for name in results.runs if name not in METHODS or not METHODS[name].after]
    seconds = sum(run["seconds"] for name in took for run in results.runs[name])
    start = f"{study.warm_up} steps of MLM" if study.warm_up else "the same weights"
    here = machine()
    return (
        f"{study.domain.facts} {study.steps} steps of {study.domain.training['per_device_train_batch_size']} pairs for "
        f"every method, seeds: {arguments.seeds}, start: {start}. Training and encoding took {seconds / 60:.0f} minutes, "
        f"report written on {here['processor']}, threads: {here['threads']}, torch {here['versions']['torch']}."
    )


def numbers_of(study: Study, results: Results, arguments: argparse.Namespace) -> dict:
    """Every number of every method, with its interval, and under which conditions."""
    return {
        "facts": study.domain.facts,
        "steps": study.steps,
        "warm_up": study.warm_up,
        "seeds": arguments.seeds,
        "machine": machine(),
        "seconds": {name: float(np.mean([run["seconds"] for run in runs])) for name, runs in results.runs.items()},
        "methods": {
            name: {
                key: asdict(results.estimate(name, key))
                for key in runs[0]
                if key not in ("seconds", "view") and " shots" not in key
            }
            for name, runs in results.runs.items()
        },
    }


def write(folder: str, name: str, text: str, numbers: dict) -> Path:
    """Print, and write as Markdown and JSON; returns the path without an ending."""
    print("\n" + text)
    stem = Path(folder) / name
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.md").write_text(text + "\n")
    Path(f"{stem}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return stem
