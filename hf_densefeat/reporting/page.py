"""The report on encoders as one HTML page that a person can send, and as Markdown.

It holds numbers, names of columns and label values, and no text of a note, no patient id and no path.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from hf_densefeat.evaluation.geometry import (
    COLLAPSED_DIRECTIONS,
    COLLAPSED_RANK,
    COLLAPSED_VARIANCE,
    OVERSPREAD_RANK,
)
from hf_densefeat.reporting.formats import Table, markdown
from hf_densefeat.reporting.plots import Picture

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --line: #d0d7de; --card: #f6f8fa;
  --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa5b1; --paper: #12161c; --line: #343b44;
  --card: #1b2128; --mark: #56b4e9; }
  @media screen { img { filter: invert(.93) hue-rotate(180deg); } } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.verdict { border-left: 5px solid var(--mark); background: var(--card); padding: .8rem 1rem; margin: 0 0 .6rem;
  font-size: 1.1rem; }
.note { color: var(--soft); font-size: .92rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: 0 0 1rem; }
th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; } tbody th { font-weight: 400; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.4rem; align-items: flex-start; }
figure { margin: 0; flex: 1 1 20rem; max-width: 34rem; } figcaption { color: var(--soft); font-size: .92rem; }
img { width: 100%; height: auto; background: #fff; border-radius: 6px; }
@media screen and (max-width: 700px) {
  thead { position: absolute; clip-path: inset(50%); height: 1px; overflow: hidden; }
  table, tbody, tr, th, td { display: block; width: 100%; }
  tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
  th, td { border: 0; padding: .1rem 0; } tbody th { font-weight: 600; }
  td { display: flex; justify-content: space-between; gap: 1rem; text-align: right; }
  td::before { content: attr(data-head); color: var(--soft); text-align: left; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --card: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; } figure, tr, .verdict { break-inside: avoid; }
  h2 { break-after: avoid; } table { font-size: 8.5pt; } figure { flex-basis: 45%; max-width: 48%; }
}
"""

HOW_TO_READ = f"""
Collapsed: the centred effective rank is below {COLLAPSED_RANK:.0%} of the attainable min(N - 1, d) (or below
{COLLAPSED_DIRECTIONS}), or less than {COLLAPSED_VARIANCE:.0%} of the squared length of the embeddings is variance.
Over-spread: above {OVERSPREAD_RANK:.0%} of the attainable rank. Healthy: between. These are rules of thumb for these
notes: few or templated notes lower the rank of any encoder. Better and worse mean that a paired 95 % interval lies on
one side of zero; of twenty differences without any cause, about one does. No visible difference is no proof of equality.
Geometry is a means: what counts are the uses, similarity and probes.
"""
METHOD = """
Similarity: embeddings as they are, compared by cosine; neighbours are notes of other patients; nothing is fitted. Probes
are linear, on frozen embeddings: logistic regression or ridge, standardised on the training rows, strength chosen on
validation patients, scored once on test patients; ARI and NMI are of k-means with k = number of classes, on all rows that
have the label. Intervals: 2.5 and 97.5 percentiles over {bootstraps} redraws of patients (or queries), the same redraws
for every encoder, so that differences are paired; they hold for these trained encoders and this split, not for another
training run. Subspace distances are squared projector distances; the noise floor is the distance of random halves of one
side, and is to be compared with the distance of disjoint halves, which has the same row count.
"""


@dataclass(frozen=True)
class Section:
    """A part of the report: a table (with nothing but a header it is left out), pictures, a remark."""

    title: str
    table: Table | None = None
    pictures: Sequence[Picture] = ()
    remark: str = ""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not self.pictures and (self.table is None or len(self.table) < 2)


def _words(text: str) -> str:
    return " ".join(text.split())


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table[0])
    # On narrow screens a line becomes a block, and each value stands beside the head of its column.
    lines = "".join(
        f'<tr><th scope="row">{html.escape(line[0])}</th>'
        + "".join(
            f'<td data-head="{html.escape(title)}">{html.escape(cell)}</td>'
            for title, cell in zip(table[0][1:], line[1:], strict=True)
        )
        + "</tr>"
        for line in table[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    return (
        f'<figure><img alt="{html.escape(picture.alt)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def render(verdicts: Sequence[str], sections: Sequence[Section], *, facts: str, method: str) -> str:
    """The report as one HTML file without any outside reference.

    Args:
        verdicts: sentences that stand first.
        sections: in the order of the page; empty ones are left out.
        facts: when, what and with which options: one paragraph.
        method: how it was measured: the last paragraph.
    """
    parts = ['<!doctype html><html lang="en"><head><meta charset="utf-8">']
    parts.append('<meta name="viewport" content="width=device-width, initial-scale=1">')
    parts.append(f"<title>Encoder report</title><style>{STYLE}</style></head><body><main><h1>Encoder report</h1>")
    parts += [f'<p class="verdict">{html.escape(sentence)}</p>' for sentence in verdicts]
    parts.append(f'<p class="note">{html.escape(facts)}</p>')
    for section in sections:
        if section.empty:
            continue
        parts.append(f"<section><h2>{html.escape(section.title)}</h2>")
        if section.table is not None and len(section.table) > 1:
            parts.append(_html_table(section.table))
        if section.remark:
            parts.append(f'<p class="note">{html.escape(section.remark)}</p>')
        if section.pictures:
            parts.append(f'<div class="pictures">{"".join(map(_html_picture, section.pictures))}</div>')
        parts.append("</section>")
    for title, text in (("How to read it", HOW_TO_READ), ("Method", method)):
        parts.append(f'<h2>{title}</h2><p class="note">{html.escape(_words(text))}</p>')
    return "".join([*parts, "</main></body></html>"])


def render_markdown(verdicts: Sequence[str], sections: Sequence[Section], *, facts: str, method: str) -> str:
    """The same as Markdown, without the pictures."""
    parts = [*verdicts, facts]
    for section in sections:
        if section.table is not None and len(section.table) > 1:
            parts += [f"## {section.title}", markdown(section.table), *([section.remark] * bool(section.remark))]
    return "\n\n".join([*parts, "## How to read it", _words(HOW_TO_READ), "## Method", _words(method)]) + "\n"
