"""The times of notes, as hospitals write them, to timestamps in UTC or numbers of days."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from hf_densefeat.data.readers import SourceTable

MICROSECONDS = pa.timestamp("us")


def read_times(values: pa.ChunkedArray, source: SourceTable) -> tuple[pa.ChunkedArray, str]:
    """Return times as timestamps in UTC or as numbers of days, none of them odd, and a word for which."""
    kind, days = values.type, "numbers of days"
    if pa.types.is_integer(kind):
        return _parsed(values, lambda some: some.cast(pa.int64()), source), days
    if pa.types.is_floating(kind):
        return pc.if_else(pc.is_finite(values), values.cast(pa.float64()), None), days
    if pa.types.is_date(kind):
        return _parsed(values, lambda some: some.cast(MICROSECONDS), source), "dates"
    if pa.types.is_timestamp(kind):
        zoned = pa.timestamp("us", kind.tz)
        safe = kind.unit in ("s", "ms")  # nanoseconds lose digits, seconds must not overflow
        return _parsed(values, lambda some: some.cast(zoned, safe=safe).cast(MICROSECONDS), source), "timestamps"
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise ValueError(
            f"Column time holds {kind}: expected timestamps, dates, ISO 8601 strings, or days as integers."
        )
    values = stripped(values)
    first = next((value.as_py() for value in values if value.is_valid), "")
    if first.lstrip("+-").replace(".", "", 1).isdigit():
        whole = pc.all(pc.match_substring_regex(values, r"^-?\d+$")).as_py()
        return _parsed(values, lambda some: some.cast(pa.int64() if whole else pa.float64()), source), days
    return _parsed(values, _from_iso, source), "timestamps"


def _parsed(
    values: pa.ChunkedArray, parse: Callable[[pa.ChunkedArray], pa.ChunkedArray], source: SourceTable
) -> pa.ChunkedArray:
    """Return the parsed times, or name the first row that cannot be parsed, found by bisection."""
    try:
        return parse(values)
    except pa.ArrowInvalid:
        good, bad = 0, len(values)
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                parse(values.slice(good, middle - good))
                good = middle
            except pa.ArrowInvalid:
                bad = middle
        raise ValueError(
            f"Column time cannot be read as a time in {source.place(good)}. Expected the same in every row: ISO 8601 "
            "(2024-05-31 or 2024-05-31 08:15:00, with or without a zone), or a number of days. Rewrite the column."
        ) from None


def _from_iso(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Parse ISO 8601; what names a zone is brought to UTC, what names none is taken as it is."""
    values = pc.replace_substring_regex(values, r"(\.\d{6})\d+", r"\1")
    zoned = pc.match_substring_regex(values, r":.*(Z|[+-]\d\d:?\d\d)$").fill_null(False)
    naive = pc.if_else(zoned, None, values).cast(MICROSECONDS)
    if not pc.any(zoned).as_py():
        return naive
    return pc.coalesce(naive, pc.if_else(zoned, values, None).cast(pa.timestamp("us", "UTC")).cast(MICROSECONDS))


def stripped(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strip white space; what is then empty becomes null."""
    values = pc.utf8_trim_whitespace(values.cast(pa.string()))
    return pc.if_else(pc.equal(values, ""), None, values)
