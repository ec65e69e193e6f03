"""A note cut into spans that share no character: its sections, or its two halves."""

from __future__ import annotations

import re
from collections.abc import Callable

SECTION_HEADER = re.compile(
    r"^(?:#+ *\S.*|[A-Z][A-Z0-9 /&,()'-]{2,60}:?|[A-Z][A-Za-z0-9 /&,()'-]{2,60}:)[ \t]*$", re.MULTILINE
)
BORDERS = (re.compile(r"[.!?;:]\s+|\s*\n\s*|[。！？；]"), re.compile(r"\s+"))  # of sentences and lines, of words
SHORTEST_HALF = 40  # characters: a clause. A half of a few words says too little to be found by


def sections(text: str) -> list[str]:
    """Cut a text before its header lines; one without headers is one section.

    A header is a markdown heading, a line in capitals, or a short line that ends in a colon. A header without a text of
    its own goes with the section that follows.
    """
    pieces, start = [], 0
    for match in SECTION_HEADER.finditer(text):
        before = text[start : match.start()].strip()
        if before and not SECTION_HEADER.fullmatch(before):
            pieces.append(before)
            start = match.start()
    return [*pieces, text[start:].strip()]


def halves(text: str) -> list[str]:
    """Cut a text in two near its middle; [] for one that is too short.

    The cut is the end of a sentence or line in the middle third that is nearest to the middle, or else the nearest space
    there. Each half has at least `SHORTEST_HALF` characters.
    """
    text = text.strip()
    size = len(text)
    for border in BORDERS:
        cuts = [match.end() for match in border.finditer(text, size // 3, size - size // 3)]
        if cuts:
            cut = min(cuts, key=lambda place: abs(2 * place - size))
            both = [text[:cut].rstrip(), text[cut:].lstrip()]
            return both if min(map(len, both)) >= SHORTEST_HALF else []
    return []


SPANS: dict[str, Callable[[str], list[str]]] = {"sections": sections, "halves": halves}
