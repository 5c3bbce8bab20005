"""Linear with its activation against F.linear and oneDNN."""

from fastattn.bench.cases.linear import cases  # noqa: F401  (conftest.py makes a row of each case and peer)


def bench_linear(replay, case, peer):
    replay(case, peer)
