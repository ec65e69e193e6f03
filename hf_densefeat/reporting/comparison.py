"""What was measured of encoders, compared: better, worse or no visible difference, and one sentence of advice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np

from hf_densefeat.evaluation.geometry import State, geometry_state, variance_share
from hf_densefeat.evaluation.metrics import PROBES, WITH_WORDS, Estimate, Metric, paired_difference
from hf_densefeat.evaluation.probes import ProbeResult
from hf_densefeat.evaluation.similarity import SIMILARITY, SimilarityResult
from hf_densefeat.reporting.formats import interval

Triple = Sequence[float | None]  # value, low, high; None where there is none


class Measured(TypedDict, total=False):
    """What was measured of one encoder, as plain numbers, on the same notes as of those beside it in a list."""

    name: str  # in tables and pictures; no path
    view: str  # of an encoder with views, which of them this is
    geometry: dict[str, float]  # `geometry_report` of the notes, or some of it
    spectrum: list[float]  # eigenvalues of their centred covariance, largest first
    similarity: dict[str, Triple]  # "task metric" to value, low, high
    probes: dict[str, Triple]  # the same of probes
    differences: dict[str, Triple]  # "task metric" to the value minus that of the first in the list, paired
    # The same minus the value of words (TF-IDF) where these are measured too; of "task mrr_with_words", the ranking fused
    # with that by words, minus words alone.
    against_words: dict[str, Triple]


class TaskResults(NamedTuple):
    """What both evaluators found of one encoder, task to result; either may be empty."""

    similarity: Mapping[str, SimilarityResult]
    probes: Mapping[str, ProbeResult]


def measured_of(
    name: str,
    geometry: dict[str, float],
    spectrum: Any,
    results: TaskResults,
    *,
    base: TaskResults | None = None,
    words: TaskResults | None = None,
) -> Measured:
    """What was measured of one encoder as plain numbers, in the one form that tables, cards and pages read.

    Results are of this encoder, of the base that it is compared with (None for the base itself), and of words, where they are
    measured beside it.
    """

    def triples(tasks: Iterable[tuple[str, dict[str, Estimate]]]) -> dict[str, Triple]:
        return {f"{task} {name}": [e.value, e.low, e.high] for task, metrics in tasks for name, e in metrics.items()}

    def against(other: TaskResults | None) -> dict[str, Triple]:
        sides: Any = () if other is None else zip(results, other, strict=True)
        return triples(
            (task, paired_difference(result, base[task])) for ours, base in sides for task, result in ours.items()
        )

    similarity, probes = (triples((task, result.metrics) for task, result in part.items()) for part in results)
    return {
        "name": name,
        "geometry": geometry,
        "spectrum": [float(value) for value in spectrum],
        "similarity": similarity,
        "probes": probes,
        "differences": against(base),
        "against_words": against(words),
    }


def judged(measured: Sequence[Measured]) -> Measured:
    """What is compared with the first encoder of a list: the last one, or its views, in each row the one that gains more.

    Geometry is that of the first view. An encoder has views where `view` names them.
    """
    views = [encoder for encoder in measured if "view" in encoder] or [measured[-1]]
    merged: Any = {**views[0], "name": "the better view" if len(views) > 1 else views[0]["name"]}
    for key in views[0].get("differences", {}):
        sign = metric_named(key.rsplit(" ", 1)[1]).sign
        best: Any = max(views, key=lambda encoder: sign * (encoder["differences"][key][0] or 0.0))
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


# ---- Metrics by the names that they have in results -----------------------------------------------------------------

_VARIANT = re.compile(rf"(.+?)(?:_(int8|binary)|_d_over_(\d+)|{WITH_WORDS})")


def known_metrics() -> dict[str, Metric]:
    """Name to metric of every kind of probe and similarity, without variants."""
    kinds = [*PROBES.values(), *(kind.metrics for kind in SIMILARITY.values())]
    return {name: metric for metrics in kinds for name, metric in metrics.items()}


def metric_named(name: str) -> Metric:
    """The metric of a name, which may end in what was done: ``mrr_binary``, ``mrr_d_over_4``; KeyError for another one."""
    known, found = known_metrics(), _VARIANT.fullmatch(name)
    if name in known or found is None:
        return known[name]
    base, code, divisor = found.groups()
    how = f"{code} codes" if code else f"first d/{divisor} dimensions" if divisor else "fused with words"
    return replace(known[base], title=f"{known[base].title}, {how}")


# ---- Rows of a comparison -------------------------------------------------------------------------------------------

Direction = Literal["better", "worse", "equal"]
WORDS: dict[Direction, str] = {"better": "better", "worse": "worse", "equal": "no visible difference"}
ARROWS: dict[Direction, str] = {"better": "↑", "worse": "↓", "equal": "·"}
GROUPS = {"similarity": "similarity", "probes": "linear probes", "clusterings": "k-means"}


def headlines(group: str) -> set[str]:
    """The metrics of a group by which verdicts count, one a task: the first of each kind."""
    if group == "similarity":
        return {kind.headline for kind in SIMILARITY.values()}
    clusters = group == "clusterings"
    return {next(iter(metrics)) for kind, metrics in PROBES.items() if (kind == "clustering") == clusters}


def direction(difference: Estimate, metric: str) -> Direction:
    """Better or worse: a 95 % interval on that side of zero. Equal: it holds zero, which is no proof, or is unknown."""
    if difference.low <= 0 <= difference.high or not np.isfinite(difference.low):
        return "equal"
    return "better" if metric_named(metric).sign * difference.value > 0 else "worse"


@dataclass(frozen=True)
class Comparison:
    """One metric of one task: the encoders' values, and their differences to the first."""

    group: str  # a key of `GROUPS`
    task: str
    metric: str  # a variant such as `mrr_binary` too
    headline: bool  # verdicts count it
    fused: bool  # it is a headline of the ranking that is fused with words
    values: dict[str, Estimate]  # by encoder
    differences: dict[str, Estimate]  # of each encoder minus the first, where they are known
    against_words: dict[str, Estimate]  # of each encoder minus words, where they were measured

    @property
    def title(self) -> str:
        """Task and metric, and which way is better where that is down."""
        entry = metric_named(self.metric)
        return f"{self.task}: {entry.title}{'' if entry.higher_is_better else ' (lower is better)'}"

    def gain(self, name: str) -> float:
        """Its difference relative to the first encoder's value, above 0 where it is better."""
        # relative, so that gains of metrics with other units can be put in one order
        base = abs(next(iter(self.values.values())).value)
        return metric_named(self.metric).sign * self.differences[name].value / max(base, 1e-9)

    def difference(self, name: str, part: str, marks: Mapping[Direction, str], *, digits: int | None = None) -> str:
        """A cell: the encoder's difference in `differences` or `against_words`, and what it means; n/a where unknown."""
        gap = getattr(self, part).get(name)
        return f"{interval(gap, digits=digits, signed=True)} {marks[direction(gap, self.metric)]}" if gap else "n/a"

    def quoted(self, difference: Estimate) -> str:
        """Metric, task and difference, for a sentence."""
        metric = self.title.removeprefix(f"{self.task}: ")
        return f"{metric} of {self.task} {interval(difference, signed=True)}"


def _estimates(measured: Sequence[Measured], part: str, key: str) -> dict[str, Estimate]:
    """Encoder to what it has under "task metric" in one of its parts, where it has."""
    sides: dict[str, Any] = {encoder["name"]: encoder.get(part, {}) for encoder in measured}
    return {
        name: Estimate(*(np.nan if value is None else value for value in side[key]))
        for name, side in sides.items()
        if key in side
    }


def comparisons(measured: Sequence[Measured]) -> list[Comparison]:
    """Every metric and variant of the last encoder, of the others where it is known: similarity, linear probes, k-means.

    The first encoder is what the others are compared with.
    """
    rows, last = [], dict[str, Any](measured[-1])
    for part in ("similarity", "probes"):
        for key in last.get(part, {}):
            task, metric = key.rsplit(" ", 1)
            # k-means over all rows is no held-out probe, and is counted apart from them
            group = "clusterings" if part == "probes" and metric in PROBES["clustering"] else part
            plain, counted = metric.removesuffix(WITH_WORDS), headlines(group)
            row = group, task, metric, metric in counted, plain != metric and plain in counted
            estimates = _estimates(measured, part, key), _estimates(measured[1:], "differences", key)
            rows.append(Comparison(*row, *estimates, _estimates(measured, "against_words", key)))
    return sorted(rows, key=lambda row: list(GROUPS).index(row.group))


# ---- The verdict ----------------------------------------------------------------------------------------------------

ADVICE: dict[State, str] = {
    "collapsed": "its cosines are hard to tell apart, so subtract the mean before comparing by cosine",
    "healthy": "nothing in its spectrum speaks against using it as it is",
    "over-spread": "its spectrum is close to noise: trust the uses that were measured alone",
}


@dataclass(frozen=True)
class Verdict:
    """What a reader should do, and why."""

    state: State  # of the geometry
    against: str | None  # "better", "worse", "mixed" or "equal", over all headline metrics; None without a base
    counts: dict[str, dict[Direction, int]]  # group to the numbers of better, equal and worse headline metrics
    advice: str  # one sentence
    evidence: str  # what it rests on

    @property
    def sentence(self) -> str:
        """Advice and evidence."""
        return f"{self.advice} {self.evidence}"


def verdict(ours: Measured, base: Measured | None = None) -> Verdict:
    """Whether to take an encoder rather than the base, by the headline metric of every task.

    Similarity, linear probes and k-means are counted apart. "better" means that at least one paired 95 % interval is on
    that side of zero and none on the other; "mixed" that both occur; "equal" that every interval holds zero, which is no
    proof of equality. The base is the first encoder of the list, to which ours has its differences; None where it is alone.
    """
    report, name = ours["geometry"], ours["name"]
    state = geometry_state(report)
    shape = f"On these notes {name} is {state}"  # no sentence begins with a name, which may be in lower case
    numbers = (
        f"centred effective rank {report['effective_rank_centered']:.0f} of {report['attainable_rank']:.0f} attainable; "
        f"{variance_share(report):.0%} of the squared length is variance"
    )
    rows = [] if base is None else [row for row in comparisons([base, ours]) if row.headline and row.differences]
    if base is None or not rows:
        evidence = f"{_sentence(numbers)}{_beside_words(ours)}"
        return Verdict(state, None, {}, f"{shape}: {ADVICE[state]}.", evidence)
    counts: dict[str, dict[Direction, int]] = {}
    for row in rows:
        group = counts.setdefault(row.group, {"better": 0, "equal": 0, "worse": 0})
        group[direction(row.differences[name], row.metric)] += 1
    better, worse = (any(count[word] for count in counts.values()) for word in ("better", "worse"))
    # one visible loss is enough to say so, whatever the number of gains
    against = ("mixed" if worse else "better") if better else ("worse" if worse else "equal")
    said: dict[Direction, str] = {"better": "better", "worse": "worse", "equal": "without a visible difference"}
    counted = []
    for part, count in counts.items():
        texts = [f"{count[word]} {text}" for word, text in said.items() if count[word]]
        counted.append(f"{GROUPS[part]}: {', '.join(texts)}")
    evidence = _sentence("; ".join(counted))
    evidence += f"{_extremes(rows, name)}{_beside_words(ours)} {shape} ({numbers}): {ADVICE[state]}."
    return Verdict(state, against, counts, f"{_advice(name, base['name'], against, counts)}.", evidence)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _advice(ours: str, base: str, against: str, counts: dict[str, dict[Direction, int]]) -> str:
    clear = {"better": f"Take {ours} rather than {base}", "worse": f"Stay with {base}: {ours} is worse"}
    clear["equal"] = f"These notes do not tell {ours} from {base}"
    if against in clear:
        return clear[against]
    if any(count["better"] and count["worse"] for count in counts.values()):
        return f"Choose between {ours} and {base} by the use: each is better in some"
    gained, lost = (
        " and ".join(GROUPS[group] for group, count in counts.items() if count[word]) for word in ("better", "worse")
    )
    return f"Take {ours} for {gained}, stay with {base} for {lost}"


def _extremes(rows: list[Comparison], name: str) -> str:
    """The largest gain and the largest loss, relative to the base, as a sentence; also where they are not visible."""
    order = sorted(rows, key=lambda row: row.gain(name))
    ends = (("gain", order[-1], order[-1].gain(name) > 0), ("loss", order[0], order[0].gain(name) < 0))
    said = "; ".join(f"largest {what}: {row.quoted(row.differences[name])}" for what, row, there in ends if there)
    return f" {_sentence(said)}" if said else ""


def _beside_words(ours: Measured) -> str:
    """Where words are ahead of the encoder, and whether it adds to them in search, as sentences."""
    gaps = [(row, gap) for row in comparisons([ours]) for gap in row.against_words.values()]
    if not gaps:
        return ""
    told = [(row, gap, direction(gap, row.metric)) for row, gap in gaps]
    ahead = [row.quoted(gap) for row, gap, which in told if row.headline and which == "worse"]
    searches = [which for row, _, which in told if row.fused]
    said = f" Words are ahead: {'; '.join(ahead)}." if ahead else " Words are nowhere ahead."
    if searches:
        said += f" Fused with words, it is better than words alone in {searches.count('better')}"
        said += f" and worse in {searches.count('worse')} of {len(searches)} searches."
    return said
