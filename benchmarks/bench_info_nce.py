"""InfoNCE against its score matrix in plain torch and torch.compile."""

from fastattn.bench.cases.info_nce import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_info_nce(replay, case, peer):
    replay(case, peer)
