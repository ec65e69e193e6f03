"""Dense embeddings for clinical encoders: shape the linear structure of the embedding matrix while pretraining."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_densefeat import events
    from hf_densefeat.data.collator import DensePairCollator
    from hf_densefeat.data.notes import load_notes
    from hf_densefeat.data.pairs import adjacent_pairs, pair_notes, pair_texts
    from hf_densefeat.data.splits import split_by_patient
    from hf_densefeat.evaluation.geometry import condition_number, effective_rank, geometry_report, subspace_distance
    from hf_densefeat.evaluation.probes import ProbeEvaluator
    from hf_densefeat.evaluation.similarity import SimilarityEvaluator
    from hf_densefeat.evaluation.similarity_reading import SimilarityTask
    from hf_densefeat.evaluation.tasks import ProbeTask
    from hf_densefeat.models.dense import AutoDenseModel, DenseFeatureMixin
    from hf_densefeat.models.head import DenseHead
    from hf_densefeat.models.interpolation import interpolate_weights
    from hf_densefeat.objective.base import BatchLoss
    from hf_densefeat.objective.moments import Moments
    from hf_densefeat.objective.objective import DenseObjective
    from hf_densefeat.objective.statistics import Statistics, sees_pairing
    from hf_densefeat.objective.terms import orthogonality_loss, spectral_spreading_loss, subspace_consistency_loss
    from hf_densefeat.training.arguments import DenseTrainingArguments
    from hf_densefeat.training.sentence_loss import DenseLoss
    from hf_densefeat.training.trainer import DenseTrainer

__version__ = version("hf_densefeat")

__all__ = [
    "AutoDenseModel",
    "BatchLoss",
    "DenseFeatureMixin",
    "DenseHead",
    "DenseLoss",
    "DenseObjective",
    "DensePairCollator",
    "DenseTrainer",
    "DenseTrainingArguments",
    "Moments",
    "ProbeEvaluator",
    "ProbeTask",
    "SimilarityEvaluator",
    "SimilarityTask",
    "Statistics",
    "adjacent_pairs",
    "condition_number",
    "effective_rank",
    "events",
    "geometry_report",
    "interpolate_weights",
    "load_notes",
    "orthogonality_loss",
    "pair_notes",
    "pair_texts",
    "sees_pairing",
    "spectral_spreading_loss",
    "split_by_patient",
    "subspace_consistency_loss",
    "subspace_distance",
]

# Room -> names. A name is imported when it is first used: the command answers a mistake before it loads transformers
_ROOMS = {
    "data.collator": "DensePairCollator",
    "data.notes": "load_notes",
    "data.pairs": "adjacent_pairs pair_notes pair_texts",
    "data.splits": "split_by_patient",
    "evaluation.geometry": "condition_number effective_rank geometry_report subspace_distance",
    "evaluation.probes": "ProbeEvaluator",
    "evaluation.similarity": "SimilarityEvaluator",
    "evaluation.similarity_reading": "SimilarityTask",
    "evaluation.tasks": "ProbeTask",
    "models.dense": "AutoDenseModel DenseFeatureMixin",
    "models.head": "DenseHead",
    "models.interpolation": "interpolate_weights",
    "objective.base": "BatchLoss",
    "objective.moments": "Moments",
    "objective.objective": "DenseObjective",
    "objective.statistics": "Statistics sees_pairing",
    "objective.terms": "orthogonality_loss spectral_spreading_loss subspace_consistency_loss",
    "training.arguments": "DenseTrainingArguments",
    "training.sentence_loss": "DenseLoss",
    "training.trainer": "DenseTrainer",
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """A public name; with the first one the encoders of events become known to transformers' auto classes."""
    if name not in __all__:
        raise AttributeError(f"module 'hf_densefeat' has no attribute {name!r}")
    events = import_module("hf_densefeat.events")
    globals()[name] = events if name == "events" else getattr(import_module(f"hf_densefeat.{_ROOM_OF[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
