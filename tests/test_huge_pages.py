"""Large outputs of the CPU's kernels lie in huge pages: fresh memory would otherwise take longer than the kernel."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastattn import ops

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        not SETTING.exists() or "[never]" in SETTING.read_text(), reason="no transparent huge pages here"
    ),
]


def is_advised(tensor: Tensor) -> bool:
    """Whether the memory in the middle of the tensor has the flag of madvise(MADV_HUGEPAGE)."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the tensor's memory is in no mapping")


def call(op: str, rows: int) -> Tensor:
    x = torch.ones(rows, 64)
    match op:
        case "layer_norm":
            return ops.layer_norm(x)
        case "rms_norm":
            return ops.rms_norm(x)
        case "linear":
            return ops.linear(x, torch.ones(64, 64))
        case "feed_forward":
            return ops.feed_forward(x, torch.ones(8, 64), None, torch.ones(64, 8), None)
        case _:
            heads = x.view(1, rows // 64, 64, 64)
            return ops.attention(heads, heads, heads)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "linear", "feed_forward", "attention"])
def test_large_outputs_are_in_huge_pages(op: str) -> None:
    """33 MiB come fresh from the system; the flag is then the kernel's doing."""
    rows = 33 * 2**20 // (64 * 4)
    held = []  # free blocks of earlier tests, which may be advised, are not to be taken for fresh ones
    while is_advised(block := torch.empty(rows, 64)):
        held.append(block)
    del block
    assert is_advised(call(op, rows))
