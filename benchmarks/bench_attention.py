"""Attention against eager, SDPA and torch.compile."""

from fastattn.bench.cases.attention import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_attention(replay, case, peer):
    replay(case, peer)
