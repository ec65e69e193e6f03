"""The facts of a run for its model card: numbers and settings, never text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType
from transformers import PreTrainedModel

from hf_densefeat.data.inputs import PairDataset
from hf_densefeat.objective.batch_loss import BatchLoss
from hf_densefeat.objective.objective import DenseObjective
from hf_densefeat.reporting.card import Run, model_card
from hf_densefeat.reporting.comparison import Measured
from hf_densefeat.reporting.plots import draw


def described_run(trainer: Any, base_model: str | None = None) -> Run:
    """What was trained, on how many notes, with which settings, and the last evaluation.

    Args:
        trainer: the `DenseTrainer` of the run.
        base_model: Hub name of what training began with; by default the name that the model was loaded by.
    """
    args, model, adapted, state = trainer.args, trainer.dense_model, trainer.model, trainer.state
    counts = {}
    if isinstance(trainer.train_dataset, PairDataset):
        pairs = trainer.train_dataset.pairs
        counts = {"patients": pairs.num_patients, "notes": pairs.num_notes, "pairs of adjacent notes": len(pairs)}
    if "train" in trainer.reading_stats:
        counts |= trainer.reading_stats["train"].counts()
    masked = f"{args.mlm_probability:.0%} of tokens masked"
    settings = {
        "updates": state.global_step,
        "pairs an update": trainer.get_total_train_batch_size(args),
        "learning rate": args.learning_rate,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "weight decay": args.weight_decay,
        "language modelling": masked if model.language_modeling == "mlm" else "next token",
        "covariance window": args.window,
        "centred": args.center,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "seed": args.seed,
    }
    if isinstance(adapted, PeftModel):
        [adapter] = adapted.active_adapters
        settings["adapter"] = f"{PeftType(adapted.peft_config[adapter].peft_type).value}, merged"
    evaluations = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    return Run(
        mlm_weight=args.mlm_weight,
        dense_weight=args.dense_weight,
        terms=described_terms(trainer.objective),
        subspace_dim=args.subspace_dim,
        settings=settings,
        counts=counts,
        base_model=base_model or model.name_or_path or None,
        evaluated=evaluations[-1] if evaluations else None,
    )


def write_card(
    folder: Path,
    name: str,
    model: PreTrainedModel,
    run: Run,
    measured: Sequence[Measured],
    *,
    tags: str | Sequence[str] = (),
    **options: Any,
) -> None:
    """README.md and its pictures; `options` go to `reporting.card.model_card`.

    Args:
        folder: made if it is not there.
        name: on the Hub, or of the folder.
        model: the dense model.
        run: its facts.
        measured: what was measured, in order of time; without it there are no pictures.
        tags: one, or several.
        options: language, license, dataset.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(measured, folder) if measured else ()
    tags = [tags] if isinstance(tags, str) else tags
    card = model_card(name, model, run, measured=measured, pictures=pictures, tags=tags, **options)
    (folder / "README.md").write_text(card, encoding="utf-8")


def described_terms(objective: DenseObjective | BatchLoss) -> dict[str, tuple[float, str]]:
    """Name to weight and first line of the docstring, for every term of the objective."""
    functions = {objective.name: (1.0, objective.function)} if isinstance(objective, BatchLoss) else objective.terms
    return {
        name: (weight, (function.__doc__ or "no description").strip().splitlines()[0])
        for name, (weight, function) in functions.items()
    }
