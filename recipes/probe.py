"""What an encoder became: similarity, geometry and linear probes; the same as `densefeat probe`."""

from hf_densefeat.commands.probe import main

if __name__ == "__main__":
    main()
