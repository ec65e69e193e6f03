"""What a domain hands to `compare.py`: data, a model to start from, tasks, and how an input is damaged.

Each module here has `load(data, model_name_or_path=None) -> Domain`: `data` is the folder of data sets that --data names,
or None for the bundled cohort.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from hf_densefeat import ProbeTask, SimilarityTask
from hf_densefeat.data.tokens import TokenPairs


@dataclass
class Domain:
    """One domain of the study. An input is a string everywhere: a note, or JSON of what an episode holds.

    Attributes:
        name: text, tabular or multimodal.
        facts: one paragraph for the report: which data, how many patients, rows and pairs, which model.
        make_model: seed → the model that every method starts from; equal seeds, equal weights. It has the mixin.
        processor: tokenizer or event processor, the trainer's `processing_class`.
        train: pairs of training patients' episodes: `.pairs` (a `NotePairs`), `.lengths` and `__getitems__`.
        self_pairs: the same with every training row as both sides of a pair (SimCSE); `.pairs.num_notes` as in `train`.
        collator: "mlm" (masked input, labels) or None (clean input, labels all −100) → the collator.
        encode: (model, inputs) → embeddings (N, d) on the CPU, without gradient and dropout; where there are `pairs`, the
            mean of the input embeddings beside them, (N, D).
        open: folder of a trained encoder → the model; None where `encode` is not of any encoder.
        features: (some training inputs, inputs) -> (N, any width), what can be had without an encoder.
        train_inputs: inputs of training patients that the post-hoc transforms are fitted on, some thousands.
        earlier: inputs of held-out patients, for the geometry …
        later: … and those that follow them, row by row.
        patient: (P,) integer code of the patient of each of these pairs.
        tasks: probes, split by patient, or none; the column `text` holds the inputs. Test patients are not in `train`.
        primary: name of the classification task whose AUROC stands in Table 4, in the sweep and the robustness curves.
        supervised: (rows,) class of every row that `train.pairs` indexes, −1 where unknown or not a training patient.
        classes: number of these classes.
        supervised_task: the task that these labels belong to; there, the supervised baseline has seen the labels.
        degrade: (inputs, share, seed) → the inputs with this share of their sections or values missing.
        similarity: search, neighbours, clusters and few labels; a name that begins with "validation " is of validation
            patients, and only chooses.
        pairs: kind of pairs, "adjacent" and others -> both sides, texts of training notes; the views are fitted on them.
        judged: the same of validation notes, which choose the content view without labels.
        form: names of the similarity tasks that ask for form (a kind of section); the others ask for content.
        shift: probes that train at one place or time and are tested at another; may be empty.
        training: options of `DenseTrainingArguments` for every method: batch size, learning rate, subspace_dim, …
        key: what else tells runs apart, beside the facts, these options and the inputs: a checkpoint's weights, labels.
    """

    name: str
    facts: str
    make_model: Callable[[int], PreTrainedModel]
    processor: Any
    train: TokenPairs
    self_pairs: TokenPairs
    collator: Callable[[str | None], Callable]
    encode: Callable[[PreTrainedModel, list[str]], Tensor]
    features: Callable[[list[str], list[str]], np.ndarray]
    train_inputs: list[str]
    earlier: list[str]
    later: list[str]
    patient: np.ndarray
    open: Callable[[Path], PreTrainedModel] | None = None
    tasks: list[ProbeTask] = field(default_factory=list)
    primary: str | None = None
    supervised: np.ndarray | None = None
    classes: int = 0
    supervised_task: str | None = None
    degrade: Callable[[list[str], float, int], list[str]] | None = None
    shift: list[ProbeTask] = field(default_factory=list)
    similarity: list[SimilarityTask] = field(default_factory=list)
    pairs: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    judged: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    form: tuple[str, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    key: str = ""
