"""Continued pretraining with language modelling and the dense objective on adjacent notes.

    accelerate launch recipes/pretrain.py                                   # the bundled documents and small encoder
    accelerate launch recipes/pretrain.py --config my.yaml --learning_rate 1e-4
    accelerate launch recipes/pretrain.py --help

The same as `densefeat pretrain`; without arguments it reads configs/documents.yaml.
"""

import sys
from pathlib import Path

from hf_densefeat.commands.main import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]], Path(__file__).resolve().parent / "configs" / "documents.yaml")
