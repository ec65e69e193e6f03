"""The dense head of an encoder, fitted on training patients' notes: of `head`, `interpolate` and `pretrain`."""

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from hf_densefeat.commands.head import Settings
from hf_densefeat.commands.measuring import Lookup, Measurement, default_similarity, loading, quiet, similarity_tasks
from hf_densefeat.commands.settings import writable
from hf_densefeat.data.notes import describe_notes
from hf_densefeat.data.pairs import adjacent_pairs
from hf_densefeat.data.splits import SplitRecord, hold_out
from hf_densefeat.models.dense import AutoDenseModel
from hf_densefeat.models.head import SAMPLE, DenseHead, epsilon_of, fit_head
from hf_densefeat.models.tokenizers import load_tokenizer
from hf_densefeat.reporting.tables import before_after_table, terminal

logger = logging.getLogger(__name__)

FEW_PAIRS = 50  # the mean of so many ranks in [0, 1] has a standard error of up to .5 / sqrt(50) = .07


def loaded(settings: Settings) -> Any:
    """The encoder that the command names."""
    quiet()
    with loading(settings.model):
        return AutoDenseModel.from_pretrained(settings.model, pooling=settings.pooling, max_length=settings.max_length)


def fit_and_save(model: Any, settings: Settings, record: SplitRecord | None = None) -> None:
    """Read the notes, encode, fit, save, measure.

    Args:
        model: the encoder.
        settings: of the command.
        record: of whom another model was trained on that is in the encoder's weights.
    """
    writable(settings.output, "output")
    similarity_tasks(settings.similarity or [], None)  # words alone: before the notes are read
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(settings.model)
    notes = settings.read()
    print(f"notes      {describe_notes(notes)}")
    own = SplitRecord.of(model)
    record = own | record if own else record
    need = ("train", "validation", "test") if settings.epsilon == "auto" else ("train", "test")
    how: dict[str, Any] = {"seed": settings.seed, "record": record, "allow_trained": settings.allow_trained}
    parts, record = hold_out(notes, need=need, **how)
    held_out = parts["test"]
    measure = Measurement(held_out, similarity=settings.similarity or default_similarity(held_out), seed=settings.seed)
    if measure.uses and any(rows.queries for rows in measure.uses.rows.values()):
        raise ValueError("--similarity column:query needs texts that are no notes; use `densefeat probe`.")
    model.dense_head = None
    encode = partial(
        model.encode, tokenizer=tokenizer, batch_size=settings.batch_size, show_progress_bar=True, head=False
    )
    head = fit_on_parts(encode, parts, settings.epsilon, settings.seed)
    model.dense_head = head
    try:
        record.write_to(model)  # the patients whose notes fit the head were trained on too
        model.save_pretrained(settings.output)
        record.save(settings.output)
        tokenizer.save_pretrained(settings.output)
    except SafetensorError as error:  # a full disk
        raise OSError(f"{settings.output} could not be written: {error}") from error
    print(described(head, parts))
    z = encode(measure.texts)
    measured = [
        measure(name, Lookup(measure.texts, rows)) for name, rows in (("as it is", z), ("with the head", head(z)))
    ]
    print(f"\n{terminal(before_after_table(measured))}\n")
    print(f"Saved to {settings.output}: SentenceTransformer and AutoDenseModel apply the head, AutoModel does not.")


def fit_on_parts(encode: Callable[..., torch.Tensor], parts: Mapping, epsilon: str, seed: int) -> DenseHead:
    """The head of unmasked training notes; "auto" chooses epsilon by the next notes of validation patients.

    Args:
        encode: texts -> embeddings without a head.
        parts: notes by split, as `hold_out` returns them.
        epsilon: "center", "auto" or a number above 0, as a word.
        seed: of the sample of training notes.
    """
    pairs = validation_pairs(parts) if epsilon == "auto" else None
    if pairs is not None and len(pairs[0]) < FEW_PAIRS:
        logger.warning("Epsilon is chosen on %d pairs of notes: fewer than %d cannot tell.", len(pairs[0]), FEW_PAIRS)
    return fit_head(encode, parts["train"]["text"][:], epsilon=epsilon_of(epsilon), pairs=pairs, seed=seed)


def validation_pairs(parts: Mapping) -> tuple[list[str], list[str]]:
    """Texts of validation patients' adjacent notes, by which epsilon is chosen; ValueError where there are none."""
    following = adjacent_pairs(parts["validation"])
    texts = np.array(parts["validation"]["text"][:], dtype=object)
    return texts[following.earlier].tolist(), texts[following.later].tolist()


def described(head: DenseHead, parts: Mapping) -> str:
    """One line of what was fitted, on how many notes."""
    how = "centring alone" if math.isinf(head.epsilon) else f"epsilon {head.epsilon:g}"
    return f"head       {how}, fitted on {min(len(parts['train']), SAMPLE):,} notes of training patients"
