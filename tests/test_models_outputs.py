"""What models give: the same by item and by attribute, and carried as it is by copies, compilers, exporters and wrappers."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from model_cases import decoder, headed, padded
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastattn.models import HeadOutput
from fastattn.models.outputs import ModelOutput

KINDS = pytest.mark.parametrize("kind", ["gpt", "tags", "spans"])
LABELLED = pytest.mark.parametrize("labelled", [True, False])
IDS = padded("right", (9, 9, 9, 9))[0]


class Call(nn.Module):
    """A model that is called with labels or without."""

    def __init__(self, kind: str, labelled: bool) -> None:
        super().__init__()
        self.model, labels = (decoder("gpt"), IDS) if kind == "gpt" else headed(kind)
        self.register_buffer("labels", labels if labelled else None)

    def forward(self, ids: Tensor) -> ModelOutput:
        return self.model(ids, labels=self.labels)


def assert_alike(given: ModelOutput, expected: ModelOutput) -> None:
    assert type(given) is type(expected)
    assert list(given) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(given[name], tensor)
    for field in fields(expected):
        assert getattr(given, field.name) is given.get(field.name)


@KINDS
@LABELLED
def test_items_are_the_attributes_that_are_there(kind: str, labelled: bool) -> None:
    output = Call(kind, labelled)(IDS)
    assert isinstance(output, dict)
    assert ("loss" in output) == labelled
    assert [name for name in (field.name for field in fields(output)) if getattr(output, name) is not None] == list(
        output
    )
    assert all(output[name] is getattr(output, name) for name in output)
    output.loss = torch.ones(())
    assert output["loss"] is output.loss
    output["loss"] = torch.zeros(())
    assert output["loss"] is output.loss
    output.loss = None
    assert "loss" not in output
    with pytest.raises(AttributeError, match=f"'{type(output).__name__}' object has no attribute 'losses'"):
        _ = output.losses
    with pytest.raises(AttributeError, match="'losses'"):
        output.losses = torch.ones(())


def saved_and_loaded(output: ModelOutput) -> ModelOutput:
    file = io.BytesIO()
    torch.save(output, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


REMADE = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda output: pickle.loads(pickle.dumps(output)),
    "torch.save": saved_and_loaded,
    "dataclasses.replace": replace,
    "values in order": lambda output: type(output)(*output.values()),
    "values by name": lambda output: type(output)(**output),
    "a tree's leaves": lambda output: pytree.tree_map(torch.clone, output),
    "DataParallel's pairs": lambda output: type(output)((name, x.clone()) for name, x in output.items()),
    "Accelerate's items": lambda output: type(output)({name: x.clone() for name, x in output.items()}),
}


@KINDS
@LABELLED
@pytest.mark.parametrize("remade", REMADE.values(), ids=REMADE)
def test_an_output_made_anew_is_what_it_was(
    kind: str, labelled: bool, remade: Callable[[ModelOutput], ModelOutput]
) -> None:
    with torch.no_grad():
        output = Call(kind, labelled)(IDS)
    assert_alike(remade(output), output)


@KINDS
def test_an_exported_model_gives_what_the_model_gives(kind: str) -> None:
    model = Call(kind, True)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (IDS,), strict=False), file)
    file.seek(0)
    assert_alike(torch.export.load(file).module()(IDS), model(IDS))


@KINDS
def test_a_compiled_function_can_give_an_output_and_read_it(kind: str) -> None:
    model = Call(kind, True)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(ids: Tensor) -> tuple[ModelOutput, Tensor]:
        output = model(ids)
        return output, output.loss + output["loss"]

    output, twice = compiled(IDS)
    assert_alike(output, model(IDS))
    torch.testing.assert_close(twice, 2 * output.loss)


def test_wrong_fields_are_named() -> None:
    x = torch.zeros(2)
    with pytest.raises(TypeError, match="HeadOutput gets losses; expected logits, loss"):
        HeadOutput(x, losses=x)
    with pytest.raises(TypeError, match="HeadOutput gets 3 values"):
        HeadOutput(x, x, x)
