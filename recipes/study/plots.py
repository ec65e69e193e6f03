"""Pictures of the study. Names stand beside what they name; ours is bold, and filled where the others are hollow."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from sklearn.isotonic import isotonic_regression

from hf_densefeat.reporting.plots import COLOURS, STYLES
from study.methods import ABLATION, CANDIDATES, METHODS, OURS
from study.results import Results

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, VERMILION, GREEN = COLOURS[:3]


def _look(name: str, stars: Sequence[str] = OURS) -> dict:
    """Colour, marker and filling of a kind of method: told apart by each of shape and filling, in grey print too."""
    method = (METHODS | CANDIDATES).get(name)
    if name in stars:
        return {"color": VERMILION, "marker": "*", "markersize": 15, "markeredgecolor": "black", "zorder": 4}
    if method is None or name in (*ABLATION, *OURS) or (name in CANDIDATES and not method.pair_loss):
        return {"color": VERMILION, "marker": "D", "markersize": 6, "fillstyle": "none", "zorder": 3}
    if method.supervised:
        return {"color": "black", "marker": "^", "markersize": 8, "zorder": 3}
    if method.free:
        return {"color": GREEN, "marker": "s", "markersize": 7, "fillstyle": "none", "zorder": 3}
    return {"color": BLUE, "marker": "o", "markersize": 7, "fillstyle": "none", "zorder": 3}


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """The places moved as little as possible until none is nearer than the gap to another, within low … high."""
    order = np.argsort(places, kind="stable")
    steps = gap * np.arange(len(order))
    moved = np.empty(len(order))
    moved[order] = np.clip(isotonic_regression(np.array(places)[order] - steps), low, high - steps[-1]) + steps
    return moved


def _bare(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def plot_pareto(points: dict[str, tuple[str, float, float, float]], path: Path | str) -> None:
    """Effective rank and subspace distance against AUROC, the names between the two, by AUROC.

    Args:
        points: method → (title, effective rank, subspace distance, AUROC).
        path: of the PNG.
    """
    height = max(4.6, 0.27 * len(points) + 1.2)
    options = {"dpi": 150, "layout": "constrained", "gridspec_kw": {"width_ratios": [3, 1.55, 3], "wspace": 0}}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, height), sharey=True, **options)
    areas = np.array([area for *_, area in points.values()])
    room = max(np.ptp(areas), 0.01)
    low, high = areas.min() - 0.06 * room, areas.max() + 0.06 * room
    places = _apart(areas, (high - low) / len(points), low, high)
    for (name, (title, rank, distance, area)), place in zip(points.items(), places, strict=True):
        look, ours = _look(name), name in OURS
        line = {"color": look["color"], "linewidth": 1.2 if ours else 0.5, "alpha": 0.8 if ours else 0.45}
        for one, x, edge in ((left, rank, 1), (right, distance, 0)):
            one.plot(x, area, linestyle="", **look)
            arrow = {"arrowstyle": "-", "shrinkA": 0, "shrinkB": 4, **line}
            one.annotate("", (x, area), (edge, place), textcoords=one.get_yaxis_transform(), arrowprops=arrow)
        weight = "bold" if ours else "normal"
        middle.text(0.5, place, title, ha="center", va="center", fontsize=9, fontweight=weight)
    figure.suptitle("★ ours   ◇ ours, changed   ○ other objectives   □ no further training   ▲ supervised", fontsize=9)
    left.set(xlabel="effective rank (centred), more is better →", ylabel="probe AUROC, mean over tasks")
    right.set(xlabel="← less is better, subspace distance of adjacent windows / 2k")
    left.set_ylim(low - 0.03 * room, high + 0.03 * room)
    middle.set_axis_off()
    for one in (left, right):
        one.set_xscale("log")
        one.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        one.xaxis.set_major_formatter("{x:g}")
        one.xaxis.set_minor_formatter("")
        _bare(one)
    right.spines.left.set_visible(False)
    right.tick_params(axis="y", length=0)
    figure.savefig(path)
    plt.close(figure)


def plot_trade(points: dict[str, tuple[str, list[tuple[float, float]]]], path: Path | str) -> None:
    """Content against form: a marker is an embedding as it is, its line goes from the content view to the form view.

    Args:
        points: method → title and (content, form), means of the metrics of similarity, as it is and of the two views, if any;
            methods where one is not defined are left out.
        path: of the PNG.
    """
    points = {name: point for name, point in points.items() if np.isfinite(point[1]).all()}
    height = max(4.6, 0.24 * len(points) + 1)
    figure, axes = plt.subplots(figsize=(10, height), dpi=150, layout="constrained")
    places = np.array([place for _, one in points.values() for place in one]).reshape(-1, 2)
    low, high = (places[:, 1].min(), places[:, 1].max()) if len(places) else (0.0, 1.0)
    room = max(high - low, 0.01)
    low, high = low - 0.03 * room, high + 0.03 * room
    names = _apart([one[0][1] for _, one in points.values()], (high - low) / max(len(points) - 1, 1), low, high)
    for (name, (title, ((content, form), *views))), place in zip(points.items(), names, strict=True):
        ours = name == "mlm+dense"
        look = _look(name, stars=("mlm+dense",))
        axes.plot(content, form, linestyle="", **look)
        line = {"color": look["color"], "linewidth": 1.2 if ours else 0.5, "alpha": 0.8 if ours else 0.45}
        if views:
            axes.plot(
                *zip(views[0], (content, form), views[1], strict=True), **line | {"linewidth": 2.5 if ours else 1}
            )
            axes.plot(*views[0], linestyle="", marker=".", color=look["color"])
        arrow = {"arrowstyle": "-", "shrinkA": 0, "shrinkB": 4, "linestyle": ":" if views else "-", **line}
        axes.annotate("", (content, form), (1.02, place), textcoords=axes.get_yaxis_transform(), arrowprops=arrow)
        text = {"fontsize": 9, "fontweight": "bold" if ours else "normal", "va": "center"}
        axes.text(1.03, place, title, transform=axes.get_yaxis_transform(), **text)
    marks = "★ the default   ◇ ours, changed, or another encoder   ○ other objectives   □ no training"
    lines = "\nline: from its content view (•) over the embedding as it is to its form view"
    axes.set_title(marks + lines * any(len(one) > 1 for _, one in points.values()), fontsize=9)
    axes.set(xlabel="content, mean over tasks →", ylabel="form, mean over tasks →")
    axes.set_ylim(low - 0.03 * room, high + 0.03 * room)
    _bare(axes)
    figure.savefig(path)
    plt.close(figure)


def plot_missing(results: Results, primary: str, path: Path | str) -> None:
    """AUROC of the primary task as parts of the input go missing, the names at the lines' ends."""
    keys = [key for key in results.runs[results.shown[0]][0] if key.startswith("missing ")]
    shares = [float(key.split()[1].rstrip("%")) for key in keys]
    names = [name for name in results.shown if name not in ABLATION or name in OURS[:2]]
    curves = np.array([[results.array(name, key)[0] for key in keys] for name in names])
    figure, axes = plt.subplots(figsize=(9, 5.6), dpi=150, layout="constrained")
    low, high = curves.min(), curves.max()
    places = _apart(curves[:, -1], max(high - low, 0.01) / 20, low, high)
    end, width = shares[-1], shares[-1] / 16
    others = [colour for colour in COLOURS if colour != VERMILION]
    for i, (name, curve, place) in enumerate(zip(names, curves, places, strict=True)):
        ours = name in OURS
        line = {"color": VERMILION if ours else others[i % len(others)], "linestyle": STYLES[i % len(STYLES)]}
        line["linewidth"] = 3 if ours else 1.3
        axes.plot(shares, curve, marker="*" if ours else "o", markersize=10 if ours else 3.5, **line)
        axes.plot([end + 0.2 * width, end + width], [curve[-1], place], **line | {"linewidth": 0.7, "linestyle": "-"})
        text = {"fontsize": 9, "fontweight": "bold" if ours else "normal", "va": "center"}
        axes.text(end + 1.15 * width, place, METHODS[name].title, **text)
    axes.set(xlabel="sections or values missing (%)", ylabel=f"AUROC, {primary}", xticks=shares)
    _bare(axes)
    figure.savefig(path)
    plt.close(figure)
