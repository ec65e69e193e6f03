"""A mixin that gives any transformers encoder an embedding, and native folders that everything else can open."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
)
from transformers.utils import cached_file

from hf_densefeat.models.batches import batches_by_length
from hf_densefeat.models.families import check_family, language_modeling_of
from hf_densefeat.models.head import FOLDER, DenseHead
from hf_densefeat.models.pooling import POOLINGS, over_chunks, pool
from hf_densefeat.models.sentence_transformers import write_files
from hf_densefeat.models.tokenizers import ABSENT, load_tokenizer

Native: Any = PreTrainedModel if TYPE_CHECKING else object  # what the mixin is mixed into

HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


class DenseFeatureMixin(Native):
    """Embeddings for a transformers model: `encode`, a `densefeat` block in the config, and folders that open anywhere.

    It adds no parameter and overrides no `forward`. The class keeps the native name, so the saved folder has the native
    `model_type`, `architectures` and keys: `AutoModel`, `AutoModelForMaskedLM`, `pipeline("fill-mask")` and
    `SentenceTransformer` open it without this package, and the latter's embeddings equal those of `encode`.
    """

    card_kind = "A text encoder for clinical notes"  # the first words of the model card

    def card_use(self) -> str | None:
        """The snippets of the model card for another input kind; None for texts, whose snippets the card has."""
        return None

    @property
    def pooling(self) -> str:
        """How tokens become an embedding: "mean", "cls", "last" or "max"."""
        return self.config.densefeat["pooling"]

    @property
    def language_modeling(self) -> str | None:
        """What the head predicts: "mlm", "causal", or None for a model without a language-modelling head."""
        return language_modeling_of(type(self).__name__.removeprefix("FSDP"))

    @property
    def max_length(self) -> int | None:
        """Tokens of a note that the embedding sees: the config's `densefeat.max_length`, or all positions there are."""
        positions = getattr(self.config, "max_position_embeddings", None)
        # the RoBERTa family numbers positions from padding_idx + 1
        embeddings = getattr(self.base_model, "embeddings", None)
        padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
        if positions and padding is not None:
            positions -= padding + 1
        # XLNet says -1 for no limit
        limits = [limit for limit in (positions, self.config.densefeat.get("max_length")) if limit and limit > 0]
        return min(limits, default=None)

    @property
    def long_notes(self) -> str:
        """What becomes of a note longer than `max_length`: "truncate", or "chunk" and average, weighted by tokens."""
        return self.config.densefeat.get("long_notes", "truncate")

    @property
    def dense_head(self) -> DenseHead | None:
        """The map that `encode` applies and that is saved beside the encoder; None for embeddings as they are pooled.

        Not called `head`, which in ModernBERT and others is a part of the language-modelling head.
        """
        return self.__dict__.get("_dense_head")

    @dense_head.setter
    def dense_head(self, head: DenseHead | None) -> None:
        if head is not None and len(head.mean) != self.config.hidden_size:
            raise ValueError(
                f"The head was fitted on embeddings of width {len(head.mean)}, but {type(self).__name__} has embeddings "
                f"of width {self.config.hidden_size}: fit it on this encoder's."
            )
        self.__dict__["_dense_head"] = head
        block = {name: value for name, value in self.config.densefeat.items() if name != "head"}
        # a string, because JSON has no infinity
        self.config.densefeat = block if head is None else block | {"head": {"epsilon": str(head.epsilon)}}

    @property
    def _body(self) -> Any:
        """The module that gives the hidden states: the head of OPT calls the decoder inside the base model, not that."""
        return self.base_model.get_decoder()

    @contextmanager
    def capture_hidden(self, chosen: Tensor | None = None) -> Iterator[None]:
        """Inside, `pooled(mask)` after a forward of the (wrapped) model gives embeddings with their graph.

        The forward goes through whatever wraps the model (DDP, FSDP2, torch.compile), and no layer but the last is kept.

        Args:
            chosen: (B, L), True at n positions; the head then sees these alone, as (1, n, d), and logits are (1, n, V).
        """
        body = self._body
        if not hasattr(body, "_densefeat_hook"):
            body._densefeat_hook = body.register_forward_hook(_keep_hidden)
        body._densefeat_capture, body._densefeat_chosen = True, chosen
        try:
            yield
        finally:
            body._densefeat_capture, body._densefeat_hidden, body._densefeat_chosen = False, None, None

    def pooled(self, attention_mask: Tensor) -> Tensor:
        """Embeddings (B, d) of the forward that just ran inside `capture_hidden`."""
        return pool(self._body._densefeat_hidden, attention_mask, self.pooling)

    @torch.no_grad()
    def encode(
        self,
        texts: list[str] | dict[str, Tensor],
        tokenizer: Any = None,
        batch_size: int = 32,
        max_length: int | None = None,
        show_progress_bar: bool = False,
        head: bool = True,
        *,
        convert_to_numpy: bool = False,
        normalize_embeddings: bool = False,
    ) -> Tensor:
        """Embeddings (N, d), float32 on the CPU, row i of text i; without dropout, whatever mode the model is in.

        Longer texts are cut, or with `long_notes` "chunk" read whole; SentenceTransformer cuts them always.

        Args:
            texts: notes, or one batch of tokens (`input_ids`, `attention_mask`).
            tokenizer: by default that of the folder or repository that the model was loaded from.
            batch_size: most rows of a forward; texts are sorted by length first, so that little is padded.
            max_length: tokens kept of a text; by default `max_length` of the model.
            show_progress_bar: show a progress bar.
            head: apply `dense_head`, if the model has one; False for the embeddings below it.
            convert_to_numpy: an array in the place of a tensor, as of sentence-transformers.
            normalize_embeddings: rows of length 1, as of sentence-transformers.
        """
        z = self._encode(texts, tokenizer, batch_size, max_length, show_progress_bar)
        z = self.dense_head(z) if head and self.dense_head is not None else z
        z = torch.nn.functional.normalize(z, dim=1) if normalize_embeddings else z
        return z.numpy() if convert_to_numpy else z  # type: ignore[return-value]

    def _encode(
        self, texts: Any, tokenizer: Any, batch_size: int, max_length: int | None, show_progress_bar: bool
    ) -> Tensor:
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            if not isinstance(texts, list):
                if isinstance(texts, str):
                    raise ValueError("Expected a list of texts but got one string: wrap it in a list.")
                if not hasattr(texts, "keys"):
                    texts = list(texts)
            if not isinstance(texts, list):
                return self._embed(texts)
            if not texts:
                return torch.empty(0, self.config.hidden_size)
            tokenizer = tokenizer or self._default_tokenizer()
            tokens, chunk_to_note = self._rows(texts, tokenizer, max_length)
            lengths = [len(ids) for ids in tokens["input_ids"]]
            parts, order = [], []
            with tqdm(total=len(lengths), desc="Encoding", disable=None if show_progress_bar else True) as bar:
                for rows in batches_by_length(lengths, batch_size, self.device):
                    batch = {name: [values[i] for i in rows] for name, values in tokens.items()}
                    parts.append(self._embed(self._padded(batch, tokenizer)))
                    order += rows
                    bar.update(len(rows))
            out = torch.cat(parts)
            out = torch.empty_like(out).index_copy_(0, torch.tensor(order), out)
            if chunk_to_note is None:
                return out
            return over_chunks(out, torch.tensor(lengths), torch.tensor(chunk_to_note), len(texts))
        finally:
            for module in training:
                module.training = True

    def _rows(
        self, texts: list[str], tokenizer: Any, max_length: int | None
    ) -> tuple[dict[str, list], list[int] | None]:
        """Columns of rows, not padded, and which text each row is of where long ones are read in chunks."""
        limit = max_length or self.max_length or tokenizer.model_max_length
        chunk = self.long_notes == "chunk"
        tokens = dict(tokenizer(texts, truncation=True, max_length=limit, return_overflowing_tokens=chunk))
        return tokens, tokens.pop("overflow_to_sample_mapping", None)

    def _padded(self, rows: dict[str, list], tokenizer: Any) -> dict[str, Tensor]:
        """One batch, padded to the right as in training: learned positions count from the left."""
        return tokenizer.pad(rows, padding_side="right", return_tensors="pt")

    def _embed(self, tokens: Any) -> Tensor:
        tokens = {name: values.to(self.device) for name, values in tokens.items()}
        with self.capture_hidden():
            # the base model alone: no logits. Under FSDP2 only the root's forward gathers the parameters
            (self if type(self).__name__.startswith("FSDP") else self.base_model)(**tokens)
            return self.pooled(tokens["attention_mask"]).float().cpu()

    def _default_tokenizer(self) -> Any:
        if getattr(self, "_densefeat_tokenizer", None) is None:
            try:
                self._densefeat_tokenizer = load_tokenizer(self.name_or_path)
            except OSError as error:
                raise ValueError(ABSENT) from error
        return self._densefeat_tokenizer

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As in transformers, always with the native keys, plus the files that pin pooling for sentence-transformers."""
        # keys renamed on load would be saved under their old names, which a resumed Trainer does not find
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_files(
                save_directory,
                width=self.config.hidden_size,
                pooling=self.pooling,
                max_length=self.max_length,
                head=self.dense_head,
            )


def _keep_hidden(module: Any, args: Any, output: Any) -> Any:
    """Keep the last hidden states for the pooling, and hand on the chosen positions alone where some are chosen."""
    if not module._densefeat_capture:
        return None
    module._densefeat_hidden = output[0]
    if module._densefeat_chosen is None:
        return None
    chosen = output[0][module._densefeat_chosen][None]
    if isinstance(output, tuple):
        return (chosen, *output[1:])
    return type(output)(**(dict(output) | {next(iter(output)): chosen}))


@functools.cache
def _dense_class(native: Any) -> Any:
    """The native class with the mixin before it, under the native name and module, which saving and loading read."""
    return type(native.__name__, (DenseFeatureMixin, native), {"__module__": native.__module__})


def as_dense(
    model: PreTrainedModel,
    pooling: str | None = None,
    max_length: int | None = None,
    long_notes: str | None = None,
) -> PreTrainedModel:
    """Mix `DenseFeatureMixin` into a model that exists, in place: its weights, hooks and state stay as they are.

    None keeps what the config says, or else `pooling` is "mean" for encoders and "last" for decoders, `max_length` all
    positions, and `long_notes` "truncate".
    """
    if pooling not in (None, *POOLINGS):
        raise ValueError(f"Expected pooling to be one of {', '.join(POOLINGS)} but got {pooling!r}.")
    if long_notes not in (None, "truncate", "chunk"):
        raise ValueError(f"Expected long_notes to be truncate or chunk but got {long_notes!r}.")
    if not isinstance(model, DenseFeatureMixin):
        check_family(model)
        native: Any = type(model)
        model.__class__ = _dense_class(native)
    block = dict(getattr(model.config, "densefeat", None) or {})
    if getattr(model, "dense_head", None) is None:
        block.pop("head", None)  # of the folder that the config is from; `AutoDenseModel` loads it
    default = "last" if model.language_modeling == "causal" else "mean"
    block["pooling"] = pooling or block.get("pooling", default)
    if block["pooling"] == "cls" and model.language_modeling == "causal":
        raise ValueError(
            f"cls pooling takes the first token, which in {type(model).__name__}, a decoder, has seen nothing of the note. "
            "Use last or mean."
        )
    if max_length is not None:
        block["max_length"] = max_length
    if long_notes is not None:
        block["long_notes"] = long_notes
    model.config.densefeat = block
    return model


class AutoDenseModel:
    """The native masked-LM class of a checkpoint (or causal, or base class, where there is none) with the mixin."""

    @classmethod
    def from_pretrained(cls, name_or_path: str, pooling: str | None = None, max_length: int | None = None, **kwargs):
        """As `AutoModelForMaskedLM.from_pretrained`, in float32 unless `dtype` says otherwise.

        Args:
            name_or_path: Hub name or folder.
            pooling: "mean", "cls", "last" or "max"; None for what the checkpoint says, else "mean" ("last" for decoders).
            max_length: tokens of a note that the embedding sees; None for what the checkpoint says.
            kwargs: passed on.
        """
        kwargs.setdefault("dtype", torch.float32)
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        config = kwargs.get("config") or AutoConfig.from_pretrained(name_or_path, **hub)
        loaded = _auto_class(config).from_pretrained(name_or_path, **kwargs)
        loaded, *info = loaded if kwargs.get("output_loading_info") else (loaded,)
        saved = (getattr(loaded.config, "densefeat", None) or {}).get("head")
        model: Any = as_dense(loaded, pooling, max_length)
        if saved is not None:
            model.dense_head = load_head(name_or_path, float(saved["epsilon"]), hub)
        return (model, *info) if info else model

    @classmethod
    def from_config(cls, config, pooling: str | None = None, max_length: int | None = None, **kwargs):
        """A model with random weights."""
        return as_dense(_auto_class(config).from_config(config, **kwargs), pooling, max_length)


def load_head(name_or_path: str, epsilon: float, hub: dict) -> DenseHead:
    """The head of a folder or repository whose config names one."""
    subfolder = f"{hub['subfolder']}/{FOLDER}" if hub.get("subfolder") else FOLDER
    options = {name: value for name, value in hub.items() if name not in ("trust_remote_code", "subfolder")}
    weights = cached_file(name_or_path, "model.safetensors", subfolder=subfolder, **options)
    return DenseHead.load(str(weights), epsilon)


def _auto_class(config: Any) -> Any:
    # a BERT with is_decoder is a decoder
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return AutoModelForMaskedLM
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
