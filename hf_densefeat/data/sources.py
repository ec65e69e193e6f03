"""Whatever holds notes, a file, a folder, a Hub name, a frame or a list, to one table."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_densefeat.data.columns import match_columns
from hf_densefeat.data.files import EXPECTED, FORMATS, PACKED
from hf_densefeat.data.readers import READ_ERRORS, SourceTable, damaged, read_files


def open_source(source: Any, columns: str | Mapping[str, str], split: str | None) -> SourceTable:
    """The rows of any source of `load_notes`; ValueError for what is none, cannot be read, or has splits and none is named."""
    if isinstance(source, str | os.PathLike):
        return _from_path(source, columns, split)
    if isinstance(source, datasets.DatasetDict):
        split = next(iter(source)) if split is None and len(source) == 1 else split
        if split not in source:
            raise ValueError(f"Expected `split` to be one of {list(source)}, got {split!r}.")
        source = source[split]
    try:
        if isinstance(source, datasets.Dataset):
            data = source.with_format(None)
        # before Mapping: pandas, polars, pyarrow and DuckDB give an Arrow stream, and may look like a mapping of columns
        elif hasattr(source, "__arrow_c_stream__"):
            data = datasets.Dataset(_plain_table(pa.RecordBatchReader.from_stream(source).read_all()))
        elif isinstance(source, Mapping):
            data = datasets.Dataset.from_dict(dict(source))
        elif isinstance(source, list):
            data = datasets.Dataset.from_list(source)
        else:
            raise ValueError(
                "Expected a path, a Hub name, a datasets.Dataset, a frame (pandas, polars, Arrow), a dict of columns or a "
                f"list of dicts, got {type(source).__name__}."
            )
    except (pa.ArrowException, AttributeError, TypeError) as error:
        raise ValueError(
            # Arrow's own message quotes a cell
            f"The {type(source).__name__} is no table ({type(error).__name__}): expected columns of one length and type each, "
            "or a list of dicts with the same keys. Does a column hold strings and numbers?"
        ) from None
    return SourceTable(data, match_columns(data.column_names, columns))


def _from_path(source: str | os.PathLike[str], columns: str | Mapping[str, str], split: str | None) -> SourceTable:
    path = Path(source)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        try:
            return open_source(datasets.load_from_disk(str(path)), columns, split)
        except (OSError, pa.ArrowException, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path.name} was written by `save_to_disk`, but cannot be read ({type(error).__name__}): write it "
                "anew."
            ) from None
    if path.exists():
        table = read_files(path, lambda names, meds: match_columns(names, columns, meds))
        return _with_meds_splits(table, path) if table.meds else table
    # what looks like a path is not looked up on the Hub: a typing error would be sent there
    ends = (*FORMATS, *PACKED)
    if path.name.endswith(ends) or path.is_absolute() or path.parts[:1] == ("..",) or len(path.parts) > 2:
        raise ValueError(f"{path.name}: no such file or folder. Expected {EXPECTED}, or a folder of these.")
    try:
        return open_source(datasets.load_dataset(str(source)), columns, split)
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f'"{source}" is no file or folder here, and could not be loaded from the Hub ({type(error).__name__}). '
            "Check the name, the network (HF_HUB_OFFLINE) and your login, or pass a path."
        ) from None


def _plain_table(table: pa.Table) -> pa.Table:
    """Without a frame's index, and with strings in the place of views, which few functions of Arrow know."""
    table = table.select([name for name in table.column_names if not name.startswith("__index_level_")])
    fields = [one.with_type(pa.large_string()) if str(one.type) == "string_view" else one for one in table.schema]
    return table.cast(pa.schema(fields))


def _with_meds_splits(table: SourceTable, path: Path) -> SourceTable:
    """With the splits that a MEDS folder brings as column `split`; subjects it does not list get none."""
    file = path / "metadata" / "subject_splits.parquet"
    if not file.exists() or "split" in table.data.column_names:
        return table
    patients = table.data.data.column(table.layout.roles["patient_id"])
    try:
        splits = pq.read_table(file, columns=["subject_id", "split"])
        place = pc.index_in(patients, value_set=splits["subject_id"].combine_chunks()).combine_chunks()
    except READ_ERRORS as error:
        raise damaged(file.name, 0, error) from None
    names = splits["split"].cast(pa.string()).combine_chunks().take(place)
    return replace(table, data=table.data.add_column("split", names))
