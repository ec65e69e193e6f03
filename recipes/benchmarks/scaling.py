"""Ranks, width and rows: bytes between ranks, two ranks against one, time and memory of the objective."""

import os
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.step import make_trainer, one_update
from benchmarks.timing import spread
from hf_densefeat import DenseObjective, DenseTrainingArguments
from hf_densefeat.objective.distributed import sum_over_ranks
from hf_densefeat.objective.moments import PairMoments

WIDTHS = (384, 768, 1024, 4096)


def scaling(args) -> dict:
    """Bytes between ranks, two ranks against one, and the objective's time and memory by width and rows."""
    return {
        "bytes a step": [row for ranks in (2, 3) for row in in_processes(wire, ranks)],
        "step": step_of_two_ranks(args.repeats),
        "objective": [cost(d, n) for d in WIDTHS for n in (16, 256, 4096)],
        "milliseconds of one eigh": {d: eigendecomposition(d) for d in WIDTHS},
    }


def in_processes(function, ranks: int, *args):
    """What `function` returns on rank 0 of so many processes (gloo), one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(one_rank, args=(function, ranks, port, answers, args), nprocs=ranks)
    return answers.get()


def one_rank(rank, function, ranks, port, answers, args) -> None:
    """The environment that a launcher sets, and the function in it."""
    torch.set_num_threads(1)
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in launched.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate sets what it thinks best
    answer = function(rank, ranks, *args)
    if rank == 0:
        answers.put(answer)
    if dist.is_initialized():
        dist.destroy_process_group()


def wire(rank: int, ranks: int, repeats: int = 20) -> list[dict]:
    """Bytes over the loopback interface for one reduction of the moments, and for a gather of the embeddings."""
    dist.init_process_group("gloo")
    rows = []
    for d in WIDTHS[:3]:
        for pairs in (16, 256, 1024):
            z = torch.randn(2, -(-pairs // ranks), d)
            moments = PairMoments.of(*z, torch.zeros(d))
            gathered = [torch.empty_like(z) for _ in range(ranks)]
            reduce = loopback(lambda m=moments: sum_over_ranks(m, torch.zeros(1)), repeats)
            gather = loopback(lambda z=z, out=gathered: dist.all_gather(out, z), repeats)
            rows.append(
                {
                    "ranks": ranks,
                    "d": d,
                    "pairs": pairs,
                    "buffer": 4 * (d * d + 5 * d + 6),
                    "sent by a rank": round(reduce / ranks),
                    "sent by a rank, had the embeddings been gathered": round(gather / ranks),
                }
            )
    return rows


def loopback(collective, repeats: int) -> float:
    """Bytes that one call puts on the loopback interface, all ranks together; nothing else should talk on it."""
    measured = []
    for _ in range(3):
        dist.barrier()
        before = sent()
        for _ in range(repeats):
            collective()
        dist.barrier()
        measured.append((sent() - before) / repeats)
    return min(measured)


def sent() -> int:
    """Bytes sent over the loopback interface since it came up, headers included."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def step_of_two_ranks(repeats: int) -> dict:
    """Seconds of an update of 16 pairs of 128 tokens at MiniLM size, by one process and by two, one thread each."""
    seconds = {ranks: in_processes(timed_updates, ranks, repeats) for ranks in (1, 2)}
    both = {weight: spread(seconds[2][weight] / seconds[1][weight]) for weight in ("MLM", "MLM + dense")}
    return {
        "seconds": {f"{ranks} ranks": {n: spread(v) for n, v in s.items()} for ranks, s in seconds.items()},
        "2 ranks / 1": both,
        "MLM + dense / MLM": {f"{ranks} ranks": spread(s["MLM + dense"] / s["MLM"]) for ranks, s in seconds.items()},
    }


def timed_updates(rank: int, ranks: int, repeats: int) -> dict:
    """Seconds of updates with and without the dense terms, alternating."""
    updates = {
        name: one_update(make_trainer(weight, 128, 16 // ranks, 1, cuda=False))
        for name, weight in (("MLM", 0.0), ("MLM + dense", 1.0))
    }
    seconds = {name: [] for name in updates}
    for i in range(repeats + 2):
        for name, update in updates.items():
            start = time.perf_counter()
            update()
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: torch.tensor(values).numpy() for name, values in seconds.items()}


def default_objective(**more) -> DenseObjective:
    """What trains by default, with other options where they are given."""
    return DenseTrainingArguments(output_dir="-", report_to="none", use_cpu=True).dense_objective(**more)


def cost(d: int, n: int) -> dict:
    """Processor milliseconds and peak MiB of moments, default objective and gradient of n pairs of width d, in training."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    z_a, z_b = (torch.randn(n, d, generator=generator) * torch.arange(1, d + 1) ** -0.5 for _ in range(2))
    objective = default_objective()
    shift, seconds = torch.zeros(d), []
    for i in range(4 if d > 2000 else 12):
        if i == 2:  # the first updates start the running state
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
        start = time.process_time()
        _, gradient = objective.gradient(PairMoments.of(z_a, z_b, shift))
        gradient.pullback(z_a, z_b)
        if i >= 2:
            seconds.append(1000 * (time.process_time() - start))
    peak = resident("VmHWM") - before
    return {
        "d": d,
        "pairs": n,
        "milliseconds": spread(seconds),
        "peak MiB": round(peak / 1024),
        "MiB of a d x d": round(4 * d * d / 2**20, 1),
    }


def eigendecomposition(d: int) -> float:
    """Milliseconds of `torch.linalg.eigh` of one covariance, one thread: what two of would be needed an update."""
    z = torch.randn(2 * d, d, generator=torch.Generator().manual_seed(0))
    covariance = z.T @ z / len(z)
    start = time.perf_counter()
    torch.linalg.eigh(covariance)
    return round(1000 * (time.perf_counter() - start), 1)


def resident(field: str) -> int:
    """KiB of this process's memory: VmRSS now, VmHWM at most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
