"""The paper's tables beside the paper's own numbers, those behind them, and a verdict in sentences."""

import math

import numpy as np
from domains import Domain
from scipy.stats import spearmanr

from hf_densefeat.evaluation.metrics import Estimate
from hf_densefeat.reporting.comparison import direction
from hf_densefeat.reporting.formats import interval, markdown
from study.measures import PATIENT_K, Measures
from study.methods import ABLATION, BASELINES, METHODS
from study.results import CONDITION, DISTANCE, RANK, Results
from study.similarity import maps_of

# Effective rank, condition number, subspace distance, AUROC, ARI, RMSE
PAPER = {
    "supervised": (38.2, 214.7, 0.317, 0.781, 0.214, 0.642),
    "mlm": (51.6, 142.3, 0.284, 0.764, 0.238, 0.618),
    "infonce": (47.9, 168.4, 0.261, 0.792, 0.251, 0.604),
    "dense": (86.4, 61.2, 0.143, 0.824, 0.317, 0.559),
}
PAPER_ABLATION = {  # effective rank, AUROC
    "full": (86.4, 0.824),
    "full-spec": (52.1, 0.781),
    "full-sub": (63.7, 0.802),
    "mlm+dense-pair": (58.9, 0.794),
}


def paper(name: str, *columns: int) -> list[str]:
    """The paper's figures, where it has any."""
    return [f"{PAPER[name][column]:g}" if name in PAPER else "" for column in columns]


def table_1(results: Results) -> str:
    """Effective rank and condition number."""
    head = ["Method", "Effective rank, centred", "uncentred", "Condition number", "over median", "Mean cosine"]
    keys = ("geometry effective_rank", "geometry condition_over_median_centered", "geometry mean_cosine")
    rows = [[*head, "Paper: rank", "Paper: condition"]]
    for name in results.shown:
        plain, median, cosine = (results.array(name, key)[0] for key in keys)
        row = [results.titles[name], interval(results.estimate(name, RANK), digits=1), f"{plain:.1f}"]
        row += [interval(results.estimate(name, CONDITION), digits=0), f"{median:,.1f}", f"{cosine:.2f}"]
        rows.append([*row, *paper(name, 0, 1)])
    return markdown(rows)


def table_2(results: Results) -> str:
    """Subspace distance of the cohort and of each patient, with what sampling alone makes of them."""
    keys = [f"geometry subspace_{key}_normalized_centered" for key in ("distance_half", "noise_floor", "excess")]
    keys += ["geometry patient_distance", "geometry patient_noise_floor"]
    head = ["Method", "Subspace distance / 2k", "between halves", "floor of halves", "excess"]
    rows = [[*head, f"A patient's earlier and later half, k = {PATIENT_K}", "floor", "Paper"]]
    for name in results.shown:
        values = [results.array(name, key)[0] for key in keys]
        part = [f"{value:.3f}" if math.isfinite(value) else "–" for value in values]
        rows.append([results.titles[name], interval(results.estimate(name, DISTANCE)), *part, *paper(name, 2)])
    return markdown(rows)


def table_3(results: Results) -> str:
    """Probes: means over tasks of a kind, and differences to the best baseline."""
    summaries = {title: keys for title, keys in results.summaries.items() if keys}
    best = {title: results.best(keys, title == "RMSE") for title, keys in summaries.items()}
    head = ["Method"]
    for title in summaries:
        head += [title, f"− {results.titles[best[title]]}" if best[title] else "−"]
    rows = [[*head, "Paper: AUROC", "Paper: ARI", "Paper: RMSE"]]
    for name in results.shown:
        row = [results.titles[name]]
        for title, keys in summaries.items():
            other = best[title]
            difference = (
                interval(results.difference(name, other, keys), signed=True) if other and other != name else ""
            )
            row += [interval(results.estimate(name, keys)), difference]
        rows.append([*row, *paper(name, 3, 4, 5)])
    return markdown(rows)


def table_4(results: Results) -> str:
    """The ablation."""
    rows = [["Objective", "Effective rank", "Subspace distance", "AUROC", "Paper: rank", "Paper: AUROC"]]
    for name, title in ABLATION.items():
        if name in results.runs:
            row = [
                title,
                interval(results.estimate(name, RANK), digits=1),
                interval(results.estimate(name, DISTANCE)),
            ]
            row.append(interval(results.estimate(name, results.summaries["AUROC"])))
            rows.append([*row, *map("{:g}".format, PAPER_ABLATION[name])])
    return markdown(rows)


def table_5(results: Results, title: str, domain: Domain) -> str:
    """Similarity under one map: a column a task, best in bold; beyond or behind MLM on the same redraws by ↑ and ↓."""
    keys = [key for key in similarity_keys(results, title) if not key.startswith("validation ")]
    found = parts(results, domain, title)
    groups = {part: found[part] for part in ("content", "form")} if "form" in found else {"mean": keys}
    rows = [["Method", *(key.rsplit(",", 1)[0] for key in keys), *groups]]
    shown = [name for name in results.shown if results.has(name, keys[0])]
    best = {key: max(results.array(name, key)[0] for name in shown) for key in keys}
    for name in shown:
        cells = []
        for key in keys:
            value = results.array(name, key)[0]
            text = f"**{value:.3f}**" if value == best[key] else f"{value:.3f}"
            if "mlm" in results.runs and name != "mlm":
                found = results.difference(name, "mlm", key)
                text += " ↑" if found.low > 0 else " ↓" if found.high < 0 else ""
            cells.append(text)
        means = [results.array(name, part)[0] for part in groups.values()]
        rows.append([results.titles[name], *cells, *(f"{mean:.3f}" for mean in means)])
    return markdown(rows)


def table_short(results: Results, domain: Domain, reference: str | None = None) -> str:
    """Similarity as it is in short: means of content and form on test and on validation documents, and the effective rank.

    With a reference also the differences to it, on the same redraws. The name of a method is followed by its number of seeds.
    """
    groups = parts(results, domain, "as it is")
    compared = [title for title in groups if not title.endswith("validation")] if reference in results.runs else []
    head = ["Method", *groups, *(f"{title} − {results.titles[reference]}" for title in compared), "effective rank"]
    rows = []
    for name in results.shown:
        means = [results.array(name, keys)[0] for keys in groups.values()]
        found = [results.difference(name, reference, groups[title]) for title in compared]
        cells = [interval(each, signed=True) if name != reference else "" for each in found]
        row = [f"{results.titles[name]} ({len(results.runs[name])})", *(f"{mean:.3f}" for mean in means), *cells]
        rows.append((means[0], [*row, f"{results.array(name, RANK)[0]:.0f}"]))
    return markdown([head, *(row for _, row in sorted(rows, key=lambda pair: -pair[0]))])


def parts(results: Results, domain: Domain, title: str) -> dict[str, list[str]]:
    """The keys of content and form under one map, on test and validation documents; parts without a task are left out."""
    found: dict[str, list[str]] = {"content": [], "form": [], "content, validation": [], "form, validation": []}
    for key in similarity_keys(results, title):
        task = key.split(":")[0]
        part = "form" if task.removeprefix("validation ") in domain.form else "content"
        found[part + ", validation" * task.startswith("validation ")].append(key)
    return {title: keys for title, keys in found.items() if keys}


def similarity_keys(results: Results, title: str) -> list[str]:
    """`task: metric, map` of the plain metrics under one map."""
    keys = dict.fromkeys(key for name in results.shown for key in results.runs[name][0])
    plain = [key for key in keys if key.endswith(f", {title}")]
    return [key for key in plain if not any(code in key for code in ("_binary", "_int8", "_d_over_"))]


def table_codes(results: Results) -> str:
    """Search with fewer bits and fewer dimensions, as it is."""
    plain = [
        key for key in similarity_keys(results, "as it is") if ": mrr" in key and not key.startswith("validation ")
    ]
    names = {"float": "", "int8": "_int8", "binary": "_binary", "d/4": "_d_over_4"}
    rows = [["Method", *(f"{key.split(':')[0]}, {name}" for key in plain[:2] for name in names)]]
    for name in results.shown:
        cells = [
            results.array(name, key.replace("mrr", f"mrr{code}"))[0] for key in plain[:2] for code in names.values()
        ]
        rows.append([results.titles[name], *(f"{cell:.3f}" for cell in cells)])
    return markdown(rows)


def table_maps(results: Results, domain: Domain, reference: str) -> str:
    """Means over the content and the form tasks by every map, what was chosen, and the reference's views less those of each.

    The difference is on the same redraws. A word of the content view's choice: layers, pairs, centring, epsilon.
    """
    found = {title: parts(results, domain, title) for title in maps_of(domain)}
    groups = {
        f"{part}, {title}": found[title][part]
        for title in found
        for part in ("content", "form")
        if part in found[title]
    }
    views = [
        key for key in ("content, content view", "form, form view") if key in groups and reference in results.runs
    ]
    rows = [["Method", *groups, *(f"{results.titles[reference]} − this, {key}" for key in views), "content view"]]
    for name in results.shown:
        cells = [
            f"{results.array(name, keys)[0]:.3f}" if results.has(name, keys[0]) else "" for keys in groups.values()
        ]
        for key in views:
            other = results.difference(reference, name, groups[key])
            cells.append("" if name == reference else interval(other, signed=True))
        chosen = dict.fromkeys(str(run["view"][0]) for run in results.runs[name] if "view" in run)
        rows.append([f"{results.titles[name]} ({len(results.runs[name])})", *cells, "; ".join(chosen)])
    return markdown(rows)


def verdict_similarity(results: Results, ours: str, domain: Domain) -> list[str]:
    """Where the default is beyond MLM and beyond every peer on the same redraws, and where behind, in sentences."""
    if ours not in results.runs or "mlm" not in results.runs:
        return []
    lines, own = [], {"content view": "content", "form view": "form"}
    for title in maps_of(domain):
        for part, chosen in parts(results, domain, title).items():
            if part.endswith("validation") or own.get(title, part) != part:
                continue
            difference = interval(results.difference(ours, "mlm", chosen), signed=True)
            peers = [
                name for name in (*BASELINES, "mlm+infonce") if name in results.runs and name not in ("mlm", "start")
            ]
            best = max(peers, key=lambda name: results.array(name, chosen)[0], default=None)
            text = f"{part.capitalize()}, {title}: {results.titles[ours]} − MLM {difference}, mean over {len(chosen)} tasks"
            if best:
                against = interval(results.difference(ours, best, chosen), signed=True)
                text += f"; − the best peer, {results.titles[best]}, {against}"
            lines.append(text + ".")
    return lines


def table_tasks(results: Results) -> str:
    """Every task by itself."""
    keys = [key for keys in results.summaries.values() for key in keys]
    rows = [[results.titles[name], *(interval(results.estimate(name, key)) for key in keys)] for name in results.shown]
    return markdown([["Method", *keys], *rows])


def table_robust(results: Results, measures: Measures) -> str:
    """Few labels, missing parts, and shift."""
    run = results.runs[results.shown[0]][0]
    few = [key for key in run if key.endswith(" shots")]
    keys = [key for key in run if key.startswith("missing ")]
    keys += [f"{task.name} auroc" for task in measures.domain.shift]
    rows = [["Method", *few, *keys]]
    for name in results.shown:
        means = [np.mean([run[key] for run in results.runs[name]], axis=0) for key in few]
        cells = [Estimate(*mean) for mean in means] + [results.estimate(name, key) for key in keys]
        rows.append([results.titles[name], *map(interval, cells)])
    return markdown(rows)


def table_rank(results: Results) -> str:
    """Spearman's correlation of effective rank with each probe, over the encoders of the study."""
    names = [name for name in results.shown if METHODS[name].encoder]
    if len(names) < 5:
        return f"{len(names)} encoders are too few to tell."
    run = results.runs[names[0]][0]
    found = {title: keys for title, keys in results.summaries.items() if keys}
    found |= {key: [key] for key in run if key.endswith(" shots") or key.startswith("missing ")}
    ranks = [results.array(name, RANK)[0] for name in names]
    rows = [["", *found], [f"over {len(names)} encoders"]]
    for keys in found.values():
        values = [np.mean([[each[key][0] for key in keys] for each in results.runs[name]]) for name in names]
        rows[1].append(f"{spearmanr(ranks, values).statistic:+.2f}")
    return markdown(rows)


def table_rows(measures: Measures) -> str:
    """What the probes are on."""
    rows = [["Task", "Kind", "Train", "Validation", "Test", "Test patients", "Share of classes, test"]]
    for task in [*measures.domain.tasks, *measures.domain.shift]:
        found, everything = measures.evaluator.rows[task.name], task.kind == "clustering"
        test = (found.split == 2) | everything
        counts = ["", ""] if everything else [str(int((found.split == code).sum())) for code in (0, 1)]
        shares = [f"{np.mean(found.y[test] == code):.2f}" for code in range(len(found.classes))]
        people = len(np.unique(found.patient[test]))
        rows.append([task.name, task.kind, *counts, str(int(test.sum())), str(people), ", ".join(shares)])
    return markdown(rows)


def table_sweep(results: Results) -> str:
    """One row a setting, with the difference in AUROC to the default."""
    areas, others = results.summaries["AUROC"], [key for key in ("ARI", "RMSE") if results.summaries[key]]
    rows = [
        ["Setting", "Effective rank", "Subspace distance", "AUROC", "− default", *others, "16 shots", "60% missing"]
    ]
    for name in results.shown:
        row = [
            results.titles[name],
            interval(results.estimate(name, RANK), digits=1),
            interval(results.estimate(name, DISTANCE)),
        ]
        row += [
            interval(results.estimate(name, areas)),
            interval(results.difference(name, "mlm+dense", areas), signed=True),
        ]
        row += [interval(results.estimate(name, results.summaries[key])) for key in others]
        rows.append([*row, *(f"{results.array(name, key)[0]:.3f}" for key in ("16 shots", "missing 60%"))])
    return markdown(rows)


def verdict(results: Results) -> list[str]:
    """Whether the default reaches what the paper claims, in sentences."""
    name, lines = "mlm+dense", []
    if name not in results.runs or not any(other in results.runs for other in BASELINES):
        return lines
    for key, low, title, target in (
        (RANK, False, "Effective rank", "at least 1.6"),
        (DISTANCE, True, "Subspace distance", "at most 0.55"),
    ):
        other = results.best(key, low, trained=True)
        if other:
            ratio = results.array(name, key)[0] / max(results.array(other, key)[0], 1e-12)
            best = f"the best trained baseline, {results.titles[other]}"
            lines.append(f"{title}: {ratio:.2f} × that of {best} (paper: {target}).")
    tasks: dict[str, list[str]] = {"better than": [], "within the interval of": [], "worse than": []}
    words = {"better": "better than", "worse": "worse than", "equal": "within the interval of"}
    for title, keys in results.summaries.items():
        for key in keys:
            other = results.best(key, title == "RMSE")
            found = results.difference(name, other, key)
            tasks[words[direction(found, title.lower())]].append(
                f"{key} ({interval(found, signed=True)} against {results.titles[other]})"
            )
    for where, found in tasks.items():
        lines.append(
            f"Tasks {where} the best baseline of each: {len(found)}{': ' if found else ''}{'; '.join(found)}."
        )
    return lines
