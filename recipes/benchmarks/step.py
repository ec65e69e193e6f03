"""A training step with the dense terms against the same step without."""

from itertools import cycle, islice
from statistics import median

import datasets
import numpy as np
import torch
from transformers import BertConfig, ModernBertConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from benchmarks.timing import alternate, spread
from hf_densefeat import AutoDenseModel, DenseTrainer, DenseTrainingArguments


def step(args) -> dict:
    """The same batch through the Trainer: MLM alone and MLM + dense, whole and accumulated."""
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    cuda = args.device == "cuda"
    # MiniLM size on a CPU, ModernBERT-base on a GPU: random weights, the published shapes
    length, pairs, cut = (512, 128, 8) if cuda else (128, 32, 4)
    results = {}
    for accumulation in (1, cut):
        trainers = {
            name: make_trainer(weight, length, pairs // accumulation, accumulation, cuda)
            for name, weight in (("MLM", 0.0), ("MLM + dense", 1.0))
        }
        seconds, memory = {}, {}
        for trainer in trainers.values():
            trainer.run = one_update(trainer)
        seconds = alternate({name: trainer.run for name, trainer in trainers.items()}, args.repeats, args.device)
        if cuda:
            for name, trainer in trainers.items():
                torch.cuda.reset_peak_memory_stats()
                trainer.run()
                memory[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        tokens = 2 * pairs * length
        results["whole batch" if accumulation == 1 else f"accumulated x {accumulation}"] = {
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "tokens per second": {name: round(tokens / median(values)) for name, values in seconds.items()},
            "MLM + dense / MLM": spread(seconds["MLM + dense"] / seconds["MLM"]),
            **({"peak GiB": memory} if memory else {}),
        }
        del trainers
    return {"device": args.device, "rows": 2 * pairs, "tokens a row": length, **results}


def make_trainer(dense_weight, length, batch_size, accumulation, cuda) -> DenseTrainer:
    """A trainer on notes that all have `length` tokens."""
    config = ModernBertConfig() if cuda else minilm()
    tokenizer = number_tokenizer(config.vocab_size, config.pad_token_id, length)
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(10, config.vocab_size, length - 2))) for _ in range(600)]
    notes = datasets.Dataset.from_dict(
        {"patient_id": np.repeat(np.arange(200), 3), "time": list(range(3)) * 200, "text": texts}
    )
    args = DenseTrainingArguments(
        output_dir="outputs/benchmark",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        dense_weight=dense_weight,
        max_length=length,
        bf16=cuda,
        use_cpu=not cuda,
        save_strategy="no",
        disable_tqdm=True,
        max_steps=10**6,
    )
    return DenseTrainer(AutoDenseModel.from_config(config), args, train_dataset=notes, processing_class=tokenizer)


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


def one_update(trainer: DenseTrainer):
    """A function that does one optimizer update as `train` does."""
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer._initial_global_step = -1  # no replay check: that is done in a run's first update alone
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
