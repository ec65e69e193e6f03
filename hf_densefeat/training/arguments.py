"""DenseTrainingArguments: TrainingArguments and what the dense objective, its pairs and its masks add."""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hf_densefeat.data.pairs import check_kinds
from hf_densefeat.objective.expander import Expander
from hf_densefeat.objective.objective import DenseObjective
from hf_densefeat.objective.statistics import Term
from hf_densefeat.training.options import option

# What a contrastive start is trained with, where nothing else is said: an anchor to what it knows of unrelated notes, two
# kinds of pairs, which together lose content on none of three domains (`recipes/results/minilm.md`), and no language
# modelling, which takes up to two fifths of what is gained (`recipes/results/mtsamples.md`, `findings.md`).
CONTRASTIVE: dict[str, Any] = {
    "pairs": ["adjacent", "halves"],
    "mlm_weight": 0.0,
    "lambda_anchor": 10 / 3,
    "learning_rate": 5e-5,
    "max_steps": 60,
    "per_device_train_batch_size": 24,
    "warmup_steps": 6,
}


@dataclass(repr=False)  # the one of TrainingArguments hides tokens
class DenseTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the weights of the dense terms.

    loss = mlm_weight MLM + dense_weight (L_spec + lambda_sub L_sub + lambda_orth L_orth + lambda_pair L_pair + lambda_anchor
    L_anchor), L_pair the share of variance that the notes of a pair do not share (`unshared_variance`), L_anchor how far
    cosines of unrelated notes have moved from those of the frozen start (`anchor`; a copy of the model is kept for it).

    Batch sizes count pairs: a forward sees 2 x `per_device_train_batch_size` notes. Different from the stock defaults:
    repositories are private, buffers are not broadcast, `logging_steps` is 10.

    The defaults were chosen by similarity on validation documents, by content; what they cost is form, such as the kind of
    a section (`recipes/results/documents.md`).
    """

    mlm_weight: float = option(1.0, help="Weight of the language-modelling loss; 0 freezes its head.")
    dense_weight: float = option(3.0, help="Weight of the dense objective; 0 is plain MLM.")
    lambda_sub: float = option(0.003, help="Weight of L_sub, in [0, 2 subspace_dim].")
    lambda_orth: float = option(0.0, help="Weight of L_orth, in [0, d (d - 1)].")
    lambda_pair: float = option(
        0.3, help="Weight of the share of variance that adjacent notes do not share, in [0, 2]."
    )
    lambda_anchor: float = option(
        0.0, help="Weight of the mean (cos - cos of the frozen start)^2 of unrelated notes, in [0, 4]."
    )
    expander: int = option(
        0,
        help="The dense terms see an MLP of the embedding, so many times as wide, trained along; 0 for the embedding.",
    )
    subspace_dim: int = option(20, help="k, the dimension of the leading subspaces.")
    window: str = option(
        "auto", help="Running covariances: 'none' (the batch alone), 'auto' (d samples) or a number of samples."
    )
    center: bool = option(True, help="Subtract each side's mean; the paper's Sigma is uncentred.")
    unbiased: bool = option(
        False,
        help="Estimate L_spec without bias (U-statistic); each patient is at most once in an update, where possible.",
    )
    terms: dict | str | None = option(
        None, help="More terms of the objective, JSON of name to weight, such as rank_deficit."
    )
    power_iterations: int = option(2, help="Power steps an update; 0 for exact eigenspaces.")
    keep_graphs: bool = option(
        False,
        help="With gradient accumulation: keep the graphs of all micro-batches, in the memory of one step on the whole "
        "update, instead of running each forward twice.",
    )
    pooling: str | None = option(None, help="mean, cls, last, max or mean_sqrt_len; default: the model's.")
    max_length: int | None = option(None, help="Tokens kept of a note; default: the model's.")
    long_notes: str | None = option(None, help="truncate, or chunk and average; default: the model's, else truncate.")
    mlm_probability: float = option(0.30, help="Share of tokens to predict.")
    whole_word_mask: bool = option(False, help="Mask whole words.")
    predict_marks: bool = option(False, help="Mask de-identification marks, such as ___, like other tokens.")
    pairs: list[str] = option(
        ["adjacent"],
        help="What is paired: adjacent (notes of a patient), sections, halves (of a note); one or several.",
    )
    pairs_per_patient: int = option(1, help="Adjacent pairs of a patient kept together in a batch.")
    max_gap: float | None = option(None, help="Largest time between adjacent notes, in days.")
    preprocessing_num_workers: int | None = option(None, help="Processes that tokenise.")

    hub_private_repo: bool | None = option(True, help="Private: patient text trained the model.")
    ddp_broadcast_buffers: bool | None = option(False, help="Off: buffers are constants here.")
    logging_steps: float = option(10, help="Log every so many updates (or a share, below 1).")

    def __post_init__(self):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # without it processes of a CPU do not find each other, and each trains alone
        super().__post_init__()
        for name in ("mlm_weight", "dense_weight", "lambda_pair", "lambda_anchor", "expander"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Expected {name} >= 0 but got {getattr(self, name)}.")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, but the loss of DenseTrainer has no smoothing: "
                "leave it at 0."
            )
        if self.mlm_weight == self.dense_weight == 0:
            raise ValueError("mlm_weight and dense_weight are both 0: nothing would be trained.")
        if self.unbiased and self.pairs_per_patient > 1:
            raise ValueError(
                f"unbiased takes the pairs of an update for independent, but pairs_per_patient is {self.pairs_per_patient}. "
                "Set one of them back."
            )
        self.pairs = check_kinds(self.pairs)
        if isinstance(self.terms, str):
            self.terms = json.loads(self.terms)
        self.dense_objective(width=1)

    def __getstate__(self) -> dict:
        """What pickles hold, without token and folders: `training_args.bin` is one, and goes to the Hub with the model."""
        return self.__dict__ | {"hub_token": None} | self._without_folders()

    def __copy__(self) -> "DenseTrainingArguments":
        """A copy is no pickle: it keeps token and folders."""
        made = object.__new__(type(self))
        made.__dict__ |= self.__dict__
        return made

    def __deepcopy__(self, memo: dict) -> "DenseTrainingArguments":
        """Copy as `__copy__` does."""
        made = object.__new__(type(self))
        made.__dict__ |= copy.deepcopy(self.__dict__, memo)
        return made

    def to_json_string(self) -> str:
        """What TensorBoard writes into a folder that goes to the Hub with the model: without folders too."""
        return json.dumps(self.to_dict() | self._without_folders(), indent=2)

    def _without_folders(self) -> dict:
        return {"output_dir": Path(str(self.output_dir)).name, "resume_from_checkpoint": None}

    def dense_objective(
        self, *, width: int | None = None, terms: Mapping[str, Term | float] | None = None, **more
    ) -> DenseObjective:
        """The objective that these arguments describe, with `more` options and terms; ValueError for one out of range.

        `width` is d of the embedding, which an expander needs: without it there is none.
        """
        window: float | str | None = None if str(self.window) == "none" else self.window
        if isinstance(window, str) and window != "auto":
            try:
                window = float(window)
            except ValueError:
                raise ValueError(
                    f"Expected window 'none', 'auto' or a number of samples but got {window!r}."
                ) from None
        own: dict[str, Any] = {**(self.terms or {}), **(terms or {})}  # type: ignore[dict-item]
        for name, weight in {"unshared_variance": self.lambda_pair, "anchor": self.lambda_anchor}.items():
            if weight:
                own.setdefault(name, weight)
        same = ("lambda_sub", "lambda_orth", "subspace_dim", "center", "unbiased")
        options: dict[str, Any] = {name: getattr(self, name) for name in same}
        options |= {"window": window, "power_iterations": self.power_iterations or None, "terms": own}
        if self.expander and width:
            options["expander"] = Expander(width, self.expander * width, seed=self.seed)
        return DenseObjective(**options | more)
