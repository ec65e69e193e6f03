"""What validation notes choose: views of an encoder, fitted on training notes, and the share of the way from its start."""

import copy
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import cached_file

from hf_densefeat.commands.measuring import Encoded, Measurement, load, quiet, sample, words_of
from hf_densefeat.commands.settings import writable
from hf_densefeat.commands.vectors import given_vectors
from hf_densefeat.data.notes import describe_notes
from hf_densefeat.data.pairs import pairs_by_kind
from hf_densefeat.data.splits import SplitRecord, hold_out
from hf_densefeat.evaluation.similarity import similarity_tasks
from hf_densefeat.evaluation.words import Words
from hf_densefeat.models.choosing import Choice, Sides, choose_views, reciprocal_ranks
from hf_densefeat.models.head import DenseHead
from hf_densefeat.models.interpolation import choose_share, interpolate_weights
from hf_densefeat.reporting.comparison import Measured
from hf_densefeat.reporting.tables import before_after_table, terminal

logger = logging.getLogger(__name__)

KINDS = ("adjacent", "halves")  # of pairs by which views are fitted and chosen, and the share
FEW_PAIRS = 50  # the mean of so many ranks in [0, 1] has a standard error of up to .5 / sqrt(50) = .07
PAIRED = {"train": 5000, "validation": 2000}  # notes of whole patients: thousands of pairs are plenty for d^2 numbers
MOST = 1000  # pairs of each kind, which are encoded for every share that is tried


def opened(settings: Any) -> tuple[Any, Any]:
    """The encoder of `densefeat head` or `interpolate` and its tokenizer, once the options are checked."""
    check(settings)
    return load(settings.model, pooling=settings.pooling, max_length=settings.max_length)


def check(settings: Any) -> None:
    """ValueError for what can be refused before anything is read."""
    quiet()
    epsilon_of(settings.epsilon)
    similarity_tasks(settings.similarity or [], None)
    writable(settings.output, "output")


def fit_model(model: Any, tokenizer: Any, settings: Any, record: SplitRecord | None = None) -> None:
    """Fit the views of an encoder, save it with them, and measure; `record` is of another model in its weights, if any."""
    own = SplitRecord.of(model)
    for_similarity = model.config.densefeat["contrastive"] = trained_for_similarity(settings.model)
    words = partial(words_of, model=model, tokenizer=tokenizer)
    parts, record, measure = held_out(settings.read(), settings, words, record=own | record if own else record)
    encoder = below(model, tokenizer, batch_size=settings.batch_size, show_progress_bar=True)
    how: dict[str, Any] = {"epsilon": settings.epsilon, "seed": settings.seed, "for_similarity": for_similarity}
    model.views, tried = fit_views(encoder, parts, **how)
    try:
        record.write_to(model)  # the patients whose notes fit the head were trained on too
        model.save_pretrained(settings.output)
        record.save(settings.output)
        tokenizer.save_pretrained(settings.output)
    except SafetensorError as error:  # a full disk
        raise OSError(f"{settings.output} could not be written: {error}") from error
    show(measure, encoder, model.views, tried)
    print(f"Saved to {settings.output}.\n{how_to_use(settings.output, model.views)}")


def fit_vectors(settings: Any) -> None:
    """Fit the views of vectors that are there already, save each for sentence-transformers and for NumPy, and measure."""
    check(settings)
    notes, given = given_vectors([("vectors", settings.vectors)], settings)
    encoder, need = given["vectors"], ("train", "validation", "test")
    parts, _, measure = held_out(notes, settings, lambda part: Words.fit(part["text"][:]), need=need)
    how: dict[str, Any] = {"epsilon": settings.epsilon, "seed": settings.seed, "for_similarity": True}
    views, tried = fit_views(encoder, parts, kinds=("adjacent",), **how)  # the halves of a note have no vectors
    folder = Path(settings.output)
    for name, head in views.items():
        head.module().save(folder / name)
        np.savez(folder / f"{name}.npz", mean=head.mean.numpy(), matrix=head.matrix.numpy())
    show(measure, encoder, views, tried)
    print(f"Saved to {folder}: each view a Dense module of sentence-transformers and a file for NumPy.")


def held_out(
    notes: Any,
    settings: Any,
    words: Callable[[Any], Words],
    *,
    need: Sequence[str] = ("train", "test"),
    **options: Any,
) -> tuple[Mapping, SplitRecord, Measurement]:
    """The notes by part, the record of who is held out from now on, and what is measured on the held-out notes.

    `words` makes those that are measured beside the encoder, of training notes.
    """
    print(f"notes      {describe_notes(notes)}")
    allow, seed = settings.allow_trained, settings.seed
    parts, record = hold_out(notes, seed=seed, allow_trained=allow, need=need, **options)
    asked: dict[str, Any] = {"similarity": settings.similarity, "words": partial(words, parts["train"])}
    measure = Measurement(parts["test"], seed=seed, **asked)
    if measure.others:
        raise ValueError("--similarity column:query needs texts that are no notes; use `densefeat probe`.")
    return parts, record, measure


def show(measure: Measurement, encoder: Encoded, views: Mapping[str, DenseHead], tried: Sequence[Choice]) -> None:
    """Print what was fitted, and what held-out patients' notes look like as they are and under each view."""
    print(described(views, tried))
    start, after = measure("as it is", encoder), measured_views(measure, encoder, views)
    print(f"\n{terminal(before_after_table([start, *measure.beside(), *after]))}\n")


def measured_views(measure: Measurement, encoder: Encoded, views: Mapping[str, DenseHead]) -> list[Measured]:
    """What is measured under each view."""
    return [measure(f"{name} view", replace(encoder, head=head)) | {"view": name} for name, head in views.items()]


def trained_for_similarity(source: str) -> bool:
    """Whether a start is a sentence-transformers folder that is not of ours, or was trained from one.

    Such an encoder is used by its cosines as they are. OSError for a name that is none.
    """
    block = getattr(AutoConfig.from_pretrained(source), "densefeat", None)
    if block is not None:
        return bool(block.get("contrastive"))
    return cached_file(source, "modules.json", _raise_exceptions_for_missing_entries=False) is not None


def below(model: Any, tokenizer: Any, **options: Any) -> Encoded:
    """An encoder below its views, with the input embeddings where it gives them."""
    how: dict[str, Any] = {"tokenizer": tokenizer, "view": None, "input_layer": model.has_input_layer}
    return Encoded(partial(model.encode, **how, **options), width=model.embedding_dimension)


def fit_views(
    encoder: Encoded,
    parts: Mapping,
    *,
    epsilon: str = "auto",
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    for_similarity: bool = False,
) -> tuple[dict[str, DenseHead], list[Choice]]:
    """The views of unmasked training notes, and what was tried for the content view.

    `parts` are of `hold_out`, `kinds` of pairs are tried. With `epsilon` "center", or without pairs to fit or to choose by,
    the mean alone is subtracted; a number takes the place of that of the views.
    """
    notes = {name: sample(parts[name], most, seed) for name, most in PAIRED.items() if name in parts}
    pairs, given = {}, epsilon_of(epsilon)
    if given is None or given < math.inf:
        pairs = {name: encoded_pairs(encoder, part, kinds) for name, part in notes.items()}
    train, validation = pairs.get("train"), pairs.get("validation")
    if not train or not validation:
        return {"content": DenseHead.fit(encoder.below(notes["train"]["text"][:])[:, : encoder.width])}, []
    known = min(len(sides[0]) for sides in validation.values())
    if known < FEW_PAIRS:
        logger.warning(
            "Views are chosen by %d pairs of validation texts: fewer than %d cannot tell.", known, FEW_PAIRS
        )
    return choose_views(train, validation, width=encoder.width, for_similarity=for_similarity, epsilon=given)


def epsilon_of(word: str) -> float | None:
    """What `auto` (None), `center` (inf) or a number above 0 says; ValueError for another word."""
    if word == "auto":
        return None
    try:
        epsilon = math.inf if word == "center" else float(word)
    except ValueError:
        epsilon = 0.0
    if not epsilon > 0:
        raise ValueError(f"Expected auto, center or a number above 0 but got {word!r}.")
    return epsilon


def encoded_pairs(encoder: Encoded, notes: Any, kinds: Sequence[str]) -> dict[str, Sides]:
    """Embeddings of adjacent notes and of the halves of notes, of each kind that the notes have."""
    found = {}
    for kind, (table, pairs) in pairs_by_kind(notes, kinds).items():
        z = encoder.below(table["text"][:])
        found[kind] = (z[pairs.earlier], z[pairs.later])
    return found


def described(views: Mapping[str, DenseHead], tried: Sequence[Choice]) -> str:
    """Lines of what was fitted, and why."""
    if not tried:
        return "views      content: centring alone"
    chosen, base = tried[0], next(one for one in tried if not one.pairs)
    why = f"validation texts find their pairs with {chosen.found:.3f}, as it is {base.found:.3f}"
    lines = [f"views      content: {chosen}; {why}"]
    if "form" in views:
        lines.append(f"           form: by {views['form'].pairs} notes, epsilon {views['form'].epsilon:g}")
    return "\n".join(lines)


def how_to_use(folder: Any, views: Mapping[str, DenseHead]) -> str:
    """A line of sentence-transformers for each view."""
    calls = {"content": "encode(texts)", "form": 'encode(texts, task="form")'}
    used = {name: call for name, call in calls.items() if name in views} or {"search": "encode(texts)"}
    return "\n".join(f'{name.capitalize() + ":":9} SentenceTransformer("{folder}").{used[name]}' for name in used)


def go_share(
    model: Any, start: Any, validation: Any, *, share: str, tokenizer: Any, seed: int, new: Collection[str] = ()
) -> str:
    """Turn the trained model back to the share of the way that is asked for, in place; returns the share in words.

    Validation notes choose where `share` is "auto". `new` are names of weights that the start's checkpoint does not have.
    """
    if share != "auto":
        interpolate_weights(model, start, float(share), new=new)
        model.config.densefeat["share"] = float(share)
        return f"{float(share):g} of the way"
    sides = {}
    for kind, (texts, pairs) in pairs_by_kind(validation, KINDS).items():
        rows = np.random.default_rng(seed).permutation(len(pairs))[:MOST]
        sides[kind] = [texts.select(side[rows])["text"][:] for side in (pairs.earlier, pairs.later)]
    if not sides:
        return "all of the way: validation notes have no pairs that could choose the share"
    trained = copy.deepcopy(model)
    encode = partial(model.encode, tokenizer=tokenizer, view=None)

    def ranks(share: float) -> dict:
        model.load_state_dict(trained.state_dict())
        interpolate_weights(model, start, share, new=new)
        return {kind: reciprocal_ranks(*map(encode, texts)) for kind, texts in sides.items()}

    chosen, tried = choose_share(ranks)
    model.load_state_dict(trained.state_dict())
    interpolate_weights(model, start, chosen.share, new=new)
    model.config.densefeat["share"] = chosen.share
    found = (f"{one.share:g}: {' and '.join(f'{rank:.3f}' for rank in one.ranks.values())}" for one in tried)
    return f"{chosen}; tried {', '.join(found)}"
