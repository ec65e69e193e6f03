"""`densefeat`: continued pretraining, measurement and the dense head from a shell."""

import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import hf_densefeat
from hf_densefeat.commands.command_lines import error_line, head_parser, interpolate_parser, probe_parser
from hf_densefeat.commands.typos import nearest, options_of, pretrain_options, unknown_option

PARSERS = {"probe": probe_parser, "head": head_parser, "interpolate": interpolate_parser}
USAGE = """usage: densefeat pretrain|probe|head|interpolate [options]

  densefeat pretrain     continued pretraining with language modelling and the dense objective on adjacent notes
  densefeat probe        what an encoder became: similarity, geometry and linear probes, for one encoder or several
  densefeat head         end cosine 0.9 without training: fit the dense head of any encoder on your notes
  densefeat interpolate  turn a trained encoder back towards its start: less content, more form

densefeat COMMAND --help shows the options that people set, densefeat --version the version. On several GPUs:
densefeat pretrain --num_processes 4 ..., or accelerate launch -m hf_densefeat.commands.pretrain ..."""


def main(argv: Sequence[str] | None = None, default_config: Path | None = None) -> None:
    """Hand the command line on to a command; what is misspelt is said before anything heavy is imported.

    Args:
        argv: words of the command line, the command first.
        default_config: what `pretrain` reads where neither --config nor --notes is given.
    """
    try:
        hand_on(list(sys.argv[1:] if argv is None else argv), default_config)
    except KeyboardInterrupt:
        sys.exit("\ndensefeat: stopped. Nothing is kept but checkpoints and cached embeddings.")


def hand_on(words: list[str], default_config: Path | None) -> None:
    """The command that the first word names, with the words after it."""
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("--version", "-V"):
        print(hf_densefeat.__version__)
    elif name in ("--help", "-h"):
        print(USAGE)
    elif name == "pretrain":
        pretrain(rest, default_config)
    elif name in PARSERS:
        measure_or_fit(name, rest)
    else:
        sys.exit(f"densefeat: there is no command {name!r}.{nearest(name, ('pretrain', *PARSERS))}\n\n{USAGE}")


def pretrain(words: list[str], default_config: Path | None = None) -> None:
    """`densefeat pretrain`, in this process or in several."""
    message = unknown_option(words, pretrain_options())
    if message:
        print(f"densefeat pretrain: error: {message}", file=sys.stderr)
        sys.exit(2)
    if "--num_processes" in words[:-1]:
        place = words.index("--num_processes")
        launch = ["launch", "--num_processes", words[place + 1], "-m", "hf_densefeat.commands.pretrain"]
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch]
        sys.exit(subprocess.call(command + words[:place] + words[place + 2 :]))
    importlib.import_module("hf_densefeat.commands.pretrain").main(words, default_config)


def measure_or_fit(name: str, words: list[str]) -> None:
    """`densefeat probe`, `head` and `interpolate`; what is wrong with notes, model or options is one line."""
    parser = PARSERS[name]()
    message = unknown_option(words, options_of(parser))
    if message:
        parser.exit(2, f"{parser.prog}: error: {message}\n")
    parser.parse_args(words)
    try:
        importlib.import_module(f"hf_densefeat.commands.{name}").main(words)
    except (ValueError, OSError) as error:
        sys.exit(f"densefeat {name}: error: {error_line(error)}")


if __name__ == "__main__":
    main()
