"""Pictures of embeddings: what people would rather look at than read. Each is written to a path, as PNG."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")  # a training node has no screen
from matplotlib import pyplot as plt

from hf_densefeat.evaluation.metrics import Estimate

# Okabe and Ito's colours, told apart by colour-blind readers; line styles tell them apart in grey print
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = "osv^D<"


def _axes(width: float = 6.4, height: float = 4.2, columns: int = 1):
    figure, axes = plt.subplots(1, columns, figsize=(width, height), dpi=150, layout="constrained", squeeze=False)
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25, linewidth=0.6)
    return figure, axes[0]


def _line(i: int) -> dict:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)], "linewidth": 2}


def _save(figure, path: Path | str) -> None:
    figure.savefig(path)
    plt.close(figure)


def _legend_below(figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def plot_spectra(spectra: dict[str, NDArray[np.float64]], path: Path | str) -> None:
    """Eigenvalue spectra on a log axis, each divided by its sum, and their cumulative sums: flat is spread, steep collapsed.

    Args:
        spectra: eigenvalues (m,), largest first, by the name of the encoder; those below 1e-10 of the first are rounding.
        path: of the PNG.
    """
    figure, (left, right) = _axes(9.6, 4.4, 2)
    for i, (name, values) in enumerate(spectra.items()):
        share = values[values > 1e-10 * values[0]] / max(values.sum(), 1e-300)
        rank = np.exp(-(share * np.log(share)).sum()) if len(share) else 0
        number = np.arange(1, len(share) + 1)
        left.plot(number, share, label=f"{name} (effective rank {rank:.0f} of {len(values)})", **_line(i))
        right.plot(number, np.cumsum(share), **_line(i))
    most = max(map(len, spectra.values()))
    left.axhline(1 / most, color="0.45", linewidth=1)
    place = {"textcoords": "offset points", "xytext": (0, 4), "ha": "right", "color": "0.35", "fontsize": 9}
    left.annotate("isotropic", (most, 1 / most), **place)
    left.set(yscale="log", xlabel="eigenvalue number", ylabel="share of the variance", title="Spectrum (centred)")
    right.set(ylim=(0, 1.02), xscale="log", xlabel="eigenvalues taken, largest first")
    right.set(ylabel="cumulative share of the variance", title="Cumulative variance")
    right.xaxis.set_major_formatter("{x:.0f}")
    _legend_below(figure, left)
    _save(figure, path)


def plot_angles(angles: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]], path: Path | str) -> None:
    """Principal angles of adjacent windows, and their noise floor.

    Args:
        angles: by encoder, two arrays (k,) in radians: earlier against later notes, and halves of one side.
        path: of the PNG.
    """
    figure, (axes,) = _axes()
    for i, (name, (found, floor)) in enumerate(angles.items()):
        number, later, noise = np.arange(1, len(found) + 1), f"{name}: earlier against later", f"{name}: noise floor"
        axes.plot(number, np.degrees(found), marker="o", markersize=4, label=later, **_line(i))
        thin = _line(i) | {"linewidth": 1, "linestyle": ":"}
        axes.plot(number, np.degrees(floor), marker="x", markersize=4, label=noise, **thin)
    axes.set(ylim=(0, 92), xlabel="principal direction pair, closest first", ylabel="angle (degrees)")
    axes.set_title("Subspaces of adjacent notes, halves of equal size")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    _legend_below(figure, axes)
    _save(figure, path)


def plot_shots(curves: dict[str, dict[str, dict[int | str, Estimate]]], path: Path | str) -> None:
    """AUROC by the number of training rows of each class, one panel a task, with intervals.

    Args:
        curves: task to encoder to number of rows to `Estimate`; the last number is the word "all".
        path: of the PNG.
    """
    figure, axes = _axes(max(4.8, 3.6 * len(curves)), 3.9, len(curves))
    for one, (task, encoders) in zip(axes, curves.items(), strict=True):
        for i, (name, curve) in enumerate(encoders.items()):
            shots = [k for k in curve if k != "all"]
            numbers = np.array([*shots, 2 * max(shots)])
            # Side by side rather than on top of each other.
            x = numbers * 1.05 ** (i - (len(encoders) - 1) / 2)
            values, low, high = ([getattr(e, side) for e in curve.values()] for side in ("value", "low", "high"))
            one.vlines(x, low, high, color=COLOURS[i % len(COLOURS)], alpha=0.6, linewidth=1.5)
            one.plot(x, values, marker="o", markersize=4, label=name, **_line(i))
        one.axhline(0.5, color="0.45", linewidth=1)
        one.set_xscale("log", base=2)
        one.set_xticks(numbers, list(map(str, curve)))
        one.set(xlabel="training rows of each class", ylabel="AUROC", title=task)
        one.minorticks_off()
    _legend_below(figure, axes[0])
    _save(figure, path)


def plot_projection(z: dict[str, NDArray], y: NDArray, classes: Sequence, label: str, path: Path | str) -> None:
    """First two principal components of each encoder, coloured by one label.

    Args:
        z: embeddings (N, d) by the name of the encoder.
        y: codes of the classes (N,), or values where there are no classes.
        classes: names of the classes; the six largest are drawn, the others in grey.
        label: name of the label.
        path: of the PNG.
    """
    figure, axes = _axes(max(4.8, 4.0 * len(z)), 4.2, len(z))
    for one, (name, rows) in zip(axes, z.items(), strict=True):
        u, s, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        x, share = u[:, :2] * s[:2], s**2 / (s**2).sum()
        if not classes:
            points = one.scatter(*x.T, c=y, cmap="cividis", s=10, linewidths=0)
        else:
            shown = np.argsort(-np.bincount(y, minlength=len(classes)), kind="stable")[: len(MARKERS)]
            rest = ~np.isin(y, shown)
            one.scatter(*x[rest].T, color="0.75", s=8, linewidths=0, label="others" if rest.any() else None)
            for i, c in enumerate(sorted(shown)):
                text = str(classes[c]) if len(str(classes[c])) <= 32 else f"class {c + 1}"
                dots = {"color": COLOURS[i], "marker": MARKERS[i], "s": 12, "alpha": 0.45, "linewidths": 0}
                one.scatter(*x[y == c].T, label=text, **dots)
        one.set(title=name, xlabel=f"component 1 ({share[0]:.0%} of the variance)")
        one.set(ylabel=f"component 2 ({share[1]:.0%})")
        one.grid(False)
    if not classes:
        figure.colorbar(points, ax=axes[-1], label=label)
    else:
        axes[-1].legend(frameon=False, fontsize=9, title=label, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)
