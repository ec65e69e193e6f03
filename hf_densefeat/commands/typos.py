"""Options that do not exist, found before transformers is imported, which takes seconds."""

import argparse
import ast
import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

EXTRA = ("config", "help", "help_all", "num_processes")  # options of `pretrain` that no dataclass has
CLASSES = ("TrainingArguments", "DenseTrainingArguments", "RecipeArguments")


def pretrain_options() -> set[str]:
    """Every option of `densefeat pretrain`: the fields of its three dataclasses, read from their source."""
    transformers = importlib.util.find_spec("transformers")
    assert transformers is not None
    assert transformers.origin is not None
    ours = Path(__file__).parents[1]
    files = (
        Path(transformers.origin).parent / "training_args.py",
        ours / "training" / "arguments.py",
        ours / "commands" / "options.py",
    )
    found = set(EXTRA)
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name in CLASSES:
                found |= {
                    line.target.id
                    for line in node.body
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
                }
    return found


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Every option of a parser of argparse."""
    return {word.removeprefix("--") for action in parser._actions for word in action.option_strings}


def unknown_option(words: Sequence[str], known: Iterable[str]) -> str | None:
    """What to say of the first option that is not known, or None.

    Args:
        words: of the command line.
        known: names with underscores. `--no-x` of a switch and hyphens are taken too, as HfArgumentParser takes them.
    """
    names = {name.replace("-", "_") for name in known}
    for word in words:
        name = word.split("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name and name not in names and name.removeprefix("no_") not in names:
            return f"unknown: {word}.{nearest(name, names)} --help lists the options."
    return None


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence with the options that a misspelt one comes close to, or nothing."""
    close = difflib.get_close_matches(word.lstrip("-").split("=")[0], sorted(known), 3)
    return f" Did you mean {' or '.join(close)}?" if close else ""
