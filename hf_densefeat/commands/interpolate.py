"""Turn a trained encoder back towards its start, without training: less content, more form.

    densefeat interpolate --model out --start emilyalsentzer/Bio_ClinicalBERT --share 0.5 --notes notes.parquet --output half

Every weight becomes start + share (model - start): 0 is the start, 1 the model, and 1.25 goes on in the same direction. Then
the views are fitted as `densefeat head` does. Compare shares with `densefeat probe --model out --model half ...`.
"""

from dataclasses import dataclass

from hf_densefeat.commands import head
from hf_densefeat.training.options import option


@dataclass(kw_only=True)
class Settings(head.Fitting):
    """Options of the command."""

    model: str = option(help="Hub name or folder of the trained encoder")
    start: str = option(help="Hub name or folder of the encoder that the model was trained from")
    share: float = option(help="of the way from the start to the model: 0.5 is half")


def run(settings: Settings) -> None:
    """Load both, interpolate, fit the views, save, measure."""
    from hf_densefeat.commands.fitting import fit_model, opened
    from hf_densefeat.commands.measuring import loading
    from hf_densefeat.data.splits import SplitRecord
    from hf_densefeat.models.dense import AutoDenseModel
    from hf_densefeat.models.interpolation import interpolate_weights

    model, tokenizer = opened(settings)
    with loading(settings.start):
        start, info = AutoDenseModel.from_pretrained(settings.start, output_loading_info=True)
    if type(start) is not type(model):
        raise ValueError(
            f"{settings.start!r} is a {type(start).__name__} and {settings.model!r} a {type(model).__name__}: expected "
            "the start that the model was trained from."
        )
    interpolate_weights(model, start.to(model.device), settings.share, new=info["missing_keys"])
    fit_model(model, tokenizer, settings, SplitRecord.of(start))
