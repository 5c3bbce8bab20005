"""Text from a language model."""

from fastattn.bench.cases.generation import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_generation(replay, case, peer):
    replay(case, peer)
