"""The objective alone: against autograd through SVD, against VICReg's loss, and its stability."""

from statistics import median

import torch
from baselines.losses import vicreg
from torch import nn
from tqdm import tqdm

from benchmarks.scaling import default_objective
from benchmarks.timing import alternate, spread
from hf_densefeat import DenseObjective, effective_rank

WIDTHS, ROWS = (384, 768, 1024), (64, 256, 1024)


def objective(args) -> dict:
    """Forward and backward on N embeddings of width d of each side, k = 20, for every size; milliseconds of one processor."""
    torch.set_num_threads(args.threads)
    return {"threads": args.threads, "sizes": [one_size(d, n, args.repeats) for d in WIDTHS for n in ROWS]}


def one_size(d: int, n: int, repeats: int) -> dict:
    """What trains by default, the paper's terms, VICReg's loss and the paper's formulas through SVD, in turns."""
    torch.manual_seed(0)
    decay = torch.arange(1, d + 1) ** -0.5
    z_a, z_b = ((torch.randn(n, d) * decay).requires_grad_() for _ in range(2))
    common = {"subspace_dim": 20, "center": True, "power_iterations": 2}
    losses = {
        "default": default_objective(),
        "default, batch alone": default_objective(window=None),
        "paper, running window": DenseObjective(window="auto", **common),
        "paper, batch alone": DenseObjective(**common),
    }
    functions = {name: lambda a, b, loss=loss: loss(a, b)["loss"] for name, loss in losses.items()}
    functions |= {"VICReg": vicreg, "literal SVD": literal_loss}
    run = {name: lambda loss=loss: torch.autograd.grad(loss(z_a, z_b), (z_a, z_b)) for name, loss in functions.items()}
    seconds = alternate(run, repeats)
    return {
        "d": d,
        "N": n,
        "milliseconds": {name: round(1000 * float(median(values)), 2) for name, values in seconds.items()},
        "/ VICReg": {name: spread(seconds[name] / seconds["VICReg"]) for name in losses},
        "literal SVD / default": spread(seconds["literal SVD"] / seconds["default"]),
    }


def literal_loss(z_a, z_b, k=20):
    """The paper's formulas as they stand, centred, differentiated through SVD."""
    sides = [z - z.mean(0) for z in (z_a, z_b)]
    z = torch.cat(sides)
    covariance = z.T @ z / len(z)
    identity = torch.eye(z.shape[1])
    spread_term = torch.linalg.norm(covariance / covariance.trace() - identity / z.shape[1]) ** 2
    bases = [torch.linalg.svd(side, full_matrices=False).Vh[:k].T for side in sides]
    subspace_term = torch.linalg.norm(bases[0] @ bases[0].T - bases[1] @ bases[1].T) ** 2
    standard = z / z.std(0, unbiased=False)
    return spread_term + subspace_term + torch.linalg.norm(standard.T @ standard / len(z) - identity) ** 2


def running(args) -> dict:
    """Effective rank, of 128, that a 3-layer MLP reaches when trained by L_spec alone (Adam, 1e-3), by batch and window.

    The last two columns are the field's usual exponential averages, for contrast: of the covariance as it is, and of the
    trace-normalised one. `runaway` counts runs whose rank fell below half of that of the batch alone.
    """
    torch.set_num_threads(1)
    windows = {"batch alone": None, "auto (128)": "auto", "256": 256, "2048": 2048}
    rows, runaway = {}, dict.fromkeys(windows, 0)
    for batch in (16, 32, 128, 1024):
        ranks = {name: [] for name in (*windows, "plain average 0.99", "normalised average 0.99")}
        for seed in tqdm(range(args.seeds), desc=f"batch {batch}"):
            for name, window in windows.items():
                loss = DenseObjective(
                    lambda_sub=0.0, lambda_orth=0.0, subspace_dim=4, window=window, center=True, power_iterations=1
                )
                ranks[name].append(train_toy(lambda z, loss=loss: loss(*z.chunk(2))["loss"], batch, args.steps, seed))
            for name, normalise in (("plain average 0.99", False), ("normalised average 0.99", True)):
                ranks[name].append(train_toy(exponential_average(normalise), batch, args.steps, seed))
        for name in windows:
            runaway[name] += sum(r < b / 2 for r, b in zip(ranks[name], ranks["batch alone"], strict=True))
        rows[f"batch {batch}"] = {name: [round(r, 1) for r in values] for name, values in ranks.items()}
    return {"steps": args.steps, "dimension": 128, "effective rank by seed": rows, "runaway": runaway}


def exponential_average(normalise: bool, beta: float = 0.99):
    """L_spec of beta C + (1 - beta) C_t, the gradient through C_t."""
    state = {}

    def loss(z):
        z = z - z.mean(0)
        covariance = z.T @ z / len(z)
        if normalise:
            covariance = covariance / covariance.trace()
        average = beta * state.get("C", covariance.detach()) + (1 - beta) * covariance
        state["C"] = average.detach()
        return average.square().sum() / average.trace().square()

    return loss


def train_toy(loss, batch: int, steps: int, seed: int, inputs: int = 64, width: int = 128) -> float:
    """Centred effective rank on 4,096 fresh rows after training on Gaussian inputs with a 1/i spectrum."""
    torch.manual_seed(seed)
    mixing = torch.randn(inputs, inputs) / torch.arange(1, inputs + 1)[:, None]
    layers = [nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, width)]
    network = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network(torch.randn(batch, inputs) @ mixing)).backward()
        optimizer.step()
    with torch.no_grad():
        return effective_rank(network(torch.randn(4096, inputs) @ mixing), center=True)
