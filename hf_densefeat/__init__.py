"""Dense embeddings for clinical encoders: shape the linear structure of the embedding matrix while pretraining."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for those who check types
    from hf_densefeat import events as events
    from hf_densefeat.data.collator import DensePairCollator as DensePairCollator
    from hf_densefeat.data.notes import load_notes as load_notes
    from hf_densefeat.data.pairs import adjacent_pairs as adjacent_pairs
    from hf_densefeat.data.pairs import pair_notes as pair_notes
    from hf_densefeat.data.pairs import pair_texts as pair_texts
    from hf_densefeat.data.splits import split_by_patient as split_by_patient
    from hf_densefeat.evaluation.geometry import condition_number as condition_number
    from hf_densefeat.evaluation.geometry import effective_rank as effective_rank
    from hf_densefeat.evaluation.geometry import geometry_report as geometry_report
    from hf_densefeat.evaluation.geometry import subspace_distance as subspace_distance
    from hf_densefeat.evaluation.probes import ProbeEvaluator as ProbeEvaluator
    from hf_densefeat.evaluation.similarity import SimilarityEvaluator as SimilarityEvaluator
    from hf_densefeat.evaluation.similarity_reading import SimilarityTask as SimilarityTask
    from hf_densefeat.evaluation.tasks import ProbeTask as ProbeTask
    from hf_densefeat.models.dense import AutoDenseModel as AutoDenseModel
    from hf_densefeat.models.dense import DenseFeatureMixin as DenseFeatureMixin
    from hf_densefeat.models.head import DenseHead as DenseHead
    from hf_densefeat.models.interpolation import interpolate_weights as interpolate_weights
    from hf_densefeat.objective.base import BatchLoss as BatchLoss
    from hf_densefeat.objective.moments import Moments as Moments
    from hf_densefeat.objective.objective import DenseObjective as DenseObjective
    from hf_densefeat.objective.statistics import Statistics as Statistics
    from hf_densefeat.objective.statistics import sees_pairing as sees_pairing
    from hf_densefeat.objective.terms import orthogonality_loss as orthogonality_loss
    from hf_densefeat.objective.terms import spectral_spreading_loss as spectral_spreading_loss
    from hf_densefeat.objective.terms import subspace_consistency_loss as subspace_consistency_loss
    from hf_densefeat.training.arguments import DenseTrainingArguments as DenseTrainingArguments
    from hf_densefeat.training.sentence_loss import DenseLoss as DenseLoss
    from hf_densefeat.training.trainer import DenseTrainer as DenseTrainer

__version__ = version("hf_densefeat")

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
__all__ = sorted(["events", *_ROOM_OF])


def __getattr__(name: str) -> Any:
    """A public name; with the first one the encoders of events become known to transformers' auto classes."""
    if name not in __all__:
        raise AttributeError(f"module 'hf_densefeat' has no attribute {name!r}")
    events = import_module("hf_densefeat.events")
    globals()[name] = events if name == "events" else getattr(import_module(f"hf_densefeat.{_ROOM_OF[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
