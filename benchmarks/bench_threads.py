"""What a second thread brings, op by op."""

from fastattn.bench.cases.threads import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_threads(replay, case, peer):
    replay(case, peer)
