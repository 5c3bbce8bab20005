"""The cost of a call beside its kernel."""

from fastattn.bench.cases.overhead import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_overhead(replay, case, peer):
    replay(case, peer)
