"""The feed-forward block against its layers."""

from fastattn.bench.cases.feed_forward import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_feed_forward(replay, case, peer):
    replay(case, peer)
