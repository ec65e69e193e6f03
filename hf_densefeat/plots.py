"""Pictures of geometry: what people would rather look at than read."""

from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's colours, told apart by colour-blind readers; line styles tell them apart in grey print
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")


def plot_spectra(spectra: dict[str, NDArray[np.float64]], path: Path | str) -> None:
    """Eigenvalue spectra, each divided by its sum, on a log axis: flat is spread, steep is collapsed.

    Args:
        spectra: eigenvalues (m,), largest first, by the name of the encoder.
        path: of the PNG.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4), dpi=150, layout="constrained")
    for i, (name, values) in enumerate(spectra.items()):
        share = values / values.sum()
        positive = share[share > 1e-9]  # below is rounding: a final LayerNorm alone costs one direction
        rank = np.exp(-(positive * np.log(positive)).sum())
        axes.plot(
            np.arange(1, len(positive) + 1),
            positive,
            label=f"{name} (effective rank {rank:.0f} of {len(values)})",
            color=COLOURS[i % len(COLOURS)],
            linestyle=STYLES[i % len(STYLES)],
            linewidth=2,
        )
        top = max(len(values), 2)
    axes.axhline(1 / top, color="grey", linewidth=1)
    axes.annotate("isotropic", (top, 1 / top), ha="right", va="bottom", color="grey")
    axes.set(
        yscale="log", xlabel="eigenvalue number", ylabel="share of the variance", title="Spectrum of the embeddings"
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
