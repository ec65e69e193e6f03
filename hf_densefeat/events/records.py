"""Episodes of timed values, such as labs and vital signs: from tables to text, and back to events.

An episode is what a note is elsewhere: one row of a table with `patient_id`, `time` and `text`, whose text is JSON,
`{"events": [["HR", 88.0, 1.5], ["Lactate", 2.1, 3.0]]}`: code, value, and hours since the episode began. What was not
measured is not in the list; nothing is imputed. A note of the same time may stand beside the events, as `"text"`.
So splits, adjacent pairs, probes and caches work on episodes as they do on notes.
"""

import json
from collections.abc import Sequence

import datasets
import numpy as np

from hf_densefeat.data.columns import column, dense_codes, place_in_run, time_ticks


def pack_episodes(episode, code, value, hours, texts: Sequence[str | None] | int) -> list[str]:
    """Episodes as JSON, from one row an event.

    Args:
        episode: (E,) which episode each event belongs to, 0 … W − 1, in any order.
        code: (E,) strings.
        value: (E,) finite numbers.
        hours: (E,) finite hours since the episode began.
        texts: W notes, None where an episode has none; or W, for episodes without notes.

    Returns:
        W strings; events are in the order of their hours. An episode may be empty.
    """
    texts = [None] * texts if isinstance(texts, int) else texts
    episode, code = np.asarray(episode), np.asarray(code)
    value, hours = np.asarray(value, np.float64), np.asarray(hours, np.float64)
    if not len(episode) == len(code) == len(value) == len(hours):
        raise ValueError(
            "Expected one episode, code, value and hour an event, got "
            f"{len(episode)}, {len(code)}, {len(value)} and {len(hours)}."
        )
    for name, numbers in {"value": value, "hours": hours}.items():
        if not np.isfinite(numbers).all():
            raise ValueError(
                f"Column `{name}`, row {int(np.argmin(np.isfinite(numbers)))}: expected a finite number, got "
                f"{numbers[~np.isfinite(numbers)][0]}. A value that is missing is no event: leave its row out."
            )
    if len(episode) and (episode.min() < 0 or episode.max() >= len(texts)):
        raise ValueError(f"Expected episodes 0 to {len(texts) - 1}, got {episode.min()} to {episode.max()}.")
    # sorted by episode, so that each episode's events are one slice
    order = np.lexsort((hours, episode))
    ends = np.searchsorted(episode[order], np.arange(len(texts)), side="right")
    events = list(zip(code[order].tolist(), value[order].tolist(), np.round(hours[order], 4).tolist(), strict=True))
    packed, start = [], 0
    for text, end in zip(texts, ends.tolist(), strict=True):
        packed.append(json.dumps({"events": events[start:end]} | ({"text": text} if text else {})))
        start = end
    return packed


def latest_of_each(episode: np.ndarray, code: np.ndarray, hours: np.ndarray, limit: int) -> np.ndarray:
    """Which events an episode of at most `limit` keeps: the latest of each code, then the latest but one, and so on.

    Episodes, codes and hours are (E,), one an event; the result is indices into them. Among events of one rank the later
    come first.
    """
    order = np.lexsort((-hours, code, episode))
    rank = np.empty(len(episode), dtype=np.int64)
    # 0 for the latest event of each code in the episode, 1 for the one before it, ...
    rank[order] = place_in_run(episode[order], code[order])
    order = np.lexsort((-hours, rank, episode))
    return order[place_in_run(episode[order]) < limit]


def event_episodes(events: datasets.Dataset, every: float = 24.0) -> datasets.Dataset:
    """Cut each patient's events into episodes of `every` hours, from the patient's first event on.

    Args:
        events: one row a value: `patient_id`, `time` (a timestamp, or a number of days), `code`, `value`. Rows may lie in
            any order; rows without a value are left out.
        every: hours.

    Returns:
        `patient_id`, `time` (of the episode's last event, so that it is known by then) and `text`, sorted by patient and
        time. Episodes without events are not there.
    """
    ticks, ticks_per_day = time_ticks(events)
    patient, value = dense_codes(events, "patient_id"), column(events, "value")
    code = np.asarray(column(events, "code").to_pylist(), dtype=str)
    rows = np.flatnonzero(value.is_valid().to_numpy())
    if not len(rows):
        raise ValueError("Expected rows with a value, got none.")
    patient, code, value, ticks = (part[rows] for part in (patient, code, value.to_numpy(), ticks))
    # the first event of each patient, from which episodes are counted
    first = np.full(patient.max() + 1, ticks.max())
    np.minimum.at(first, patient, ticks)
    hours = (ticks - first[patient]) / ticks_per_day * 24
    place = (hours // every).astype(np.int64)
    keys, episode = np.unique(np.stack([patient, place], 1), axis=0, return_inverse=True)
    # the row of each episode's last event, whose patient and time the episode has
    last = rows[np.lexsort((ticks, episode))][np.cumsum(np.bincount(episode)) - 1]
    texts = pack_episodes(episode, code, value, hours - place * every, len(keys))
    return events.select(last).select_columns(["patient_id", "time"]).flatten_indices().add_column("text", texts)


def events_of(episodes: Sequence[str]) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
    """All events of all episodes: episode (E,), codes, value (E,) and hours (E,); ValueError for what is not an episode."""
    if isinstance(episodes, str):
        raise ValueError("Expected a list of episodes but got one string: wrap it in a list.")
    codes: list[str] = []
    numbers, counts = [np.zeros((2, 0))], []
    for i, episode in enumerate(episodes):
        try:
            events = json.loads(episode).get("events", [])
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f'Episode {i}: expected JSON such as {{"events": [["HR", 88.0, 1.5]]}}, got something else. '
                "`pack_episodes` and `event_episodes` make it from a table."
            ) from error
        try:
            code, value, hours = zip(*events, strict=True) if events else ((), (), ())
            numbers.append(np.array([value, hours], np.float64))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f'Episode {i}: expected events of code, value and hours, such as ["HR", 88.0, 1.5], got something else.'
            ) from error
        if not np.isfinite(numbers[-1]).all():
            raise ValueError(
                f"Episode {i} has an event whose value or hours are not finite. A missing value is no event: leave it out."
            )
        codes += code
        counts.append(len(code))
    value, hours = np.concatenate(numbers, axis=1)
    return np.repeat(np.arange(len(counts)), counts), codes, value, hours


def note_of(episode: str) -> str | None:
    """The note of an episode, if it has one."""
    note = json.loads(episode).get("text")
    return note if note and note.strip() else None
