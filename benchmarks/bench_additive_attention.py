"""Additive attention against eager and torch.compile."""

from fastattn.bench.cases.additive_attention import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_additive_attention(replay, case, peer):
    replay(case, peer)
