"""A step of generation against SDPA on the same cache."""

from fastattn.bench.cases.attention_with_kvcache import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_attention_with_kvcache(replay, case, peer):
    replay(case, peer)
