"""Modules that follow pooling in a sentence-transformers folder: read, applied and written without that library."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

Fetch = Callable[[str], str | None]  # the name of a file in a folder or repository -> where it lies, or None
EMBEDDING = "sentence_embedding"  # what a module after pooling reads and writes
BESIDE = "cls_token_embeddings"  # where `Pooling` by "cls" looks first: it can put two vectors side by side
WEIGHTED = ("Dense", "LayerNorm")
KEPT = (*WEIGHTED, "Normalize", "Dropout")


def read_json(file: str | None) -> Any:
    """What a JSON file holds; {} where there is no file."""
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else {}


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, and the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class SentenceModule:
    """One module of a sentence-transformers folder."""

    kind: str  # the name of its class there
    options: dict[str, Any]  # its `config.json`
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)  # by the names that its class gives them
    metadata: dict[str, str] = field(default_factory=dict)  # of its safetensors file

    @classmethod
    def load(cls, kind: str, path: str, fetch: Fetch) -> SentenceModule:
        """Read the config and weights of a module; ValueError for a class or an option that `__call__` does not know."""
        if kind not in KEPT:
            raise ValueError(f"the module {kind} is none of {', '.join(KEPT)}")
        options = read_json(fetch(f"{path}/config.json"))
        # older releases of sentence-transformers refuse these two names, so the default is not written back
        places = {options.pop(name, None) or EMBEDDING for name in ("module_input_name", "module_output_name")}
        if places != {EMBEDDING}:
            raise ValueError(f"the module {kind} reads or writes {', '.join(sorted(places - {EMBEDDING}))}")
        module = cls(kind, options, *_weights(path, fetch) if kind in WEIGHTED else ({}, {}))
        if kind == "Dense":
            module.activation()
        return module

    def activation(self) -> torch.nn.Module:
        """Of a Dense module: a class of torch.nn, Tanh where none is named."""
        name = self.options.get("activation_function", "torch.nn.Tanh")
        found = getattr(torch.nn, name.rpartition(".")[2], None)
        if not name.startswith("torch.nn.") or not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
            raise ValueError(f"the module Dense has the activation {name}, which is no class of torch.nn")
        return found()

    def __call__(self, z: Tensor) -> Tensor:
        """Embeddings (N, d) to what the module makes of them in evaluation, with the gradient by `z` alone."""
        weights = {name: value.to(z) for name, value in self.weights.items()}
        if self.kind == "Normalize":
            return F.normalize(z, dim=-1)
        if self.kind == "LayerNorm":
            return F.layer_norm(z, z.shape[-1:], weights["norm.weight"], weights["norm.bias"])
        if self.kind == "Dropout":
            return z
        out = self.activation()(F.linear(z, weights["linear.weight"], weights.get("linear.bias")))
        if self.options.get("use_residual"):
            out = out + (F.linear(z, weights["residual.weight"]) if "residual.weight" in weights else z)
        return out

    def save(self, folder: Path) -> None:
        """Write the config and the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.options:
            write_json(folder / "config.json", self.options)
        if self.weights:
            weights = {name: value.contiguous() for name, value in self.weights.items()}
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"} | self.metadata)


def dense_options(inputs: int, outputs: int, *, bias: bool) -> dict[str, Any]:
    """`config.json` of a Dense module without activation."""
    identity = "torch.nn.modules.linear.Identity"
    return {"in_features": inputs, "out_features": outputs, "bias": bias, "activation_function": identity}


def _weights(path: str, fetch: Fetch) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata; folders of the first releases have a `pytorch_model.bin`, read without unpickling code."""
    if file := fetch(f"{path}/model.safetensors"):
        with safe_open(file, "pt") as opened:
            return load_file(file), opened.metadata() or {}
    if file := fetch(f"{path}/pytorch_model.bin"):
        return torch.load(file, map_location="cpu", weights_only=True), {}
    raise ValueError(f"{path} has neither model.safetensors nor pytorch_model.bin")


def through(modules: Sequence[SentenceModule], z: Tensor) -> Tensor:
    """Embeddings (N, d) through modules, one after the other, in their own precision also under autocast."""
    with torch.autocast(z.device.type, enabled=False):
        for module in modules:
            z = module(z)
    return z
