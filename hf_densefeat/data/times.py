"""The times of notes, as hospitals write them, to timestamps in UTC or numbers of days."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MICROSECONDS = pa.timestamp("us")
TIME_UNITS = ("days", "seconds", "milliseconds", "yyyymmdd")
DIGITS = {  # dates without separators: how so many digits are parsed, and what they look like
    4: ("%Y", "years, YYYY"),
    6: ("%Y%m", "months, YYYYMM"),
    8: ("%Y%m%d", "dates, YYYYMMDD"),
    12: ("%Y%m%d%H%M", "dates with a time, YYYYMMDDHHMM"),
    14: ("%Y%m%d%H%M%S", "dates with a time, YYYYMMDDHHMMSS"),
}
UNITS = (  # of numbers up to MOST_DAYS, 10^8, 10^10, 10^13, 10^16 and beyond
    "",
    "a unit shorter than days (divide minutes by 1440)",
    *(f"{unit} since 1970" for unit in ("seconds", "milliseconds", "microseconds", "nanoseconds")),
)
MOST_DAYS = 1e6  # what is beyond counts something shorter than days
# 31/12/2020, 12-31-20 3:04 PM; 01-JAN-2020
PATTERNS = [
    mark.join((first, second, year)) + clock
    for mark in "/.- "
    for first, second in (("%d", "%m"), ("%m", "%d"), ("%d", "%b"))
    for year in ("%Y", "%y")
    for clock in ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")
]


def read_times(
    values: pa.ChunkedArray, place: Callable[[int], str], *, unit: str | None = None, pattern: str | None = None
) -> tuple[pa.ChunkedArray, str]:
    """Times as timestamps in UTC or as numbers of days, none of them odd, and a word for which.

    `unit` and `pattern` are `time_unit` and `time_format` of `load_notes`; `place` names a row. ValueError for a value that
    cannot be read, and for numbers that look like dates, where no unit is given.
    """
    kind = values.type
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        zoned = pa.timestamp("us", getattr(kind, "tz", None))
        safe = getattr(kind, "unit", "s") in ("s", "ms")  # nanoseconds lose digits, seconds must not overflow
        said = "dates" if pa.types.is_date(kind) else "timestamps"
        return _parsed(values, lambda some: some.cast(zoned, safe=safe).cast(MICROSECONDS), place), said
    if pa.types.is_integer(kind):
        return _numbers(_parsed(values, lambda some: some.cast(pa.int64()), place), place, unit)
    if pa.types.is_floating(kind):
        return _numbers(pc.if_else(pc.is_finite(values), values.cast(pa.float64()), None), place, unit)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise ValueError(
            f"Column time holds {kind}: expected timestamps, dates, ISO 8601 strings, or days as integers."
        )
    values = pc.utf8_trim_whitespace(values.cast(pa.string()))
    values = pc.if_else(pc.equal(values, ""), None, values)
    if pattern:
        return _parsed(values, lambda some: pc.strptime(some, pattern, "us"), place, f"{pattern!r}"), "timestamps"
    first = next((value.as_py() for value in values if value.is_valid), "")
    if first.lstrip("+-").replace(".", "", 1).isdigit():
        whole = pc.all(pc.match_substring_regex(values, r"^-?\d+$")).as_py()
        number = pa.int64() if whole else pa.float64()
        return _numbers(_parsed(values, lambda some: some.cast(number), place), place, unit)
    if first and (how := _how_to_say(values, place)):
        raise ValueError(how)
    return _parsed(values, _from_iso, place), "timestamps"


def _numbers(values: pa.ChunkedArray, place: Callable[[int], str], unit: str | None) -> tuple[pa.ChunkedArray, str]:
    """Numbers as what the unit says; without one they are days, unless they look like dates or are too many days."""
    if unit is None and (looks := _disguise(values.drop_null().to_numpy())):
        much = pc.greater(pc.abs(values.cast(pa.float64())), MOST_DAYS).fill_null(False).to_numpy()
        first = int((much if much.any() else values.is_valid().to_numpy()).argmax())
        raise ValueError(
            f"Column time holds numbers that look like {looks}, first {place(first)}, not like days. Say what "
            f"they are: `time_unit=` one of {', '.join(TIME_UNITS)}."
        )
    if unit in (None, "days"):
        return values, "numbers of days"
    if unit == "yyyymmdd":
        return _parsed(values, _from_digits, place, "YYYYMMDD, with or without HHMMSS"), "timestamps"
    scale = 1e6 if unit == "seconds" else 1e3

    def micros(some: pa.ChunkedArray) -> pa.ChunkedArray:
        """Whole microseconds, which a float of seconds holds exactly until 2255."""
        return pc.round(pc.multiply(some.cast(pa.float64()), scale)).cast(pa.int64()).cast(MICROSECONDS)

    return _parsed(values, micros, place, unit), "timestamps"


def _disguise(numbers: np.ndarray) -> str:
    """What numbers look like, if they do not look like days; 43831, a spreadsheet's serial, counts days."""
    if not len(numbers):
        return ""
    most = np.abs(numbers).max()
    if (numbers == np.floor(numbers)).all() and numbers.min() > 0 and most < 1e14:
        try:
            years = pc.min_max(pc.year(_from_digits(pa.chunked_array([numbers.astype(np.int64)])))).as_py()
        except pa.ArrowInvalid:
            years = {"min": 0, "max": 0}
        digits = len(str(int(most)))
        if (1900 if digits == 4 else 1800) <= years["min"] and years["max"] <= (2100 if digits == 4 else 2300):
            return DIGITS[digits][1]
    # A single number decides: days since the year 0 are below a million until 2737, and MIMIC shifts dates up to 2200.
    return UNITS[int(np.searchsorted([MOST_DAYS, 1e8, 1e10, 1e13, 1e16], most))]


def _from_digits(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Dates without separators, all of one length."""
    text = values.cast(pa.int64()).cast(pa.string())
    lengths = pc.unique(pc.utf8_length(text.drop_null())).to_pylist()
    if len(lengths) > 1 or (lengths and lengths[0] not in DIGITS):
        raise pa.ArrowInvalid("dates of several lengths")
    return pc.strptime(text, DIGITS[lengths[0] if lengths else 8][0], "us")


def _how_to_say(values: pa.ChunkedArray, place: Callable[[int], str]) -> str | None:
    """The sentence for dates such as 31/12/2020: which format, and whether day and month can be told apart."""

    def read(some: pa.ChunkedArray, patterns: list[str]) -> list[str]:
        """The patterns that read all of these."""
        times = {one: pc.strptime(some, one, "us", error_is_null=True) for one in patterns}
        return [one for one, found in times.items() if found.null_count == some.null_count]

    row = int(values.is_valid().to_numpy().argmax())
    likely = read(values.slice(row, 1), PATTERNS)
    # %Y reads two digits too, as a year of the first century
    likely = [one for one in likely if "%y" in one] or likely
    if not likely:
        return None
    formats = read(values, likely) or likely
    said = " or ".join(f'`time_format="{one}"`' for one in formats)
    unclear = ": day and month cannot be told apart by these rows" if len(formats) > 1 else ""
    return f"Column time is not ISO 8601, first in {place(row)}. Say how it is written{unclear}: {said}."


def _parsed(
    values: pa.ChunkedArray,
    parse: Callable[[pa.ChunkedArray], pa.ChunkedArray],
    place: Callable[[int], str],
    expected: str = "ISO 8601 (2024-05-31 or 2024-05-31 08:15:00, with or without a zone), or a number of days",
) -> pa.ChunkedArray:
    """The parsed times; ValueError names the first row that cannot be parsed, found by bisection."""
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
            f"Column time cannot be read as a time in {place(good)}. Expected the same in every row: {expected}. "
            'Say how yours is written with `time_format="%d/%m/%Y"` or `time_unit="yyyymmdd"`, or rewrite the column.'
        ) from None


def _from_iso(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Parse ISO 8601; what names a zone is brought to UTC, what names none is taken as it is."""
    values = pc.replace_substring_regex(values, r"(\.\d{6})\d+", r"\1")
    zoned = pc.match_substring_regex(values, r":.*(Z|[+-]\d\d:?\d\d)$").fill_null(False)
    naive = pc.if_else(zoned, None, values).cast(MICROSECONDS)
    return pc.coalesce(naive, pc.if_else(zoned, values, None).cast(pa.timestamp("us", "UTC")).cast(MICROSECONDS))
