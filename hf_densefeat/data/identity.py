"""Patient ids in one form, whatever wrote them: a csv of pandas, a frame, parquet, the table of a probe."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NONE_WORDS = ("", "null", "nan", "none", "[null]", "\\n", "<na>", "nat")  # what exports write for nothing, in any case
ID_RULE = "spaces stripped, 1.0 is 1, words for nothing are missing"


def identities(
    values: pa.ChunkedArray | Sequence[Any], *, place: Callable[[int], str] = lambda row: f"row {row + 1:,}"
) -> pa.ChunkedArray:
    """Patient ids as integers or strings, in one form; those that are missing are null.

    Strings lose the spaces around them; "1.0" and the float 1.0 become 1, and "007" stays as it is. Nothing, NaN and the
    words that exports write for it (NULL, nan, None, <NA>, in any case) are no patient. ValueError, with the `place` of the
    first, for floats that are not whole or beyond 2^53, above which neighbours are one number, and for other types.
    """
    if not isinstance(values, pa.ChunkedArray):
        try:
            values = pa.chunked_array([pa.array(values, from_pandas=True)])
        except (pa.ArrowException, TypeError):  # of several types: a frame that once lacked an id
            values = pa.chunked_array([pa.array([None if one is None or one != one else str(one) for one in values])])
    kind = values.type
    if pa.types.is_integer(kind):
        return values
    if pa.types.is_floating(kind):
        values = pc.if_else(pc.is_finite(values), values, None)
        whole = pc.and_(pc.equal(values, pc.floor(values)), pc.less_equal(pc.abs(values), 2**53))
        odd = pc.invert(whole).fill_null(False).to_numpy()
        if odd.any():
            raise ValueError(
                f"Column patient_id holds floats that are no identifiers, first {place(int(odd.argmax()))}: "
                "expected integers or strings. Which column holds the patient?"
            )
        return values.cast(pa.int64())
    if not (pa.types.is_decimal(kind) or pa.types.is_null(kind) or "string" in str(kind)):
        raise ValueError(f"Column patient_id holds {kind}: expected integers or strings. Which one holds the patient?")
    values = pc.utf8_trim_whitespace(values.cast(pa.string()))
    values = pc.replace_substring_regex(values, r"^([+-]?\d+)\.0*$", r"\1")
    return pc.if_else(pc.is_in(pc.utf8_lower(values), value_set=pa.array(NONE_WORDS)), None, values)


def id_hashes(ids: Sequence[Any], salt: str = "", *, key: bytes = b"") -> np.ndarray:
    """A 64-bit hash of the salt and each id, (n,) uint64, by which patients are split and recorded.

    It is coarser than identity: 007 and 7, or a UUID in capitals, may be one patient in two tables, and share a hash.
    """
    texts = pc.utf8_lower(identities(ids).cast(pa.string())).fill_null("")
    texts = pc.replace_substring_regex(texts, r"^0+(\d)", r"\1").to_pylist()
    found = [hashlib.blake2b(f"{salt}{one}".encode(), digest_size=8, key=key).digest() for one in texts]
    return np.array(found, dtype="S8").view(">u8").astype(np.uint64)


def id_places(ids: Sequence[Any], seed: int) -> np.ndarray:
    """Where the hash of (seed, id) stands in its range, in [0, 1), (n,)."""
    return id_hashes(ids, f"{seed}:").astype(np.float64) / 2.0**64
