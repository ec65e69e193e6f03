"""The command lines of `probe`, `head` and `interpolate`, which are read before anything heavy is imported."""

import argparse
import re
from typing import Any

PROBE = """\
What an encoder makes of your notes: similarity, geometry and linear probes, for one encoder or several side by side.

    densefeat probe --model out/ --model answerdotai/ModernBERT-base --notes notes.parquet \\
        --similarity same_patient --similarity diagnosis:neighbours --task died:binary --task age:regression

The first --model is the base that the others are compared with. A model is a folder, a Hub name or a
sentence-transformers folder, as `path` or `name=path`. A task is `label:kind` for a column of the notes, or
`label:kind:table` for a table of its own with a `text` column and, where there are such, a `patient_id` or
`subject_id` column (else every row is a patient) and a `split` column; kinds are binary, multiclass, regression and
clustering. --similarity names uses of the embeddings by cosine, measured on the notes of held-out patients:
`same_patient` (the default: a patient's other notes among everybody's), or `column:kind` with a kind of query, same,
neighbours, clusters or few_labels.

Written to --output: `report.html` (one file that can be sent to a colleague), `report.json`, `report.md` and the PNGs.
They hold numbers, names of columns and label values, and no note text, patient id or path. With --meds FOLDER, the test
rows' predictions of binary tasks go to that folder in the schema of meds-evaluation, with patient ids."""
HEAD = """End a high mean cosine, or sharpen search, without training: fit the dense head of any encoder.

    densefeat head --model emilyalsentzer/Bio_ClinicalBERT --notes notes.parquet --output out
    densefeat head --model out --notes notes.parquet --output sharper --epsilon auto

The head is an affine map, fitted in closed form on training patients' notes and saved as a `Dense` module beside the encoder:
`SentenceTransformer(out)` and `AutoDenseModel.from_pretrained(out)` apply it, and the encoder's weights stay as they are. It
prints what the held-out patients' notes look like before and after."""
INTERPOLATE = """Turn a trained encoder back towards its start, without training: less content, more form.

    densefeat interpolate --model out --start emilyalsentzer/Bio_ClinicalBERT --share 0.5 --notes notes.parquet --output half

Every weight becomes start + share (model - start): 0 is the start, 1 the model, and 1.25 goes on in the same direction. Then
the dense head is fitted as `densefeat head` does. Compare shares with `densefeat probe --model out --model half ...`."""
ROLES = {"patient_id": "patient_column", "time": "time_column", "text": "text_column"}


def reading_of(arguments: Any) -> dict[str, Any]:
    """What `load_notes` takes beside the source: the columns that the command line names, and how times are written."""
    named = {role: getattr(arguments, option) for role, option in ROLES.items()}
    columns = {role: name for role, name in named.items() if name} or "auto"
    return {"columns": columns, "time_unit": arguments.time_unit, "time_format": arguments.time_format}


def error_line(error: Exception) -> str:
    """What a room says of a mistake, with options of the command in the place of Python's."""
    options = ", ".join(f"--{option}" for option in ROLES.values())
    return re.sub(r"Name yours with\s+`columns=.*?`", f"Name yours with {options}", str(error), flags=re.DOTALL)


def probe_parser() -> argparse.ArgumentParser:
    """The command line of `densefeat probe`."""
    found = _parser("probe", PROBE)
    found.add_argument("--model", action="append", required=True, help="PATH or NAME=PATH; the first is the base")
    _add_notes(found)
    found.add_argument("--task", action="append", default=[], help="label:kind or label:kind:table")
    found.add_argument("--similarity", action="append", help="same_patient, or column:kind")
    found.add_argument("--output", default="probe_report", help="folder to write")
    found.add_argument("--k", type=int, default=20, help="subspace dimension")
    found.add_argument("--bootstraps", type=int, default=1000, help="redraws of the test patients")
    found.add_argument("--shots", type=int, nargs="*", help="few-shot sizes (1 to 128 by default); none: --shots")
    found.add_argument("--batch_size", type=int, default=32)
    found.add_argument("--max_length", type=int, help="tokens of a note, default: what the encoder can see")
    found.add_argument("--no_cache", action="store_true", help="do not keep embeddings under HF_HOME/hf_densefeat")
    found.add_argument("--meds", help="folder for binary tasks' predictions as MEDS tables; these hold patient ids")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--allow_trained", action="store_true", help="test on patients that a model was trained on")
    return found


def head_parser() -> argparse.ArgumentParser:
    """The command line of `densefeat head`."""
    return _add_head(_parser("head", HEAD))


def interpolate_parser() -> argparse.ArgumentParser:
    """The command line of `densefeat interpolate`."""
    found = _parser("interpolate", INTERPOLATE)
    found.add_argument(
        "--start", required=True, help="Hub name or folder of the encoder that the model was trained from"
    )
    found.add_argument(
        "--share", required=True, type=float, help="of the way from the start to the model: 0.5 is half"
    )
    return _add_head(found)


def _add_head(found: argparse.ArgumentParser) -> argparse.ArgumentParser:
    found.add_argument("--model", required=True, help="Hub name or folder of the encoder")
    _add_notes(found)
    found.add_argument("--output", required=True, help="folder to write")
    found.add_argument("--epsilon", default="center", help="center (the default), auto, or a number: 1 for search")
    found.add_argument("--pooling", help="mean, cls, last or max; default: the encoder's, else mean")
    found.add_argument("--max_length", type=int, help="tokens of a note; default: what the encoder can see")
    found.add_argument("--batch_size", type=int, default=32)
    found.add_argument("--similarity", action="append", help="same_patient (the default) or column:kind, as in probe")
    found.add_argument("--seed", type=int, default=0, help="of the split by patient and of the sample")
    return found


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"densefeat {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_notes(found: argparse.ArgumentParser) -> None:
    found.add_argument("--notes", required=True, help="table of notes: a file, a folder or a Hub name")
    for role, option in ROLES.items():
        found.add_argument(f"--{option}", help=f"column of the {role.removesuffix('_id')}; default: found by its name")
    found.add_argument("--time_unit", help="what numbers of time count: days, seconds, milliseconds or yyyymmdd")
    found.add_argument("--time_format", help="how times are written, such as %%d/%%m/%%Y")
