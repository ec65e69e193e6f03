"""The files beside a transformers model by which sentence-transformers pools, truncates and maps as we do."""

import json
from pathlib import Path

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
