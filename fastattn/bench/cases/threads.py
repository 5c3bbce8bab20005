"""What a second thread brings: each op's largest case in float32, with all of torch's threads against one.

"over one thread" is how many times as fast all threads are. The ops bound by memory can gain what a copy gains, which is less
than the number of threads where one of them already takes much of the bandwidth.
"""

from dataclasses import replace

import torch

from ...backends import OPS
from ..harness import FORWARD, OURS, TRAINING, Case, Problem

ONE = "one thread"


def cases(quick: bool = False) -> list[Case]:
    """For each op the case with the most to do, forward and training."""
    from . import CASES  # which has this module's cases, too

    sources = [of_op for op, of_op in CASES.items() if op in OPS]
    found = []
    for of_op in sources[:1] if quick else sources:
        for direction in (FORWARD, TRAINING):
            of_direction = [case for case in of_op(quick) if (case.direction, case.dtype) == (direction, torch.float32)]
            if of_direction:
                found.append(_with_one_thread(max(of_direction, key=lambda case: case.flops + case.moved)))
    return found


def _with_one_thread(case: Case) -> Case:
    def build(_: Case) -> Problem:
        problem = case.build(case)
        ours = problem.peers[OURS]
        return replace(problem, peers={OURS: ours, ONE: replace(ours, threads=1)}, baseline=ONE)

    return replace(case, op="threads", options=f"{case.op} {case.options}".strip(), build=build)
