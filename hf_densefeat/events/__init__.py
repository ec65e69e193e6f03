"""Encoders for windows of timed values, alone or beside a note."""

from hf_densefeat.events.modeling_event import EventConfig, EventModel, EventModelForMaskedValues
from hf_densefeat.events.modeling_multimodal import (
    MultimodalConfig,
    MultimodalModel,
    MultimodalModelForMaskedPrediction,
    MultimodalPairCollator,
    MultimodalProcessor,
)
from hf_densefeat.events.processing_event import EventProcessor, WindowPairCollator, WindowPairs
from hf_densefeat.events.records import event_windows, latest_of_each, pack_windows

__all__ = [
    "EventConfig",
    "EventModel",
    "EventModelForMaskedValues",
    "EventProcessor",
    "MultimodalConfig",
    "MultimodalModel",
    "MultimodalModelForMaskedPrediction",
    "MultimodalPairCollator",
    "MultimodalProcessor",
    "WindowPairCollator",
    "WindowPairs",
    "event_windows",
    "latest_of_each",
    "pack_windows",
]
