"""What the evaluators share: tasks are read once, each different text is encoded once, a trainer gets flat numbers."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar

from hf_densefeat.data.splits import refuse_trained
from hf_densefeat.evaluation.embeddings import embed
from hf_densefeat.evaluation.metrics import Metric

logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class Evaluator(ABC):
    """Tasks that one encoder after another is measured on; subclasses read them and say what is measured.

    As in sentence-transformers' evaluators ``primary_metric`` is the first task's headline in the numbers of a call, and
    ``greater_is_better`` says whether more of it is better.
    """

    tasks: Sequence[Any]  # with different names
    _: KW_ONLY
    bootstraps: int = 1000  # replicates of `evaluate` over patients
    batch_size: int = 32  # passed to `encode`
    max_length: int | None = None  # passed to `encode` where it takes it
    cache: str | Path | bool = True  # disk cache of `evaluate`, see `embed`
    seed: int = 0  # of splits, k-means, samples and bootstrap
    allow_trained: bool = False  # test whom the model was trained on, instead of refusing them by their number

    what: ClassVar[str]

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"Expected at least one task, with different names, but got {names}.")
        # by task, with `texts`, `queries`, the ids of who is `tested`, and how many rows are `left_out`
        self.rows: dict[str, Any] = {task.name: self._read(task) for task in self.tasks}
        for name, rows in self.rows.items():
            if any(rows.left_out.values()):
                counts = {reason: count for reason, count in rows.left_out.items() if count}
                logger.info("%s %s: rows apart: %s.", self.what.capitalize(), name, counts)
        headline, metric = next(iter(self._metrics(self.tasks[0].kind).items()))
        self.primary_metric, self.greater_is_better = f"{names[0]}_{headline}", metric.higher_is_better

    @abstractmethod
    def _read(self, task: Any) -> Any:
        """The rows of a task."""

    @abstractmethod
    def _metrics(self, kind: str) -> dict[str, Metric]:
        """The metrics of a kind by name, the one by which verdicts count first."""

    def refuse_trained(self, model: Any) -> None:
        """ValueError, with their number, for tested patients that the model was trained on, unless that is allowed."""
        for name, rows in self.rows.items() if not self.allow_trained else ():
            refuse_trained(rows.tested, model, f"{self.what.capitalize()} {name!r}")

    def texts(self) -> list[str]:
        """All texts that an encoder has to give embeddings of, some of them more than once."""
        return [text for rows in self.rows.values() for text in (*rows.texts, *rows.queries)]

    def _embedded(self, model: Any, tokenizer: Any, points: bool, **options: Any) -> dict[str, tuple]:
        """Task name to embeddings of its texts and of its queries, None where it has none, encoded in one call."""
        self.refuse_trained(model)
        how: dict[str, Any] = {"batch_size": self.batch_size, "max_length": self.max_length}
        how["cache"] = False if points else self.cache
        z, start, found = embed(model, self.texts(), tokenizer, **how, **options), 0, {}
        for name, rows in self.rows.items():
            middle = start + len(rows.texts)
            end = middle + len(rows.queries)
            found[name], start = (z[start:middle], z[middle:end] if rows.queries else None), end
        return found

    @abstractmethod
    def evaluate(self, model: Any, tokenizer: Any = None, *, points: bool = False) -> dict[str, Any]:
        """Task name to result; with `points` values alone, without bootstrap and without the disk."""

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
        for task, result in self.evaluate(model, tokenizer, points=True).items():
            metrics |= {f"{task}_{name}": found.value for name, found in result.metrics.items()}
        return metrics | {f"{self.what}_seconds": time.perf_counter() - start}
