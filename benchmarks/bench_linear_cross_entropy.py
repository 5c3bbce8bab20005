"""A last linear layer with its cross entropy against `F.cross_entropy(F.linear())` and torch.compile."""

from fastattn.bench.cases.linear_cross_entropy import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_linear_cross_entropy(replay, case, peer):
    replay(case, peer)
