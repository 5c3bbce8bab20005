"""A whole pretrained model against PyTorch's own paths, ONNX Runtime and OpenVINO."""

from fastattn.bench.cases.minilm import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_minilm(replay, case, peer):
    replay(case, peer)
