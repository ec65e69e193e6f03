"""Folders of sentence-transformers: read as they are, written so that it embeds as we do, and a live model as its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import cached_file

from hf_densefeat.models.encoding import NO_LIMIT
from hf_densefeat.models.head import DenseHead
from hf_densefeat.models.modules import BESIDE, EMBEDDING, Fetch, SentenceModule, dense_options, read_json, write_json
from hf_densefeat.models.pooling import POOLINGS

ROUTER, TYPE = "router_config.json", "sentence_transformers.models.{}"
MODULES, TRANSFORMER, SETTINGS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
TOKENIZER = "tokenizer_config.json"
# by the classes of the first releases
OLDER = ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
KNOWN = {"max_seq_length", "do_lower_case", "transformer_task", "modality_config"}  # options of a Transformer
KNOWN |= {"config_args", "module_output_name", "unpad_inputs"}
OUTPUT = {"method": "forward", "method_output_name": "last_hidden_state"}


@dataclass(frozen=True)
class SentenceSettings:
    """What a sentence-transformers folder adds to a transformer and its pooling."""

    tail: tuple[SentenceModule, ...] = ()  # modules after pooling, in order
    prompts: dict[str, str] = field(default_factory=dict)  # name to the text that is put before every text
    default_prompt_name: str | None = None  # the prompt where `encode` names none; None for no prompt
    include_prompt: bool = True  # pool over the tokens of the prompt too
    lower_case: bool = False  # the tokenizer lowers every text first
    similarity: str | None = "cosine"  # by which embeddings are to be compared; None for what the library takes

    def prompt(self, name: str | None = None) -> str:
        """The prompt of a name, by default the default one; ValueError for a name that the folder does not have."""
        name = name or self.default_prompt_name
        if name is not None and name not in self.prompts:
            raise ValueError(
                f"Expected prompt_name to be one of {', '.join(self.prompts) or 'none'} but got {name!r}."
            )
        return self.prompts[name] if name is not None else ""

    def excluded(self, prompt: str, tokenizer: Any) -> int:
        """How many tokens of a prompt, the opening one included, stand before what is pooled; 0 where all is pooled."""
        if self.include_prompt or not prompt:
            return 0
        ids = tokenizer(prompt)["input_ids"]
        return len(ids) - (ids[-1] in tokenizer.all_special_ids)


class SentenceFolder(NamedTuple):
    """What `modules.json` and the files that it names say of how a folder embeds a text."""

    pooling: str | None  # a name of `POOLINGS`; None without `modules.json`
    max_length: int | None  # tokens that are kept of a text; None for as many as the transformer has positions
    settings: SentenceSettings  # what comes beside and after pooling
    views: dict[str, DenseHead]  # the last module: a `DenseHead` alone, or one for each route of a `Router`


def fetcher(name_or_path: str, hub: dict[str, Any]) -> Fetch:
    """What finds a file of a folder or Hub repository: its path, or None where there is no such file."""
    options: dict[str, Any] = {name: value for name, value in hub.items() if name != "trust_remote_code"}
    return partial(cached_file, str(name_or_path), _raise_exceptions_for_missing_entries=False, **options)


def read_folder(name_or_path: str, hub: dict[str, Any]) -> SentenceFolder:
    """What a folder or Hub repository says, in the layout of any release from 2 to 6; `hub` says where and how to look.

    ValueError for what another model than ours would have to compute, OSError if there is no such folder or repository.
    """
    fetch = fetcher(name_or_path, hub)
    if fetch(MODULES) is None:  # without what is for texts: an encoder of episodes has its views in its config's block
        names = (read_json(fetch("config.json")).get("densefeat") or {}).get("views", ())
        views = {name: DenseHead.of_module(SentenceModule.load("Dense", f"{name}_Dense", fetch)) for name in names}
        return SentenceFolder(None, None, SentenceSettings(), views)
    try:
        return _read(fetch)
    except ValueError as error:
        raise ValueError(
            f"{Path(name_or_path).name} cannot be kept as it is: {error}. A sentence-transformers folder is read where it has "
            "a text Transformer, then Pooling by one mode, then Dense, Normalize, LayerNorm or Dropout."
        ) from error


def _read(fetch: Fetch) -> SentenceFolder:
    modules = read_json(fetch(MODULES))
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    other = [module["type"] for module in modules if not str(module["type"]).startswith("sentence_transformers.")]
    if other or kinds[:2] != ["Transformer", "Pooling"] or modules[0]["path"]:
        raise ValueError(f"its modules are {', '.join(other or kinds)}")
    settings, transformer = read_json(fetch(SETTINGS)), read_transformer(fetch)
    model, task = settings.get("model_type", "SentenceTransformer"), transformer.get("transformer_task")
    if model != "SentenceTransformer" or task not in (None, "feature-extraction"):
        raise ValueError(f"it is a {model} for the task {task}")
    modality = transformer.get("modality_config", {"text": OUTPUT})
    if modality.get("text") != OUTPUT or "message" in modality:
        raise ValueError(f"its Transformer takes {', '.join(modality)}, or not the last hidden state")
    unknown = [name for name, value in transformer.items() if value and name not in KNOWN]
    unknown += ["truncate_dim"] if settings.get("truncate_dim") else []
    if unknown:
        raise ValueError(f"it sets {', '.join(unknown)}")
    pooling, include_prompt = _read_pooling(read_json(fetch(f"{modules[1]['path']}/config.json")))
    paths = [(kind, module["path"]) for kind, module in zip(kinds[2:], modules[2:], strict=True)]
    paths, views = _read_views(paths, fetch)
    tail = [SentenceModule.load(kind, path, fetch) for kind, path in paths]
    length = transformer.get("max_seq_length") or read_json(fetch(TOKENIZER)).get("model_max_length")
    kept = int(length) if length and length < NO_LIMIT else None
    prompts, default_prompt_name = settings.get("prompts") or {}, settings.get("default_prompt_name")
    lower_case, similarity = bool(transformer.get("do_lower_case")), settings.get("similarity_fn_name")
    own = SentenceSettings(tuple(tail), prompts, default_prompt_name, include_prompt, lower_case, similarity)
    return SentenceFolder(pooling, kept, own, views)


def _read_views(paths: list[tuple[str, str]], fetch: Fetch) -> tuple[list[tuple[str, str]], dict[str, DenseHead]]:
    """Kinds and paths of the modules before the views, and the views."""
    kind, path = paths[-1] if paths else ("", "")
    if kind == "Router":
        routes = read_json(fetch(f"{path}/{ROUTER}")).get("structure", {})
        views = {name: one for name, one in routes.items() if name in ("content", "form")}
        others = [name for name, one in routes.items() if name not in views and one != views.get("content")]
        if "content" not in views or others or any(len(one) != 1 for one in views.values()):
            raise ValueError(f"its Router has the routes {', '.join(routes)}")
        places = {name: f"{path}/{one}" for name, (one,) in views.items()}
    else:
        places = {"content": path} if kind == "Dense" else {}
    modules = {name: SentenceModule.load("Dense", place, fetch) for name, place in places.items()}
    wide = [one for one, _ in paths[-4:-1]] == ["Dense", "WeightedLayerPooling", "Pooling"]
    # without a mark the last Dense is another's, and belongs to the embedding
    if kind != "Router" and not wide and not any("epsilon" in module.metadata for module in modules.values()):
        return paths, {}
    before = paths[:-4] if wide else paths[:-1]
    return before, {name: DenseHead.of_module(module) for name, module in modules.items()}


def read_transformer(fetch: Fetch) -> dict[str, Any]:
    """The config of the module Transformer; {} where there is none."""
    names = (TRANSFORMER, *(f"sentence_{name}_config.json" for name in OLDER))
    return next((read_json(file) for name in names if (file := fetch(name))), {})


def _read_pooling(config: dict[str, Any]) -> tuple[str, bool]:
    """The name of the pooling, and whether it pools over the prompt; from release 6 on the mode is one word."""
    modes = config.get("pooling_mode") or [mode for mode in MODES if config.get(f"pooling_mode_{mode}")] or "mean"
    modes = [modes] if isinstance(modes, str) else modes
    short = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    names = {entry.mode: name for name, entry in POOLINGS.items()}
    found = [names.get(short.get(mode, mode)) for mode in modes]
    if len(found) != 1 or found[0] is None:
        raise ValueError(f"it pools by {' and '.join(modes)}")
    return found[0], config.get("include_prompt", True)


def write_folder(target: Path | str, model: Any) -> None:
    """Write a dense model's files into its folder, in the older form, which every release from 2 to 6 reads."""
    folder, settings, modules = Path(target), model.sentence, placed_modules(model)
    for path, module in modules.items():
        module.save(folder / path)
    entries = list(dict.fromkeys(path.split("/")[0] for path in modules))
    if entries[-1].endswith("Router"):
        write_json(folder / entries[-1] / ROUTER, _router(list(model.views)))
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": TYPE.format(path.partition("_")[2] or "Transformer")}
        for i, path in enumerate(["", *entries])
    ]
    write_json(folder / MODULES, listed)
    transformer: dict[str, Any] = {"max_seq_length": model.max_length, "do_lower_case": settings.lower_case}
    if any(module.kind == "WeightedLayerPooling" for module in modules.values()):
        transformer["config_args"] = {"output_hidden_states": True}
    write_json(folder / TRANSFORMER, transformer)
    own: dict[str, Any] = {"model_type": "SentenceTransformer", "__version__": {}, "prompts": settings.prompts}
    own |= {"default_prompt_name": settings.default_prompt_name, "similarity_fn_name": settings.similarity}
    write_json(folder / SETTINGS, own)


def placed_modules(model: Any) -> dict[str, SentenceModule]:
    """Path in the folder to module of what follows the transformer, in order, those of the views last."""
    modules = [_pooling(model, POOLINGS[model.pooling].mode), *model.tail]
    if any(len(head.mean) > model.embedding_dimension for head in model.views.values()):
        modules += _beside(model)
    found = {f"{place}_{module.kind}": module for place, module in enumerate(modules, start=1)}
    last = f"{len(modules) + 1}_" + ("Router/{}_0_Dense" if len(model.views) > 1 else "Dense")
    return found | {last.format(name): head.module() for name, head in model.views.items()}


def _pooling(model: Any, *modes: str) -> SentenceModule:
    flags = {f"pooling_mode_{one}": one in modes for one in MODES}
    options = {"word_embedding_dimension": model.config.hidden_size, **flags}
    return SentenceModule("Pooling", options | {"include_prompt": model.sentence.include_prompt})


def _beside(model: Any) -> list[SentenceModule]:
    """Modules that append the mean of the input embeddings (N, width) to the embedding (N, d).

    The embedding is kept where `Pooling` takes the vector of its mode "cls" from, the input embeddings take the place of the
    last states, and `Pooling` by "cls" and "mean" puts both side by side.
    """
    d, width, layers = model.embedding_dimension, model.config.hidden_size, model.config.num_hidden_layers
    copy = dense_options(d, d, bias=False) | {"module_input_name": EMBEDDING, "module_output_name": BESIDE}
    first = {"word_embedding_dimension": width, "layer_start": 0, "num_hidden_layers": layers}
    return [
        SentenceModule("Dense", copy, {"linear.weight": torch.eye(d)}),
        SentenceModule("WeightedLayerPooling", first, {"layer_weights": torch.eye(layers + 1)[0]}),
        _pooling(model, "cls_token", "mean_tokens"),
    ]


def _router(names: list[str]) -> dict[str, Any]:
    """The config of a `Router` by `task`; `encode_query` and `encode_document` are of the first view."""
    routes = {name: name for name in names} | {"query": names[0], "document": names[0]}
    return {
        "types": {f"{name}_0_Dense": TYPE.format("Dense") for name in names},
        "structure": {task: [f"{name}_0_Dense"] for task, name in routes.items()},
        "parameters": {"default_route": names[0], "allow_empty_key": True},
    }


def files_of(folder: Path | str) -> list[str]:
    """Names of the files that `write_folder` writes, and of the folders of modules that are there."""
    return [MODULES, TRANSFORMER, SETTINGS, *(path.name for path in Path(folder).glob("[0-9]*_*"))]


class _Live(torch.nn.Module):
    """A model that trains, as the one module of a SentenceTransformer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def preprocess(self, texts: list[str], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Tokens of a batch."""
        length = self.model.max_length or self.tokenizer.model_max_length
        options = {"truncation": True, "max_length": length, "padding": True, "padding_side": "right"}
        tokens = self.tokenizer([(prompt or "") + text for text in texts], return_tensors="pt", **options)
        return dict(tokens) | {"prompt_length": self.model.sentence.excluded(prompt or "", self.tokenizer)}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """The features with the embeddings of `encode`."""
        names = (*self.tokenizer.model_input_names, "prompt_length")
        tokens = {name: value for name, value in features.items() if name in names}
        return features | {"sentence_embedding": self.model.encode(tokens)}

    def get_embedding_dimension(self) -> int:
        """Width of what `encode` gives."""
        return self.model.output_dimension


def as_sentence_transformer(model: Any, tokenizer: Any) -> Any:
    """A SentenceTransformer that encodes with a dense model in memory, as it is now: nothing is copied or saved."""
    from sentence_transformers import SentenceTransformer

    settings = model.sentence
    prompts = {"prompts": dict(settings.prompts), "default_prompt_name": settings.default_prompt_name}
    return SentenceTransformer(modules=[_Live(model, tokenizer)], device=str(model.device), **prompts)


def evaluated(evaluator: Any, model: Any, tokenizer: Any) -> dict[str, float]:
    """The numbers of an evaluator: one of sentence-transformers gets a SentenceTransformer, another model and tokenizer."""
    theirs = any(base.__module__.startswith("sentence_transformers.") for base in type(evaluator).__mro__)
    if not theirs:
        return evaluator(model, tokenizer)
    found = evaluator(as_sentence_transformer(model, tokenizer))
    return found if isinstance(found, dict) else {getattr(evaluator, "name", "") or "evaluator": float(found)}
