"""All ops in several threads at once, and in a forked process."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import FUSED, Sample, gradients, leaves, tensors
from torch import Tensor

import fastattn


def in_threads(function: Callable[[], Any], count: int = 4) -> list[Any]:
    """What the function returns when as many Python threads call it at the same time."""
    results: list[Any] = [None] * count
    start = threading.Barrier(count)

    def target(index: int) -> None:
        start.wait()
        try:
            results[index] = function()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=target, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize(("sample", "backend"), [row for row in FUSED if not row.values[0].random])
def test_threads_get_the_same_bits(sample: Sample, backend: str) -> None:
    def results() -> list[Tensor]:
        args, kwargs = arguments = sample.arguments()
        outputs = tensors(sample.function(*args, **kwargs))
        return [*outputs, *gradients(outputs, leaves(arguments))]

    count = 5 if backend == "cpu" else 1  # interpreted and emulated launches take turns, and their time
    with fastattn.use_backend(backend):
        expected = results()
        for rounds in in_threads(lambda: [results() for _ in range(count)], 4 if backend == "cpu" else 2):
            for found in rounds:
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_explain_in_one_thread_leaves_calls_in_others_alone() -> None:
    x = torch.ones(2, 3)

    def both() -> None:
        for _ in range(50):
            assert fastattn.explain("rms_norm", x).reasons["eager"] is None
            assert fastattn.rms_norm(x).shape == (2, 3)

    in_threads(both)


FORKED = """
import os, torch
import fastattn

def forward():
    with torch.no_grad():
        losses = [fastattn.linear_cross_entropy(x, w, target), fastattn.info_nce(x, x)]
        rows = [fastattn.layer_norm(x), fastattn.rms_norm(x), fastattn.feed_forward(x, w, None, w, None)]
        return [*losses, *rows, fastattn.attention(q, q, q), fastattn.linear(x, w, None, activation="gelu")]

def gradients():
    loss = fastattn.linear_cross_entropy(x, w, target) + fastattn.attention(q, q, q).sum()
    return torch.autograd.grad(loss, (x, w, q))

def same(results, expected):
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))

x, w, q = (torch.randn(*shape, requires_grad=True) for shape in ((4000, 300), (300, 300), (2, 4, 300, 64)))
target = torch.zeros(4000, dtype=torch.int64)
torch.set_num_threads(2)
outputs, grads = forward(), gradients()
child = os.fork()
grandchild = os.fork() if child == 0 else None
found = forward()
if child == 0:
    torch.set_num_threads(1)
good = same(found, outputs) and same(gradients(), grads)
if grandchild:
    good = good and os.waitpid(grandchild, 0)[1] == 0
if child == 0:
    os._exit(0 if good else 3)
assert good
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_ops_work_in_a_forked_process() -> None:
    """OpenMP's threads stay behind in a fork. torch's own ops wait for them, unless told to use one thread; kernels do not."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
