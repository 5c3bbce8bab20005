"""Interleaved timing."""

import math
import time
from collections.abc import Callable, Sequence

MAX_ROUNDS = 200


def interleave(
    calls: Sequence[Callable], *, seconds: float, min_rounds: int, sample: float = 2e-3
) -> list[list[float]]:
    """Seconds a call of each of `calls`, one sample a round.

    Every call is warmed up first. A round takes one sample of each call, beginning with another one each time; a sample
    repeats a short call until it lasts `sample` seconds. Rounds go on for about `seconds`, and at least `min_rounds`.
    """
    repeats = []
    for call in calls:
        call()
        once = _time(call, 1)
        repeats.append(max(1, math.ceil(sample / max(once, 1e-9))))
    samples: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (time.perf_counter() < end and rounds < MAX_ROUNDS):
        for offset in range(len(calls)):
            index = (rounds + offset) % len(calls)
            samples[index].append(_time(calls[index], repeats[index]))
        rounds += 1
    return samples


def _time(call: Callable, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
