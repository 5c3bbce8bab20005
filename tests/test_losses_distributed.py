"""The contrastive loss across processes: two of them, each with its rows, find the gradients of one with all rows."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from processes import PROCESSES, needs_gloo, run_in_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastattn.losses import ContrastiveLoss

ROWS, WIDTH = 5, 12


class Case(NamedTuple):
    """What the loss is given beside its settings: k positives a row, shared or each row's own negatives, labels."""

    settings: dict
    several: int = 0
    negatives: tuple[int, ...] = ()
    labels: bool = False
    dtype: torch.dtype = torch.float64


CASES = {
    "one-sided": Case({}),
    "two-sided": Case({"symmetric": True}),
    "hard negatives": Case({"symmetric": True, "normalise": True}, negatives=(2,)),
    "several positives": Case({"symmetric": True}, several=3, negatives=(2,)),
    "labels": Case({"symmetric": True}, labels=True),
    "labels and several positives": Case({"symmetric": True}, several=2, negatives=(), labels=True),
    "one-sided, labels": Case({"normalise": True}, several=2, negatives=(1,), labels=True),
    "bfloat16": Case({"symmetric": True}, several=2, dtype=torch.bfloat16),
}


class Trained(nn.Module):
    """An encoder and a loss with a learnt temperature, as DistributedDataParallel wraps them."""

    def __init__(self, case: Case, gather: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(WIDTH, 8, dtype=case.dtype)
        self.loss = ContrastiveLoss(0.3, learned=True, gather=gather, **case.settings)

    def forward(self, query: Tensor, positive: Tensor, negatives: Tensor | None, labels: Tensor | None) -> Tensor:
        encoded = (None if x is None else self.encoder(x) for x in (query, positive, negatives))
        return self.loss(*encoded, labels=labels)


def batch(case: Case) -> list[Tensor | None]:
    """The rows of all processes."""
    generator = torch.Generator().manual_seed(1)
    rows = PROCESSES * ROWS
    shapes = [(rows, WIDTH), (rows, *((case.several,) if case.several else ()), WIDTH)]
    shapes += [(rows, *case.negatives, WIDTH)] if case.negatives else []
    tensors = [torch.randn(s, generator=generator).to(case.dtype) for s in shapes]
    tensors += [] if case.negatives else [None]
    return [*tensors, torch.randint(0, 3, (rows,), generator=generator) if case.labels else None]


def own(tensors: list[Tensor | None], rank: int) -> list[Tensor | None]:
    return [None if x is None else x[rank * ROWS : (rank + 1) * ROWS] for x in tensors]


def check_gradients(rank: int, case: Case) -> None:
    alone = Trained(case, gather=False)
    expected = alone(*batch(case))
    expected.backward()
    shared = Trained(case, gather=True)
    wrapped = DistributedDataParallel(shared)  # which has to live until the backward
    loss = wrapped(*own(batch(case), rank))
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    tolerance = 3e-2 if case.dtype == torch.bfloat16 else 1e-6  # the temperature is in float32
    torch.testing.assert_close(mean / PROCESSES, expected.detach(), rtol=tolerance, atol=tolerance)
    for (name, p), q in zip(shared.named_parameters(), alone.parameters(), strict=True):
        limit = tolerance * q.grad.abs().max().item()
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}")


def check_refusals(rank: int) -> None:
    """Every process hears of it, whichever is the odd one, and the next call works."""
    x = torch.randn(4, 6)
    loss = ContrastiveLoss(gather=True)
    odd = rank == 1
    for message, arguments in (
        (
            r"query differs between processes: \(4, 6\) torch.float32 in process 0, \(3, 6\)",
            (x[: 3 if odd else 4],) * 2,
        ),
        ("positive differs", (x, x if odd else x.unsqueeze(1))),
        (r"negatives differs between processes: None in process 0, \(4, 6\)", (x, x, x if odd else None)),
        ("query differs .* torch.float16 in process 1", (x.half() if odd else x, x)),
    ):
        with pytest.raises(ValueError, match=message):
            loss(*arguments)
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="labels differs"):
        loss(x, x, labels=labels if odd else None)
    assert loss(x, x).isfinite()
    pair = ContrastiveLoss(gather=True, group=dist.new_group([rank], use_local_synchronization=True))
    assert torch.equal(pair(x, x), ContrastiveLoss()(x, x))  # in a group of one there are no others


def check_all(rank: int, folder: Path) -> None:
    for name, case in CASES.items():
        _named(name, check_gradients, rank, case)
    check_refusals(rank)


def _named(name: str, check: Callable, *args: object) -> None:
    try:
        check(*args)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error


@needs_gloo
def test_two_processes_find_the_gradients_of_one(tmp_path: Path) -> None:
    run_in_processes(check_all, tmp_path)
