"""`densefeat head`: encode, fit the dense head, save it beside the encoder, and measure before and after."""

import argparse
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from hf_densefeat.commands.command_lines import head_parser, reading_of
from hf_densefeat.commands.loading import loading
from hf_densefeat.commands.measure import pairs_if_any, similarity_tasks
from hf_densefeat.data.notes import describe_notes, load_notes
from hf_densefeat.data.pairs import adjacent_pairs
from hf_densefeat.data.splits import split_by_patient
from hf_densefeat.evaluation.geometry import geometry_report, spectrum
from hf_densefeat.evaluation.similarity import similarity_of
from hf_densefeat.evaluation.similarity_tasks import SimilarityRows, similarity_rows
from hf_densefeat.models.dense import AutoDenseModel
from hf_densefeat.models.head import SAMPLE, DenseHead, epsilon_of, fit_head
from hf_densefeat.models.tokenizers import load_tokenizer
from hf_densefeat.reporting.comparison import Both, Measured, measured_of
from hf_densefeat.reporting.tables import before_after_table, terminal


def run(arguments: argparse.Namespace) -> None:
    """Encode, fit, save, measure.

    Raises:
        ValueError: for notes, a model or an epsilon that cannot be used.
    """
    epsilon_of(arguments.epsilon)  # refused before anything is read
    with loading(arguments.model):
        model = AutoDenseModel.from_pretrained(
            arguments.model, pooling=arguments.pooling, max_length=arguments.max_length
        )
    fit_and_save(model, arguments)


def fit_and_save(model: Any, arguments: argparse.Namespace) -> None:
    """What follows when the encoder is there: read the notes, encode, fit, save, measure."""
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(arguments.model)
    notes = load_notes(arguments.notes, **reading_of(arguments))
    print(f"notes      {describe_notes(notes)}")
    parts = split_by_patient(notes, seed=arguments.seed)
    asked = asked_of(arguments.similarity, parts["test"])
    Path(arguments.output).mkdir(parents=True, exist_ok=True)  # what cannot be done is said before all is encoded
    model.dense_head = None
    encode = partial(
        model.encode, tokenizer=tokenizer, batch_size=arguments.batch_size, show_progress_bar=True, head=False
    )
    head = fit_on_parts(encode, parts, arguments.epsilon, arguments.seed)
    model.dense_head = head
    try:
        model.save_pretrained(arguments.output)
        tokenizer.save_pretrained(arguments.output)
    except SafetensorError as error:  # a full disk
        raise OSError(f"{arguments.output} could not be written: {error}") from error
    print(described(head, parts))
    measured = compared(parts["test"], encode(list(parts["test"]["text"])), head, asked, arguments.seed)
    print(f"\n{terminal(before_after_table(measured))}\n")
    print(f"Saved to {arguments.output}: SentenceTransformer and AutoDenseModel apply the head, AutoModel does not.")


def fit_on_parts(encode: Callable[..., torch.Tensor], parts: Mapping, epsilon: str, seed: int) -> DenseHead:
    """The head of unmasked training notes; "auto" chooses epsilon by the next notes of validation patients.

    Args:
        encode: texts -> embeddings without a head.
        parts: notes by split, as `split_by_patient` returns them.
        epsilon: "center", "auto" or a number above 0, as a word.
        seed: of the sample of training notes.
    """
    pairs = None
    if epsilon == "auto":
        following = adjacent_pairs(parts["validation"])
        texts = np.array(parts["validation"]["text"][:], dtype=object)
        pairs = (texts[following.earlier].tolist(), texts[following.later].tolist())
    return fit_head(encode, parts["train"]["text"][:], epsilon=epsilon_of(epsilon), pairs=pairs, seed=seed)


def described(head: DenseHead, parts: Mapping) -> str:
    """One line of what was fitted, on how many notes."""
    how = "centring alone" if math.isinf(head.epsilon) else f"epsilon {head.epsilon:g}"
    return f"head       {how}, fitted on {min(len(parts['train']), SAMPLE):,} notes of training patients"


def asked_of(words: Sequence[str] | None, notes: datasets.Dataset) -> dict[str, SimilarityRows]:
    """Uses by cosine of held-out notes; without words a patient's own notes, where any patient has two."""
    default = ["same_patient"] if len(pairs_if_any(notes)) else []
    asked = {task.name: similarity_rows(task) for task in similarity_tasks(words or default, notes)}
    if any(rows.queries for rows in asked.values()):
        raise ValueError("--similarity column:query needs texts that are no notes; use `densefeat probe`.")
    return asked


def compared(
    notes: datasets.Dataset, z: torch.Tensor, head: DenseHead, asked: Mapping[str, SimilarityRows], seed: int
) -> list[Measured]:
    """Held-out notes without and with the head, in the form of `before_after_table`."""
    pairs = pairs_if_any(notes)
    text_row = {text: i for i, text in enumerate(notes["text"][:])}
    measured: list[Measured] = []
    first: Both | None = None
    for name, rows in (("as it is", z), ("with the head", head(z))):
        uses = {
            task: similarity_of(
                rows[[text_row[text] for text in one.texts]], one, codes=("float",), divisors=(1,), seed=seed
            )
            for task, one in asked.items()
        }
        earlier, later = (rows[pairs.earlier], rows[pairs.later]) if len(pairs) else (rows, None)
        geometry = geometry_report(earlier, later, k=20)
        measured.append(measured_of(name, geometry, spectrum(rows, center=True), (uses, {}), base=first))
        first = first or (uses, {})
    return measured


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    quiet()
    run(head_parser().parse_args(argv))


def quiet() -> None:
    """Warnings alone, and one progress bar: that of encoding."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


if __name__ == "__main__":
    main()
