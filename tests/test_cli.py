"""`python -m fastattn`, and the benchmark harness behind it: figures only for results that are right."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastattn.__main__ import main
from fastattn._cli.info import example
from fastattn.backends import BACKENDS, OPS
from fastattn.bench import peers
from fastattn.bench.cases import CASES, GPU_CASES, attention
from fastattn.bench.harness import EAGER, FORWARD, OURS, TRAINING, Peer, compare
from fastattn.bench.machine import Yardsticks, peak_memory
from fastattn.bench.report import write_rates
from fastattn.bench.timing import interleave
from fastattn.dispatch import explain, use_backend

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n"


def test_info_names_every_op_and_backend(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["info"])
    out = capsys.readouterr().out
    assert torch.__version__ in out
    for name in (*OPS, *BACKENDS):
        assert name in out
    for line in ("cpu", "threads", "fastattn"):
        assert line in out


@pytest.mark.parametrize("op", OPS)
def test_info_asks_with_arguments_the_op_takes(op):
    args, kwargs = example(op, torch.float32, "cpu")
    assert explain(op, *args, **kwargs).reasons["eager"] is None


def test_bench_writes_valid_figures(tmp_path, capsys):
    files = {name: tmp_path / name for name in ("figures.json", "tables.md", "charts")}
    figures, tables, charts = map(str, files.values())
    main(["bench", "--quick", "--json", figures, "--markdown", tables, "--plot", charts])
    content = json.loads((tmp_path / "figures.json").read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert {result["op"] for result in content["results"]} == set(CASES)
    for result in content["results"]:
        assert result["peers"][result["baseline"]]["ratio"] == 1
        assert OURS in result["peers"]
        for figures in result["peers"].values():
            assert figures["min_s"] <= figures["median_s"] <= figures["max_s"]
            low, high = figures["ratio_quartiles"]
            assert low <= figures["ratio"] <= high
            assert figures["gflops"] == pytest.approx(result["flops"] / figures["median_s"] / 1e9)
            low, high = figures["fastattn_ratio_quartiles"]
            assert low <= figures["fastattn_ratio"] <= high
            assert (figures["share_of_floor"] is None) == (result["op"] == "overhead")
        assert set(result["floors_s"]) == (set() if result["op"] == "overhead" else {"matmul", "copy"})
    assert sorted(path.stem for path in files["charts"].iterdir()) == sorted(CASES)
    assert all(path.read_bytes().startswith(PNG) for path in files["charts"].iterdir())
    lines = files["tables.md"].read_text().splitlines()
    assert [line.removeprefix("## ") for line in lines if line.startswith("## ")] == list(CASES)
    rows = [line for line in lines if " float32 " in line or " bfloat16 " in line]
    assert len(rows) == len(content["results"])
    out = capsys.readouterr().out
    assert all(op in out for op in CASES)


def test_bench_of_an_unknown_op_names_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "attentoin"])
    message = capsys.readouterr().err
    assert "attentoin" in message
    assert all(op in message for op in CASES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_on_a_gpu_that_is_not_there_says_so(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--device", "cuda"])
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_every_case_has_a_distinct_name_and_a_positive_cost():
    for op, cases in (*CASES.items(), *GPU_CASES.items()):
        for quick in (False, True):
            chosen = cases(quick)
            assert len({str(case) for case in chosen}) == len(chosen), op
            assert {case.op for case in chosen} == {op}
            assert all((case.flops > 0 and case.moved > 0) == (op != "overhead") for case in chosen)


@pytest.mark.parametrize("direction", [FORWARD, TRAINING])
def test_a_wrong_result_gets_no_figure(direction):
    case = next(case for case in CASES["rms_norm"](True) if case.direction == direction)
    problem = case.build(case)
    right = problem.peers[OURS]

    def wrong(x, residual, weight):
        out, total = right.call(x, residual, weight)
        return out * 1.001, total

    broken = replace(problem, peers={**problem.peers, OURS: Peer(wrong, right.inputs)})
    with pytest.raises(AssertionError, match="result 0 of fastattn"):
        compare(replace(case, build=lambda case: broken), Yardsticks(0.01), seconds=0.01, min_rounds=2, compile=False)


def test_a_peer_that_fails_is_left_out_and_the_note_says_why():
    case = CASES["attention"](True)[0]
    problem = case.build(case)

    def broken(*inputs):
        raise RuntimeError("no such kernel\nand more")

    peers = {**problem.peers, EAGER: replace(problem.peers[EAGER], call=broken)}
    case = replace(case, build=lambda case: replace(problem, peers=peers))
    result = compare(case, Yardsticks(0.01), seconds=0.01, min_rounds=2, compile=False)
    assert list(result.timings) == [OURS, "sdpa"]
    assert "eager is left out: no such kernel" in result.notes


def test_a_case_that_runs_in_plain_torch_says_so_and_why():
    case = CASES["layer_norm"](True)[0]
    with use_backend("eager"):
        result = compare(case, Yardsticks(0.01), seconds=0.01, min_rounds=2, compile=False)
    assert [note for note in result.notes if note.startswith("fastattn runs layer_norm in plain torch here")]


def test_bench_goes_on_after_a_case_that_fails_and_exits_with_1(monkeypatch, capsys):
    first, second = CASES["rms_norm"](True)

    def broken(case):
        raise MemoryError("not enough")

    monkeypatch.setitem(CASES, "rms_norm", lambda quick: [replace(first, build=broken), second])
    with pytest.raises(SystemExit):
        main(["bench", "rms_norm", "--quick", "--seconds", "0.01"])
    out = capsys.readouterr().out
    assert "MemoryError: not enough" in out
    assert "training" in out


def test_bench_runs_on_the_threads_it_is_told(tmp_path):
    before = torch.get_num_threads()
    try:
        main(["bench", "rms_norm", "--quick", "--threads", "1", "--json", str(tmp_path / "figures.json")])
    finally:
        torch.set_num_threads(before)
    assert json.loads((tmp_path / "figures.json").read_text())["machine"]["threads"] == 1
    with pytest.raises(SystemExit):
        main(["bench", "rms_norm", "--quick", "--threads", "0"])


def test_peak_memory_sees_what_a_call_takes_and_gives_back():
    def call():
        return torch.ones(1 << 22).sum()

    call()
    taken = peak_memory(call)
    assert taken is None or 2**24 * 0.9 < taken < 2**24 * 1.5


def test_the_floor_is_as_much_work_as_the_case_has():
    sticks = Yardsticks(0.01).of(torch.float32, 2 * 64**3 * 10, 2**20)
    assert sticks["matmul"].share == pytest.approx(10 * 64**3 / 128**3, rel=0.8)
    assert sticks["copy"].share == 1
    assert Yardsticks().of(torch.float32, 0, 0) == {}


def test_interleaving_takes_turns_and_rotates_who_begins():
    order = []
    calls = [lambda name=name: order.append(name) for name in "abc"]
    samples = interleave(calls, seconds=0.0, min_rounds=4, sample=0.0)
    assert [len(own) for own in samples] == [4, 4, 4]
    assert "".join(order[-12:]) == "abcbcacababc"


def test_charts_of_rates_are_drawn(tmp_path):
    results = [
        compare(case, Yardsticks(0.01), seconds=0.01, min_rounds=2, compile=False)
        for op in ("rms_norm", "attention")
        for case in CASES[op](True)
    ]
    paths = write_rates(tmp_path, results)
    assert {path.stem.split("-")[1] for path in paths} == {FORWARD, TRAINING}
    assert all(path.read_bytes().startswith(PNG) for path in paths)


@pytest.mark.parametrize("options", ["causal", "", "bias", "window", "softcap"])
def test_the_gpus_peers_of_attention_compute_the_same(options, monkeypatch):
    """On the CPU, at a small size: those that run there agree, and the others are left out with the reason."""
    monkeypatch.setattr(attention, "WINDOW", 5)
    # What FlexAttention computes is the same without a compiler, which would take 20 seconds.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    peers._flex.cache_clear()
    case = next(case for case in GPU_CASES["attention"](False) if case.options == options and case.direction == FORWARD)
    query, key, value = (torch.randn(1, 2, 16, 8) for _ in range(3))
    small = replace(
        case,
        device="cpu",
        shape={"batch": 1, "heads": 2, "kv_heads": 2, "seq": 16, "head_dim": 8},
        dtype=torch.float32,
        build=lambda case: replace(attention._on_gpu(case, (query, key, value)), baseline="eager"),
    )
    result = compare(small, Yardsticks(0.01), seconds=0.01, min_rounds=2, compile=False)
    assert {OURS, "eager"} <= set(result.timings)
    assert all(" is left out: " in note for note in result.notes)


def test_pytest_benchmark_reports_the_interleaved_samples(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_layer_norm.py", "-q", "--quick"]
    # pytest-xdist's workers say so in the environment, and pytest-benchmark measures nothing in one of them.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(
        [*command, f"--benchmark-json={figures}", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(figures.read_text())["benchmarks"]
    assert len(rows) == 4  # forward and training, fastattn and eager
    for row in rows:
        assert row["stats"]["median"] == pytest.approx(row["extra_info"]["median_s"])
        assert row["stats"]["rounds"] == row["extra_info"]["rounds"]
