"""Dense embeddings for clinical encoders: shape the linear structure of the embedding matrix while pretraining."""

from importlib.metadata import version

from hf_densefeat import events  # their import makes them known to transformers' auto classes
from hf_densefeat.data.collator import DensePairCollator
from hf_densefeat.data.notes import load_notes
from hf_densefeat.data.pairs import adjacent_pairs
from hf_densefeat.data.splits import split_by_patient
from hf_densefeat.evaluation.geometry import condition_number, effective_rank, geometry_report, subspace_distance
from hf_densefeat.evaluation.probes import ProbeEvaluator
from hf_densefeat.evaluation.similarity import SimilarityEvaluator
from hf_densefeat.evaluation.similarity_tasks import SimilarityTask
from hf_densefeat.evaluation.tasks import ProbeTask
from hf_densefeat.models.dense import AutoDenseModel, DenseFeatureMixin
from hf_densefeat.models.head import DenseHead
from hf_densefeat.objective.batch_loss import BatchLoss
from hf_densefeat.objective.moments import Moments
from hf_densefeat.objective.objective import DenseObjective
from hf_densefeat.objective.statistics import Statistics
from hf_densefeat.objective.terms import orthogonality_loss, spectral_spreading_loss, subspace_consistency_loss
from hf_densefeat.training.arguments import DenseTrainingArguments
from hf_densefeat.training.trainer import DenseTrainer

__version__ = version("hf_densefeat")

__all__ = [
    "AutoDenseModel",
    "BatchLoss",
    "DenseFeatureMixin",
    "DenseHead",
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
    "load_notes",
    "orthogonality_loss",
    "spectral_spreading_loss",
    "split_by_patient",
    "subspace_consistency_loss",
    "subspace_distance",
]
