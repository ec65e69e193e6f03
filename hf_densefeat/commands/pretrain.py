"""Continue pretraining with language modelling and the dense objective on adjacent notes.

It prints what was read, the progress, and what the encoder was and became on held-out patients, and writes to `output_dir`
the encoder, as a folder that `AutoModel` and `SentenceTransformer` open, its model card, `report.json`, `report.md` and
pictures.
"""

import argparse
import ast
import json
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_densefeat.commands.settings import SYNONYMS, NotesTable, canonical, nearest, refuse_unknown
from hf_densefeat.training.options import option

if TYPE_CHECKING:
    from transformers import HfArgumentParser

    from hf_densefeat.training.arguments import DenseTrainingArguments


@dataclass(kw_only=True)
class Settings(NotesTable):
    """What is read, from where, and what is measured; the rest is `DenseTrainingArguments`."""

    notes: str = option("", help="File, folder or Hub name of the notes.")
    model: str | None = option(None, help="Hub name or folder of the encoder.")
    config_name: str | None = option(None, help="Start from random weights with this config.")
    tokenizer_name: str | None = option(None, help="Default: beside the model or config.")
    similarity: list[str] = option([], help="Uses: column:query, column:same, column:neighbours, column:few_labels.")
    probe: list[str] = option([], help="Linear probes, label:kind each, as in probe.")
    beside: str | None = option(None, help="JSON file of measurements, such as of MLM alone: a column of the table.")
    share: str | None = option(
        None,
        help="Of the way from the start to the trained weights: a number, or auto, by validation notes. Default: auto from a "
        "start that was trained for similarity, else 1.",
    )
    views: str = option("auto", help="Views after training: none, auto, an epsilon, or center for the mean.")
    allow_trained: bool = option(False, help="Hold out patients that the start was trained on, where the table does.")
    max_measured_notes: int = option(4000, help="Notes, of whole patients, to measure on.")
    head_warmup_steps: int = option(100, help="Updates in which a new language-modelling head is trained alone first.")
    head_warmup_learning_rate: float = option(1e-3, help="Peak learning rate of that warm-up.")
    given: frozenset[str] = field(init=False, default=frozenset(), metadata={"help": ""})  # options that were named


GROUPS = {  # what people set; --help_all lists the rest
    "data": ("notes", "patient_column", "time_column", "text_column", "pairs", "max_gap"),
    "model": ("model", "pooling", "max_length", "long_notes", "views", "share"),
    "objective": ("mlm_weight", "dense_weight", "lambda_pair", "lambda_sub", "lambda_anchor", "mlm_probability"),
    "training": ("max_steps", "num_train_epochs", "per_device_train_batch_size", "learning_rate", "bf16"),
    "measured": ("similarity", "probe"),
    "output": ("output_dir", "save_strategy", "resume_from_checkpoint", "push_to_hub"),
}
USAGE = "densefeat pretrain [--config FILE.yaml] [--option value ...]"
EXAMPLES = """examples:
  densefeat pretrain --notes notes.parquet --model answerdotai/ModernBERT-base --max_steps 2000 --bf16
  densefeat pretrain --config my.yaml --similarity diagnosis:neighbours --probe died:binary --output_dir out
  densefeat pretrain --config my.yaml --resume_from_checkpoint last

Every option may stand in the YAML file of --config; the command line wins. A path there that begins with ./ or ../ is
relative to the file, any other to the folder that you are in. --help_all lists all options."""
EXTRA = ("config", "help", "help_all", "num_processes")  # options that no dataclass has


def main(words: Sequence[str], default_config: Path | None = None) -> None:
    """Read the options, and run."""
    check(words)
    settings, args = parse(words, default_config)
    from hf_densefeat.commands.pretraining import run

    run(settings, args)


def check(words: Sequence[str]) -> None:
    """Answer --help and misspelt options before transformers is imported, which takes seconds."""
    options = written_options()
    if "--help" in words or "-h" in words:
        print(short_help(options))
        sys.exit()
    refuse_unknown(
        canonical(words), {*options, *EXTRA}, argparse.ArgumentParser(prog="densefeat pretrain", usage=USAGE)
    )


def written_options() -> dict[str, tuple[Any, str]]:
    """Every option with its default and its help: fields of the dataclasses, those of training read from their source."""
    theirs = Path(getattr(find_spec("transformers"), "origin", "")).parent / "training_args.py"
    ours = Path(__file__).parents[1] / "training" / "arguments.py"
    found = {one.name: (one.default, one.metadata["help"]) for one in fields(Settings) if one.init}
    for file in (theirs, ours):
        classes = (node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
        lines = (line for one in classes for line in one.body if isinstance(line, ast.AnnAssign))
        found |= {ast.unparse(line.target): _default_and_help(line.value) for line in lines}
    return found


def _default_and_help(value: ast.expr | None) -> tuple[Any, str]:
    """What `option(default, help=...)` or `field(default=..., metadata={"help": ...})` say, where it is a literal."""
    words: dict[str | None, Any] = {}
    if isinstance(value, ast.Call):
        parts = {word.arg: word.value for word in value.keywords} | dict(zip(("default",), value.args, strict=False))
        for name, part in parts.items():
            with suppress(ValueError):
                words[name] = ast.literal_eval(part)
    return words.get("default"), words.get("help") or words.get("metadata", {}).get("help", "")


def short_help(options: dict[str, tuple[Any, str]]) -> str:
    """The options that people set, in groups, with what each is and its default."""
    lines = [f"usage: {USAGE}", "", str(__doc__).splitlines()[0], ""]
    for title, names in GROUPS.items():
        lines.append(f"{title}:")
        for name in names:
            default, text = options[name]
            shown = f" [{default}]" if isinstance(default, (int, float, str)) and default not in (False, "") else ""
            text = " ".join(text.split()).split(". ")[0].split(";")[0].rstrip(".")
            lines.append(f"  --{name:<28} {text[:80]}{shown}")
    return "\n".join([*lines, "", EXAMPLES])


def parse(argv: Sequence[str], default_config: Path | None = None) -> tuple[Settings, "DenseTrainingArguments"]:
    """Options of a YAML file, then those of the command line, through one parser that types both."""
    from transformers import HfArgumentParser
    from transformers.integrations import get_available_reporting_integrations

    from hf_densefeat.commands.fitting import epsilon_of
    from hf_densefeat.training.arguments import DenseTrainingArguments

    classes: Any = [Settings, DenseTrainingArguments]
    parser = HfArgumentParser(classes, prog="pretrain", usage=USAGE, allow_abbrev=False, add_help=False)
    parser.add_argument("--config", help="YAML file of options.")
    argv = canonical(argv)
    if "--help_all" in argv:
        parser.print_help()
        sys.exit()
    given = parser.parse_known_args(argv)[0]
    config = given.config or (None if given.notes else default_config)
    known = {action.dest for action in parser._actions}
    words = [*options_of(config, known, parser), *argv]
    try:
        settings, args, _, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
        if settings.views != "none":
            epsilon_of(settings.views)
        if settings.share not in (None, "auto") and not 0 <= float(settings.share) < math.inf:
            raise ValueError(f"Expected --share auto, or a number of at least 0, but got {settings.share!r}.")
    # TrainingArguments refuses too: bf16 on a CPU, steps of saving and of evaluation that do not fit
    except (ValueError, RuntimeError, ImportError) as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}.{nearest(unknown[0], known)} --help lists the options.")
    for name in set(args.report_to) - set(get_available_reporting_integrations()):
        parser.error(f"--report_to {name}: {name} is not installed. Install it, or say --report_to none.")
    if not settings.notes:
        parser.error("no notes: pass --notes, a file, folder or Hub name, or name them in the config.")
    if not (settings.model or settings.config_name):
        parser.error("no model: pass --model, a Hub name or folder (or --config_name for a new one).")
    named = (word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--"))
    settings.given = frozenset(name.replace("-", "_") for name in named)
    return settings, args


def options_of(config: Path | str | None, known: set[str], parser: "HfArgumentParser") -> list[str]:
    """A YAML file as words of the command line; paths in it that start with ./ or ../ are relative to the file."""
    import yaml

    if config is None:
        return []
    if not Path(config).is_file():
        parser.error(f"--config: there is no file {config}.")
    # values are read as strings: the parser knows the types; YAML would read `no` as False and 1e-5 as text
    values = yaml.load(Path(config).read_text(), Loader=yaml.BaseLoader) or {}
    words = []
    for key, value in values.items():
        key = SYNONYMS.get(key, key)
        if key not in known:
            parser.error(f"{config}: unknown key {key!r}.{nearest(key, known)} --help lists the options.")
        items = value if isinstance(value, list) else [json.dumps(_typed(value)) if isinstance(value, dict) else value]
        items = [str(Path(config).parent / item) if item.startswith(("./", "../")) else item for item in items]
        if items not in ([""], ["null"]):
            words += [f"--{key}", *items]
    return words


def _typed(value: Any) -> Any:
    """A YAML mapping of words with its numbers as numbers: `terms: {rank_deficit: 1e-1}`."""
    if isinstance(value, dict):
        return {key: _typed(inner) for key, inner in value.items()}
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


if __name__ == "__main__":
    import hf_densefeat.commands.main

    hf_densefeat.commands.main.main(["pretrain", *sys.argv[1:]])
