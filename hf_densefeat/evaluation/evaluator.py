"""What the evaluators share: tasks are read once, each different text is encoded once, a trainer gets flat numbers."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hf_densefeat.data.splits import refuse_trained
from hf_densefeat.evaluation.embeddings import embed
from hf_densefeat.evaluation.metrics import METRICS


class Evaluator(ABC):
    """Tasks that one encoder after another is measured on; subclasses read them and say what is measured.

    Attributes:
        rows: task name to its rows, with ``texts``, perhaps ``queries``, and the ids of who is ``tested``.
        primary_metric: the first task's headline in the numbers of a call, as sentence-transformers' evaluators have it.
        greater_is_better: whether more of it is better.
    """

    what: ClassVar[str]
    rows: Mapping[str, Any]

    def __init__(
        self,
        tasks: Sequence[Any],
        *,
        headline: str,
        bootstraps: int,
        batch_size: int,
        max_length: int | None,
        cache: str | Path | bool,
        seed: int,
        allow_trained: bool,
    ) -> None:
        names = [task.name for task in tasks]
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"Expected at least one task, with different names, but got {names}.")
        self.tasks, self.bootstraps, self.seed, self.allow_trained = list(tasks), bootstraps, seed, allow_trained
        self.batch_size, self.max_length, self.cache = batch_size, max_length, cache
        self.primary_metric = f"{names[0]}_{headline}"
        self.greater_is_better = METRICS[headline].higher_is_better

    def refuse_trained(self, model: Any) -> None:
        """ValueError, with their number, for tested patients that the model was trained on, unless that is allowed."""
        for name, rows in self.rows.items() if not self.allow_trained else ():
            refuse_trained(rows.tested, model, f"{self.what.capitalize()} {name!r}")

    def texts(self) -> list[str]:
        """All texts that an encoder has to give embeddings of, some of them more than once."""
        return [text for rows in self.rows.values() for text in (*rows.texts, *getattr(rows, "queries", ()))]

    def _embedded(self, model: Any, tokenizer: Any, cache: str | Path | bool, **options: Any) -> dict[str, list[Any]]:
        """Task name to embeddings of its texts and of its queries, encoded in one call."""
        self.refuse_trained(model)
        how: dict[str, Any] = {"batch_size": self.batch_size, "max_length": self.max_length, "cache": cache}
        z = embed(model, self.texts(), tokenizer, **how, **options)
        counts = [(len(rows.texts), len(getattr(rows, "queries", ()))) for rows in self.rows.values()]
        ends = np.cumsum(counts).reshape(-1, 2)
        return {
            name: [z[end - count : end] for end, count in zip(*side, strict=True)]
            for name, side in zip(self.rows, zip(ends, counts, strict=True), strict=True)
        }

    @abstractmethod
    def _measured(self, model: Any, tokenizer: Any, cache: str | Path | bool, bootstraps: int) -> dict[str, Any]:
        """Task name to result; without replicates where the numbers of a call are wanted."""

    def __call__(
        self, model: Any, tokenizer: Any = None, epoch: int = -1, steps: int = -1, **_: Any
    ) -> dict[str, float]:
        """Point values, ``{task}_{metric}``, and the seconds that it took.

        Every rank encodes every text in the same order and nothing is read from disk, so that ranks stay in step where
        a forward is a collective (FSDP); the numbers are the same on all ranks. sentence-transformers may call it, as
        `evaluator(model, output_path, epoch, steps)`: these are without effect.
        """
        start = time.perf_counter()
        metrics: dict[str, float] = {}
        for task, result in self._measured(model, tokenizer, False, 0).items():
            metrics |= {f"{task}_{name}": found.value for name, found in result.metrics.items()}
        return metrics | {f"{self.what}_seconds": time.perf_counter() - start}
