"""`densefeat head`: end a high mean cosine, or sharpen search, without training: fit the dense head of any encoder.

    densefeat head --model emilyalsentzer/Bio_ClinicalBERT --notes notes.parquet --output out
    densefeat head --model out --notes notes.parquet --output sharper --epsilon auto

The head is an affine map, fitted in closed form on training patients' notes and saved as a `Dense` module beside the encoder:
`SentenceTransformer(out)` and `AutoDenseModel.from_pretrained(out)` apply it, and the encoder's weights stay as they are. It
prints what the held-out patients' notes look like before and after.
"""

import argparse
import logging
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from hf_densefeat.commands.measure import similarity_tasks
from hf_densefeat.data.notes import describe_notes, load_notes
from hf_densefeat.data.pairs import adjacent_pairs
from hf_densefeat.data.splits import split_by_patient
from hf_densefeat.evaluation.geometry import geometry_report, spectrum
from hf_densefeat.evaluation.similarity import similarity_of
from hf_densefeat.evaluation.similarity_tasks import similarity_rows
from hf_densefeat.models.dense import AutoDenseModel
from hf_densefeat.models.head import SAMPLE, DenseHead, choose_epsilon
from hf_densefeat.reporting.comparison import triples
from hf_densefeat.reporting.tables import before_after_table, terminal


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="densefeat head", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", required=True, help="Hub name or folder of the encoder")
    found.add_argument("--notes", required=True, help="table of notes: a file, a folder or a Hub name")
    found.add_argument("--output", required=True, help="folder to write")
    found.add_argument("--epsilon", default="center", help="center (the default), auto, or a number: 1 for search")
    found.add_argument("--pooling", help="mean, cls, last or max; default: the encoder's, else mean")
    found.add_argument("--max_length", type=int, help="tokens of a note; default: what the encoder can see")
    found.add_argument("--batch_size", type=int, default=32)
    found.add_argument("--similarity", action="append", help="same_patient (the default) or column:kind, as in probe")
    found.add_argument("--seed", type=int, default=0, help="of the split by patient and of the sample")
    return found


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Encode, fit, save, measure; returns the seconds that encoding and the rest took.

    Raises:
        ValueError: for notes, a model or an epsilon that cannot be used.
    """
    chosen = {"center": math.inf, "auto": None}
    try:
        epsilon = chosen[arguments.epsilon] if arguments.epsilon in chosen else float(arguments.epsilon)
    except ValueError:
        raise ValueError(f"Expected --epsilon center, auto or a number but got {arguments.epsilon!r}.") from None
    notes = load_notes(arguments.notes)
    print(f"notes      {describe_notes(notes)}")
    parts = split_by_patient(notes, seed=arguments.seed)
    model = AutoDenseModel.from_pretrained(
        arguments.model, pooling=arguments.pooling, max_length=arguments.max_length
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    model.dense_head = None
    encode = partial(model.encode, batch_size=arguments.batch_size, show_progress=True, head=False)
    order = np.random.default_rng(arguments.seed).permutation(len(parts["train"]))[:SAMPLE]
    train = parts["train"].select(np.sort(order))
    begun = time.perf_counter()
    z = {name: encode(list(part["text"])) for name, part in (("train", train), ("test", parts["test"]))}
    if epsilon is None:
        following = adjacent_pairs(parts["validation"])
        seen = encode(list(parts["validation"]["text"]))
        epsilon = choose_epsilon(z["train"], seen[following.earlier], seen[following.later])
    encoded = time.perf_counter() - begun
    head = DenseHead.fit(z["train"], epsilon=epsilon)
    model.dense_head = head
    Path(arguments.output).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.output)
    model._default_tokenizer().save_pretrained(arguments.output)
    how = "centring alone" if math.isinf(head.epsilon) else f"epsilon {head.epsilon:g}"
    print(f"head       {how}, fitted on {len(train):,} notes of training patients")
    measured = compared(parts["test"], z["test"], head, arguments)
    print(f"\n{terminal(before_after_table(measured))}\n")
    print(f"Saved to {arguments.output}: SentenceTransformer and AutoDenseModel apply the head, AutoModel does not.")
    return {"encode": encoded, "rest": time.perf_counter() - begun - encoded}


def compared(notes: datasets.Dataset, z: torch.Tensor, head: DenseHead, arguments: argparse.Namespace) -> list[dict]:
    """Held-out notes without and with the head, in the form of `before_after_table`."""
    pairs = adjacent_pairs(notes)
    tasks = similarity_tasks(arguments.similarity or ["same_patient"], notes)
    measured, first = [], {}
    for name, rows in (("as it is", z), (f"with the head, {arguments.epsilon}", head(z))):
        found = {
            "name": name,
            "geometry": geometry_report(rows[pairs.earlier], rows[pairs.later], k=20),
            "spectrum": spectrum(rows, center=True).tolist(),
            "similarity": {},
            "probes": {},
            "differences": {},
        }
        text_row = {text: i for i, text in enumerate(notes["text"][:])}
        for task in tasks:
            asked = similarity_rows(task)
            if asked.queries:
                raise ValueError("--similarity column:query needs texts that are no notes; use `densefeat probe`.")
            places = [text_row[text] for text in asked.texts]
            result = similarity_of(rows[places], asked, codes=("float",), divisors=(1,), seed=arguments.seed)
            found["similarity"] |= triples({task.name: result})
            if task.name in first:
                found["differences"] |= triples({task.name: result}, first)
            first.setdefault(task.name, result)
        measured.append(found)
    return measured


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run; what is wrong is one line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        run(parser().parse_args(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"densefeat head: error: {error}")


if __name__ == "__main__":
    main()
