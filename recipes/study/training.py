"""The trainer of one run: same data, batches and schedule for all methods."""

from pathlib import Path

import torch
from baselines.trainer import SupervisedTrainer
from domains import Domain
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback

from hf_densefeat import BatchLoss, DenseObjective, DenseTrainer, DenseTrainingArguments
from hf_densefeat.objective.objective import spectral_spreading_term
from study.methods import Method
from study.terms import BoundedRank


def study_objective(args: DenseTrainingArguments, method: Method, width: int) -> DenseObjective:
    """The objective of the arguments, with the weight, the bound and the term that the method changes."""
    terms = {"spectral_spreading": (method.spec_weight, spectral_spreading_term)}
    if method.most_rank is not None:  # without effect above that rank
        terms |= {
            "spectral_spreading": (0.0, spectral_spreading_term),
            "bounded_rank": (method.spec_weight, BoundedRank(rank=method.most_rank)),
        }
    return args.dense_objective(width=width, broadening=method.broadening, terms=terms)


class StudyTrainer(DenseTrainer):
    """With a second, unmasked forward for the dense terms."""

    def embed_pairs(self, model, inputs, *, predict=True):
        """The loss of the masked batch, embeddings of the unmasked one."""
        if "clean" not in inputs:
            return super().embed_pairs(model, inputs, predict=predict)
        clean = inputs.pop("clean")
        masked = super().embed_pairs(model, inputs, predict=predict)
        return super().embed_pairs(model, clean, predict=False)._replace(mlm=masked.mlm)


class BothCollator:
    """The masked batch, and in it the unmasked one."""

    def __init__(self, masked, clean):
        self.masked, self.clean = masked, clean

    def __call__(self, pairs):
        """One dict in another."""
        return self.masked(pairs) | {"clean": self.clean(pairs)}


class Progress(TrainerCallback):
    """Steps of all runs on one bar."""

    def __init__(self, bar: tqdm | None):
        self.bar = bar

    def on_step_end(self, args, state, control, **kwargs):
        """One more."""
        if self.bar is not None:
            self.bar.update()


def make_trainer(domain: Domain, method: Method, model, seed: int, steps: int, folder: Path, bar=None):
    """The trainer of one run: same data, batches and schedule for all."""
    options = {
        "output_dir": str(folder / "trainer"),
        "max_steps": steps,
        "seed": seed,
        "data_seed": seed,
        "dataloader_drop_last": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    args = DenseTrainingArguments(**(options | domain.training | method.arguments))
    collator = domain.collator("mlm" if args.mlm_weight else None)
    if method.clean:
        collator = BothCollator(collator, domain.collator(None))
    common = {
        "model": model,
        "args": args,
        "train_dataset": domain.self_pairs if method.self_pairs else domain.train,
        "processing_class": domain.processor,
        "data_collator": collator,
    }
    if method.supervised:
        trainer = SupervisedTrainer(labels=domain.supervised, classes=domain.classes, **common)
    elif method.pair_loss is not None:
        torch.manual_seed(seed)
        objective = BatchLoss(method.pair_loss(model.embedding_dimension), name="pair_loss")
        trainer = DenseTrainer(objective=objective, **common)
    else:
        trainer = StudyTrainer(objective=study_objective(args, method, model.embedding_dimension), **common)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(bar))
    return trainer
