"""The trainer of one run: same data, batches and schedule for all methods."""

from pathlib import Path

import torch
from domains import Domain
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback

from hf_densefeat import DenseObjective, DenseTrainer, DenseTrainingArguments
from hf_densefeat.baselines import trainer as b
from study.methods import Method


class StudyObjective(DenseObjective):
    """With a weight on L_spec and a rank above which it is without effect."""

    def __init__(self, objective: DenseObjective, method: Method):
        vars(self).update(vars(objective))
        self.broadening, self.spec_weight = method.broadening, method.spec_weight
        self.most_rank = method.most_rank

    def terms(self, a, b):
        """The terms, the loss changed."""
        terms = super().terms(a, b)
        spread = terms["spectral_spreading"]
        counted = spread
        if self.most_rank is not None:
            counted = (spread - (1 / self.most_rank - 1 / len(a.shift))).clamp(min=0)
        terms["loss"] = terms["loss"] - spread + self.spec_weight * counted
        return terms


class StudyTrainer(DenseTrainer):
    """With a term that sees the pairing, and a second, unmasked forward for the dense terms."""

    pair_weight = 0.0

    def _dense_term(self, update, z_a, z_b):
        loss = super()._dense_term(update, z_a, z_b)
        return loss + self.pair_weight * b.unshared_variance(z_a, z_b) if self.pair_weight else loss

    def _forward(self, model, inputs):
        if "clean" not in inputs:
            return super()._forward(model, inputs)
        clean = inputs.pop("clean")
        outputs, *_ = super()._forward(model, inputs)
        return outputs, *super()._forward(model, clean)[1:]


class BothCollator:
    """The masked batch, and in it the unmasked one."""

    def __init__(self, masked, clean):
        self.masked, self.clean = masked, clean

    def __call__(self, pairs):
        """One dict in another."""
        return self.masked(pairs) | {"clean": self.clean(pairs)}


def embed_at(model, layer: int) -> None:
    """From here on the model's embedding is of this layer's output: the hook on the base model sees it as its own."""
    with model.capture_hidden():
        base = model.base_model
    layers = next(part for part in base.modules() if isinstance(part, nn.ModuleList))

    def keep(module, args, output):
        base._densefeat_layer = output[0] if isinstance(output, tuple) else output

    def instead(module, args, output):
        if base._densefeat_capture:
            base._densefeat_hidden = base._densefeat_layer

    layers[layer].register_forward_hook(keep)
    base.register_forward_hook(instead)


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
        trainer = b.SupervisedTrainer(labels=domain.supervised, classes=domain.classes, **common)
    elif method.pair_loss is not None:
        torch.manual_seed(seed)
        trainer = b.PairLossTrainer(pair_loss=method.pair_loss(model.config.hidden_size), **common)
    else:
        trainer = StudyTrainer(**common)
        trainer.pair_weight = method.pair_weight
        trainer.objective = StudyObjective(trainer.objective, method)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(bar))
    return trainer
