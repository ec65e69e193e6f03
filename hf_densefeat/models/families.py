"""Which class opens a checkpoint, and families that are refused: without an embedding, or whose folder nobody could open."""

import logging
from collections.abc import Iterable
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

logger = logging.getLogger(__name__)

# Their attention, or what stands in its place, is not masked, or not exactly
SEES_PADDING = ("convbert", "cpmant", "fnet", "funnel", "nystromformer", "yoso")
# transformers renames keys of these on loading, and does not find them below a head
UNREADABLE = ("axk1", "deepseek_v4", "inkling2_loop_text", "inkling2_text", "laguna")
REASONS = {
    name: "AutoModel does not find every weight of its saved folder, and draws those anew" for name in UNREADABLE
} | {"reformer": "its hidden states are twice as wide as hidden_size, and its batches must have one length"}


def language_modeling_of(name: str) -> str | None:
    """What the head of a native class predicts: "mlm", "causal", or None for a class without a language-modelling head."""
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "mlm"
    return "causal" if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else None


def auto_class(config: Any) -> Any:
    """The auto class that opens a checkpoint: masked-LM, or else causal, or else of the base model."""
    # the encoder alone of an encoder-decoder family, as T5EncoderModel saves it
    encoder = next((name for name in config.architectures or () if name.endswith("EncoderModel")), None)
    if encoder and not config.is_encoder_decoder and hasattr(transformers, encoder):
        return getattr(transformers, encoder)
    # a BERT with is_decoder is a decoder
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return transformers.AutoModelForMaskedLM
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel


def positions_of(model: Any) -> int | None:
    """Tokens for which a model has positions; None for no limit."""
    positions = getattr(model.config, "max_position_embeddings", None)
    # the RoBERTa family numbers positions from padding_idx + 1
    embeddings = getattr(model.base_model, "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    if positions and padding is not None:
        positions -= padding + 1
    # XLNet says -1 for no limit
    return positions if positions and positions > 0 else None


def check_weights(model: PreTrainedModel, missing: Iterable[str], source: str) -> None:
    """ValueError for weights of the encoder that its checkpoint does not have; the head may be new, the pooler is not used."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    random = sorted(name for name in missing if name.startswith(prefix) and "pooler" not in name)
    if random:
        raise ValueError(
            f"{len(random):,} weights of the encoder, such as {random[0]}, are not in the checkpoint {source!r} and would be "
            f"random: is it one of another architecture than {type(model).__name__}?"
        )


def check_family(model: PreTrainedModel) -> None:
    """ValueError for a native model that would fail later, or whose embeddings others would not get."""
    name, reason = type(model).__name__, _reason_against(model)
    if reason:
        raise ValueError(f"{name} {reason}")
    if model.config.model_type in SEES_PADDING:
        logger.warning(
            "%s sees padding: an embedding depends on the lengths of the other texts of its batch. encode(texts, "
            "batch_size=1) avoids that.",
            name,
        )


def _reason_against(model: PreTrainedModel) -> str | None:
    config, body, head = model.config, model.base_model, language_modeling_of(type(model).__name__)
    if config.is_encoder_decoder:
        return (
            "is an encoder-decoder: it has no one embedding of a text. Use an encoder, or the encoder alone, such as "
            "T5EncoderModel with mlm_weight=0."
        )
    if model.main_input_name != "input_ids":
        return f"reads {model.main_input_name}, not tokens of a text. Use a text encoder."
    if not hasattr(config, "hidden_size"):
        return "is not a text encoder: its config has no hidden_size. Use a model of text alone."
    if head and body is model:
        return "has no body apart from its head: no hidden states to pool."
    bidirectional = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if head == "causal" and bidirectional:
        return (
            "would see the tokens that it is to predict: its config says is_decoder=False. Load the masked-LM model of this "
            "family, or set is_decoder=True in the config."
        )
    opened: Any = transformers.MODEL_MAPPING.get(type(config), ())
    classes = opened if isinstance(opened, tuple) else (opened,)
    # code from the Hub has mappings of its own
    if head and type(model).__module__.startswith("transformers.") and type(body) not in classes:
        others = f"as {classes[0].__name__}" if classes else "not at all"
        return (
            f"has the body {type(body).__name__}, but AutoModel would open its folder {others}: nobody else would get its "
            "embeddings. Use an encoder, or a decoder that is not a part of a larger model."
        )
    heads, key_heads = (getattr(config, f"num_{which}_heads", None) for which in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(key_heads, int) and heads % key_heads:
        return (
            f"cannot compute: in its config num_attention_heads is {heads}, which is no multiple of num_key_value_heads, "
            f"{key_heads}."
        )
    if config.model_type in REASONS:
        return f"is refused: {REASONS[config.model_type]}. Use another family."
    return None
