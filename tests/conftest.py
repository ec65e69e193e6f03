"""Small models, a tokenizer, synthetic notes and short trainings, made here: nothing is downloaded."""

import datetime
import gc
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    set_seed,
)

from hf_densefeat import AutoDenseModel, DenseTrainer, DenseTrainingArguments, adjacent_pairs
from hf_densefeat.data.tokens import TextProcessor

WORDS = (
    "patient admitted with chest pain fever cough sepsis diabetes insulin metformin lisinopril stable "
    "unstable discharged home hospice lab sodium potassium creatinine elevated normal low high blood "
    "pressure heart rate left right lung effusion pneumonia antibiotics given improved worsened denies "
    "reports history of chronic kidney disease failure follow up in clinic weeks days year old male "
    "female smoker alcohol family mother father "
).split()

# Nothing on the screen or on disk, and a log entry for every update
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
LAMBDA_SUB, LAMBDA_ORTH, K = 0.1, 0.01, 3  # of `make_trainer`


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)
    # a Trainer collects garbage when it begins: of all that was imported that took ten times as long as a small training
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def make_tokenizer():
    """A token a word of WORDS."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate(special + sorted(set(WORDS)))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def notes():
    """60 notes of 12 patients, 3 to 7 each, 5 to 40 words long."""
    return make_notes()


def make_notes(patients=12, seed=0):
    rng = np.random.default_rng(seed)
    rows = {"patient_id": [], "time": [], "text": []}
    for patient in range(patients):
        favourite = rng.choice(WORDS, 12)
        for visit in range(3 + patient % 5):
            words = np.where(rng.random(40) < 0.5, rng.choice(favourite, 40), rng.choice(WORDS, 40))
            rows["patient_id"].append(patient)
            rows["time"].append(datetime.datetime(2020, 1, 1) + datetime.timedelta(days=30 * visit))
            rows["text"].append(" ".join(words[: rng.integers(5, 41)]))
    return datasets.Dataset.from_dict(rows)


@pytest.fixture(scope="session")
def pairs(tokenizer):
    """45 pairs of 12 patients, tokenised once."""
    notes = make_notes()
    assert len(adjacent_pairs(notes)) == 45
    return TextProcessor(tokenizer).pairs(notes, adjacent_pairs(notes), max_length=64)[0]


def make_model(family, tokenizer, dropout=0.1, hidden=24, **kwargs):
    """A tiny model of a family, with dropout unless told otherwise."""
    set_seed(0)
    shared = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    bert = {
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 66,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    config = {
        "bert": lambda: BertConfig(**shared, **bert),
        "roberta": lambda: RobertaConfig(**shared, **bert, bos_token_id=2, eos_token_id=3),
        "distilbert": lambda: DistilBertConfig(
            **shared,
            dim=hidden,
            n_layers=2,
            n_heads=2,
            hidden_dim=2 * hidden,
            max_position_embeddings=66,
            dropout=dropout,
            attention_dropout=dropout,
        ),
        "modernbert": lambda: ModernBertConfig(
            **shared,
            hidden_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * hidden,
            max_position_embeddings=66,
            embedding_dropout=dropout,
            mlp_dropout=dropout,
            attention_dropout=dropout,
            global_attn_every_n_layers=2,
            local_attention=16,
            bos_token_id=2,
            eos_token_id=3,
            cls_token_id=2,
            sep_token_id=3,
        ),
    }[family]()
    return AutoDenseModel.from_config(config, **kwargs)


def make_trainer(
    folder, tokenizer, pairs, family="bert", dropout=0.1, cls=DenseTrainer, model=None, extra=None, **kwargs
):
    """A trainer of a tiny model for one epoch; `kwargs` are settings, `extra` goes to the trainer."""
    settings = {
        "seed": 3,
        "num_train_epochs": 1,
        "mlm_weight": 1.0,
        "dense_weight": 1.0,
        "lambda_sub": LAMBDA_SUB,
        "lambda_orth": LAMBDA_ORTH,
        "lambda_pair": 0.0,  # the reference losses are of the paper's three terms
        "subspace_dim": K,
        "per_device_train_batch_size": 16,
    }
    model = model if model is not None else make_model(family, tokenizer, dropout)
    args = DenseTrainingArguments(str(folder), **QUIET | settings | kwargs)
    trainer = cls(model, args, train_dataset=pairs, processing_class=tokenizer, **extra or {})
    trainer.remove_callback(next(type(c) for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
    return trainer


def logs(trainer):
    """The log entries of updates."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def make_window_trainer(folder, model, windows, processor, evaluator=None, callbacks=None, **options):
    """Six steps on windows of events, with or without notes; options are those of the training arguments."""
    settings = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "subspace_dim": 4}
    return DenseTrainer(
        model,
        DenseTrainingArguments(str(folder), **QUIET | settings | options),
        train_dataset=windows,
        eval_dataset=windows,
        processing_class=processor,
        evaluator=evaluator,
        callbacks=callbacks,
    )


BLOCK_DENSEFEAT = """
import sys

sys.modules["hf_densefeat"] = None
try:
    import hf_densefeat
except ImportError:
    pass
else:
    raise SystemExit("hf_densefeat can be imported")
"""


def run_without_densefeat(script, folder, **environment):
    """Run a script in a folder, in a process that cannot import hf_densefeat; what it prints."""
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | environment
    done = subprocess.run(
        [sys.executable, "-I", "-c", BLOCK_DENSEFEAT + script],  # -I: PYTHONPATH and the folder are not searched
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
