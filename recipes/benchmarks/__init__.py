"""The benchmarks of `recipes/benchmark.py`."""
