"""A whole encoder layer against torch.nn's."""

from fastattn.bench.cases.encoder_layer import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_encoder_layer(replay, case, peer):
    replay(case, peer)
