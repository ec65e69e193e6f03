"""Tables to notes, notes to pairs, pairs to batches of tokens."""
