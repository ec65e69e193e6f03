"""Encoders for episodes of timed values, alone or beside a note."""

from hf_densefeat.events.modeling_event import EventConfig, EventModel, EventModelForMaskedValues
from hf_densefeat.events.modeling_multimodal import (
    MultimodalConfig,
    MultimodalModel,
    MultimodalModelForMaskedPrediction,
    MultimodalPairCollator,
    MultimodalProcessor,
)
from hf_densefeat.events.processing_event import EpisodePairCollator, EpisodePairs, EventProcessor
from hf_densefeat.events.records import event_episodes, latest_of_each, pack_episodes

__all__ = [
    "EpisodePairCollator",
    "EpisodePairs",
    "EventConfig",
    "EventModel",
    "EventModelForMaskedValues",
    "EventProcessor",
    "MultimodalConfig",
    "MultimodalModel",
    "MultimodalModelForMaskedPrediction",
    "MultimodalPairCollator",
    "MultimodalProcessor",
    "event_episodes",
    "latest_of_each",
    "pack_episodes",
]
