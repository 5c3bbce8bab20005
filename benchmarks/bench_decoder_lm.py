"""A training step of a language model, its optimizer's included."""

from fastattn.bench.cases.decoder_lm import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_decoder_lm(replay, case, peer):
    replay(case, peer)
