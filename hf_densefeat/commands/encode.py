r"""Encode a table of notes, of any size, to parquet files of vectors.

    densefeat encode --model out --notes notes.parquet --output vectors
    densefeat encode --model out --notes notes/ --output vectors --precision float16 --num_processes 8

Each file holds, of --shard_size rows of the table, the columns row (its number in the table, from 0), patient_id and time as
they stand in the table, note_id where the table has one, and vector; no text. The folder and its files are for you alone
(modes 0700 and 0600), because ids of patients are in them. Rows without text get no vector.

A run that was stopped goes on with the same command: a file is there whole or not at all. The result is the same for any
number of processes. `_manifest.json` says which model, notes and options made the vectors, and has the SHA-256 of each file;
vectors of another run are not mixed with these. Memory does not grow with the number of notes.

--precision int8 gives the 256 steps between the least and the largest value of each dimension among 2,000 notes, evenly
spread over the table, which `_manifest.json` keeps; bits gives 1 where a value is above 0, packed in bytes of 8.
"""

from dataclasses import dataclass
from typing import Literal

from hf_densefeat.commands.settings import Columns
from hf_densefeat.training.options import option


@dataclass(kw_only=True)
class Settings(Columns):
    """Options of the command."""

    model: str = option(help="Hub name or folder of the encoder")
    output: str = option(help="folder to write")
    precision: Literal["float32", "float16", "int8", "bits"] = option("float32", help="of the vectors in the files")
    truncate_dim: int | None = option(None, help="keep the first so many dimensions")
    view: str | None = option(None, help="content, form, or none for what is below the views; default: the model's")
    max_length: int | None = option(None, help="tokens of a note; default: what the encoder can see")
    batch_size: int = option(32, help="notes at once")
    dtype: Literal["float32", "bfloat16"] = option("float32", help="of the encoder's weights")
    shard_size: int = option(10_000, help="rows of a file")
    num_processes: int | None = option(None, help="processes, one a GPU; started by accelerate")


def run(settings: Settings) -> None:
    """Encode what is not encoded yet."""
    from hf_densefeat.commands.encoding import encode_table

    encode_table(settings)
