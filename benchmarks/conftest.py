"""pytest-benchmark over fastattn.bench's cases.

A row of the plugin's table is one peer of one case. The plugin times one function after another, which on a noisy
machine compares two moments rather than two functions. So a case is measured once, all its peers interleaved
(`fastattn.bench`), and each row then replays its peer's samples to the plugin through a clock of its own.
"""

import pytest
import torch

from fastattn.bench import peers
from fastattn.bench.harness import Case, Result, compare, peer_names
from fastattn.bench.machine import Yardsticks, describe


class ReplayClock:
    """A clock that stands still but for `step`, which lets the next sample's time pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: list[float] = []

    def __call__(self) -> float:
        return self.now

    def load(self, samples: list[float]) -> None:
        self.samples = list(reversed(samples))

    def step(self) -> None:
        self.now += self.samples.pop() if self.samples else 0.0


CLOCK = ReplayClock()
YARDSTICKS = Yardsticks()
_measured: dict[str, Result] = {}


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="small shapes, a fraction of a second each, no torch.compile")
    parser.addoption("--threads", type=int, help="torch's threads")


def pytest_configure(config):
    threads = config.getoption("--threads", default=None)
    if threads is not None:
        torch.set_num_threads(threads)


def pytest_generate_tests(metafunc):
    """Each file names its op's `cases`; a row a case and peer."""
    if "peer" not in metafunc.fixturenames:
        return
    quick = metafunc.config.getoption("--quick")
    compile = not quick and peers.compile_unavailable() is None
    rows = [(case, peer) for case in metafunc.module.cases(quick) for peer in peer_names(case, compile)]
    metafunc.parametrize(("case", "peer"), rows, ids=[f"{case}-{peer}" for case, peer in rows])


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(
            pytest.mark.benchmark(timer=CLOCK, group=f"{item.module.__name__} {item.callspec.params['case']}")
        )


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["fastattn"] = describe()


@pytest.fixture
def replay(benchmark, request):
    """`replay(case, peer)` measures the case, if no peer of it has yet, and gives the peer's samples to the plugin."""
    quick = request.config.getoption("--quick")

    def run(case: Case, peer: str) -> None:
        key = f"{case.op} {case}"
        if key not in _measured:
            seconds, min_rounds = (0.05, 3) if quick else (2.0, 5)
            compile = not quick and peers.compile_unavailable() is None
            _measured.clear()  # cases come one after another; an old one's result is not asked for again
            _measured[key] = compare(case, YARDSTICKS, seconds=seconds, min_rounds=min_rounds, compile=compile)
        result = _measured[key]
        if peer not in result.timings:
            pytest.skip("; ".join(note for note in result.notes if note.startswith(peer)))
        samples = result.timings[peer].samples
        CLOCK.load(samples)
        benchmark.pedantic(CLOCK.step, rounds=len(samples))
        benchmark.extra_info.update(result.peer_as_dict(peer), baseline=result.baseline)

    return run
