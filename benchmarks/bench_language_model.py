"""A language model's training step."""

from fastattn.bench.cases.language_model import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_language_model(replay, case, peer):
    replay(case, peer)
