"""A Trainer whose checkpoints are whole or not there, that resumes exactly, stops when it is told to, and saves adapters."""

from __future__ import annotations

import logging
import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    HubStrategy,
    SaveStrategy,
    TrainOutput,
    rotate_checkpoints,
)

from hf_densefeat.models.adapters import ADAPTER, load_adapter, merged, save_adapter
from hf_densefeat.models.sentence_transformers import files_of
from hf_densefeat.training.checkpoints import (
    UNFINISHED,
    CheckpointError,
    SavedState,
    check_whole,
    newest_whole,
    publish,
    sync_folder,
    warn_of_unfinished,
)

logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """The stock Trainer, of which a crash leaves a checkpoint that resumes.

    * A checkpoint is written in `output_dir/unfinished` and gets its name when all ranks' files and a manifest are there.
    * Resuming checks every file before anything is loaded, and names the one that is missing or damaged.
    * `resume_from_checkpoint=True` takes the run's newest whole checkpoint, and says which it passes over.
    * A checkpoint carries the run's `fingerprint`; one of another run is named and never taken.
    * SIGTERM ends the update and saves, unless `save_strategy` is no; `train` then raises SystemExit(143), which ends the
      process as the signal would.
    * A run that is finished is not trained further when it is resumed.
    * A run with an adapter saves the merged encoder, which opens anywhere, and the adapter, from which it resumes.
    """

    told_to_stop = False  # this process has received SIGTERM
    stopped = False  # training ended by SIGTERM, on all ranks
    fingerprint: Callable[[], dict[str, Any]]  # what tells this run's checkpoints from those of another
    agreed_to_stop: Callable[[], bool]  # whether any rank was told to stop, the same on all ranks
    _being_written = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_StopWhenTold(self))

    def train(self, resume_from_checkpoint=None, *args, **kwargs) -> TrainOutput:
        """Train as transformers does, from a checkpoint that is checked first: see the class."""
        output_dir = Path(str(self.args.output_dir))
        warn_of_unfinished(output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole(output_dir, self.fingerprint())
            if resume_from_checkpoint is None:
                raise CheckpointError(f"There is no whole checkpoint in {output_dir.name} to resume from.")
        elif resume_from_checkpoint:
            check_whole(Path(resume_from_checkpoint), self.fingerprint())
        with self._told_by_sigterm():
            result = super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, *args, **kwargs)
        if self.stopped:  # told to end: whoever called would go on with a model that is trained in part
            raise SystemExit(128 + signal.SIGTERM)
        if resume_from_checkpoint and self.state.global_step == self._initial_global_step:
            return TrainOutput(self.state.global_step, math.nan, {})  # a finished run has no new loss and times
        return result

    # ---- Resuming ----

    def _init_training_state(self, max_steps, num_update_steps, num_epochs, resume_from_checkpoint, trial):
        """The stock Trainer looks for the best checkpoint where the first run wrote it, not beside the one resumed from.

        And it trains a finished run for one more update.
        """
        done = super()._init_training_state(max_steps, num_update_steps, num_epochs, resume_from_checkpoint, trial)
        self.state.__class__ = SavedState
        if resume_from_checkpoint is not None:
            checkpoint = Path(resume_from_checkpoint)
            self._find_best(checkpoint)
            if self.state.global_step >= max_steps:
                logger.warning("%s is of a finished run: there is nothing left to train.", checkpoint.name)
                return num_epochs, 0  # all epochs are done, none of their micro-batches is to be skipped
        return done

    def _find_best(self, checkpoint: Path) -> None:
        best = checkpoint.absolute().with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _issue_warnings_after_load(self, load_result) -> None:
        """The stock Trainer trains on with the base model's weights where some are missing: an error here."""
        tied = set(getattr(self.model, "all_tied_weights_keys", {}))
        missing, unexpected = set(load_result.missing_keys) - tied, load_result.unexpected_keys
        if missing or unexpected:
            raise ValueError(
                f"The checkpoint does not fit the model. Missing: {sorted(missing)[:5]}; unexpected: "
                f"{sorted(unexpected)[:5]}. Resume with the model and the transformers version that wrote it."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """The stock Trainer would load the merged encoder of a run with an adapter as if it were the adapter."""
        if isinstance(self.model, PeftModel):
            load_adapter(self.model, Path(resume_from_checkpoint) / ADAPTER)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        """The stock Trainer would take the merged encoder for the adapter here too."""
        if isinstance(self.model, PeftModel):
            load_adapter(self.model, Path(self.state.best_model_checkpoint) / ADAPTER)
        else:
            super()._load_best_model()

    # ---- Saving ----

    def _get_output_dir(self, trial):
        """The stock Trainer writes a checkpoint's files one by one into the folder from which a killed run would resume."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / UNFINISHED) if self._being_written else folder

    def _save_checkpoint(self, model, trial):
        """See `_get_output_dir`: written beside, then sealed and renamed; then pushed, and older ones deleted."""
        run = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial, target = run / UNFINISHED / name, run / name
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # until `finally`, `_get_output_dir` and `_push_from_checkpoint` must know that the checkpoint is not whole
        self._being_written = True
        # the stock Trainer must not delete old checkpoints now: it would look for them among the unfinished
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(partial, target, self.fingerprint())
                sync_folder(run)
                if not any((run / UNFINISHED).iterdir()):
                    (run / UNFINISHED).rmdir()
        except (OSError, SafetensorError, RuntimeError) as error:
            free = shutil.disk_usage(run).free / 1e6  # torch and safetensors do not say that a disk is full
            shutil.rmtree(partial, ignore_errors=True)
            whole = newest_whole(run, self.fingerprint())
            raise OSError(
                f"{name} could not be written: {error} ({free:,.1f} MB of the disk were free). "
                + (f"{whole.name} is whole: resume from it." if whole else "There is no checkpoint yet.")
            ) from error
        finally:
            self._being_written, self.args.save_total_limit = False, limit
        self.accelerator.wait_for_everyone()
        self._find_best(target)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def _save(self, output_dir=None, state_dict=None):
        """The stock Trainer saves an adapter alone, which opens nowhere without its base model."""
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
        """Save as transformers does, and the model card too where a person saves to the run's own folder."""
        if not _internal_call and output_dir in (None, self.args.output_dir):
            self.create_model_card()
        super().save_model(output_dir, _internal_call)

    def _push_from_checkpoint(self, checkpoint_folder):
        """The stock Trainer pushes no card in mid-training, and none of the files by which sentence-transformers pools."""
        if self._being_written:
            return  # it is pushed when it has its name
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            if self.push_in_progress is not None and not self.push_in_progress.is_done():
                if not self.args.hub_always_push:
                    return  # as the Trainer does; what is being uploaded must not change
                self._finish_current_push()
            self.create_model_card()
            for name in (*files_of(checkpoint_folder), ADAPTER):
                source, target = Path(checkpoint_folder) / name, Path(self.args.output_dir) / name
                if source.is_dir():
                    shutil.copytree(source, target, dirs_exist_ok=True)
                elif source.is_file():
                    shutil.copy(source, target)
        super()._push_from_checkpoint(checkpoint_folder)

    # ---- SIGTERM ----

    @contextmanager
    def _told_by_sigterm(self) -> Iterator[None]:
        """While training, SIGTERM (a cluster's preemption) is taken as the wish to save and stop."""
        self.told_to_stop = self.stopped = False
        if threading.current_thread() is not threading.main_thread():
            yield  # a signal can be handled in the main thread alone
            return

        def tell(*_) -> None:
            self.told_to_stop = True

        before = signal.signal(signal.SIGTERM, tell)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


class _StopWhenTold(TrainerCallback):
    """Save and stop after an update in which a rank was told to."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.agreed_to_stop():
            self.trainer.stopped = control.should_training_stop = True
            control.should_save = args.save_strategy != SaveStrategy.NO
            saved = f"checkpoint-{state.global_step}" if control.should_save else "nothing (save_strategy no)"
            logger.warning("SIGTERM: the run saves %s and stops.", saved)
        return control
