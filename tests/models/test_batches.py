"""Every row once, longest first, at most so many rows, and at most so many positions."""

import pytest

from hf_densefeat.models.encoding import CACHED_TOKENS, batches_by_length


@pytest.mark.parametrize("lengths", [[], [5], [3, 9, 4, 9, 1], [3000, 1, 1], [256] * 20, list(range(1, 600))])
@pytest.mark.parametrize("batch_size", [1, 8, 32])
@pytest.mark.parametrize("total", [CACHED_TOKENS, None])
def test_rows_are_cut_by_length(lengths, batch_size, total):
    batches = list(batches_by_length(lengths, batch_size, total))
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    for batch in batches:
        positions = len(batch) * lengths[batch[0]]
        assert len(batch) <= batch_size
        assert total is None or len(batch) == 1 or positions <= total
    if total is None:
        assert len(batches) == -(-len(lengths) // batch_size)


def test_no_batch_is_smaller_than_it_must_be():
    """A batch ends where one more row would be too much."""
    lengths = [256] * 20
    assert [len(batch) for batch in batches_by_length(lengths, 32, CACHED_TOKENS)] == [8, 8, 4]
