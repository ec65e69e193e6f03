"""Runs' numbers over seeds: estimates with intervals, and differences between methods."""

import numpy as np
from domains import Domain

from hf_densefeat.evaluation.metrics import Estimate
from study.methods import BASELINES, CANDIDATES, METHODS, Method

RANK, DISTANCE = "geometry effective_rank_centered", "geometry subspace_distance_normalized_centered"
CONDITION = "geometry condition_resolved_centered"


class Results:
    """All runs' numbers, method by method, averaged over seeds with intervals of redrawn seeds and patients.

    Attributes:
        runs: method → for each seed, key → value and replicates.
        summaries: AUROC, ARI and RMSE → the keys that their mean is over; empty where there is no such task.
        shown: the methods of the tables that were run, in the tables' order.
        titles: their names in tables.
    """

    def __init__(self, runs: dict[str, list[dict]], domain: Domain, methods: dict[str, Method]):
        self.runs = runs
        self.summaries: dict[str, list[str]] = {"AUROC": [], "ARI": [], "RMSE": []}
        metrics = {"clustering": "ARI", "regression": "RMSE"}
        for task in domain.tasks:
            metric = metrics.get(task.kind, "AUROC")
            self.summaries[metric].append(f"{task.name} {metric.lower()}")
        self.shown = [name for name in (*METHODS, *CANDIDATES) if name in runs]
        self.shown += [name for name in runs if name not in self.shown]
        self.titles = {name: methods[name].title for name in self.shown}

    def has(self, name: str, key: str) -> bool:
        """Whether the method was measured so."""
        return all(key in run for run in self.runs[name])

    def array(self, name: str, keys: str | list[str]) -> tuple[float, np.ndarray]:
        """Value and replicates of a method, the mean over several metrics where a list is given."""
        keys = [keys] if isinstance(keys, str) else keys
        table = np.mean([[run[key] for run in self.runs[name]] for key in keys], axis=0)
        value, replicates = table[:, 0].mean(), table[:, 1:]
        seeds, count = replicates.shape
        drawn = np.random.default_rng(0).integers(seeds, size=(count, seeds))
        return float(value), replicates[drawn, np.arange(count)[:, None]].mean(1)

    def estimate(self, name: str, keys: str | list[str]) -> Estimate:
        """With its interval."""
        return Estimate.of(*self.array(name, keys))

    def difference(self, ours: str, theirs: str, keys: str | list[str]) -> Estimate:
        """Ours minus theirs on the same redraws."""
        (value, drawn), (other, others) = self.array(ours, keys), self.array(theirs, keys)
        return Estimate.of(value - other, drawn - others)

    def best(self, keys: str | list[str], low: bool = False, trained: bool = False) -> str | None:
        """The baseline that is best at this, of those that were run; of those that were trained, where asked for."""
        there = [name for name in BASELINES if name in self.runs and not (trained and METHODS[name].free)]
        return min(there, key=lambda name: self.array(name, keys)[0] * (1 if low else -1), default=None)

    def point(self, name: str) -> tuple[float, float, float]:
        """Effective rank, distance and mean AUROC."""
        return tuple(self.array(name, key)[0] for key in (RANK, DISTANCE, self.summaries["AUROC"]))
