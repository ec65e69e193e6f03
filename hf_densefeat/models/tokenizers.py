"""The tokenizer of a folder or repository, refused where there is none."""

from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import AutoTokenizer

from hf_densefeat.models.sentence_transformers import MODULES, fetcher, read_transformer

ABSENT = (
    "No tokenizer beside the model: pass one, model.encode(texts, tokenizer) or --tokenizer_name, or save one there, "
    "tokenizer.save_pretrained(FOLDER)."
)


def check_vocabulary(tokenizer: Any, model: Any) -> None:
    """ValueError for a tokenizer with tokens for which the model has no embedding: words that were added to it."""
    largest, rows = max(tokenizer.get_vocab().values()), getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is not None and largest >= rows:
        raise ValueError(
            f"The tokenizer has {largest + 1:,} tokens, but {type(model).__name__} has embeddings for {rows:,}. For tokens "
            "that were added: model.resize_token_embeddings(len(tokenizer)), and save both in one folder."
        )


def load_tokenizer(name_or_path: Path | str, **options: Any) -> Any:
    """As `AutoTokenizer.from_pretrained`, which makes one without a vocabulary of a folder that has a config alone.

    Where the config of a sentence-transformers folder says so, the tokenizer lowers every text first. ValueError if there is
    no tokenizer, or it knows no token but the special ones; OSError if there is no such folder or repository.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options)
    except OSError:
        if Path(name_or_path).is_dir():
            raise ValueError(ABSENT) from None
        raise
    except (ValueError, TypeError) as error:
        raise ValueError(ABSENT) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(ABSENT)
    fetch = fetcher(str(name_or_path), options)
    if fetch(MODULES) and read_transformer(fetch).get("do_lower_case"):
        if not tokenizer.is_fast:
            raise ValueError(
                "do_lower_case needs a fast tokenizer, but the folder has a slow one: save a tokenizer.json."
            )
        backend = tokenizer.backend_tokenizer
        if '"type":"Lowercase"' not in backend.to_str():
            steps = [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer else [])]
            backend.normalizer = normalizers.Sequence(steps)
    return tokenizer
