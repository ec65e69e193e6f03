"""What was measured of encoders, compared: better, worse or no visible difference, and one sentence of advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np

from hf_densefeat.evaluation.geometry import State, geometry_state, variance_share
from hf_densefeat.evaluation.metrics import METRICS, METRICS_OF, WITH_WORDS, Estimate, metric_named, paired_difference
from hf_densefeat.evaluation.probes import ProbeResult
from hf_densefeat.evaluation.similarity import SimilarityResult
from hf_densefeat.evaluation.similarity_kinds import SIMILARITY
from hf_densefeat.reporting.formats import interval

Triple = Sequence[float | None]  # value, low, high; None where there is none


class Measured(TypedDict, total=False):
    """What was measured of one encoder, as plain numbers, on the same notes as of those beside it in a list.

    Attributes:
        name: in tables and pictures; no path.
        view: of an encoder with views, which of them this is.
        geometry: `geometry_report` of the notes, or some of it.
        spectrum: eigenvalues of their centred covariance, largest first.
        similarity: "task metric" to value, low, high.
        probes: the same of probes.
        differences: "task metric" to this encoder's value minus that of the first in the list, paired, with interval.
        against_words: the same minus the value of words (TF-IDF) where these are measured too; of "task mrr_with_words",
            the ranking fused with that by words, minus words alone.
    """

    name: str
    view: str
    geometry: dict[str, float]
    spectrum: list[float]
    similarity: dict[str, Triple]
    probes: dict[str, Triple]
    differences: dict[str, Triple]
    against_words: dict[str, Triple]


Results = Mapping[str, SimilarityResult] | Mapping[str, ProbeResult]
Both = tuple[Mapping[str, SimilarityResult], Mapping[str, ProbeResult]]  # of similarity and of probes, task to result


def measured_of(
    name: str,
    geometry: dict[str, float],
    spectrum: Any,
    results: Both,
    *,
    base: Both | None = None,
    words: Both | None = None,
) -> Measured:
    """What was measured of one encoder as plain numbers, in the one form that tables, cards and pages read.

    Args:
        name: in tables and pictures; no path.
        geometry: of `geometry_report`; empty for words.
        spectrum: eigenvalues (m,), largest first.
        results: of similarity and of probes, either may be empty.
        base: the same of the encoder that this one is compared with; None for that encoder itself.
        words: the same of words, where they are measured beside it.
    """

    def against(other: Both | None) -> dict[str, Triple]:
        return {} if other is None else _triples(results[0], other[0]) | _triples(results[1], other[1])

    return {
        "name": name,
        "geometry": geometry,
        "spectrum": [float(value) for value in spectrum],
        "similarity": _triples(results[0]),
        "probes": _triples(results[1]),
        "differences": against(base),
        "against_words": against(words),
    }


def _triples(results: Results, base: Results | None = None) -> dict[str, Triple]:
    """Results by task as "task metric" to value, low, high; with a base, paired differences to its results."""
    found: dict[str, Triple] = {}
    for task, result in results.items():
        estimates = result.metrics if base is None else paired_difference(result, base[task])
        found |= {f"{task} {metric}": [e.value, e.low, e.high] for metric, e in estimates.items()}
    return found


def judged(measured: Sequence[Measured]) -> Measured:
    """What is compared with the first encoder of a list: the last one, or its views, in each row the one that gains more.

    Geometry is that of the first view. An encoder has views where `view` names them.
    """
    views = [one for one in measured if "view" in one] or [measured[-1]]
    merged: Any = {**views[0], "name": " or ".join(one["name"] for one in views)}
    for key in views[0].get("differences", {}):
        sign = 1 if metric_named(key.rsplit(" ", 1)[1]).higher_is_better else -1
        gains = [sign * (one["differences"][key][0] or 0.0) for one in views]
        best = views[gains.index(max(gains))]
        for part in ("similarity", "probes", "differences", "against_words"):
            if key in merged.get(part, {}):
                merged[part] = {**merged[part], key: best[part][key]}
    return merged


def plain_numbers(value: Any) -> Any:
    """For JSON: nested dicts and lists with Python's floats, None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): plain_numbers(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain_numbers(inner) for inner in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def estimate_of(triple: Triple) -> Estimate:
    """A triple as `Estimate`."""
    return Estimate(*(np.nan if value is None else value for value in triple))


# ---- Rows of a comparison -------------------------------------------------------------------------------------------

Direction = Literal["better", "worse", "equal"]
WORDS: dict[Direction, str] = {"better": "better", "worse": "worse", "equal": "no visible difference"}
ARROWS: dict[Direction, str] = {"better": "↑", "worse": "↓", "equal": "·"}
GROUPS = {"similarity": "similarity", "probes": "linear probes", "clusterings": "k-means"}


def headlines(group: str) -> set[str]:
    """The metrics of a group by which verdicts count, one a task: the first of each kind."""
    kinds = {
        "similarity": [kind.metrics for kind in SIMILARITY.values()],
        "clusterings": [METRICS_OF["clustering"]],
        "probes": [metrics for kind, metrics in METRICS_OF.items() if kind != "clustering"],
    }
    return {metrics[0] for metrics in kinds[group]}


def direction(difference: Estimate, metric: str) -> Direction:
    """Better or worse: a 95 % interval on that side of zero. Equal: it holds zero, which is no proof, or is unknown."""
    sign = 1 if metric_named(metric).higher_is_better else -1
    if difference.low <= 0 <= difference.high or not np.isfinite(difference.low):
        return "equal"
    return "better" if sign * difference.value > 0 else "worse"


@dataclass(frozen=True)
class Comparison:
    """One metric of one task: the encoders' values, and their differences to the first.

    Attributes:
        group: a key of `GROUPS`.
        task: name of the task.
        metric: name of the metric, a variant such as ``mrr_binary`` too.
        values: encoder to `Estimate`.
        differences: encoder to `Estimate` of it minus the first, where it is known.
        against_words: encoder to `Estimate` of it minus words, where they were measured.
    """

    group: str
    task: str
    metric: str
    values: dict[str, Estimate]
    differences: dict[str, Estimate]
    against_words: dict[str, Estimate]

    @property
    def headline(self) -> bool:
        """Whether verdicts count it."""
        return self.metric in headlines(self.group)

    @property
    def fused(self) -> bool:
        """Whether it is a headline metric of the ranking that is fused with words."""
        return self.metric.endswith(WITH_WORDS) and self.metric.removesuffix(WITH_WORDS) in headlines(self.group)

    @property
    def title(self) -> str:
        """Task and metric, and which way is better where that is down."""
        entry = metric_named(self.metric)
        return f"{self.task}: {entry.title}{'' if entry.higher_is_better else ' (lower is better)'}"

    def direction(self, name: str) -> Direction:
        """Whether that encoder is better than the first."""
        return direction(self.differences.get(name, Estimate(np.nan)), self.metric)

    def gain(self, name: str) -> float:
        """Its difference relative to the first encoder's value, above 0 where it is better."""
        # relative, so that gains of metrics with other units can be put in one order
        base = abs(next(iter(self.values.values())).value)
        sign = 1 if metric_named(self.metric).higher_is_better else -1
        return sign * self.differences[name].value / max(base, 1e-9)

    def quoted(self, difference: Estimate) -> str:
        """Metric, task and difference, for a sentence."""
        metric = self.title.removeprefix(f"{self.task}: ")
        return f"{metric} of {self.task} {interval(difference, signed=True)}"


def comparisons(measured: Sequence[Measured], *, variants: bool = False) -> list[Comparison]:
    """Similarity first, then linear probes, then k-means; every metric of the last encoder, of the others where it is known.

    Args:
        measured: encoders; the first is what the others are compared with.
        variants: also the metrics of codes, fewer dimensions and rankings fused with words (``mrr_binary``,
            ``mrr_d_over_4``, ``mrr_with_words``).
    """
    found = []
    parts: tuple[Literal["similarity", "probes"], ...] = ("similarity", "probes")
    for part in parts:
        sides = {one["name"]: _part(one, part) for one in measured}
        gaps = {one["name"]: _part(one, "differences") for one in measured[1:]}
        beside = {one["name"]: _part(one, "against_words") for one in measured}
        for key in sides[measured[-1]["name"]]:
            task, metric = key.rsplit(" ", 1)
            # a variant is named by its metric and what was done to the embeddings: mrr_binary
            if not variants and metric not in METRICS:
                continue
            values, differences, against = (
                {name: estimate_of(side[key]) for name, side in one.items() if key in side}
                for one in (sides, gaps, beside)
            )
            # k-means over all rows is no held-out probe, and is counted apart from them
            group = "clusterings" if part == "probes" and metric in METRICS_OF["clustering"] else part
            found.append(Comparison(group, task, metric, values, differences, against))
    return sorted(found, key=lambda one: list(GROUPS).index(one.group))


def _part(one: Measured, name: Literal["similarity", "probes", "differences", "against_words"]) -> dict[str, Triple]:
    return one.get(name, {})


# ---- The verdict ----------------------------------------------------------------------------------------------------

ADVICE: dict[State, str] = {
    "collapsed": "its cosines are hard to tell apart: subtract the mean (a dense head) before comparing by cosine",
    "healthy": "nothing in its spectrum speaks against using it as it is",
    "over-spread": "its spectrum is close to noise: trust the uses that were measured alone",
}


@dataclass(frozen=True)
class Verdict:
    """What a reader should do, and why.

    Attributes:
        state: of the geometry.
        against: "better", "worse", "mixed" or "equal", over all headline metrics; None without a base.
        counts: group to the numbers of better, equal and worse headline metrics.
        advice: one sentence.
        evidence: what it rests on.
    """

    state: State
    against: str | None
    counts: dict[str, dict[Direction, int]]
    advice: str
    evidence: str

    @property
    def sentence(self) -> str:
        """Advice and evidence."""
        return f"{self.advice} {self.evidence}"


def verdict(ours: Measured, base: Measured | None = None) -> Verdict:
    """Whether to take an encoder rather than the base, by the headline metric of every task.

    Similarity, linear probes and k-means are counted apart. "better" means that at least one paired 95 % interval is on
    that side of zero and none on the other; "mixed" that both occur; "equal" that every interval holds zero, which is no
    proof of equality.

    Args:
        ours: the encoder, with its differences to the base.
        base: the first encoder of the list; None where there is but one.
    """
    report, name = ours["geometry"], ours["name"]
    state = geometry_state(report)
    shape = f"{name} is {state} on these notes"
    numbers = (
        f"centred effective rank {report['effective_rank_centered']:.0f} of {report['attainable_rank']:.0f} attainable; "
        f"{variance_share(report):.0%} of the squared length is variance"
    )
    rows = [] if base is None else [row for row in comparisons([base, ours]) if row.headline and row.differences]
    if base is None or not rows:
        evidence = f"{numbers[0].upper()}{numbers[1:]}.{_beside_words(ours)}"
        return Verdict(state, None, {}, f"{shape}: {ADVICE[state]}.", evidence)
    counts: dict[str, dict[Direction, int]] = {}
    for row in rows:
        group = counts.setdefault(row.group, {"better": 0, "equal": 0, "worse": 0})
        group[row.direction(name)] += 1
    better, worse = (sum(one[word] for one in counts.values()) for word in ("better", "worse"))
    # one visible loss is enough to say so, whatever the number of gains
    against = ("mixed" if worse else "better") if better else ("worse" if worse else "equal")
    evidence = "; ".join(f"{GROUPS[group]}: {_counted(one)}" for group, one in counts.items())
    advice = f"{_advice(name, base['name'], against, counts)}."
    evidence = f"{evidence[0].upper()}{evidence[1:]}.{_extremes(rows, name)}{_beside_words(ours)}"
    evidence += f" {shape} ({numbers}): {ADVICE[state]}."
    return Verdict(state, against, counts, advice, evidence)


def _counted(counts: dict[Direction, int]) -> str:
    words: dict[Direction, str] = {"better": "better", "worse": "worse", "equal": "without a visible difference"}
    return ", ".join(f"{counts[word]} {text}" for word, text in words.items() if counts[word])


def _advice(ours: str, base: str, against: str, counts: dict[str, dict[Direction, int]]) -> str:
    if against == "better":
        return f"Take {ours} rather than {base}"
    if against == "worse":
        return f"Stay with {base}: {ours} is worse"
    if against == "equal":
        return f"These notes do not tell {ours} from {base}"
    if any(one["better"] and one["worse"] for one in counts.values()):
        return f"Choose between {ours} and {base} by the use: each is better in some"
    gained, lost = (
        " and ".join(GROUPS[group] for group, one in counts.items() if one[word]) for word in ("better", "worse")
    )
    return f"Take {ours} for {gained}, stay with {base} for {lost}"


def _extremes(rows: list[Comparison], name: str) -> str:
    """The largest gain and the largest loss, relative to the base, as a sentence; also where they are not visible."""
    order = sorted(rows, key=lambda row: row.gain(name))
    parts = []
    if order[-1].gain(name) > 0:
        parts.append(f"largest gain: {order[-1].quoted(order[-1].differences[name])}")
    if order[0].gain(name) < 0:
        parts.append(f"largest loss: {order[0].quoted(order[0].differences[name])}")
    text = "; ".join(parts)
    return f" {text[0].upper()}{text[1:]}." if text else ""


def _beside_words(ours: Measured) -> str:
    """Where words are ahead of the encoder, and whether it adds to them in search, as sentences."""
    name = ours["name"]
    rows = [row for row in comparisons([ours], variants=True) if name in row.against_words]
    ahead = [
        row.quoted(row.against_words[name])
        for row in rows
        if row.headline and direction(row.against_words[name], row.metric) == "worse"
    ]
    searches = [direction(row.against_words[name], row.metric) for row in rows if row.fused]
    if not rows:
        return ""
    said = f" Words are ahead: {'; '.join(ahead)}." if ahead else " Words are nowhere ahead."
    if searches:
        said += f" Fused with words, it is better than words alone in {searches.count('better')}"
        said += f" and worse in {searches.count('worse')} of {len(searches)} searches."
    return said
