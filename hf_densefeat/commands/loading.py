"""Models by name, with a sentence that names the one that cannot be loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Inside, what transformers and the Hub say of a missing model becomes a ValueError that names it."""
    try:
        yield
    except OSError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        where = "In the folder" if Path(source).is_dir() else "There is no such folder, and from the Hub"
        raise ValueError(f"the model {source!r} cannot be loaded. {where}: {reason}.") from error
