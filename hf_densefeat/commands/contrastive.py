"""What `pretrain` does by itself with a start that was trained for similarity, and the share of the way that serves."""

import copy
from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np
from transformers import AutoConfig
from transformers.utils import cached_file

from hf_densefeat.commands.pretrain import Settings
from hf_densefeat.data.pairs import pairs_by_kind
from hf_densefeat.models.choosing import reciprocal_ranks
from hf_densefeat.models.interpolation import choose_share, interpolate_weights
from hf_densefeat.training.arguments import CONTRASTIVE, DenseTrainingArguments

KINDS = ("adjacent", "halves")  # of the validation pairs that choose the share
MOST = 1000  # of each kind, which are encoded for every share that is tried


def trained_for_similarity(source: str) -> bool:
    """Whether a start is a sentence-transformers folder that is not of ours, or was trained from one.

    Such an encoder is used by its cosines as they are. OSError for a name that is none.
    """
    block = getattr(AutoConfig.from_pretrained(source), "densefeat", None)
    if block is not None:
        return bool(block.get("contrastive"))
    return cached_file(source, "modules.json", _raise_exceptions_for_missing_entries=False) is not None


def take_defaults(settings: Settings, args: DenseTrainingArguments) -> str:
    """Set the options that were not given to what a contrastive start needs; return these in words."""
    chosen = {name: value for name, value in CONTRASTIVE.items() if name not in settings.given}
    if "num_train_epochs" in settings.given:
        chosen.pop("max_steps", None)
    for name, value in chosen.items():
        setattr(args, name, value)
    settings.share = settings.share or "auto"
    words = ", ".join(f"{name} {value:g}" for name, value in chosen.items())
    return f"trained for similarity, so by default {words}, share {settings.share}"


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
