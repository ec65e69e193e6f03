"""The module of `evaluate` loads offline from its file and gives geometry's numbers."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from hf_densefeat.evaluation import geometry

METRICS = Path(geometry.__file__).with_name("geometry_metrics.py")


@pytest.fixture
def load(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda name: evaluate.load(str(METRICS), name, cache_dir=str(tmp_path))


def embeddings(seed):
    return torch.randn(60, 8, generator=torch.Generator().manual_seed(seed))


def test_effective_rank_and_condition_number(load):
    """Tensors, arrays and lists give the same numbers as the functions."""
    z = embeddings(0)
    found = load("effective_rank").compute(embeddings=z, center=True)
    assert found == {"effective_rank": geometry.effective_rank(z, center=True), "n": 60, "d": 8, "attainable": 8}
    condition = load("condition_number").compute(embeddings=np.asarray(z).tolist())
    assert condition["condition_number"] == geometry.condition_number(z)


def test_subspace_distance_comes_with_its_floor(load):
    """The distance is never without the split-half floor; an unsupported k is refused."""
    z, z_next = embeddings(0), embeddings(1)
    found = load("subspace_distance").compute(embeddings=z, next_embeddings=z_next, k=3)
    assert found["subspace_distance"] == pytest.approx(geometry.subspace_distance(z, z_next, 3))
    assert found["subspace_noise_floor"] > 0
    with pytest.raises(ValueError, match="support k <= 8"):
        load("subspace_distance").compute(embeddings=z, next_embeddings=z_next, k=9)


def test_an_unknown_configuration_is_refused(load):
    """With those that there are."""
    with pytest.raises(ValueError, match="condition_number"):
        load("rank")
