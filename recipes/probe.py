"""What an encoder became: similarity, geometry and linear probes; the same as `densefeat probe`."""

import sys

from hf_densefeat.commands.main import main

if __name__ == "__main__":
    main(["probe", *sys.argv[1:]])
