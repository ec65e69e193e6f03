"""PEFT adapters: one trains inside a dense model, is saved alone, and is saved merged into plain weights.

A folder that a run with an adapter writes has the merged encoder at its root, which opens anywhere, and the adapter, from
which a run resumes, in `adapter/`: at the root its config would send transformers to look for the base model.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import cast

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from transformers import PreTrainedModel

ADAPTER = "adapter"


def with_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The model with a new adapter, all else frozen; ValueError for prompts and prefixes, which no weight can hold."""
    if config.is_prompt_learning:
        raise ValueError(
            f"{PeftType(config.peft_type).value} adds virtual tokens, which cannot be merged into the weights, so that no "
            "plain AutoModel could open the encoder. Use an adapter of the weights, such as LoraConfig."
        )
    return get_peft_model(model, config)


def without_adapter(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model inside, adapter layers in place: its forward is that of the adapted model."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def merged(model: PeftModel) -> PreTrainedModel:
    """A copy with the adapter merged into the weights: the model that trains stays as it is, to the last bit.

    Where the adapter changes one of the modules that share a weight, such as embeddings and a tied decoder, each module of
    the copy has its own, and the config says so: merged into the one weight it would change the others too.
    """
    copied = copy.deepcopy(model)
    base = without_adapter(copied)
    names = Counter(parameter for _, parameter in base.named_parameters(remove_duplicate=False))
    changed: set[torch.nn.Parameter] = set()
    for name, module in base.named_modules():
        changed |= set(module.parameters(recurse=False)) if name.endswith(".base_layer") else set()
        changed |= set(module.original_module.parameters()) if isinstance(module, ModulesToSaveWrapper) else set()
    if any(names[parameter] > 1 for parameter in changed):
        _untie(base)
    return cast(PreTrainedModel, copied.merge_and_unload())


def _untie(model: PreTrainedModel) -> None:
    """A weight of its own for every module."""
    seen: set[torch.nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            seen.add(parameter)
    model.config.tie_word_embeddings = False


def save_adapter(model: PeftModel, folder: Path | str) -> None:
    """The adapter alone, as `PeftModel.from_pretrained` reads it, without the path of a local base model."""
    [name] = model.active_adapters
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    if config.base_model_name_or_path and Path(config.base_model_name_or_path).exists():
        config.base_model_name_or_path = None
    config.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in weights.items()}
    save_file(weights, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(model: PeftModel, folder: Path | str) -> None:
    """What `save_adapter` wrote, back into the adapter that trains; ValueError if it does not fit."""
    [name] = model.active_adapters
    if not Path(folder).is_dir():
        raise ValueError(f"The checkpoint has no folder {ADAPTER!r}: it was not written by a run with peft_config.")
    try:
        result = model.load_adapter(str(folder), name, is_trainable=True)
    except RuntimeError:
        raise ValueError(
            "The adapter in the checkpoint has other shapes than that of peft_config, such as another rank r: resume with "
            "the peft_config that wrote it."
        ) from None
    if result.missing_keys or result.unexpected_keys:
        raise ValueError(
            f"The adapter in the checkpoint does not fit peft_config. Missing: {sorted(result.missing_keys)[:5]}; "
            f"unexpected: {sorted(result.unexpected_keys)[:5]}."
        )
