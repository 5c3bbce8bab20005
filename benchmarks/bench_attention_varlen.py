"""Packed attention against eager and SDPA on the padded batch."""

from fastattn.bench.cases.attention_varlen import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_attention_varlen(replay, case, peer):
    replay(case, peer)
