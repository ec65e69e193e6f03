"""Small models, a tokenizer and synthetic notes, made here: nothing is downloaded."""

import datetime

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

from hf_densefeat import AutoDenseModel

WORDS = (
    "patient admitted with chest pain fever cough sepsis diabetes insulin metformin lisinopril stable "
    "unstable discharged home hospice lab sodium potassium creatinine elevated normal low high blood "
    "pressure heart rate left right lung effusion pneumonia antibiotics given improved worsened denies "
    "reports history of chronic kidney disease failure follow up in clinic weeks days year old male "
    "female smoker alcohol family mother father "
).split()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


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
