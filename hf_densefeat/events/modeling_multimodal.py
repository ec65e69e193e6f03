"""A note and the values of one time episode in one embedding; either may be missing, both may not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from hf_densefeat.data.collator import DensePairCollator
from hf_densefeat.data.inputs import Row, pad_rows
from hf_densefeat.events.modeling_event import EpisodeModel, EventConfig, EventModel, prediction_head, transformer
from hf_densefeat.events.processing_event import EpisodePairCollator, EpisodeProcessor, EventProcessor, EventStats
from hf_densefeat.events.records import note_of


class MultimodalProcessor(EpisodeProcessor):
    """A tokenizer for an episode's note and an `EventProcessor` for its values, in one folder.

    It stands where a tokenizer stands. An episode is JSON as `pack_episodes` makes it, with `text`, with events, or with both.
    A row has `input_ids` of the note, and `event_ids`, `quantiles` and `hours` of the events; empty arrays stand for a side
    that is missing.

    Args:
        tokenizer: of the text encoder.
        events: fitted on training episodes.
        max_length: tokens kept of a note; by default what the tokenizer says.
    """

    model_input_names = ("input_ids", "event_ids", "quantiles", "hours", "attention_mask")

    def __init__(self, tokenizer, events: EventProcessor, max_length: int | None = None):
        self.tokenizer, self.events = tokenizer, events
        if max_length:
            tokenizer.model_max_length = max_length

    @classmethod
    def from_pretrained(cls, folder: str, **kwargs) -> MultimodalProcessor:
        """Both, from a folder or repository."""
        return cls(AutoTokenizer.from_pretrained(folder, **kwargs), EventProcessor.from_pretrained(folder, **kwargs))

    def save_pretrained(self, folder: str | Path, **kwargs) -> None:
        """Both, as JSON, into one folder."""
        self.tokenizer.save_pretrained(folder, **kwargs)
        self.events.save_pretrained(folder, **kwargs)

    @property
    def codes(self) -> list[str]:
        """Codes known."""
        return self.events.codes

    @property
    def model_max_length(self) -> int:
        """Tokens kept of a note."""
        return self.tokenizer.model_max_length

    def get_vocab(self) -> dict[str, int]:
        """Tokens, and after them the codes."""
        vocabulary, last = self.tokenizer.get_vocab(), len(self.tokenizer)
        return vocabulary | {f"event {code}": last + i for code, i in self.events.get_vocab().items()}

    def __repr__(self) -> str:
        """What embeddings depend on: equal processors, equal text."""
        return f"{type(self).__name__}({self.tokenizer!r}, {self.events!r})"

    def read(self, episodes: Sequence[str], max_length: int | None = None) -> tuple[list[Row], EventStats]:
        """One row an episode, and the counts of events; ValueError for one with neither a note nor a known event."""
        rows, stats = self.events.read(episodes, empty=True)
        notes = [note_of(episode) for episode in episodes]
        written = [note for note in notes if note]
        length = min(max_length or self.model_max_length, self.model_max_length)
        tokens = iter(self.tokenizer(written, truncation=True, max_length=length)["input_ids"] if written else ())
        read = []
        for i, (row, note) in enumerate(zip(rows, notes, strict=True)):
            ids = np.array(next(tokens) if note else [], dtype=np.int64)
            if not len(ids) and not len(row["input_ids"]):
                raise ValueError(f"Episode {i} has neither a note nor an event of a known code: leave it out.")
            read.append({"input_ids": ids, "event_ids": row.pop("input_ids"), **row})
        return read, stats

    def pad(self, rows: Mapping[str, Sequence[np.ndarray]]) -> dict[str, Tensor]:
        """One batch: `input_ids` (B, T), what the events have (B, E), and `attention_mask` (B, T + E), notes first.

        Where the rows have `labels` and `event_labels`, the batch has `labels` (B, T + E).
        """
        sides = [{"input_ids": rows["input_ids"]}, {name: rows[name] for name in ("event_ids", "quantiles", "hours")}]
        if "labels" in rows:
            sides[0]["labels"], sides[1]["labels"] = rows["labels"], rows["event_labels"]
        note, events = (pad_rows(side) for side in sides)
        both = [name for name in ("attention_mask", "labels") if name in note]
        return note | events | {name: torch.cat([note[name], events[name]], 1) for name in both}

    def collator(
        self, objective: str | None, *, mlm_probability: float, max_length: int | None = None
    ) -> MultimodalPairCollator:
        """See `PairProcessor`; `mlm_probability` is the share of tokens, and of values, to predict."""
        return MultimodalPairCollator(self, "mlm" if objective else None, mlm_probability)


class MultimodalPairCollator(EpisodePairCollator):
    """As `EpisodePairCollator`, with MLM's masks on the notes besides; `labels` (2B, T + E), tokens first, then bins."""

    def __init__(
        self, processor: MultimodalProcessor, objective: Literal["mlm"] | None = "mlm", mask_probability: float = 0.30
    ):
        super().__init__(processor, objective, mask_probability)
        self.events = EpisodePairCollator(processor.events, objective, mask_probability)
        self.text = DensePairCollator(processor.tokenizer, objective, mlm_probability=mask_probability)

    def row(self, row: Row, seed: tuple[int, int]) -> Row:
        """The row with masked tokens and values, and the labels of both."""
        note = self.text.row({"input_ids": row["input_ids"]}, seed)
        values = {"input_ids": row["event_ids"], "quantiles": row["quantiles"], "hours": row["hours"]}
        return note | _events(self.events.row(values, seed))

    def nothing(self) -> Row:
        """One event."""
        none = np.zeros(0, np.int64)
        return {"input_ids": none, "labels": none} | _events(self.events.nothing())


def _events(row: Row) -> Row:
    """The columns of events as a row has them that may have a note too."""
    return {"event_ids": row.pop("input_ids"), "event_labels": row.pop("labels"), **row}


class MultimodalConfig(PreTrainedConfig):
    """A text encoder's config, an `EventConfig`, and the number of layers over both.

    Attributes:
        text_config: of any encoder that `AutoModelForMaskedLM` knows.
        event_config: its `hidden_size`, heads, width and dropout are those of the layers over both, too.
        fusion_layers: layers that see both.
        densefeat: pooling, "mean" or "max".
    """

    model_type = "densefeat_multimodal"

    text_config: Any = None  # dicts become configs
    event_config: Any = None
    fusion_layers: int = 1
    densefeat: Any = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**({"model_type": "bert"} | (self.text_config or {})))
        if not isinstance(self.event_config, PreTrainedConfig):
            self.event_config = EventConfig(**(self.event_config or {}))
        self.densefeat = {"pooling": "mean"} | (self.densefeat or {})

    @property
    def hidden_size(self) -> int:
        """Width of the embedding, d."""
        return self.event_config.hidden_size


class MultimodalPreTrainedModel(EpisodeModel):
    """Config, prefix and processor of both multimodal models."""

    config_class = MultimodalConfig
    base_model_prefix = "encoder"
    processor_class = MultimodalProcessor
    card_kind = "An encoder for clinical notes with labs and vital signs of the same time"

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the tokens."""
        body: Any = self.base_model
        return body.text.get_input_embeddings()


class MultimodalModel(MultimodalPreTrainedModel):
    """Each side through its own encoder, then layers over the tokens and events of both: one stream, fused midway.

    As in VisualBERT (Li et al., 2019), with encoders below: attention over the concatenation of both sides, each with a
    vector that says which it is. A missing side is no position in that attention, and so it is in the mean that is the
    embedding: nothing stands in for it.
    """

    def __init__(self, config: MultimodalConfig):
        super().__init__(config)
        d, text = config.hidden_size, config.text_config
        # the body of the masked-LM class: by themselves some bodies add a pooler, whose weights nothing would train
        self.text = AutoModelForMaskedLM.from_config(text).base_model
        self.text_map = nn.Linear(text.hidden_size, d) if text.hidden_size != d else nn.Identity()
        self.events = EventModel(config.event_config)
        self.sides = nn.Embedding(2, d)
        self.layers = transformer(config.event_config, config.fusion_layers)
        self.post_init()

    def forward(
        self, input_ids: Tensor, event_ids: Tensor, quantiles: Tensor, hours: Tensor, attention_mask: Tensor, **_
    ):
        """Tokens (B, T), events (B, E), mask (B, T + E) -> `last_hidden_state` (B, T + E, d)."""
        # positions of the note first, then those of the events
        note_mask, event_mask = attention_mask.tensor_split([input_ids.shape[1]], dim=1)
        note = self.text(input_ids=input_ids, attention_mask=_never_empty(note_mask)).last_hidden_state
        events = self.events(event_ids, quantiles, hours, _never_empty(event_mask)).last_hidden_state
        both = torch.cat([self.text_map(note) + self.sides.weight[0], events + self.sides.weight[1]], 1)
        return BaseModelOutput(last_hidden_state=self.layers(both, src_key_padding_mask=~attention_mask.bool()))


class MultimodalModelForMaskedPrediction(MultimodalPreTrainedModel):
    """`MultimodalModel` with two heads: tokens at the note's positions (tied to the token embeddings), bins at the events'.

    The logits of both stand in one tensor, one position after the other: classes that a side does not have are −inf-like.
    So the masked-prediction loss is the mean over masked tokens and values together.
    """

    def __init__(self, config: MultimodalConfig):
        super().__init__(config)
        self.encoder = MultimodalModel(config)
        self.text_head = prediction_head(config.hidden_size, config.text_config.hidden_size)
        self.event_head = prediction_head(config.hidden_size, config.event_config.num_bins)
        self.post_init()

    @classmethod
    def from_text_encoder(
        cls, name_or_path: str, event_config: EventConfig, fusion_layers: int = 1, **kwargs
    ) -> MultimodalModelForMaskedPrediction:
        """With the text encoder of a checkpoint (`kwargs` go to its `from_pretrained`), and the rest random."""
        text = AutoModelForMaskedLM.from_pretrained(name_or_path, **kwargs)
        model = cls(MultimodalConfig(text_config=text.config, event_config=event_config, fusion_layers=fusion_layers))
        model.encoder.text.load_state_dict(text.base_model.state_dict())
        return model

    def forward(
        self, input_ids: Tensor, event_ids: Tensor, quantiles: Tensor, hours: Tensor, attention_mask: Tensor, **_
    ):
        """Tokens (B, T), events (B, E), mask (B, T + E) -> `logits` (B, T + E, tokens or bins, what is more)."""
        hidden = self.encoder(input_ids, event_ids, quantiles, hours, attention_mask).last_hidden_state
        note, events = hidden.tensor_split([input_ids.shape[1]], dim=1)
        words: Any = self.get_input_embeddings()
        sides = [F.linear(self.text_head(note), words.weight), self.event_head(events)]
        classes = max(side.shape[-1] for side in sides)
        # as good as -inf, and no NaN where a row has no label
        never = torch.finfo(sides[0].dtype).min
        return MaskedLMOutput(logits=torch.cat([F.pad(x, (0, classes - x.shape[-1]), value=never) for x in sides], 1))


def _never_empty(mask: Tensor) -> Tensor:
    """A side that is missing gets one position, which nothing above it attends: attention over none is not a number."""
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1)


AutoConfig.register(MultimodalConfig.model_type, MultimodalConfig)
AutoModel.register(MultimodalConfig, MultimodalModel)
AutoModelForMaskedLM.register(MultimodalConfig, MultimodalModelForMaskedPrediction)
