"""Training in two processes: DistributedDataParallel and FSDP2 take the step that one process takes on the whole batch."""

import time
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
        state = {
            key: value.full_tensor() if hasattr(value, "full_tensor") else value
            for key, value in model.state_dict().items()
        }
        if rank == 0:
            torch.save(state, f"{folder}/{name}")
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


@pytest.mark.parametrize(
    ("manner", "tolerance"),
    [
        ("ddp", 16 * torch.finfo(torch.float32).eps),
        ("fsdp", 16 * torch.finfo(torch.float32).eps),
        ("fsdp-bfloat16", 4 * torch.finfo(torch.bfloat16).eps),
    ],
)
def test_two_processes_take_the_step_of_one(manner: str, tolerance: float, folder: Path) -> None:
    model, tokens, targets = model_and_batch()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step(model, tokens, targets)
    given = torch.load(folder / manner, weights_only=True)
    assert list(given) == list(before)
    expected_step = torch.cat([(value - before[key]).flatten() for key, value in model.state_dict().items()])
    given_step = torch.cat([(given[key] - value).flatten() for key, value in before.items()])
    # The parameters are rounded too, hence their length beside the step's.
    length = torch.cat([value.flatten() for value in before.values()]).norm()
    rounding = torch.finfo(torch.float32).eps * length
    assert (given_step - expected_step).norm() <= tolerance * expected_step.norm() + rounding
