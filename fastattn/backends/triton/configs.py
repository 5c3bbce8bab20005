"""The table of configurations: which tiles, warps and stages a kernel takes, by chip, dtype and width.

Rows are read from the top and the first that fits is taken, so a kernel's special cases come before its general one. What
the compiler makes of each row is asserted for every chip (`budgets.py`, `python -m fastattn kernels`): matrix instructions,
shared memory, registers for the blocks a multiprocessor is to hold, spilled bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .chips import Chip


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled.

    Attributes:
        tiles: the kernel's `tl.constexpr` tile sizes by name.
        num_warps: warps a block.
        num_stages: how many tiles are on their way from memory in a pipelined loop.
        blocks: how many blocks a multiprocessor is to hold at once; the registers have to suffice for them.
        spills: the bytes a thread may spill to local memory.
        newest: whether products of 16-bit tensors must use the matrix instructions of the chip's own generation; without, those
            that sm_80 has will do (tiles of few rows: wgmma and tcgen05 take 64 and more).
    """

    tiles: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    blocks: int = 1
    spills: int = 0
    newest: bool = True


@dataclass(frozen=True)
class Row:
    """One row: the calls it fits, and their config.

    Attributes:
        kernel: the kernel's name.
        config: what it takes.
        chips: names of chips, or () for all.
        bits: the elements' width, or 0 for all.
        width: the largest width (head_dim, features of a row) that the row fits.
    """

    kernel: str
    config: Config
    chips: tuple[str, ...] = ()
    bits: int = 0
    width: int = 1 << 30

    def fits(self, kernel: str, chip: Chip, bits: int, width: int) -> bool:
        return (
            self.kernel == kernel
            and (not self.chips or chip.name in self.chips)
            and self.bits in (0, bits)
            and width <= self.width
        )


def _norm(kernel: str, spills: int) -> tuple[Row, ...]:
    """A norm's row lies in registers: as few warps as keep 16 elements a thread, and several short rows in a program."""
    shapes = (
        (64, 16, 4),
        (128, 16, 4),
        (256, 8, 4),
        (512, 4, 4),
        (1024, 2, 4),
        (2048, 1, 4),
        (4096, 1, 8),
        (8192, 1, 16),
    )
    return tuple(
        Row(kernel, Config({"ROWS": rows, "BLOCK": width}, num_warps=warps, spills=spills), width=width)
        for width, rows, warps in shapes
    )


_WIDEST = {"ROWS": 1, "BLOCK": 16384}

TABLE: tuple[Row, ...] = (
    *_norm("norm_forward", spills=0),
    Row("norm_forward", Config(_WIDEST, num_warps=16)),
    *_norm("norm_backward", spills=32),
    Row("norm_backward", Config(_WIDEST, num_warps=16, spills=32), ("gfx942",)),  # whose blocks have 1024 threads, too
    Row("norm_backward", Config(_WIDEST, num_warps=32, spills=320)),
    # A row of a vocabulary is read by as many lanes as keep enough loads on their way; short ones share a program.
    Row("row_statistics", Config({"ROWS": 4, "BLOCK": 256}, num_warps=4), width=1024),
    Row("row_statistics", Config({"ROWS": 1, "BLOCK": 4096}, num_warps=8, blocks=2)),
    Row("logit_gradients", Config({"TILES": 32, "ROWS": 4, "BLOCK": 512}, num_warps=4, blocks=3)),
    Row("query_terms", Config({"ROWS": 4, "BLOCK": 256}, num_warps=4), width=1024),
    Row("query_terms", Config({"ROWS": 1, "BLOCK": 4096}, num_warps=8, blocks=3)),
    # 128 bytes of a row, and programs enough for a GPU.
    Row("positive_terms", Config({"ROWS": 32, "BLOCK": 64}, num_warps=4, blocks=4)),
    Row("score_gradients", Config({"TILES": 32, "ROWS": 4, "BLOCK": 512}, num_warps=4, blocks=3)),
)


def choose(kernel: str, chip: Chip, dtype: torch.dtype, width: int) -> Config:
    """The config of a call: the first row of the table that fits."""
    for row in TABLE:
        if row.fits(kernel, chip, dtype.itemsize * 8, width):
            return row.config
    raise LookupError(f"no row of configs.TABLE fits {kernel} on {chip.name} for {dtype} and width {width}")
