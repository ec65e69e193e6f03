"""Pictures of what was measured, each a PNG with a text for those who cannot see it. Narrow, so that a phone shows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from hf_densefeat.evaluation.geometry import CONDITION_FLOOR
from hf_densefeat.evaluation.metrics import Estimate
from hf_densefeat.reporting.comparison import Measured, comparisons
from hf_densefeat.reporting.formats import interval, number

# Okabe and Ito's colours, told apart by colour-blind readers; line styles tell them apart in grey print
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = "osv^D<"
WIDTH = 4.7  # inches: at the width of a phone the letters are still of 10 pixels


@dataclass(frozen=True)
class Picture:
    """A PNG on disk."""

    path: Path
    alt: str  # what is seen, with the numbers that matter
    caption: str  # how to read it


def _axes(height: float, rows: int = 1) -> tuple[Any, Any]:
    # not pyplot, which would need a backend: a node has no screen, and a notebook keeps its own
    figure = Figure(figsize=(WIDTH, height), dpi=170, layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)
    for axis in axes[:, 0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes[:, 0]


def _line(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)], "linewidth": 2}


def _save(figure: Any, path: Path | str, alt: str, caption: str, *, legend: Any = None, columns: int = 1) -> Picture:
    """Write the figure, with the legend of these axes, if any, below it."""
    if legend is not None:
        handles, labels = legend.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path)
    return Picture(Path(path), alt, caption)


def plot_similarity(measured: Sequence[Measured], path: Path | str) -> Picture:
    """A dot and a 95 % interval for the headline metric of each similarity task, encoders below each other."""
    rows = [row for row in comparisons(measured) if row.headline and row.group == "similarity"]
    figure, (axes,) = _axes(max(3.0, 1.0 + (0.34 + 0.13 * len(measured)) * len(rows)))
    step = 0.62 / max(len(measured), 2)
    for i, name in enumerate(encoder["name"] for encoder in measured):
        look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        known = [(place, row.values[name]) for place, row in enumerate(rows) if name in row.values]
        y = np.array([place for place, _ in known]) + (i - (len(measured) - 1) / 2) * step
        # no line is drawn where a side is NaN
        axes.hlines(y, [e.low for _, e in known], [e.high for _, e in known], color=look["color"], linewidth=2.5)
        axes.plot([e.value for _, e in known], y, linestyle="", markersize=5.5, label=name, **look)
    axes.set_yticks(range(len(rows)), [row.title.replace(": ", "\n", 1) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=min(0, axes.get_xlim()[0]))
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="value, more is better →")
    values = "; ".join(
        f"{row.title.replace(': ', ', ')}: {', '.join(f'{name} {interval(e)}' for name, e in row.values.items())}"
        for row in rows
    )
    alt = f"Dots with intervals, a row for each use of similarity. {values}."
    caption = "Embeddings compared by cosine as they are, on held-out notes; bars are 95 % intervals over patients."
    return _save(figure, path, alt, caption, legend=axes, columns=min(len(measured), 3))


def plot_spectra(spectra: dict[str, NDArray[np.float64]], path: Path | str) -> Picture:
    """Eigenvalue spectra (m,), largest first, by encoder, each divided by its sum: flat is spread, steep is collapsed.

    Eigenvalues below the floor are rounding. An encoder without any takes its colour: it has the same in every picture.
    """
    figure, (axes,) = _axes(4.0 + 0.2 * len(spectra))
    said = []
    for i, (name, values) in enumerate(spectra.items()):
        if not len(values):
            continue
        share = values[values > CONDITION_FLOOR * values[0]] / max(values.sum(), 1e-300)
        rank = np.exp(-(share * np.log(share)).sum()) if len(share) else 0
        text = f"{name} (effective rank {rank:.0f} of {len(values)})"
        axes.plot(np.arange(1, len(share) + 1), share, label=text, **_line(i))
        if len(share):
            half = int(np.searchsorted(np.cumsum(share), 0.5)) + 1
            said.append(f"{text}: its largest direction has {share[0]:.0%} of the variance, {half} have half")
    most = max(map(len, spectra.values()))
    axes.axhline(1 / most, color="0.45", linewidth=1)
    place = {"textcoords": "offset points", "xytext": (0, 4), "ha": "right", "color": "0.35"}
    axes.annotate("isotropic", (most, 1 / most), **place)
    axes.set(yscale="log", xlabel="eigenvalue number", ylabel="share of the variance")
    alt = f"Falling lines on a logarithmic axis, one an encoder. {'; '.join(said)}."
    caption = "Spectrum of the centred embeddings: flat is spread over many directions, steep is collapsed onto few."
    return _save(figure, path, alt, caption, legend=axes)


def plot_angles(angles: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], path: Path | str) -> Picture:
    """Principal angles of earlier against later notes (k,), in radians, and those of halves of one side, their noise floor."""
    figure, (axes,) = _axes(3.8 + 0.2 * len(angles))
    said = []
    for i, (name, sides) in enumerate(angles.items()):
        later, noise = map(np.degrees, sides)
        x = np.arange(1, len(later) + 1)
        axes.plot(x, later, marker="o", markersize=5, fillstyle="none", label=f"{name}: earlier, later", **_line(i))
        # The floor is drawn as a band, which lies open under a line that runs along it.
        band = {"color": COLOURS[i % len(COLOURS)], "alpha": 0.12, "linewidth": 0}
        axes.fill_between(x, 0, noise, label=f"{name}: noise", **band)
        above = number(float((later - noise).mean()), digits=1, signed=True)
        said.append(f"{name}: mean angle {later.mean():.0f} degrees, {above} against its noise floor")
    axes.set(ylim=(0, 92), xlabel="pair of principal directions, closest first", ylabel="angle (degrees)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    caption = "A line above its band: from note to note the leading directions change by more than sampling explains."
    return _save(figure, path, f"Rising lines of principal angles. {'; '.join(said)}.", caption, legend=axes)


def plot_shots(curves: Mapping[str, dict[str, dict[int | str, Estimate]]], path: Path | str) -> Picture:
    """AUROC by task, encoder and number of training rows of each class, the last one the word "all"; one panel a task."""
    figure, axes = _axes(2.6 * len(curves) + 0.7, len(curves))
    said = []
    for panel, (task, encoders) in zip(axes, curves.items(), strict=True):
        for i, (name, curve) in enumerate(encoders.items()):
            shots = [k for k in curve if isinstance(k, int)]
            numbers = np.array([*shots, 2 * max(shots)])
            # Side by side rather than on top of each other.
            x = numbers * 1.05 ** (i - (len(encoders) - 1) / 2)
            values, low, high = ([getattr(e, side) for e in curve.values()] for side in ("value", "low", "high"))
            panel.vlines(x, low, high, color=COLOURS[i % len(COLOURS)], alpha=0.6, linewidth=1.5)
            panel.plot(x, values, marker="o", markersize=4, label=name, **_line(i))
            said.append(f"{task}, {name}: {values[0]:.2f} with {shots[0]} of each class, {values[-1]:.2f} with all")
        panel.axhline(0.5, color="0.45", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_xticks(numbers, list(map(str, curve)))
        panel.set(ylabel="AUROC", title=task)
        panel.minorticks_off()
    axes[-1].set_xlabel("training rows of each class")
    caption = "Few labels: mean over three nested draws; bars are 95 % intervals over test patients."
    alt = f"AUROC by number of labels. {'; '.join(said)}."
    return _save(figure, path, alt, caption, legend=axes[0], columns=3)


def plot_projection(
    z: dict[str, NDArray[Any]], y: NDArray[Any], classes: Sequence[Any], *, label: str, path: Path | str
) -> Picture:
    """First two principal components of each encoder's embeddings (N, d), coloured by one label.

    The label's y are codes of the classes (N,), of which the six largest are drawn in colour and the others in grey, or
    values where there are no classes.
    """
    figure, axes = _axes(3.4 * len(z) + 0.8, len(z))
    said = []
    for panel, (name, rows) in zip(axes, z.items(), strict=True):
        u, s, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        x, share = u[:, :2] * s[:2], s**2 / max((s**2).sum(), 1e-300)
        if classes:
            _scatter_classes(panel, x, y, classes)
        else:
            points = panel.scatter(*x.T, c=y, cmap="cividis", s=10, linewidths=0)
        panel.set(title=name, xlabel=f"component 1 ({share[0]:.0%} of the variance)")
        panel.set(ylabel=f"component 2 ({share[1]:.0%})")
        panel.grid(False)
        said.append(f"{name}: the two components have {share[:2].sum():.0%} of the variance")
    if not classes:
        figure.colorbar(points, ax=axes[-1], label=label)
    alt = f"Scatter of notes, coloured by {label}. {'; '.join(said)}."
    caption = f"Notes by {label}. Two of many dimensions: what is far apart here need not be, nor what is mixed."
    return _save(figure, path, alt, caption, legend=axes[-1] if classes else None, columns=2)


def _scatter_classes(axes: Any, x: NDArray[Any], y: NDArray[Any], classes: Sequence[Any]) -> None:
    shown = np.argsort(-np.bincount(y, minlength=len(classes)), kind="stable")[: len(MARKERS)]
    rest = ~np.isin(y, shown)
    axes.scatter(*x[rest].T, color="0.75", s=8, linewidths=0, label="others" if rest.any() else None)
    for i, c in enumerate(sorted(shown)):
        text = str(classes[c]) if len(str(classes[c])) <= 32 else f"class {c + 1}"
        dots = {"color": COLOURS[i], "marker": MARKERS[i], "s": 12, "alpha": 0.45, "linewidths": 0}
        axes.scatter(*x[y == c].T, label=text, **dots)


def draw(measured: Sequence[Measured], folder: Path | str) -> list[Picture]:
    """The pictures for a card or README, as far as there is something to draw: similarity.png and spectrum.png."""
    folder, pictures = Path(folder), []
    if any(row.group == "similarity" for row in comparisons(measured)):
        pictures.append(plot_similarity(measured, folder / "similarity.png"))
    spectra = {encoder["name"]: np.array(encoder.get("spectrum", [])) for encoder in measured}
    if any(map(len, spectra.values())):
        pictures.append(plot_spectra(spectra, folder / "spectrum.png"))
    return pictures
