"""`densefeat interpolate`: an encoder between a start and what training made of it, with a dense head of its own."""

import argparse
from collections.abc import Sequence

from hf_densefeat.commands.command_lines import interpolate_parser
from hf_densefeat.commands.head import fit_and_save, quiet
from hf_densefeat.commands.loading import loading
from hf_densefeat.models.dense import AutoDenseModel
from hf_densefeat.models.head import epsilon_of
from hf_densefeat.models.interpolation import interpolate_weights


def run(arguments: argparse.Namespace) -> None:
    """Load both, interpolate, fit the head, save, measure.

    Raises:
        ValueError: for models that are not of one training, and for a share, notes or an epsilon that cannot be used.
    """
    epsilon_of(arguments.epsilon)  # refused before anything is read
    with loading(arguments.model):
        options = {"pooling": arguments.pooling, "max_length": arguments.max_length}
        model = AutoDenseModel.from_pretrained(arguments.model, **options)
    with loading(arguments.start):
        start, info = AutoDenseModel.from_pretrained(arguments.start, output_loading_info=True)
    if type(start) is not type(model):
        raise ValueError(
            f"{arguments.start!r} is a {type(start).__name__} and {arguments.model!r} a {type(model).__name__}: expected "
            "the start that the model was trained from."
        )
    interpolate_weights(model, start, arguments.share, new=info["missing_keys"])
    fit_and_save(model, arguments)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    quiet()
    run(interpolate_parser().parse_args(argv))


if __name__ == "__main__":
    main()
