"""The options of a command: a dataclass, which becomes a parser before anything heavy is imported."""

import argparse
import difflib
import re
import shlex
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import ModuleType, UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from hf_densefeat.training.options import option

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = {"patient_id": "patient_column", "time": "time_column", "text": "text_column"}
SYNONYMS = {"model_name_or_path": "model"}  # what transformers' scripts call an option


@dataclass(kw_only=True)
class Columns:
    """Which table a command reads, and which of its columns."""

    notes: str = option(help="table of notes: a file, a folder or a Hub name")
    patient_column: str | None = option(None, help="column of the patient; default: found by its name")
    time_column: str | None = option(None, help="column of the time; default: found by its name")
    text_column: str | None = option(None, help="column of the text; default: found by its name")

    def columns(self) -> dict[str, str] | str:
        """What `load_notes` takes as `columns`."""
        named = {role: getattr(self, column) for role, column in COLUMNS.items()}
        return {role: name for role, name in named.items() if name} or "auto"


@dataclass(kw_only=True)
class NotesTable(Columns):
    """Which notes a command reads, and how."""

    time_unit: str | None = option(None, help="what numbers of time count: days, seconds, milliseconds or yyyymmdd")
    time_format: str | None = option(None, help="how times are written, such as %%d/%%m/%%Y")
    drop_copies: bool = option(False, help="leave out notes whose text an earlier note of the same patient has")

    def read(self, source: Any = None) -> "Dataset":
        """The notes, of the table that `notes` names or of another source."""
        from hf_densefeat.data.notes import load_notes

        how: dict[str, Any] = {name: getattr(self, name) for name in ("time_unit", "time_format", "drop_copies")}
        return load_notes(self.notes if source is None else source, self.columns(), **how)


def parser_of(command: ModuleType) -> argparse.ArgumentParser:
    """The parser of a command's module: its docstring is the usage, the fields of its `Settings` are the options.

    `T | None` takes one value, a list several, in one place or option by option (and none where None is its default), a
    bool is a switch, a Literal a choice.
    """
    parser = argparse.ArgumentParser(
        prog=f"densefeat {command.__name__.rpartition('.')[2]}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = get_type_hints(command.Settings)
    for one in fields(command.Settings):
        kinds = get_args(hints[one.name]) if isinstance(hints[one.name], UnionType) else (hints[one.name],)
        kind, default = kinds[0], one.default_factory() if one.default_factory is not MISSING else one.default
        how: dict[str, Any] = {"required": True} if default is MISSING else {"default": default}
        if kind is bool:
            how["action"] = "store_true"
        elif get_origin(kind) is list:
            how |= {"action": "extend", "nargs": "*" if default is None else "+", "type": get_args(kind)[0]}
        elif get_origin(kind) is Literal:
            how["choices"] = get_args(kind)
        else:
            how["type"] = kind
        parser.add_argument(f"--{one.name}", help=one.metadata["help"], **how)
    return parser


def parse(command: ModuleType, words: Sequence[str]) -> Any:
    """The `Settings` of a command's module from words of the command line; what is wrong with them ends the process."""
    parser, words = parser_of(command), canonical(words)
    refuse_unknown(words, {word.removeprefix("--") for word in parser._option_string_actions}, parser)
    return command.Settings(**vars(parser.parse_args(words)))


def canonical(words: Sequence[str]) -> list[str]:
    """The words with the names of options as they are here: with underscores, and no synonym."""
    found = []
    for word in words:
        before, equals, value = word.partition("=")
        name = before[2:].replace("-", "_")
        found.append(f"--{SYNONYMS.get(name, name)}{equals}{value}" if before.startswith("--") else word)
    return found


def refuse_unknown(words: Sequence[str], known: Iterable[str], parser: argparse.ArgumentParser) -> None:
    """End the process if there are options that are not known; all are named, with the nearest ones.

    `--no-x` of a switch and hyphens are taken too, as HfArgumentParser takes them.
    """
    names, unknown = {name.replace("-", "_") for name in known}, []
    for word in words:
        name = word.split("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name and name not in names and name.removeprefix("no_") not in names:
            unknown.append(f"unknown: {word}.{nearest(name, names)}")
    if unknown:
        parser.exit(2, f"{parser.prog}: error: {' '.join(unknown)} --help lists the options.\n")


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence with the names that a misspelt one comes close to, or nothing."""
    close = difflib.get_close_matches(word.lstrip("-").split("=")[0], sorted(known), 3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def error_line(error: Exception, options: Iterable[str]) -> str:
    """What a room says of a mistake, with the options of the command in the place of Python's: `--time_unit days`.

    What is in brackets, (`on_missing="drop"`), is left out where the command has no such option.
    """
    known, columns = set(options), ", ".join(f"--{column}" for column in COLUMNS.values())

    def named(match: re.Match[str]) -> str:
        if match["name"] not in known:
            return "" if match["bracket"] else match[0]
        value = match["value"].strip('"')
        words = f"--{match['name']}" + (f" {shlex.quote(value)}" if value not in ("", "True") else "")
        return f" ({words})" if match["bracket"] else words

    text = re.sub(r"Name yours with\s+`columns=.*?`", f"Name yours with {columns}", str(error), flags=re.DOTALL)
    return re.sub(
        r'(?P<bracket> \()?`?\b(?P<name>\w+)=(?P<value>"[^"]*"|\w*(?:\.\w+\(\w*\))?)`?(?(bracket)\))', named, text
    )


def writable(folder: str, name: str) -> Path:
    """The folder, made if it is not there; ValueError with the option that names it where nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Path(folder)
    except OSError as error:
        raise ValueError(f"--{name} {shlex.quote(folder)} cannot be written: {error.strerror}.") from None
