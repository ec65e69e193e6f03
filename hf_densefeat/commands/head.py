"""End a high mean cosine, or sharpen search, without training: the dense head of any encoder.

    densefeat head --model emilyalsentzer/Bio_ClinicalBERT --notes notes.parquet --output out
    densefeat head --model out --notes notes.parquet --output sharper --epsilon auto

The head is an affine map, fitted in closed form on training patients' notes and saved as a `Dense` module beside the encoder:
`SentenceTransformer(out)` and `AutoDenseModel.from_pretrained(out)` apply it, and the encoder's weights stay as they are. It
prints what the held-out patients' notes look like before and after.
"""

from dataclasses import dataclass

from hf_densefeat.commands.settings import NotesTable, option


@dataclass(kw_only=True)
class Settings(NotesTable):
    """Options of the command."""

    model: str = option(help="Hub name or folder of the encoder")
    output: str = option(help="folder to write")
    epsilon: str = option("center", help="center (the default), auto, or a number: 1 for search")
    pooling: str | None = option(None, help="mean, cls, last or max; default: the encoder's, else mean")
    max_length: int | None = option(None, help="tokens of a note; default: what the encoder can see")
    batch_size: int = option(32, help="notes at once")
    similarity: list[str] | None = option(None, help="same_patient (the default) or column:kind, as in probe")
    seed: int = option(0, help="of the split by patient, where the encoder records none, and of the sample")
    allow_trained: bool = option(False, help="hold out patients that the encoder was trained on, where the table does")


def run(settings: Settings) -> None:
    """Encode, fit, save, measure.

    Raises:
        ValueError: for notes, a model or an epsilon that cannot be used.
    """
    from hf_densefeat.commands.fitting import fit_and_save, loaded
    from hf_densefeat.models.head import epsilon_of

    epsilon_of(settings.epsilon)  # refused before anything is read
    fit_and_save(loaded(settings), settings)
