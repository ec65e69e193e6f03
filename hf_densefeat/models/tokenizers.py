"""The tokenizer of a folder or repository, refused where there is none."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

ABSENT = (
    "No tokenizer beside the model: pass one, model.encode(texts, tokenizer) or --tokenizer_name, or save one there, "
    "tokenizer.save_pretrained(FOLDER)."
)


def load_tokenizer(name_or_path: Path | str, **options: Any) -> Any:
    """As `AutoTokenizer.from_pretrained`, which makes one without a vocabulary of a folder that has a config alone.

    Raises:
        ValueError: if there is no tokenizer, or it knows no token but the special ones.
        OSError: if there is no such folder or repository.
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
    return tokenizer
