"""The summary of attention's weights against plain torch, which forms them."""

from fastattn.bench.cases.attention_summary import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_attention_summary(replay, case, peer):
    replay(case, peer)
