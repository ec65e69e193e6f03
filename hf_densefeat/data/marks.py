"""De-identification marks: what stands in a note in place of a name, a date or a number."""

from __future__ import annotations

import re
from typing import Any

# MIMIC-III's [**2151-7-16**], MIMIC-IV's ___, and names of kinds such as <DATE>; of bounded length, because a mark that is
# never closed would take the rest of the note with it
MARKS = re.compile(r"\[\*\*.{0,100}?\*\*\]|_{3,}|<[A-Z][A-Z0-9_ -]{2,29}>", re.DOTALL)


def marked_tokens(text: str, encoding: Any) -> list[int]:
    """Return 1 for each token of which a part stands in a de-identification mark, 0 for the others.

    Args:
        text: the note.
        encoding: what a fast tokenizer made of it (`tokenizers.Encoding`), not cut.
    """
    marked = [0] * len(encoding)
    for match in MARKS.finditer(text):
        places = range(match.start(), match.end())
        # a tokenizer may drop characters, spaces for one
        first = next((token for token in map(encoding.char_to_token, places) if token is not None), None)
        last = next((token for token in map(encoding.char_to_token, reversed(places)) if token is not None), None)
        if first is not None and last is not None:
            marked[first : last + 1] = [1] * (last + 1 - first)
    return marked
