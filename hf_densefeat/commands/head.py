"""Two views of any encoder, without training: one by content, one by form, and no cosine of 0.9 between unrelated notes.

    densefeat head --model emilyalsentzer/Bio_ClinicalBERT --notes notes.parquet --output out

Each view is an affine map, fitted in closed form on training patients' notes and saved beside the encoder, whose weights stay
as they are: SentenceTransformer(out).encode(texts) is the content view, encode(texts, task="form") the form view. The content
view is a strong map of an encoder of language modelling, and a mild one of an encoder that was trained for similarity.
Validation patients' notes say, without a label, whether it serves; else the encoder stays as it is. It prints what the
held-out patients' notes look like as they are and under each view.

--vectors z.parquet in the place of --model fits the views of vectors that are there already, such as an API's (see `densefeat
probe`), by adjacent notes. OUT/content and OUT/form are then `Dense` modules of sentence-transformers, and content.npz and
form.npz hold `mean` and `matrix` for NumPy: a view is (z - mean) @ matrix.
"""

from dataclasses import dataclass

from hf_densefeat.commands.settings import NotesTable
from hf_densefeat.training.options import option


@dataclass(kw_only=True)
class Fitting(NotesTable):
    """Options of every command that fits views."""

    output: str = option(help="folder to write")
    epsilon: str = option("auto", help="auto: .03, or 10 of an encoder trained for similarity; a number; or center")
    pooling: str | None = option(None, help="mean, cls, last, max or mean_sqrt_len; default: the encoder's")
    max_length: int | None = option(None, help="tokens of a note; default: what the encoder can see")
    batch_size: int = option(32, help="notes at once")
    similarity: list[str] | None = option(None, help="same_patient (the default) or column:kind, as in probe")
    seed: int = option(0, help="of the split by patient, where the encoder records none, and of the sample")
    allow_trained: bool = option(False, help="hold out patients that the encoder was trained on, where the table does")


@dataclass(kw_only=True)
class Settings(Fitting):
    """Options of the command."""

    model: str | None = option(None, help="Hub name or folder of the encoder")
    vectors: str | None = option(None, help="table of vectors that are there already, in the place of a model")
    id_column: str | None = option(None, help="joins vectors and notes; default: note_id, else the row's number")


def run(settings: Settings) -> None:
    """Encode, fit, save, measure."""
    from hf_densefeat.commands.fitting import fit_model, fit_vectors, opened

    if bool(settings.model) == bool(settings.vectors):
        raise ValueError("Expected either --model, a folder or Hub name, or --vectors, a table.")
    if settings.vectors:
        fit_vectors(settings)
    else:
        fit_model(*opened(settings), settings)
