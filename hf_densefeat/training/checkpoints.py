"""What a run writes: checkpoints that resume exactly, adapters, the model card, and pushes to the Hub."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from hf_densefeat.data.inputs import PairDataset
from hf_densefeat.models.adapters import ADAPTER, load_adapter, merged, save_adapter
from hf_densefeat.models.sentence_transformers import FILES
from hf_densefeat.objective.batch_loss import BatchLoss
from hf_densefeat.objective.objective import DenseObjective
from hf_densefeat.reporting.card import Run, model_card
from hf_densefeat.reporting.plots import draw

OBJECTIVE_STATE = "densefeat_state.safetensors"


class _State(TrainerState):
    """Saved without the best checkpoint's folder, a path of this machine: `best_global_step` says which one it is."""

    def save_to_json(self, json_path: str) -> None:
        state = copy.copy(self)
        state.best_model_checkpoint = None
        TrainerState.save_to_json(state, json_path)


class Saving:
    """The part of `DenseTrainer` that saves, resumes and publishes; it stands before `Trainer` among the bases."""

    # ---- Checkpoints ----

    def _init_training_state(self, max_steps, num_update_steps, num_epochs, resume_from_checkpoint, trial):
        """The best checkpoint so far lies beside the one that the run resumes from."""
        skipped = super()._init_training_state(max_steps, num_update_steps, num_epochs, resume_from_checkpoint, trial)
        self.state.__class__ = _State
        if resume_from_checkpoint is not None and self.state.best_global_step:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            best = Path(resume_from_checkpoint).absolute().with_name(name)
            if best.is_dir():
                self.state.best_model_checkpoint = str(best)
        return skipped

    def _save_optimizer_and_scheduler(self, output_dir):
        """The running covariances and bases belong to the optimisation: saved once, the same on all ranks."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {name: value.contiguous().cpu() for name, value in self.objective.state_dict().items()}
            metadata = {
                "skipped_updates": str(self.update_log.skipped),
                "stream": self.stream.position if self.stream else "",
            }
            save_file(state, Path(output_dir) / OBJECTIVE_STATE, metadata=metadata)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / OBJECTIVE_STATE
        if not path.is_file():
            raise ValueError(
                f"The checkpoint has no {OBJECTIVE_STATE}: DenseTrainer did not write it. To start from its weights "
                "alone, pass it as the model instead of resuming."
            )
        with safe_open(path, framework="pt") as file:
            self.update_log.skipped = int(file.metadata()["skipped_updates"])
            stream = file.metadata().get("stream")
            state = {name: file.get_tensor(name).to(self.args.device) for name in file.keys()}  # noqa: SIM118
        self.objective.load_state_dict(state)
        if self.stream is not None:
            if not stream:
                raise ValueError(
                    "The checkpoint is not of a run on a stream. Resume it with the notes it was trained on."
                )
            self.stream.load_state(stream)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Missing or unexpected weights on resume are an error: the stock Trainer would train on with the base model's."""
        tied = set(getattr(self.model, "all_tied_weights_keys", {}))
        missing, unexpected = set(load_result.missing_keys) - tied, load_result.unexpected_keys
        if missing or unexpected:
            raise ValueError(
                f"The checkpoint does not fit the model. Missing: {sorted(missing)[:5]}; unexpected: "
                f"{sorted(unexpected)[:5]}. Resume with the model and the transformers version that wrote it."
            )

    def _save(self, output_dir=None, state_dict=None):
        """A run with an adapter saves the merged encoder, which opens anywhere, and the adapter, from which it resumes."""
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            adapted, self.model = self.model, merged(self.model)
            try:
                super()._save(output_dir)
            finally:
                self.model = adapted
            save_adapter(adapted, Path(output_dir or self.args.output_dir) / ADAPTER)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, with the model card where it is the run's own folder that a person saves to."""
        if not _internal_call and output_dir in (None, self.args.output_dir):
            self.create_model_card()
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if isinstance(self.model, PeftModel):
            load_adapter(self.model, Path(resume_from_checkpoint) / ADAPTER)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if isinstance(self.model, PeftModel):
            load_adapter(self.model, Path(self.state.best_model_checkpoint) / ADAPTER)
        else:
            super()._load_best_model()

    # ---- Hub ----

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] = (),
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | None = None,
    ) -> None:
        """Write README.md: numbers, never text, and usage that runs as printed; see `export.model_card`.

        `measured`, a list on the trainer, holds what was measured before and after, if anything was.
        """
        if not self.is_world_process_zero():
            return
        args, model, folder = self.args, self.dense_model, Path(self.args.output_dir)
        counts = {}
        if isinstance(self.train_dataset, PairDataset):
            pairs = self.train_dataset.pairs
            counts = {"patients": pairs.num_patients, "notes": pairs.num_notes, "pairs of adjacent notes": len(pairs)}
        if "train" in self.reading_stats:
            counts |= self.reading_stats["train"].counts()
        training = {
            "updates": self.state.global_step,
            "pairs an update": self.get_total_train_batch_size(args),
            "learning rate": args.learning_rate,
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "weight decay": args.weight_decay,
            "language modelling": f"{args.mlm_probability:.0%} of tokens masked"
            if model.language_modeling == "mlm"
            else "next token",
            "covariance window": args.window,
            "centred": args.center,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            "seed": args.seed,
        }
        if isinstance(self.model, PeftModel):
            [adapter] = self.model.active_adapters
            training["adapter"] = f"{self.model.peft_config[adapter].peft_type.value}, merged"
        evaluations = [entry for entry in self.state.log_history if any(name.startswith("eval_") for name in entry)]
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(
            mlm_weight=args.mlm_weight,
            dense_weight=args.dense_weight,
            terms=_described_terms(self.objective),
            subspace_dim=args.subspace_dim,
            settings=training,
            counts=counts,
            base_model=finetuned_from or model.name_or_path or None,
            evaluated=evaluations[-1] if evaluations else None,
        )
        card = model_card(
            self.hub_model_id or args.hub_model_id or model_name or folder.absolute().name,
            model,
            run,
            measured=self.measured,
            pictures=draw(self.measured, folder) if self.measured else (),
            language=language,
            license=license,
            tags=[tags] if isinstance(tags, str) else tags,
            dataset=dataset,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _push_from_checkpoint(self, checkpoint_folder):
        """Mid-training pushes carry the card, and the files by which sentence-transformers pools."""
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            if self.push_in_progress is not None and not self.push_in_progress.is_done():
                if not self.args.hub_always_push:
                    return  # as the Trainer does; what is being uploaded must not change
                self._finish_current_push()
            self.create_model_card()
            for name in (*FILES, ADAPTER):
                source, target = Path(checkpoint_folder) / name, Path(self.args.output_dir) / name
                if source.is_dir():
                    shutil.copytree(source, target, dirs_exist_ok=True)
                elif source.is_file():
                    shutil.copy(source, target)
        super()._push_from_checkpoint(checkpoint_folder)


def _described_terms(objective: DenseObjective | BatchLoss) -> dict[str, tuple[float, str]]:
    """Name to weight and first line of the docstring, for every term of the objective."""
    functions = {objective.name: (1.0, objective.function)} if isinstance(objective, BatchLoss) else objective.terms
    return {
        name: (weight, (function.__doc__ or "no description").strip().splitlines()[0])
        for name, (weight, function) in functions.items()
    }
