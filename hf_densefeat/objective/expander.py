"""The expander: what the terms see in the place of the embeddings, trained along and left behind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_densefeat.objective.precision import full_precision


class Expander(nn.Module):
    """A three-layer MLP (n, d) -> (n, D): linear, LayerNorm, ReLU, twice, then linear without bias.

    VICReg (Bardes et al., 2022) and its kin train through one. What the terms ask for is then true of its output; the
    embedding below keeps more, such as what sets the notes of a pair apart, and the views find it there. Theirs has
    BatchNorm, which mixes the rows of a micro-batch; LayerNorm sees each row alone, so that the loss still does not depend
    on how a batch is cut.

    Args:
        width: d of the embedding.
        hidden: D, the width of all three layers.
        seed: of the weights, which are so the same on all ranks.
    """

    def __init__(self, width: int, hidden: int, *, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                *(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU()),
                *(nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU()),
                nn.Linear(hidden, hidden, bias=False),
            )

    def forward(self, z: Tensor) -> Tensor:
        """Features (n, D), in float32 or wider."""
        with torch.autocast(z.device.type, enabled=False):
            features: Tensor = self.layers(full_precision(z))
        return features
