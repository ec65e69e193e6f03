"""Metrics by the names that they have in results: of every kind of probe and similarity, and their variants."""

import re
from dataclasses import replace

from hf_densefeat.evaluation.metrics import PROBES, WITH_WORDS, Metric
from hf_densefeat.evaluation.similarity import SIMILARITY

_VARIANT = re.compile(rf"(.+?)(?:_(int8|binary)|_d_over_(\d+)|{WITH_WORDS})")


def known_metrics() -> dict[str, Metric]:
    """Name to metric, without variants."""
    kinds = [*PROBES.values(), *(kind.metrics for kind in SIMILARITY.values())]
    return {name: metric for metrics in kinds for name, metric in metrics.items()}


def metric_named(name: str) -> Metric:
    """The metric of a name, which may end in what was done: ``mrr_binary``, ``mrr_d_over_4``, ``mrr_with_words``.

    Raises:
        KeyError: for an unknown name.
    """
    known = known_metrics()
    if name in known:
        return known[name]
    found = _VARIANT.fullmatch(name)
    if found is None:
        raise KeyError(name)
    base, code, divisor = found.groups()
    how = f"{code} codes" if code else f"first d/{divisor} dimensions" if divisor else "fused with words"
    return replace(known[base], title=f"{known[base].title}, {how}")
