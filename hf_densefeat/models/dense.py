"""A mixin that gives any transformers encoder an embedding, and native folders that everything else can open."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from hf_densefeat.models.encoding import Rows, capturing, evaluating, pooled_texts, token_rows
from hf_densefeat.models.families import auto_class, check_family, check_weights, language_modeling_of, positions_of
from hf_densefeat.models.head import VIEWS, DenseHead
from hf_densefeat.models.modules import SentenceModule, through
from hf_densefeat.models.pooling import POOLINGS, pool, without_prompt
from hf_densefeat.models.sentence_transformers import SentenceSettings, placed_modules, read_folder, write_folder
from hf_densefeat.models.tokenizers import ABSENT, check_vocabulary, load_tokenizer

Native: Any = PreTrainedModel if TYPE_CHECKING else object  # what the mixin is mixed into

HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
IN_MODULES = ("pooling", "max_length")  # of the config's block, what a folder's modules.json says instead


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

    sentence = SentenceSettings()  # prompts, the modules after pooling: what a sentence-transformers folder adds

    @property
    def pooling(self) -> str:
        """How tokens become an embedding, a name of `POOLINGS`: "mean", "cls", "last", "max" or "mean_sqrt_len"."""
        return self.config.densefeat["pooling"]

    @property
    def tail(self) -> tuple[SentenceModule, ...]:
        """Frozen modules between pooling and the embedding (`Dense`, `Normalize`); () without a folder that has some."""
        return self.sentence.tail

    @property
    def has_input_layer(self) -> bool:
        """Whether views may read the input embeddings: the base model gives `hidden_states`, and every token is pooled."""
        return self.sentence.include_prompt

    @property
    def prompt(self) -> str:
        """What stands before every text, in training too; "" for nothing."""
        return self.sentence.prompt()

    @property
    def embedding_dimension(self) -> int:
        """Width d of the embedding: that of the hidden states, or what the last `Dense` of `tail` makes of it."""
        widths = [module.options["out_features"] for module in self.tail if module.kind == "Dense"]
        return widths[-1] if widths else self.config.hidden_size

    @property
    def output_dimension(self) -> int:
        """Width of what `encode` gives by default: of the content view, where there is one."""
        return self.embedding_dimension if self.dense_head is None else self.dense_head.matrix.shape[1]

    @property
    def language_modeling(self) -> str | None:
        """What the head predicts: "mlm", "causal", or None for a model without a language-modelling head."""
        return language_modeling_of(type(self).__name__.removeprefix("FSDP"))

    @property
    def max_length(self) -> int | None:
        """Tokens of a note that the embedding sees: the config's `densefeat.max_length`, or all positions there are."""
        limits = (positions_of(self), self.config.densefeat.get("max_length"))
        return min((limit for limit in limits if limit), default=None)

    @property
    def long_notes(self) -> str:
        """What becomes of a note longer than `max_length`: "truncate", or "chunk" and average, weighted by tokens."""
        return self.config.densefeat.get("long_notes", "truncate")

    @property
    def views(self) -> dict[str, DenseHead]:
        """Affine maps of the embedding by name, "content" and "form", saved beside the encoder; {} without.

        A map of width `embedding_dimension` + `hidden_size` takes the mean of the input embeddings too, behind the embedding.
        """
        return dict(self.__dict__.get("_views", {}))

    @views.setter
    def views(self, views: Mapping[str, DenseHead]) -> None:
        widths = [self.embedding_dimension]
        widths += [widths[0] + self.config.hidden_size] if self.has_input_layer else []
        for name, head in views.items():
            if name not in VIEWS:
                raise ValueError(f"Expected views by the names {' and '.join(VIEWS)} but got {name!r}.")
            if len(head.mean) not in widths:
                raise ValueError(
                    f"The {name} view was fitted on embeddings of width {len(head.mean)}, but {type(self).__name__} has "
                    f"embeddings of width {' or '.join(map(str, widths))}: fit it on this encoder's."
                )
        self.__dict__["_views"] = dict(views)

    @property
    def dense_head(self) -> DenseHead | None:
        """The content view, which `encode` applies; None for embeddings as they are pooled.

        Not called `head`, which in ModernBERT and others is a part of the language-modelling head.
        """
        return self.views.get("content")

    @property
    def _body(self) -> Any:
        """The module that gives the hidden states: the head of OPT calls the decoder inside the base model, not that."""
        return self.base_model.get_decoder()

    def capture_hidden(self, chosen: Tensor | None = None) -> AbstractContextManager[None]:
        """Inside, `pooled(mask)` after a forward of the (wrapped) model gives embeddings with their graph.

        The forward goes through whatever wraps the model (DDP, FSDP2, torch.compile), and no layer but the last is kept.

        Args:
            chosen: (B, L), True at n positions; the head then sees these alone, as (1, n, d), and logits are (1, n, V).
        """
        return capturing(self._body, chosen)

    def pooled(self, attention_mask: Tensor, *, prompt_length: int | None = None, tail: bool = True) -> Tensor:
        """Embeddings (B, d) of the forward that just ran inside `capture_hidden`.

        Args:
            attention_mask: of its rows, padded on the right.
            prompt_length: tokens at the beginning that are not pooled; None for those of the default prompt, where the
                folder leaves the prompt out.
            tail: apply `tail`; False for the pooled states, such as of chunks that are to be averaged first.
        """
        if prompt_length is None:
            settings = self.sentence
            prompt_length = 0 if settings.include_prompt else settings.excluded(self.prompt, self._default_tokenizer())
        z = pool(self._body._densefeat_hidden, without_prompt(attention_mask, prompt_length), self.pooling)
        return through(self.tail, z) if tail else z

    @torch.no_grad()
    def encode(
        self,
        texts: list[str] | dict[str, Tensor],
        tokenizer: Any = None,
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        show_progress_bar: bool = False,
        head: bool = True,
        view: str | None = "content",
        input_layer: bool = False,
        prompt_name: str | None = None,
        convert_to_numpy: bool = False,
        normalize_embeddings: bool = False,
        return_cut: bool = False,
    ) -> Any:
        """Embeddings (N, d), float32 on the CPU, row i of text i; without dropout, whatever mode the model is in.

        Longer texts are cut, or with `long_notes` "chunk" read whole; SentenceTransformer cuts them always. Beside the
        texts and the result, memory does not grow with N. For texts that do not fit in memory see `encode_stream`.

        Args:
            texts: notes, or one batch of tokens (`input_ids`, `attention_mask`).
            tokenizer: by default that of the folder or repository that the model was loaded from.
            batch_size: most rows of a forward; texts are sorted by length first, so that little is padded.
            max_length: tokens kept of a text; by default `max_length` of the model.
            show_progress_bar: show a progress bar.
            head: False is the same as `view` None.
            view: "content", which is no map for an encoder without views; "form"; None for the embeddings below the views.
            input_layer: below the views, append the mean of the input embeddings (N, d + `hidden_size`), as views may read.
            prompt_name: which of the folder's prompts to put before every text; by default the folder's default.
            convert_to_numpy: an array in the place of a tensor, as of sentence-transformers.
            normalize_embeddings: rows of length 1, as of sentence-transformers.
            return_cut: return the embeddings, and of each text whether it was cut (N,).
        """
        if isinstance(texts, str):
            raise ValueError("Expected a list of texts but got one string: wrap it in a list.")
        view = view if head else None
        if view not in (None, "content", *self.views):
            raise ValueError(
                f"Expected view to be one of {', '.join(self.views) or 'content'} or None, which this encoder has, but got "
                f"{view!r}: `densefeat head` fits views."
            )
        found = self.views.get(view) if view else None
        wide = input_layer if found is None else len(found.mean) > self.embedding_dimension
        with evaluating(self):
            if hasattr(texts, "keys"):
                tokens = dict(cast(Any, texts))
                z = self._embed(tokens, int(tokens.pop("prompt_length", 0)), wide)
                cut = torch.zeros(len(z), dtype=torch.bool)
            else:
                tokenizer, prompt = tokenizer or self._default_tokenizer(), self.sentence.prompt(prompt_name)
                texts = [prompt + text for text in texts]
                how: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "input_layer": wide}
                how["excluded"] = self.sentence.excluded(prompt, tokenizer)
                z, cut = pooled_texts(self, texts, tokenizer, progress=show_progress_bar, **how)
        z, *inputs = z.split(self.config.hidden_size, dim=1)
        z = torch.cat([through(self.tail, z), *inputs], 1)
        z = z if found is None else found(z)
        z = torch.nn.functional.normalize(z, dim=1) if normalize_embeddings else z
        both = (z.numpy(), cut.numpy()) if convert_to_numpy else (z, cut)
        return both if return_cut else both[0]

    def encode_stream(self, texts: Iterable[str], *, block: int = 10_000, **options: Any) -> Iterator[Any]:
        """What `encode(..., **options)` gives of `block` texts at a time, in order: for texts that do not fit in memory."""
        remaining = iter(texts)
        while some := list(itertools.islice(remaining, block)):
            yield self.encode(some, **options)

    def _rows(self, texts: list[str], tokenizer: Any, max_length: int | None) -> Rows:
        limit = max_length or self.max_length or tokenizer.model_max_length
        rows = token_rows(texts, tokenizer, limit, chunk=self.long_notes == "chunk")
        known = getattr(self.get_input_embeddings(), "num_embeddings", math.inf)
        if any(max(ids, default=0) >= known for ids in rows.tokens["input_ids"]):
            check_vocabulary(tokenizer, self)
        return rows

    def _padded(self, rows: dict[str, list], tokenizer: Any) -> dict[str, Tensor]:
        """One batch, padded to the right as in training: learned positions count from the left."""
        return tokenizer.pad(rows, padding_side="right", return_tensors="pt")

    def _embed(self, tokens: Any, prompt_length: int, input_layer: bool) -> Tensor:
        tokens = {name: values.to(self.device) for name, values in tokens.items()}
        options = {"output_hidden_states": True} if input_layer else {}
        with self.capture_hidden():
            # the base model alone: no logits. Under FSDP2 only the root's forward gathers the parameters
            out = (self if type(self).__name__.startswith("FSDP") else self.base_model)(**tokens, **options)
            z = self.pooled(tokens["attention_mask"], prompt_length=prompt_length, tail=False)
            if input_layer:
                mask = without_prompt(tokens["attention_mask"], prompt_length)
                z = torch.cat([z, pool(out.hidden_states[0], mask, "mean")], 1)
            return z.float().cpu()

    def _default_tokenizer(self) -> Any:
        if getattr(self, "_densefeat_tokenizer", None) is None:
            try:
                self._densefeat_tokenizer = load_tokenizer(self.name_or_path)
            except OSError as error:
                raise ValueError(ABSENT) from error
        return self._densefeat_tokenizer

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As in transformers, always with the native keys, plus the files of a sentence-transformers folder.

        These say how the folder embeds a text, and the config does not say it again: another program may change them.
        """
        # keys renamed on load would be saved under their old names, which a resumed Trainer does not find
        kwargs.setdefault("save_original_format", False)
        block = self.config.densefeat
        self.config.densefeat = {name: value for name, value in block.items() if name not in IN_MODULES}
        try:
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        finally:
            self.config.densefeat = block
        if is_main_process:
            write_folder(save_directory, self)

    @property
    def sentence_modules(self) -> dict[str, SentenceModule]:
        """Path to module of what follows the transformer in a saved folder, the content view last but for the form view."""
        return placed_modules(self)


@functools.cache
def _dense_class(native: Any) -> Any:
    """The native class with the mixin before it, under the native name and module, which saving and loading read."""
    return type(native.__name__, (DenseFeatureMixin, native), {"__module__": native.__module__})


def as_dense(
    model: PreTrainedModel,
    *,
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
    causal = model.language_modeling == "causal"
    said = {"pooling": "last" if causal else "mean"} | (getattr(model.config, "densefeat", None) or {})
    given = {"pooling": pooling, "max_length": max_length, "long_notes": long_notes}
    block = said | {name: value for name, value in given.items() if value is not None}
    block.pop("views", None)  # of the folder, not of a run
    if block["pooling"] == "cls" and causal:
        raise ValueError(
            f"cls pooling takes the first token, which in {type(model).__name__}, a decoder, has seen nothing of the note. "
            "Use last or mean."
        )
    model.config.densefeat = block
    return model


class AutoDenseModel:
    """The native masked-LM class of a checkpoint (or causal, or base class, where there is none) with the mixin."""

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, *, pooling: str | None = None, max_length: int | None = None, **kwargs
    ):
        """As `AutoModelForMaskedLM.from_pretrained`, in float32 unless `dtype` says otherwise.

        Args:
            name_or_path: Hub name or folder.
            pooling: a name of `POOLINGS`; None for what the checkpoint says, else "mean" ("last" for decoders).
            max_length: tokens of a note that the embedding sees; None for what the checkpoint says.
            kwargs: passed on.

        Raises:
            ValueError: for a checkpoint without some weights of the encoder.
        """
        kwargs.setdefault("dtype", torch.float32)
        hub = {name: kwargs[name] for name in HUB if name in kwargs}
        folder = read_folder(name_or_path, hub)
        config = kwargs.get("config") or AutoConfig.from_pretrained(name_or_path, **hub)
        asked = kwargs.pop("output_loading_info", False)
        loaded, info = auto_class(config).from_pretrained(name_or_path, output_loading_info=True, **kwargs)
        model: Any = as_dense(loaded, pooling=pooling or folder.pooling, max_length=max_length or folder.max_length)
        check_weights(model, info["missing_keys"], name_or_path)
        model.sentence, model.views = folder.settings, folder.views
        return (model, info) if asked else model

    @classmethod
    def from_config(cls, config, *, pooling: str | None = None, max_length: int | None = None, **kwargs):
        """A model with random weights."""
        return as_dense(auto_class(config).from_config(config, **kwargs), pooling=pooling, max_length=max_length)
