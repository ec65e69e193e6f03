"""A training step with the dense terms against the same step without."""

import time
from itertools import cycle, islice
from unittest.mock import patch

import datasets
import numpy as np
import torch
from transformers import BertConfig, ModernBertConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from benchmarks.timing import alternate, spread
from hf_densefeat import AutoDenseModel, DenseTrainer, DenseTrainingArguments
from hf_densefeat.objective.moments import PairMoments


def step(args) -> dict:
    """The same batches: the stock Trainer's MLM step, ours, and ours with the dense terms; whole, accumulated, mixed lengths.

    On a CPU seconds are those of the processor.
    """
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    cuda = args.device == "cuda"
    # MiniLM size on a CPU, ModernBERT-base on a GPU: random weights, the published shapes
    length, pairs, cut = (512, 128, 8) if cuda else (128, 32, 4)
    cases = {
        "whole batch": (length, pairs, 1, False),
        f"accumulated x {cut}": (length, pairs, cut, False),
        "mixed lengths up to 512": (512, pairs if cuda else 8, 1, True),
    }
    results = {name: _case(args, *case, cuda=cuda) for name, case in cases.items()}
    return {"device": args.device, "rows": 2 * pairs, "tokens a row": length, **results}


def _case(args, length: int, pairs: int, accumulation: int, mixed: bool, cuda: bool) -> dict:
    options = {"length": length, "batch_size": pairs // accumulation, "accumulation": accumulation, "mixed": mixed}
    trainers = {
        name: make_trainer(weight, cuda=cuda, **options) for name, weight in (("MLM", 0.0), ("MLM + dense", 3.0))
    }
    steps = {name: one_update(trainer) for name, trainer in trainers.items()}
    if accumulation == 1:
        steps = {"stock MLM": stock_update(make_trainer(0.0, cuda=cuda, **options))} | steps
    else:
        trainers["kept graphs"] = make_trainer(3.0, cuda=cuda, keep_graphs=True, **options)
        steps["MLM + dense, kept graphs"] = one_update(trainers["kept graphs"])
    seconds = alternate(steps, args.repeats, args.device)
    base = next(iter(steps))
    found = {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        f"/ {base}": {name: spread(values / seconds[base]) for name, values in seconds.items() if name != base},
        "MLM + dense / MLM": spread(seconds["MLM + dense"] / seconds["MLM"]),
        "padding": round(padding(trainers["MLM + dense"]), 4),
    }
    if cuda:
        for name, run in steps.items():
            torch.cuda.reset_peak_memory_stats()
            run()
            found.setdefault("peak GiB", {})[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def share(args) -> dict:
    """The objective's share of whole updates of 8 pairs of notes of 128 tokens, at three sizes of BERT, random weights.

    The objective is all that the dense terms compute on embeddings: moments, terms, their gradient, and its way back to the
    rows. What their forward and backward through the model cost is not in it. 8 pairs are the default of a device: more pairs
    make the model's part grow, and that of the moments alone.
    """
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(args.threads)
    widths = {"3 M": (192, 4, 4), "22 M": (384, 6, 12), "110 M": (768, 12, 12)}
    found = {}
    for name in args.sizes:
        width, layers, heads = widths[name]
        vocabulary = 6000 if width == 192 else 30522
        config = minilm(vocab_size=vocabulary)
        config.update({"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads})
        config.intermediate_size = 4 * width
        trainer = make_trainer(3.0, length=128, batch_size=8, accumulation=1, cuda=False, config=config)
        update, spent, shares, seconds = one_update(trainer), [], [], []
        objective = trainer.objective
        objective.plan, objective.share = clocked(objective.plan, spent), clocked(objective.share, spent)
        with patch.object(PairMoments, "of", clocked(PairMoments.of, spent)):
            for repeat in range(args.repeats + 1):
                spent.clear()
                start = time.process_time()
                update()
                if repeat:  # the first warms up
                    seconds.append(time.process_time() - start)
                    shares.append(sum(spent) / seconds[-1])
        found[name] = {
            "parameters": trainer.model.num_parameters(),
            "processor seconds of an update": spread(seconds),
            "share": spread(shares),
        }
    return {"pairs": 8, "tokens a note": 128, "threads": args.threads, "sizes": found}


def clocked(function, spent: list[float]):
    """The function, which adds the processor's seconds it takes to a list."""

    def run(*arguments, **options):
        start = time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            spent.append(time.process_time() - start)

    return run


def make_trainer(
    dense_weight, length, batch_size, accumulation, cuda, mixed=False, keep_graphs=False, config=None
) -> DenseTrainer:
    """A trainer on notes that all have `length` tokens, or whose lengths are log-normal, a few of them cut there."""
    config = config or (ModernBertConfig() if cuda else minilm())
    tokenizer = number_tokenizer(config.vocab_size, config.pad_token_id, length)
    rng = np.random.default_rng(0)
    lengths = np.full(600, length - 2)
    if mixed:
        lengths = np.clip(rng.lognormal(np.log(0.35 * length), 0.8, 600), 8, length - 2).astype(int)
    texts = [" ".join(map(str, rng.integers(10, config.vocab_size, n))) for n in lengths]
    notes = datasets.Dataset.from_dict(
        {"patient_id": np.repeat(np.arange(200), 3), "time": list(range(3)) * 200, "text": texts}
    )
    args = DenseTrainingArguments(
        output_dir="outputs/benchmark",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        dense_weight=dense_weight,
        keep_graphs=keep_graphs,
        max_length=length,
        bf16=cuda,
        use_cpu=not cuda,
        save_strategy="no",
        disable_tqdm=True,
        max_steps=10**6,
    )
    return DenseTrainer(AutoDenseModel.from_config(config), args, train_dataset=notes, processing_class=tokenizer)


def stock_update(trainer: DenseTrainer):
    """As `one_update`, with the model's own loss on the padded batch, as transformers' Trainer has it."""
    trainer.compute_loss = lambda model, inputs, **_: (
        model(**{name: value for name, value in inputs.items() if name not in ("num_pairs", "lengths")}).loss
    )
    return one_update(trainer)


def minilm(**kwargs) -> BertConfig:
    """A model of MiniLM's size."""
    return BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, **kwargs)


def number_tokenizer(vocabulary: int, pad: int, length: int) -> PreTrainedTokenizerFast:
    """A token a number: texts of any length in tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {str(i): i for i in range(vocabulary)}
    special = {"pad_token": pad, "cls_token": 1 if pad != 1 else 2, "sep_token": 3, "mask_token": 4, "unk_token": 5}
    backend = Tokenizer(models.WordLevel(ids, unk_token="5"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    cls, sep = special["cls_token"], special["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", special_tokens=[(str(cls), cls), (str(sep), sep)]
    )
    names = {name: str(i) for name, i in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, **names)


@torch.no_grad()
def padding(trainer: DenseTrainer) -> float:
    """Share of the positions of a batch that are computed for no token."""
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    _, made = trainer.compute_loss(trainer.model, batches[0], return_outputs=True)
    return 1 - batches[0]["attention_mask"].sum().item() / made.slots


def one_update(trainer: DenseTrainer):
    """A function that does one optimizer update as `train` does."""
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    loader = cycle(list(islice(trainer.get_train_dataloader(), 4 * trainer.args.gradient_accumulation_steps)))

    def update():
        batches, items = trainer.get_batch_samples(
            loader, trainer.args.gradient_accumulation_steps, trainer.args.device
        )
        for batch in batches:
            trainer.training_step(model, batch, items)
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        model.zero_grad()

    return update
