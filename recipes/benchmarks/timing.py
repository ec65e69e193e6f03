"""Clocks, memory, and where a benchmark ran."""

import ctypes
import platform
import threading
import time
from pathlib import Path

import accelerate
import datasets
import numpy as np
import pyarrow as pa
import torch
import transformers
from tqdm import tqdm


def machine() -> dict:
    """Where and with what this ran."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate, datasets, np)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpu": device,
        "python": platform.python_version(),
        "versions": versions,
    }


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def alternate(functions: dict, repeats: int, device: str = "cpu") -> dict[str, np.ndarray]:
    """Seconds of each function, the functions in turn, so that a drifting machine drifts for all.

    On a CPU these are the processor's, which other processes of the machine do not lengthen.
    """
    seconds = {name: [] for name in functions}
    clock = time.process_time if device == "cpu" else time.perf_counter
    for i in tqdm(range(repeats + 2), desc="measuring", leave=False):
        for name, function in functions.items():
            synchronise(device)
            start = clock()
            function()
            synchronise(device)
            if i >= 2:  # the first two warm up
                seconds[name].append(clock() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def synchronise(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def spread(values) -> dict[str, float]:
    """Median and the 10th and 90th percentile."""
    low, high = np.percentile(values, [10, 90])
    return {"median": round(float(np.median(values)), 5), "p10": round(float(low), 5), "p90": round(float(high), 5)}


def measured(function):
    """A function's result, and what it took."""
    pa.default_memory_pool().release_unused()
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)  # memory that is kept for later would hide what comes next
    before, peak, done = anonymous_megabytes(), [0], threading.Event()

    def watch():
        while not done.wait(0.003):
            peak[0] = max(peak[0], anonymous_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        result = function()
        took = {
            "seconds": round(time.perf_counter() - wall, 3),
            "processor seconds": round(time.process_time() - cpu, 3),
        }
    finally:
        done.set()
        watcher.join()
    return result, took | {"peak MB above": round(max(0, max(peak[0], anonymous_megabytes()) - before))}


def anonymous_megabytes() -> float:
    """Memory of this process that belongs to no file (Linux)."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * 4096 / 1e6
