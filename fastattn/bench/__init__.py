"""Benchmarks: what each op costs beside eager, SDPA, oneDNN and torch.compile. `python -m fastattn bench` runs them.

`cases` says what is measured, `peers` holds the other implementations, `harness` checks and compares them, `report`
shows the outcome. `pytest benchmarks/` runs the same cases under pytest-benchmark.
"""
