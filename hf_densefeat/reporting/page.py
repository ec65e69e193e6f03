"""The report on encoders as one HTML page that a person can send, and as Markdown.

It holds numbers, names of columns and label values, and no text of a note, no patient id and no path.
"""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_densefeat.evaluation.geometry import (
    COLLAPSED_DIRECTIONS,
    COLLAPSED_RANK,
    COLLAPSED_VARIANCE,
    OVERSPREAD_RANK,
)
from hf_densefeat.evaluation.metrics import Estimate
from hf_densefeat.reporting.comparison import Measured, Verdict
from hf_densefeat.reporting.formats import Table, markdown
from hf_densefeat.reporting.plots import Picture, draw, plot_angles, plot_shots
from hf_densefeat.reporting.tables import code_table, comparison_table, geometry_table, subspace_table

HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">\
<meta name="viewport" content="width=device-width, initial-scale=1">\
<title>Encoder report</title><style>{style}</style></head><body><main><h1>Encoder report</h1>"""

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
.wide { overflow-x: auto; }
.note { color: var(--soft); font-size: .92rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: 0 0 1rem; }
th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; } tbody th { font-weight: 400; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.4rem; align-items: flex-start; }
figure { margin: 0; flex: 1 1 20rem; max-width: 34rem; } figcaption { color: var(--soft); font-size: .92rem; }
img { width: 100%; height: auto; background: #fff; border-radius: 6px; }
.compact th, .compact td { padding-right: .8rem; } .group th { font-weight: 600; padding-top: .7rem; }
@media screen and (max-width: 700px) {
  .compact { font-size: .75rem; } .compact th, .compact td { padding-right: .45rem; }
  .lines thead { position: absolute; clip-path: inset(50%); height: 1px; overflow: hidden; }
  .lines, .lines tbody, .lines tr, .lines th, .lines td { display: block; width: 100%; }
  .lines tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
  .lines th, .lines td { border: 0; padding: .1rem 0; } .lines tbody th { font-weight: 600; }
  .lines td { display: flex; justify-content: space-between; gap: 1rem; text-align: right; }
  .lines td::before { content: attr(data-head); color: var(--soft); text-align: left; }
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
Similarity: embeddings as they are, compared by cosine; neighbours are notes of other patients; nothing is fitted. Words:
TF-IDF (1 + ln of the count) of what the encoders read, fitted on training patients' notes; fused with words: documents in
the order of the sum of 1/(60 + rank) over both rankings. Probes
are linear, on frozen embeddings: logistic regression or ridge, standardised on the training rows, strength chosen on
validation patients, scored once on test patients; ARI and NMI are of k-means with k = number of classes, on all rows that
have the label. Intervals: 2.5 and 97.5 percentiles over {bootstraps} redraws of patients (or queries), the same redraws
for every encoder, so that differences are paired; they hold for these trained encoders and this split, not for another
training run. Subspace distances are squared projector distances; the noise floor is the distance of random halves of one
side, and is to be compared with the distance of disjoint halves, which has the same row count.
"""


@dataclass(frozen=True)
class Section:
    """A part of the report: a table (with nothing but a header it is left out) and pictures."""

    title: str
    table: Table | None = None
    pictures: Sequence[Picture] = ()

    @property
    def rows(self) -> Table:
        """The table where it has any line."""
        return self.table if self.table and len(self.table) > 1 else []


def report_sections(
    measured: Sequence[Measured],
    folder: Path | str,
    *,
    adjacent: Mapping[str, dict[str, float]] | None = None,
    per_patient: Mapping[str, dict[str, float]] | None = None,
    angles: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]] | None = None,
    shots: Mapping[str, dict[str, dict[int | str, Estimate]]] | None = None,
    projection: Picture | None = None,
    rows: Table | None = None,
) -> list[Section]:
    """Similarity first, then geometry, then probes; the first encoder is the base of the others.

    `adjacent` and `per_patient` are for `subspace_table`, `angles` and `shots` for the plots of these names, which are
    drawn into the folder; `projection` is of `plot_projection`, and `rows` of `rows_table`.
    """
    folder = Path(folder)
    probes = [plot_shots(shots, folder / "shots.png")] if shots else []
    probes += [projection] if projection else []
    return [
        Section("At a glance", pictures=draw(measured, folder)),
        Section("Similarity", comparison_table(measured, ("similarity",), "use, by cosine")),
        Section("Similarity with fewer bits or dimensions", code_table(measured)),
        Section("Geometry", geometry_table(measured)),
        Section(
            "Subspaces of adjacent notes",
            subspace_table(adjacent, per_patient) if adjacent else None,
            [plot_angles(angles, folder / "angles.png")] if angles else [],
        ),
        Section("Probes", comparison_table(measured, ("probes", "clusterings"), "probe"), probes),
        Section("Rows behind the numbers", rows),
    ]


def _html_table(table: Table) -> str:
    """A table; where lines share their first cell, it becomes a heading over them, and the table stays narrow."""
    # A line may break before or after an interval, not in it.
    head, *lines = [[re.sub(r"(?<=\d), (?=[+-]?\d)", ",\u00a0", html.escape(cell)) for cell in line] for line in table]
    grouped = len({line[0] for line in lines}) < len(lines)
    titles = 1 if grouped else 0  # the column of the lines' own titles
    head = head[titles:]
    bodies: dict[str, str] = {}
    for name, (title, *cells) in ((line[0] if grouped else "", line[titles:]) for line in lines):
        # On narrow screens a line becomes a block, and each value stands beside the head of its column.
        values = "".join(f'<td data-head="{key}">{cell}</td>' for key, cell in zip(head[1:], cells, strict=True))
        bodies[name] = bodies.get(name, "") + f'<tr><th scope="row">{title}</th>{values}</tr>'
    parts = [f'<table class="{"compact" if grouped else "lines"}"><thead><tr>']
    parts += [f'<th scope="col">{cell}</th>' for cell in head] + ["</tr></thead>"]
    for name, rows in bodies.items():
        heading = f'<tr class="group"><th scope="rowgroup" colspan="{len(head)}">{name}</th></tr>' if grouped else ""
        parts.append(f"<tbody>{heading}{rows}</tbody>")
    return "".join([*parts, "</table>"])


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    image = f'<img alt="{html.escape(picture.alt)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(picture.caption)}</figcaption></figure>"


def render(verdicts: Sequence[Verdict], sections: Sequence[Section], *, facts: str, method: str) -> str:
    """The report as one HTML file without any outside reference: verdicts, facts, the sections that are not empty, method.

    The facts say when, what and with which options; the method how it was measured. Each is one paragraph.
    """
    parts = [HEAD.format(style=STYLE)]
    for advice, evidence in ((html.escape(one.advice), html.escape(one.evidence)) for one in verdicts):
        parts.append(f'<p class="verdict"><strong>{advice}</strong> {evidence}</p>')
    parts.append(f'<p class="note">{html.escape(facts)}</p>')
    for section in (part for part in sections if part.rows or part.pictures):
        parts.append(f"<section><h2>{html.escape(section.title)}</h2>")
        if section.rows:
            parts.append(f'<div class="wide">{_html_table(section.rows)}</div>')
        if section.pictures:
            parts.append(f'<div class="pictures">{"".join(map(_html_picture, section.pictures))}</div>')
        parts.append("</section>")
    for title, text in (("How to read it", HOW_TO_READ), ("Method", method)):
        parts.append(f'<h2>{title}</h2><p class="note">{html.escape(" ".join(text.split()))}</p>')
    return "".join([*parts, "</main></body></html>"])


def render_markdown(verdicts: Sequence[Verdict], sections: Sequence[Section], *, facts: str, method: str) -> str:
    """The same as Markdown, without the pictures."""
    parts = [*(f"**{verdict.advice}** {verdict.evidence}" for verdict in verdicts), facts]
    parts += [f"## {section.title}\n\n{markdown(section.rows)}" for section in sections if section.rows]
    for title, text in (("How to read it", HOW_TO_READ), ("Method", method)):
        parts.append(f"## {title}\n\n{' '.join(text.split())}")
    return "\n\n".join(parts) + "\n"
