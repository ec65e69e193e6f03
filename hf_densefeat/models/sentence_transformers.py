"""What sentence-transformers needs: files by which it pools, truncates and maps as we do, and a live model as its own."""

import json
from pathlib import Path
from typing import Any

import torch

from hf_densefeat.models.head import FOLDER, DenseHead
from hf_densefeat.models.pooling import POOLINGS

FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling", FOLDER)


def write_files(
    folder: Path | str, *, width: int, pooling: str, max_length: int | None, head: DenseHead | None = None
) -> None:
    """Write the files into a folder that has a transformers model, in the older form, which every release from 2 to 6 reads.

    Args:
        folder: the model's.
        width: d.
        pooling: a name of `POOLINGS`.
        max_length: tokens that are kept of a text; None for all that the tokenizer keeps.
        head: the map that follows pooling, saved as a `Dense` module.
    """
    types = "sentence_transformers.models"
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if head is not None:
        head.save(folder)
        modules.append((FOLDER, "Dense"))
    files = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"{types}.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            **{f"pooling_mode_{mode}": mode == POOLINGS[pooling].mode for mode in modes},
            "include_prompt": True,
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "__version__": {},
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")


class _Live(torch.nn.Module):
    """A model that trains, as the one module of a SentenceTransformer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def preprocess(self, texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        """Tokens of a batch; `tokenize` is the name before release 6."""
        length = self.model.max_length or self.tokenizer.model_max_length
        options = {"truncation": True, "max_length": length, "padding": True, "padding_side": "right"}
        return dict(self.tokenizer(list(texts), return_tensors="pt", **options))

    tokenize = preprocess

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """The features with the embeddings of `encode`."""
        tokens = {name: value for name, value in features.items() if name in self.tokenizer.model_input_names}
        return features | {"sentence_embedding": self.model.encode(tokens)}

    def get_embedding_dimension(self) -> int:
        """d; `get_sentence_embedding_dimension` is the name before release 6."""
        return self.model.config.hidden_size

    get_sentence_embedding_dimension = get_embedding_dimension


def as_sentence_transformer(model: Any, tokenizer: Any) -> Any:
    """A SentenceTransformer that encodes with a model in memory, as it is now: nothing is copied or saved.

    Args:
        model: with `DenseFeatureMixin`.
        tokenizer: the model's.
    """
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(modules=[_Live(model, tokenizer)], device=str(model.device))


def evaluated(evaluator: Any, model: Any, tokenizer: Any) -> dict[str, float]:
    """The numbers of an evaluator: one of sentence-transformers gets a SentenceTransformer, another model and tokenizer."""
    theirs = any(base.__module__.startswith("sentence_transformers.") for base in type(evaluator).__mro__)
    if not theirs:
        return evaluator(model, tokenizer)
    found = evaluator(as_sentence_transformer(model, tokenizer))
    return found if isinstance(found, dict) else {getattr(evaluator, "name", "") or "evaluator": float(found)}
