"""How time, memory and bytes grow: with the width, the rows, the micro-batches, the ranks and the notes; one figure."""

import tempfile
import time
from pathlib import Path
from statistics import median

import datasets
import matplotlib
import numpy as np
import torch
from transformers.utils import logging

from benchmarks.data import write_notes
from benchmarks.scaling import cost, default_objective, in_processes, resident, wire
from benchmarks.step import make_trainer, one_update
from benchmarks.timing import measured
from hf_densefeat import adjacent_pairs, load_notes
from hf_densefeat.objective.moments import PairMoments
from hf_densefeat.reporting.plots import COLOURS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FIGURE = Path(__file__).resolve().parents[1] / "results" / "growth.png"
GPUS, GIGABYTES_A_SECOND, MICROSECONDS_A_HOP = 64, 12.5, 20  # a network of 100 Gb/s


def growth(args) -> dict:
    """Each quantity with everything else held, and the exponent e of the fit y = c x^e through its three largest sizes."""
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    by_width = {d: cost(d, 256) for d in (192, 384, 768, 1536, 3072)}
    by_rows = {n: cost(384, n) for n in (64, 256, 1024, 4096)}
    sent = {ranks: in_processes(wire, ranks)[-1] for ranks in (2, 3)}
    by_notes = {n: notes(n) for n in args.notes}
    curves = {
        "objective, ms, by width d (256 pairs)": {d: found["milliseconds"]["median"] for d, found in by_width.items()},
        "objective, peak MiB, by width d": {d: in_processes(peak, 1, d) for d in by_width},
        "objective, ms, by pairs (d 384)": {n: found["milliseconds"]["median"] for n, found in by_rows.items()},
        "update, s, by micro-batches": {k: accumulated(k, args.repeats) for k in (1, 2, 4, 8)},
        "MB a rank sends, by ranks (d 1024)": {ranks: row["sent by a rank"] / 1e6 for ranks, row in sent.items()},
        "load and pair, s, by notes": {n: found["seconds"] for n, found in by_notes.items()},
        "load and pair, MB above, by notes": {n: found["peak MB above"] for n, found in by_notes.items()},
    }
    fitted = {name: round(exponent(curve), 2) for name, curve in curves.items() if "by ranks" not in name}
    draw(curves, fitted)
    return {"curves": curves, "exponents": fitted, f"on {GPUS} GPUs, by arithmetic": on_many(768, 110e6)}


def exponent(curve: dict) -> float:
    """Least squares in logarithms: below, what does not grow hides what does."""
    x, y = np.log(list(curve.items())[-3:]).T
    return float(np.polyfit(x, y, 1)[0])


def peak(rank: int, ranks: int, d: int) -> float:
    """MiB of three updates of 256 pairs in a process that has done nothing else, state and gradients in it."""
    before = resident("VmHWM")
    objective = default_objective()
    z_a, z_b = torch.randn(2, 256, d)
    for _ in range(3):
        _, gradient = objective.gradient(PairMoments.of(z_a, z_b, torch.zeros(d)))
        gradient.pullback(z_a, z_b)
    return round((resident("VmHWM") - before) / 1024, 1)


def accumulated(micro_batches: int, repeats: int) -> float:
    """Processor seconds of an update of 32 pairs of 64 tokens at MiniLM size, in so many micro-batches."""
    update = one_update(make_trainer(3.0, 64, 32 // micro_batches, micro_batches, cuda=False))
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()
        update()
        seconds.append(time.process_time() - start)
    return median(seconds[1:])


def notes(count: int) -> dict:
    """Seconds and memory of a table of so many notes, in no order, to adjacent pairs."""
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        write_notes(Path(folder) / "notes.parquet", count)
        return measured(lambda: adjacent_pairs(load_notes(Path(folder) / "notes.parquet")))[1]


def on_many(d: int, parameters: float) -> dict:
    """Of one update on many GPUs: what the dense terms add to what data parallelism sends anyway, ring all-reduces.

    A rank sends 2 (R - 1) / R of a buffer, as was measured with two and three ranks, in 2 (R - 1) hops.
    """
    share, hops = 2 * (GPUS - 1) / GPUS, 2 * (GPUS - 1)
    moments, gradient = 4 * (d * d + 5 * d + 7), 4 * parameters

    def milliseconds(size: float) -> float:
        return round(1000 * (share * size / (1e9 * GIGABYTES_A_SECOND) + hops * MICROSECONDS_A_HOP / 1e6), 2)

    return {
        "d": d,
        "parameters": parameters,
        "collectives an update, more than without": 1,
        "MB a rank sends": {"moments": round(share * moments / 1e6, 2), "gradient": round(share * gradient / 1e6)},
        "milliseconds": {"moments": milliseconds(moments), "gradient": milliseconds(gradient)},
        "assumed": f"{GIGABYTES_A_SECOND} GB/s, {MICROSECONDS_A_HOP} microseconds a hop",
    }


def draw(curves: dict, fitted: dict) -> None:
    """A panel a curve, both axes logarithmic, with the fitted exponent."""
    figure, panels = plt.subplots(2, 4, figsize=(13, 6), layout="constrained")
    for panel, (name, curve) in zip(panels.flat, curves.items(), strict=False):
        panel.loglog(list(curve), list(curve.values()), "o-", color=COLOURS[0])
        panel.set_title(name, fontsize=9)
        panel.set_xticks(list(curve), [f"{x:,}" for x in curve], fontsize=7)
        panel.minorticks_off()
        panel.set_yticks([])
        for x, y in curve.items():
            panel.annotate(f"{y:.3g}", (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
        panel.margins(0.15)
        said = f"exponent {fitted[name]:.2f}" if name in fitted else "2 (R - 1) / R of the buffer"
        panel.text(0.05, 0.9, said, fontsize=9, transform=panel.transAxes)
    panels.flat[-1].axis("off")
    figure.savefig(FIGURE, dpi=120)
    plt.close(figure)
