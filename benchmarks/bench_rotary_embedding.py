"""Rotary embedding against eager and torch.compile."""

from fastattn.bench.cases.rotary_embedding import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_rotary_embedding(replay, case, peer):
    replay(case, peer)
