"""Interleaved timing, on the wall clock or on a GPU's."""

import math
import time
from collections.abc import Callable, Sequence

import torch

MAX_ROUNDS = 200


def interleave(
    calls: Sequence[Callable], *, seconds: float, min_rounds: int, sample: float = 2e-3, device: str = "cpu"
) -> list[list[float]]:
    """Seconds a call of each of `calls`, one sample a round.

    Every call is warmed up first. A round takes one sample of each call, beginning with another one each time; a sample
    repeats a short call until it lasts `sample` seconds. Rounds go on for about `seconds`, and at least `min_rounds`.
    On a GPU it is the GPU's own clock that is read, before a sample's first call and after its last one: where a call's
    kernels take less time than it takes to start them, that is what the figure shows.
    """
    time_calls = _time_on_gpu if device == "cuda" else _time
    repeats = []
    for call in calls:
        call()
        once = time_calls(call, 1)
        repeats.append(max(1, math.ceil(sample / max(once, 1e-9))))
    samples: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (time.perf_counter() < end and rounds < MAX_ROUNDS):
        for offset in range(len(calls)):
            index = (rounds + offset) % len(calls)
            samples[index].append(time_calls(calls[index], repeats[index]))
        rounds += 1
    return samples


def _time(call: Callable, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _time_on_gpu(call: Callable, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats
