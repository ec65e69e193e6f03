"""The facts of a run for its model card: numbers and settings, never text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType

from hf_densefeat.data.inputs import PairDataset
from hf_densefeat.reporting.card import Run, model_card
from hf_densefeat.reporting.plots import draw


def described_run(trainer: Any, base_model: str | None) -> Run:
    """What a `DenseTrainer` trained, on how many notes, with which settings, and the last evaluation: see `write_card`."""
    args, model, adapted, state = trainer.args, trainer.dense_model, trainer.model, trainer.state
    counts = {}
    if isinstance(trainer.train_dataset, PairDataset):
        pairs = trainer.train_dataset.pairs
        kinds = pairs.kinds or {"adjacent notes": len(pairs)}
        counts = {"patients": pairs.num_patients, "notes" if not pairs.kinds else "notes and spans": pairs.num_notes}
        counts |= {f"pairs of {kind}": count for kind, count in kinds.items()}
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
        **trainer.objective.settings,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "seed": args.seed,
    }
    if "share" in model.config.densefeat:
        settings["share of the way from the start"] = f"{model.config.densefeat['share']:g}"
    if args.mlm_weight != trainer.mlm_weight_before:
        settings["weight of language modelling"] = (
            f"{trainer.mlm_weight_before:g} before, {args.mlm_weight:g} at the end"
        )
    if isinstance(adapted, PeftModel):
        [adapter] = adapted.active_adapters
        settings["adapter"] = f"{PeftType(adapted.peft_config[adapter].peft_type).value}, merged"
    documents = {name: function.__doc__ for name, (_, function) in trainer.objective.terms.items()}
    about = {name: (text or "no description").strip().splitlines()[0] for name, text in documents.items()}
    evaluations = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    return Run(
        mlm_weight=args.mlm_weight,
        dense_weight=args.dense_weight,
        terms={name: (weight, about[name]) for name, (weight, _) in trainer.objective.terms.items()},
        subspace_dim=trainer.objective.subspace_dim,
        settings=settings,
        counts=counts,
        base_model=base_model or model.name_or_path or None,
        # a model that came from the Hub knows its commit
        local=not (base_model or getattr(model.config, "_commit_hash", None)),
        evaluated=evaluations[-1] if evaluations else None,
    )


# options that change what an update computes
FINGERPRINT = (
    "seed data_seed learning_rate lr_scheduler_type warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon optim "
    "max_grad_norm mlm_weight dense_weight mlm_probability whole_word_mask predict_marks pairs pairs_per_patient max_gap"
)


def run_fingerprint(trainer: Any) -> dict[str, Any]:
    """What tells a run's checkpoints from another's: options and objective by name, digests of model and data; JSON's types.

    A run may go on with more steps, on other devices, cut into other micro-batches.
    """
    args, model, objective, data = trainer.args, trainer.dense_model, trainer.objective, trainer.train_dataset
    options = {name: getattr(args, name) for name in FINGERPRINT.split()}
    options |= {"pairs an update": trainer.get_total_train_batch_size(args), "pooling": model.pooling}
    options |= {"max_length": model.max_length, "long_notes": model.long_notes, **objective.settings}
    options |= {f"weight of {name}": weight for name, (weight, _) in objective.terms.items()}
    options |= {"subspace_dim": objective.subspace_dim}
    known = {name: value if isinstance(value, (int, float)) else str(value) for name, value in options.items()}
    name = type(model).__name__.removeprefix("FSDP") + Path(model.name_or_path).name
    known["model"] = hashlib.sha256(name.encode()).hexdigest()[:16]
    if isinstance(data, PairDataset):
        arrays = (data.pairs.earlier, data.pairs.later, data.lengths)
        known["data"] = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]
    return known


def write_card(
    trainer: Any,
    *,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tags: str | Sequence[str] = (),
    **options: Any,
) -> None:
    """Write README.md: numbers, never text, usage that runs as printed, and pictures of what was measured.

    The model has its name on the Hub, or else `model_name`, or that of the folder. `finetuned_from` is the Hub name of what
    training began with; by default the name that the model was loaded by. `measured`, a list on the trainer, holds what
    was measured before and after, if anything was. `language`, `license`, `tags` and `dataset` are as for
    `reporting.card.model_card`.
    """
    if not trainer.is_world_process_zero():
        return
    folder, measured = Path(str(trainer.args.output_dir)), trainer.measured
    folder.mkdir(parents=True, exist_ok=True)
    name = trainer.hub_model_id or trainer.args.hub_model_id or model_name or folder.absolute().name
    options |= {"tags": [tags] if isinstance(tags, str) else tags, "measured": measured}
    pictures, run = draw(measured, folder) if measured else (), described_run(trainer, finetuned_from)
    card = model_card(name, trainer.dense_model, run, pictures=pictures, **options)
    (folder / "README.md").write_text(card, encoding="utf-8")
