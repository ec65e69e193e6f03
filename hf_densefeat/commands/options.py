"""Options of `pretrain`: a YAML file, the command line, and a help that fits a screen."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.integrations import get_available_reporting_integrations

from hf_densefeat.commands.typos import nearest
from hf_densefeat.models.head import epsilon_of
from hf_densefeat.training.arguments import DenseTrainingArguments


@dataclass
class RecipeArguments:
    """What is read, from where, and what is measured."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub name or folder of the encoder."})
    config_name: str | None = field(default=None, metadata={"help": "Start from random weights with this config."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: beside the model or config."})
    notes: str | None = field(default=None, metadata={"help": "File, folder or Hub name of the notes."})
    patient_column: str | None = field(default=None, metadata={"help": "Default: found by its name."})
    time_column: str | None = field(default=None, metadata={"help": "Default: found by its name."})
    text_column: str | None = field(default=None, metadata={"help": "Default: found by its name."})
    time_unit: str | None = field(
        default=None, metadata={"help": "What numbers of time count: days, seconds, milliseconds or yyyymmdd."}
    )
    time_format: str | None = field(default=None, metadata={"help": "How times are written, such as %%d/%%m/%%Y."})
    similarity: list[str] = field(
        default_factory=list,
        metadata={"help": "Search and neighbours: column:query, column:same, column:neighbours, column:few_labels."},
    )
    probe: list[str] = field(default_factory=list, metadata={"help": "Linear probes, label_column:kind each."})
    beside: str | None = field(
        default=None,
        metadata={"help": "JSON of measurements that the table shows beside this run's, such as MLM alone."},
    )
    head: str = field(
        default="center",
        metadata={"help": "Dense head after training: none, center, auto, or an epsilon."},
    )
    max_measured_notes: int = field(default=4000, metadata={"help": "Notes, of whole patients, to measure on."})
    head_warmup_steps: int = field(
        default=100,
        metadata={"help": "If the language-modelling head is new, train it alone for so many updates first."},
    )
    head_warmup_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of that warm-up."})


GROUPS = {  # what people set; --help_all lists the rest
    "data": ("notes", "patient_column", "time_column", "text_column", "pairs", "max_gap"),
    "model": ("model_name_or_path", "pooling", "max_length", "long_notes", "head"),
    "objective": ("mlm_weight", "dense_weight", "lambda_pair", "lambda_sub", "mlm_probability"),
    "training": ("max_steps", "num_train_epochs", "per_device_train_batch_size", "learning_rate", "bf16"),
    "measured": ("similarity", "probe"),
    "output": ("output_dir", "save_strategy", "resume_from_checkpoint", "push_to_hub"),
}
EXAMPLES = """examples:
  densefeat pretrain --notes notes.parquet --model_name_or_path answerdotai/ModernBERT-base --max_steps 2000 --bf16
  densefeat pretrain --config my.yaml --similarity diagnosis:neighbours --probe died:binary --output_dir out
  densefeat pretrain --config my.yaml --resume_from_checkpoint last

Every option may stand in the YAML file of --config; the command line wins. --help_all lists all options."""


def parse(argv: Sequence[str], default_config: Path | None = None) -> tuple[RecipeArguments, DenseTrainingArguments]:
    """Options of a YAML file, then those of the command line, through one parser that types both.

    Args:
        argv: words of the command line.
        default_config: the file that is read where neither --config nor --notes is given.
    """
    argv = list(argv)
    classes: Any = [RecipeArguments, DenseTrainingArguments]
    parser = HfArgumentParser(
        classes,
        prog="pretrain",
        usage="densefeat pretrain [--config FILE.yaml] [--option value ...]",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--config", help="YAML file of options.")
    if "--help" in argv or "-h" in argv:
        print(short_help(parser))
        sys.exit()
    if "--help_all" in argv:
        parser.print_help()
        sys.exit()
    given = parser.parse_known_args(argv)[0]
    config = given.config or (None if given.notes else default_config)
    known = {action.dest for action in parser._actions}
    words = options_of(config, known, parser) + argv
    try:
        recipe, args, _, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except (
        ValueError,
        RuntimeError,
        ImportError,
    ) as error:  # of TrainingArguments: bf16 on a CPU, dates that do not fit
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}.{nearest(unknown[0], known)} --help lists the options.")
    for name in set(args.report_to) - set(get_available_reporting_integrations()):
        parser.error(f"--report_to {name}: {name} is not installed. Install it, or say --report_to none.")
    if not recipe.notes:
        parser.error("no notes: pass --notes, a file, folder or Hub name, or name them in the config.")
    if not (recipe.model_name_or_path or recipe.config_name):
        parser.error("no model: pass --model_name_or_path, a Hub name or folder (or --config_name for a new one).")
    if recipe.head != "none":
        try:
            epsilon_of(recipe.head)
        except ValueError as error:
            parser.error(f"--head none, or an epsilon: {error}")
    for task in recipe.probe:
        if task.count(":") != 1:
            parser.error(f"expected --probe label_column:kind but got {task!r}, as in --probe died:binary.")
    return recipe, args


def options_of(config: Path | str | None, known: set[str], parser: HfArgumentParser) -> list[str]:
    """A YAML file as words of the command line; paths in it that start with ./ or ../ are relative to the file."""
    if config is None:
        return []
    if not Path(config).is_file():
        parser.error(f"--config: there is no file {config}.")
    # as strings: the parser knows the types, YAML would read `no` as False and 1e-5 as text
    values = yaml.load(Path(config).read_text(), Loader=yaml.BaseLoader) or {}
    words = []
    for key, value in values.items():
        if key not in known:
            parser.error(f"{config}: unknown key {key!r}.{nearest(key, known)} --help lists the options.")
        items = value if isinstance(value, list) else [value]
        items = [str(Path(config).parent / item) if item.startswith(("./", "../")) else item for item in items]
        if items not in ([""], ["null"]):
            words += [f"--{key}", *items]
    return words


def short_help(parser: argparse.ArgumentParser) -> str:
    """The options that people set, in groups, with what each is and its default."""
    actions = {action.dest: action for action in parser._actions}
    lines = [
        f"usage: {parser.usage}",
        "",
        "Continued pretraining with language modelling and the dense objective.",
        "",
    ]
    for title, names in GROUPS.items():
        lines.append(f"{title}:")
        for name in names:
            action = actions[name]
            default = "" if action.default in (None, [], False, "") else f" [{action.default}]"
            text = (action.help or "").split(". ")[0].split(";")[0].rstrip(".")
            lines.append(f"  --{name:<28} {text[:80]}{default}")
    return "\n".join([*lines, "", EXAMPLES])
