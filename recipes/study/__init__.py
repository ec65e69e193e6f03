"""The rooms of `recipes/compare.py`."""
