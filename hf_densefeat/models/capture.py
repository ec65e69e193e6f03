"""The last hidden states of a forward, kept on their way to the head, whatever wraps the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def capturing(body: Any, chosen: Tensor | None) -> Iterator[None]:
    """Inside, a forward leaves its last hidden states in `body._densefeat_hidden`; see `DenseFeatureMixin.capture_hidden`."""
    if not hasattr(body, "_densefeat_hook"):
        body._densefeat_hook = body.register_forward_hook(_keep_hidden)
    body._densefeat_capture, body._densefeat_chosen = True, chosen
    try:
        yield
    finally:
        body._densefeat_capture, body._densefeat_hidden, body._densefeat_chosen = False, None, None


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
