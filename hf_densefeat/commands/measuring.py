"""What the commands share: models by name, probes by the words of the command line, and one encoder's numbers."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from hf_densefeat.data.columns import Layout
from hf_densefeat.data.pairs import pair_notes, pairs_if_any
from hf_densefeat.data.readers import read_files
from hf_densefeat.data.splits import SplitRecord
from hf_densefeat.evaluation.geometry import geometry_report, spectrum
from hf_densefeat.evaluation.metrics import rows_of_some_patients
from hf_densefeat.evaluation.probes import ProbeEvaluator
from hf_densefeat.evaluation.similarity import SimilarityEvaluator, similarity_tasks
from hf_densefeat.evaluation.tasks import PROBE_KINDS, Kind, ProbeTask
from hf_densefeat.evaluation.words import NAME as WORDS
from hf_densefeat.evaluation.words import WordRows, Words
from hf_densefeat.models.dense import AutoDenseModel
from hf_densefeat.models.tokenizers import load_tokenizer
from hf_densefeat.reporting.comparison import Measured, TaskResults, measured_of


def quiet(level: int = logging.WARNING) -> None:
    """Our own lines from this level on, and one progress bar: that of encoding."""
    logging.basicConfig(level=level, format="%(message)s")
    for name in ("sentence_transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Inside, what transformers and the Hub say of a missing model becomes a ValueError that names it."""
    try:
        yield
    except OSError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        where = "In the folder" if Path(source).is_dir() else "There is no such folder, and from the Hub"
        raise ValueError(f"The model {source!r} cannot be loaded. {where}: {reason}.") from error


def load(source: str, device: Any = None, **options: Any) -> tuple[Any, Any]:
    """The encoder, on the device or on the GPU where there is one, and its tokenizer."""
    with loading(source):
        model, tokenizer = AutoDenseModel.from_pretrained(source, **options), load_tokenizer(source)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def sample(notes: Any, maximum: int, seed: int) -> Any:
    """Notes of whole patients, drawn at random, until there are `maximum`."""
    if len(notes) <= maximum:
        return notes
    return notes.select(rows_of_some_patients(np.asarray(notes["patient_id"]), maximum, seed))


def check_probes(words: Sequence[str], option: str) -> None:
    """ValueError for a word that is no `label:kind` or `label:kind:table`."""
    for word in words:
        if [*word.split(":"), ""][1] not in PROBE_KINDS:
            raise ValueError(
                f"Expected --{option} label:kind or label:kind:table, kind one of {', '.join(PROBE_KINDS)}, got {word!r}."
            )


def parse_tasks(words: Sequence[str], notes: Any) -> list[ProbeTask]:
    """`label:kind` for a column of the notes (a table, or one a split), `label:kind:table` for a table of its own."""
    tasks = []
    for word in words:
        label, kind, table = (*word.split(":", 2), "")[:3]
        task = ProbeTask(label, notes, label, cast(Kind, kind))
        if table:
            data = read_table(table)
            patient = next((name for name in ("patient_id", "subject_id") if name in data.column_names), None)
            task = replace(task, name=f"{Path(table).stem} {label}", dataset=data, patient=patient)
        tasks.append(task)
    names = [task.name for task in tasks]
    # one column may be both predicted and clustered
    return [task if names.count(task.name) == 1 else replace(task, name=f"{task.name} {task.kind}") for task in tasks]


def read_table(path: str) -> datasets.Dataset:
    """A table of texts and labels, in any format that notes may have; `patient_id` is the column of that name, if any."""

    def layout(names: Sequence[str], meds: bool) -> Layout:
        wanted = [name for name in ("text", "patient_id", "subject_id") if name in names]
        return Layout("a probe's table", {name: name for name in wanted})

    return read_files(Path(path), layout).data


def tokens_seen(model: Any, tokenizer: Any, max_length: int | None = None) -> int | None:
    """How many tokens of a text an encoder sees at once; None for no limit."""
    limits = (max_length, getattr(model, "max_length", None), getattr(tokenizer, "model_max_length", None))
    return min((int(limit) for limit in limits if limit), default=None)


def words_of(notes: Any, model: Any, tokenizer: Any) -> Words:
    """The words of training notes, as far into each as the encoder reads."""
    read = None if model.long_notes == "chunk" else tokens_seen(model, tokenizer)
    return Words.fit(notes["text"][:], tokenizer, read)


@dataclass
class Encoded:
    """An encoder that reads each text once, under one map of its embeddings after another (`replace(encoded, head=...)`)."""

    read: Any  # texts -> embeddings (N, D) below the map; None where the rows of all texts are given
    _: KW_ONLY
    width: int  # d of the embedding, the first columns of those below the map
    head: Any = None  # the map; None for the embedding as it is
    rows: dict[str, Any] = field(default_factory=dict)  # text to its row below the map, where it is known already

    @classmethod
    def of(cls, texts: Sequence[str], z: Any) -> "Encoded":
        """Embeddings that are already there."""
        return cls(None, width=z.shape[1], rows=dict(zip(texts, torch.as_tensor(z), strict=True)))

    def below(self, texts: Sequence[str]) -> Any:
        """Embeddings (N, D) below the map."""
        new = [text for text in dict.fromkeys(texts) if text not in self.rows]
        self.rows.update(zip(new, self.read(new), strict=True) if new else ())
        return torch.stack([self.rows[text] for text in texts])

    def encode(self, texts: Sequence[str], tokenizer: Any = None, **_: Any) -> Any:
        """Embeddings (N, d)."""
        z = self.below(texts)
        return z[:, : self.width] if self.head is None else self.head(z[:, : len(self.head.mean)])


class Measurement:
    """Similarity of held-out notes, linear probes and geometry, of words and of one frozen encoder after another.

    Geometry is of the held-out `notes`, paired by `kinds`. The uses of `similarity` are of `asked_of`, by default the same;
    None is a patient's own notes, where any patient has two. `words` gives the words that are measured beside the encoders,
    once. `variants` adds similarity of codes and of fewer dimensions. `options` are those of both evaluators.
    """

    def __init__(
        self,
        notes: Any,
        *,
        kinds: Sequence[str] = ("adjacent",),
        similarity: Sequence[str] | None = None,
        asked_of: Any = None,
        tasks: Sequence[ProbeTask] = (),
        shots: Sequence[int] = (),
        words: Callable[[], Words] | None = None,
        record: SplitRecord | None = None,
        k: int = 20,
        variants: bool = False,
        **options: Any,
    ) -> None:
        asked_of = notes if asked_of is None else asked_of
        table, self.pairs = (notes, pairs_if_any(notes)) if tuple(kinds) == ("adjacent",) else pair_notes(notes, kinds)
        self.texts, self.k = list(table["text"]), k
        if similarity is None:
            similarity = ["same_patient"] if len(pairs_if_any(asked_of)) else []
        wanted = similarity_tasks(similarity, asked_of)
        options["cache"] = False  # what is encoded here is kept in memory
        plain: dict[str, Any] = {} if variants else {"codes": ("float",), "divisors": (1,)}
        self.similarity = SimilarityEvaluator(wanted, **options, **plain) if wanted else None
        self.probes = ProbeEvaluator(tasks, record=record, shots=shots, **options) if tasks else None
        self.evaluators = [one for one in (self.similarity, self.probes) if one]
        asked = {text for one in self.evaluators for text in one.texts()}
        self.others = sorted(asked - set(self.texts))  # so that no text is encoded twice
        self.fit_words = words
        self.words: WordRows | None = None
        self.of_words: TaskResults | None = None
        self.first: TaskResults | None = None

    def refuse_trained(self, model: Any) -> None:
        """ValueError for tested patients that the model was trained on."""
        for one in self.evaluators:
            one.refuse_trained(model)

    def results(self, known: Any) -> TaskResults:
        """Similarity and probes of an encoder, with words beside it, which are measured before the first one."""
        if self.fit_words and self.evaluators and self.words is None:
            self.words = self.fit_words().known(self.texts + self.others)
            self.of_words = self._results(self.words, None)
        return self._results(known, self.words)

    def _results(self, known: Any, words: WordRows | None) -> TaskResults:
        uses = self.similarity.evaluate(known, words=words) if self.similarity else {}
        return TaskResults(uses, self.probes.evaluate(known) if self.probes else {})

    def __call__(self, name: str, model: Any, tokenizer: Any = None) -> Measured:
        """Numbers by name: geometry, similarity and probes with intervals, differences to the first call and to words."""
        self.refuse_trained(model)
        texts = self.texts + self.others
        found = torch.as_tensor(model.encode(texts, tokenizer, show_progress_bar=True))
        z, results = found[: len(self.texts)], self.results(Encoded.of(texts, found))
        earlier, later, groups = z, None, None
        if len(self.pairs):
            earlier, later = z[self.pairs.earlier], z[self.pairs.later]
            groups = torch.from_numpy(self.pairs.patient)
        geometry = geometry_report(earlier, later, k=self.k, groups=groups)
        return self.compared(name, geometry, z, results)

    def compared(self, name: str, geometry: dict[str, float], z: torch.Tensor, results: TaskResults) -> Measured:
        """What was measured of an encoder, with differences to the first one and to words."""
        base, self.first = self.first, self.first or results
        return measured_of(name, geometry, spectrum(z, center=True), results, base=base, words=self.of_words)

    def beside(self) -> list[Measured]:
        """What words give, compared with the first encoder, for the list of encoders; empty where nothing is asked of them."""
        base = None if self.first is self.of_words else self.first
        return [measured_of(WORDS, {}, [], self.of_words, base=base)] if self.of_words else []
