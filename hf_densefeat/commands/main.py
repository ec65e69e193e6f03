"""`densefeat`: continued pretraining, encoding, measurement and views, from a shell."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import hf_densefeat
from hf_densefeat.commands.settings import error_line, nearest, parse

# Modules of this folder. Each imports nothing heavy when it is imported, and has a docstring, whose first line stands in the
# list of --help, a dataclass `Settings` (see `settings.parser_of`) and a function `run(settings)`.
COMMANDS = ("pretrain", "encode", "probe", "head", "interpolate")
USAGE = """usage: densefeat {names} [options]

{commands}

densefeat COMMAND --help shows the options that people set, densefeat --version the version. On several GPUs:
densefeat pretrain|encode --num_processes 4 ..., or accelerate launch -m hf_densefeat.commands.pretrain ..."""


def main(argv: Sequence[str] | None = None, default_config: Path | None = None) -> None:
    """Hand the command line on to a command; what is misspelt is said before anything heavy is imported.

    `default_config` is what `pretrain` reads where neither --config nor --notes is given.
    """
    try:
        hand_on(list(sys.argv[1:] if argv is None else argv), default_config)
    except KeyboardInterrupt:
        sys.exit("\ndensefeat: stopped. Nothing is kept but checkpoints and cached embeddings.")


def hand_on(words: list[str], default_config: Path | None) -> None:
    """The command that the first word names, with the words after it; what is wrong with its notes or model is one line."""
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("--version", "-V"):
        print(hf_densefeat.__version__)
    elif name in ("--help", "-h"):
        print(usage())
    elif name not in COMMANDS:
        sys.exit(f"densefeat: there is no command {name!r}.{nearest(name, COMMANDS)}\n\n{usage()}")
    else:
        command = import_module(f"hf_densefeat.commands.{name}")
        if name == "pretrain":  # it reads a YAML file too, and says itself where it was stopped
            command.check(rest)
            launch_if_several(name, rest)
            command.main(rest, default_config)
            return
        settings = parse(command, rest)
        launch_if_several(name, rest)
        try:
            command.run(settings)
        except (ValueError, OSError) as error:
            options = (one.name for one in fields(command.Settings))
            sys.exit(f"densefeat {name}: error: {error_line(error, options)}")


def usage() -> str:
    """Every command with its line."""
    about = {name: str(import_module(f"hf_densefeat.commands.{name}").__doc__).splitlines()[0] for name in COMMANDS}
    lines = (f"  densefeat {name:<11}  {line[0].lower()}{line[1:].rstrip('.:')}" for name, line in about.items())
    return USAGE.format(names="|".join(COMMANDS), commands="\n".join(lines))


def launch_if_several(name: str, words: list[str]) -> None:
    """Start the command in `--num_processes` processes, where that is asked for, and end with their status."""
    words = [part for word in words for part in (word.split("=") if word.startswith("--num_processes=") else [word])]
    if "--num_processes" in words[:-1]:
        place = words.index("--num_processes")
        several = ["--multi_gpu"] if words[place + 1] != "1" else []  # without it a CPU would have one process alone
        launch = ["launch", *several, "--num_processes", words[place + 1], "-m", "hf_densefeat.commands.main", name]
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch]
        sys.exit(subprocess.call(command + words[:place] + words[place + 2 :]))


if __name__ == "__main__":
    main()
