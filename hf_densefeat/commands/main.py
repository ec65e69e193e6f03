"""`densefeat`: continued pretraining, measurement and the dense head from a shell."""

import importlib
import subprocess
import sys
from collections.abc import Sequence

import hf_densefeat

USAGE = """usage: densefeat pretrain|probe|head [options]

  densefeat pretrain   continued pretraining with language modelling and the dense objective on adjacent notes
  densefeat probe      what an encoder became: similarity, geometry and linear probes, for one encoder or several
  densefeat head       end cosine 0.9 without training: fit the dense head of any encoder on your notes

densefeat COMMAND --help shows the options that people set, densefeat --version the version. On several GPUs:
densefeat pretrain --num_processes 4 ..., or accelerate launch -m hf_densefeat.commands.pretrain ..."""


def main(argv: Sequence[str] | None = None) -> None:
    """Hand the command line on to a command."""
    words = list(sys.argv[1:] if argv is None else argv)
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("--version", "-V"):
        print(hf_densefeat.__version__)
    elif name == "pretrain" and "--num_processes" in rest[:-1]:
        place = rest.index("--num_processes")
        launch = ["launch", "--num_processes", rest[place + 1], "-m", "hf_densefeat.commands.pretrain"]
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch]
        sys.exit(subprocess.call(command + rest[:place] + rest[place + 2 :]))
    elif name == "pretrain":
        from hf_densefeat.commands.pretrain import main as pretrain

        pretrain(rest)
    elif name in ("probe", "head"):
        command = importlib.import_module(f"hf_densefeat.commands.{name}")
        try:
            command.main(rest)
        except (ValueError, OSError) as error:  # what is wrong with notes, model or options is one line
            sys.exit(f"densefeat {name}: error: {error}")
    elif name in ("--help", "-h"):
        print(USAGE)
    else:
        sys.exit(f"densefeat: there is no command {name!r}.\n\n{USAGE}")


if __name__ == "__main__":
    main()
