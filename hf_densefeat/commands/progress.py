"""What the terminal shows of a run: lines of at most 80 columns, and one bar or one short line for each log."""

import textwrap
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from hf_densefeat.reporting.formats import number

# Of the numbers in a log, those that say how the run goes; TensorBoard and its kin have all
SHOWN = {
    "loss": "loss",
    "mlm_loss": "MLM",
    "effective_rank": "effective rank",
    "unshared_variance": "unshared variance",
}


def line(label: str, text: str) -> str:
    """A label of at most ten letters and a text, wrapped below itself."""
    indent = " " * 11
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, 80, initial_indent=f"{label:<11}", subsequent_indent=indent, **options)


def in_words(state: TrainerState, logs: dict[str, Any]) -> str | None:
    """One log entry: an update, an evaluation, or None for one that is of the end."""
    evaluated = {name: value for name, value in logs.items() if name.startswith("eval_")}
    if evaluated:
        kept = {name: value for name, value in evaluated.items() if not name.endswith(("_runtime", "_per_second"))}
        return line("evaluated", ", ".join(f"{name} {number(value)}" for name, value in kept.items()))
    if "loss" not in logs:
        return None
    said = [f"{words} {number(logs[name])}" for name, words in SHOWN.items() if name in logs]
    if logs.get("skipped_updates"):
        said.append(f"{logs['skipped_updates']} updates skipped")
    return line("update", f"{state.global_step:,} of {state.max_steps:,}: {', '.join(said)}")


class Lines(TrainerCallback):
    """A line for each log, where there is no terminal."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Print it once."""
        said = in_words(state, logs)
        if said and state.is_local_process_zero:
            print(said, flush=True)


class Bar(ProgressCallback):
    """One bar, with the loss and the effective rank beside it."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Numbers of an update beside the bar, those of an evaluation above it."""
        bar = self.training_bar
        if bar is None:
            return
        if "loss" in logs:
            shown = {"loss": logs["loss"], "rank": logs.get("effective_rank", float("nan"))}
            bar.set_postfix({name: number(value) for name, value in shown.items()})
        elif any(name.startswith("eval_") for name in logs):
            bar.write(str(in_words(state, logs)))


def show(trainer: Any) -> None:
    """Put these in the place of what transformers prints."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Lines() if trainer.args.disable_tqdm else Bar())
