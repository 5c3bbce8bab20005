"""Add + RMS norm against the two steps."""

from fastattn.bench.cases.rms_norm import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_rms_norm(replay, case, peer):
    replay(case, peer)
