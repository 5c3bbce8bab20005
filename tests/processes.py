"""A pair of processes in one gloo group, for tests of training in several."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import distributed

PROCESSES = 2
TIMEOUT = timedelta(seconds=60)  # of every collective, so that a process that dies ends the other

needs_gloo = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="torch was built without gloo"
)


def run_in_processes(work: Callable[[int, Path], None], folder: Path) -> None:
    """`work(rank, folder)`, a module's function, in every process of the group; raises what one of them raised."""
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        processes = torch.multiprocessing.spawn(_process, (work, folder), nprocs=PROCESSES, join=False)
    deadline = time.monotonic() + 3 * TIMEOUT.total_seconds()
    try:
        while not processes.join(timeout=1.0):
            if time.monotonic() > deadline:
                pytest.fail("the processes did not end")
    finally:
        for process in processes.processes:
            process.kill()


def _process(rank: int, work: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES, timeout=TIMEOUT
    )
    work(rank, folder)
    distributed.barrier()  # a process that leaves early closes what the other still reads from
    distributed.destroy_process_group()
    # Not through the interpreter's own end: a thread of gloo's that lets go of its last tensor meanwhile aborts the process
    # (pytorch/pytorch issue 190489).
    os._exit(0)
