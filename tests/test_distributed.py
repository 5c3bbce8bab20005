"""Training in two processes, by DDP, FSDP2 and tensor parallelism: the step that one process takes on the whole batch."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from nn_reference import randomise
from torch import Tensor, distributed, nn

import fastattn.nn as fnn
from fastattn.ops import linear_cross_entropy

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="torch was built without gloo"
)

PROCESSES = 2
TIMEOUT = timedelta(seconds=60)  # of every collective, so that a process that dies ends the other
STEP = 0.1


class LanguageModel(nn.Module):
    """Tokens to their loss, the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        layer = fnn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = fnn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = fnn.Linear(16, 20)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.encoder(self.embedding(tokens))
        return linear_cross_entropy(hidden, self.head.weight, targets, self.head.bias)


def model_and_batch() -> tuple[LanguageModel, Tensor, Tensor]:
    """The same in every process."""
    torch.manual_seed(0)
    model = LanguageModel()
    randomise(model)
    tokens, targets = torch.randint(20, (2, 2 * PROCESSES, 6))
    return model, tokens, targets


def step(model: nn.Module, tokens: Tensor, targets: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=STEP)
    model(tokens, targets).backward()
    optimizer.step()


def sharded(model: LanguageModel, **policy: torch.dtype) -> LanguageModel:
    """Each layer gathers its own parameters, and the model the rest."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = distributed.init_device_mesh("cpu", (PROCESSES,))
    for layer in [*model.encoder.layers, model]:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
    return model


def norms_and_linears_and_batch() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(fnn.LayerNorm(16), fnn.Linear(16, 20), fnn.Linear(20, 16), fnn.RMSNorm(16))
    randomise(model)
    return model, *torch.randn(2, 2, 3 * PROCESSES, 16)


def tensor_parallel(model: nn.Module) -> nn.Module:
    """Norms split along the sequence, linear layers along their features."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan = {
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "2": RowwiseParallel(output_layouts=Shard(1)),
        "3": SequenceParallel(),
    }
    return parallelize_module(model, distributed.init_device_mesh("cpu", (PROCESSES,)), plan)


def projected_step(model: nn.Module, x: Tensor, direction: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=STEP)
    (whole(model(x)) * direction).sum().backward()
    optimizer.step()


def whole(value: Tensor) -> Tensor:
    """Of a DTensor the tensor that the processes hold together."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def save(model: nn.Module, rank: int, path: str) -> None:
    state = {key: whole(value) for key, value in model.state_dict().items()}  # every process takes part
    if rank == 0:
        torch.save(state, path)


def train(rank: int, folder: str) -> None:
    """What each process runs: a step in every manner; the first saves the parameters."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES, timeout=TIMEOUT
    )
    manners = {
        "ddp": nn.parallel.DistributedDataParallel,
        "fsdp": sharded,
        "fsdp-bfloat16": lambda model: sharded(model, param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    }
    for name, wrap in manners.items():
        model, tokens, targets = model_and_batch()
        share = slice(2 * rank, 2 * rank + 2)
        wrapped = wrap(model)
        step(wrapped, tokens[share], targets[share])
        save(model, rank, f"{folder}/{name}")
    model, x, direction = norms_and_linears_and_batch()
    projected_step(tensor_parallel(model), x.chunk(PROCESSES, 1)[rank], direction)
    save(model, rank, f"{folder}/tensor-parallel")
    distributed.barrier()  # a process that leaves early closes what the other still reads from
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distributed")
    processes = torch.multiprocessing.spawn(train, (str(path),), nprocs=PROCESSES, join=False)
    deadline = time.monotonic() + 2 * TIMEOUT.total_seconds()
    while not processes.join(timeout=1.0):  # raises what a process raised
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail("the processes did not end")
    return path


FLOAT32, BFLOAT16 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16))


def assert_same_step(given: dict[str, Tensor], model: nn.Module, take: Callable[[], None], tolerance: float) -> None:
    """The parameters given are the model's after it took its step."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    take()
    assert list(given) == list(before)
    expected_step = torch.cat([(value - before[key]).flatten() for key, value in model.state_dict().items()])
    given_step = torch.cat([(given[key] - value).flatten() for key, value in before.items()])
    # The parameters are rounded too, hence their length beside the step's.
    length = torch.cat([value.flatten() for value in before.values()]).norm()
    assert (given_step - expected_step).norm() <= tolerance * expected_step.norm() + FLOAT32 * length


@pytest.mark.parametrize(
    ("manner", "tolerance"), [("ddp", 16 * FLOAT32), ("fsdp", 16 * FLOAT32), ("fsdp-bfloat16", 4 * BFLOAT16)]
)
def test_two_processes_take_the_step_of_one(manner: str, tolerance: float, folder: Path) -> None:
    model, tokens, targets = model_and_batch()
    given = torch.load(folder / manner, weights_only=True)
    assert_same_step(given, model, lambda: step(model, tokens, targets), tolerance)


def test_tensor_parallel_norms_and_linears_take_the_step_of_one(folder: Path) -> None:
    """Their tensors are DTensors, which run on eager."""
    model, x, direction = norms_and_linears_and_batch()
    given = torch.load(folder / "tensor-parallel", weights_only=True)
    assert_same_step(given, model, lambda: projected_step(model, x, direction), 16 * FLOAT32)
