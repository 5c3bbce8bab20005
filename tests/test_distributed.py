"""Training in two processes, by DDP, FSDP2 and tensor parallelism: losses, gradients and steps are those of one process.

Starting a process costs seconds, so one pair of them runs every case, each writes down what the first process holds at its end,
and the tests compare it with what this process computes on the whole batch.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from model_cases import assert_same, decoder
from nn_reference import randomise
from processes import PROCESSES, needs_gloo, run_in_processes
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fastattn.nn as fnn
from fastattn.ops import linear_cross_entropy

pytestmark = needs_gloo

STEPS, STEP = 2, 0.3


class Encoder(nn.Module):
    """Tokens and targets to their loss, the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        layer = fnn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, activation="gelu", batch_first=True)
        self.stack = fnn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = fnn.Linear(16, 20)

    @property
    def layers(self) -> nn.ModuleList:
        return self.stack.layers

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.stack(self.embedding(tokens))
        return linear_cross_entropy(hidden, self.head.weight, targets, self.head.bias)


class Blocks(nn.Sequential):
    """What tensor parallelism splits: norms along the sequence, linear layers along their features."""

    def __init__(self) -> None:
        super().__init__(
            fnn.LayerNorm(16),
            fnn.Linear(16, 20, activation="gelu"),
            fnn.Linear(20, 16),
            fnn.RMSNorm(16),
            fnn.FeedForward(16, 24, "silu", gated=True),
        )

    def forward(self, x: Tensor, direction: Tensor) -> Tensor:
        out = super().forward(x)
        out = out.full_tensor() if hasattr(out, "full_tensor") else out
        return (out * direction).sum()


def language_model_batch() -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(20, (2, 2 * PROCESSES, 6), generator=torch.Generator().manual_seed(1))
    return tokens, targets


def encoder_case() -> tuple[nn.Module, tuple[Tensor, ...], Callable[..., Tensor]]:
    torch.manual_seed(0)
    model = Encoder()
    randomise(model)
    return model, language_model_batch(), lambda model, tokens, targets: model(tokens, targets)


def decoder_case(kind: str) -> tuple[nn.Module, tuple[Tensor, ...], Callable[..., Tensor]]:
    return decoder(kind).train(), language_model_batch()[:1], lambda model, ids: model(ids, labels=ids).loss


def blocks_case() -> tuple[nn.Module, tuple[Tensor, ...], Callable[..., Tensor]]:
    torch.manual_seed(0)
    model = Blocks()
    randomise(model)
    return model, tuple(torch.randn(2, 2, 3 * PROCESSES, 16)), lambda model, x, direction: model(x, direction)


def sharded(model: nn.Module, **policy: torch.dtype) -> nn.Module:
    """Each layer gathers its own parameters, and the model the rest."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = distributed.init_device_mesh("cpu", (PROCESSES,))
    for module in [*model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
    return model


def sharded_bfloat16(model: nn.Module) -> nn.Module:
    return sharded(model, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def tensor_parallel(model: nn.Module) -> nn.Module:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    plan = {
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "2": RowwiseParallel(output_layouts=Shard(1)),
        "3": SequenceParallel(),
        "4.linear1": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "4.linear_gate": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "4.linear2": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    return parallelize_module(model, distributed.init_device_mesh("cpu", (PROCESSES,)), plan)


def part_of_the_batch(batch: tuple[Tensor, ...], rank: int) -> tuple[Tensor, ...]:
    return tuple(x.chunk(PROCESSES)[rank] for x in batch)


def part_of_the_sequence(batch: tuple[Tensor, ...], rank: int) -> tuple[Tensor, ...]:
    """Of the input; the direction multiplies an output that is whole again."""
    x, direction = batch
    return x.chunk(PROCESSES, 1)[rank], direction


class Case(NamedTuple):
    """A model with its batch and its loss, how a process wraps the model, how far a dtype may lead off, and a process's share."""

    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...], Callable[..., Tensor]]]
    wrap: Callable[[nn.Module], nn.Module]
    tolerance: float = 2e-5
    share: Callable[[tuple[Tensor, ...], int], tuple[Tensor, ...]] = part_of_the_batch


BFLOAT16 = 8 * torch.finfo(torch.bfloat16).eps
MODELS = {"encoder": encoder_case, "gpt": lambda: decoder_case("gpt"), "llama": lambda: decoder_case("llama")}
CASES = {
    **{f"ddp {name}": Case(make, DistributedDataParallel) for name, make in MODELS.items()},
    # Parameters that lead to no tensor found in the output are given up.
    "ddp-unused gpt": Case(MODELS["gpt"], partial(DistributedDataParallel, find_unused_parameters=True)),
    **{f"fsdp {name}": Case(make, sharded) for name, make in MODELS.items()},
    **{f"fsdp-bfloat16 {name}": Case(make, sharded_bfloat16, BFLOAT16) for name, make in MODELS.items()},
    "tensor-parallel blocks": Case(blocks_case, tensor_parallel, share=part_of_the_sequence),
}


def whole(value: Tensor) -> Tensor:
    """A copy; of a DTensor one of the tensor that the processes hold together, in which all of them take part."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def train(model: nn.Module, batch: tuple[Tensor, ...], loss_of: Callable[..., Tensor]) -> dict[str, Any]:
    """Each step's loss, the first one's gradients, and by how much all of them moved the parameters."""

    def parameters() -> dict[str, Tensor]:
        return {name.removeprefix("module."): whole(value.detach()) for name, value in model.named_parameters()}

    before = parameters()
    optimizer = torch.optim.SGD(model.parameters(), STEP, momentum=0.9)
    losses, gradients = [], {}
    for _ in range(STEPS):
        loss = loss_of(model, *batch)
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {n.removeprefix("module."): whole(p.grad) for n, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.detach().float())
    moved = {name: value - before[name] for name, value in parameters().items()}
    return {"losses": torch.stack(losses), "gradients": gradients, "moved": moved}


def train_all(rank: int, folder: Path) -> None:
    """What each process does."""
    for name, case in CASES.items():
        model, batch, loss_of = case.make()
        found = train(case.wrap(model), case.share(batch, rank), loss_of)
        if case.share is part_of_the_batch:  # else each process has the loss of all
            distributed.all_reduce(found["losses"])
            found["losses"] /= PROCESSES
        if rank == 0:
            torch.save(found, folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distributed")
    run_in_processes(train_all, path)
    return path


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name: str, folder: Path) -> None:
    case = CASES[name]
    expected = train(*case.make())
    given = torch.load(folder / name, weights_only=True)
    torch.testing.assert_close(given["losses"], expected["losses"], rtol=case.tolerance, atol=0)
    assert_same(given["gradients"], expected["gradients"], case.tolerance)
    # A step is the difference of two parameters, and these are rounded.
    assert_same(given["moved"], expected["moved"], 10 * case.tolerance)
