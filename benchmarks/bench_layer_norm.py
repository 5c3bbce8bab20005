"""Add + layer norm against the two steps."""

from fastattn.bench.cases.layer_norm import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_layer_norm(replay, case, peer):
    replay(case, peer)
