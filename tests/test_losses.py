"""All of fastattn.losses: modules are copied as they are, the functions compile, and wrong input is named."""

import copy
import pickle
from typing import Any

import pytest
import torch
from loss_cases import contrast
from torch import Tensor, nn

from fastattn import losses

MODULES = {
    "language modelling": lambda: losses.LanguageModellingLoss(class_weight=torch.rand(11), z_loss=0.1),
    "masked": lambda: losses.MaskedLanguageModellingLoss(nn.Linear(6, 6), label_smoothing=0.1),
    "contrastive": lambda: losses.ContrastiveLoss(0.1, learned=True, symmetric=True),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_of_a_module_is_the_module(name: str, copied) -> None:
    module = MODULES[name]()
    call = contrast((5, 6), (5, 6))
    if name != "contrastive":
        call = [call[0], torch.randn(11, 6), torch.randint(0, 11, (5,))]
    expected = module(*call)
    twin = copied(module)
    assert torch.equal(twin(*call), expected)
    fresh = MODULES[name]()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(*call), expected)
    assert str(twin) == str(module)


def test_losses_compile_without_a_break_and_give_the_same() -> None:
    hidden, weight = contrast((3, 6, 8), (11, 8))
    labels = torch.randint(0, 11, (3, 6))
    query, positive = contrast((9, 8), (9, 2, 8), seed=1)

    def both() -> tuple[Tensor, Tensor]:
        language = losses.language_modelling_loss(hidden, weight, labels, num_items_in_batch=7)
        return language, losses.contrastive_loss(query, positive, labels=labels.flatten()[:9], symmetric=True)

    torch.testing.assert_close(torch.compile(both, backend="aot_eager", fullgraph=True)(), both())


def test_wrong_input_is_named() -> None:
    hidden, weight, labels = torch.randn(2, 5, 4), torch.randn(9, 4), torch.randint(0, 9, (2, 5))
    good = {"hidden": hidden, "weight": weight, "labels": labels}

    def lm(items: Any = None, **changes: Any) -> Tensor:
        return losses.language_modelling_loss(**{**good, "num_items_in_batch": items, **changes})

    def mlm(transform: Any) -> Tensor:
        return losses.masked_language_modelling_loss(**good, transform=transform)

    contrastive = losses.contrastive_loss
    starts = torch.tensor([0, 3, 5], dtype=torch.int32)
    query, negatives = torch.randn(6, 4), torch.randn(3, 4)
    module = nn.Dropout()
    for expected, message, call in (
        (TypeError, "hidden is a list", lambda: lm(hidden=[1])),
        (TypeError, "labels has dtype torch.int32; expected int64", lambda: lm(labels=labels.int())),
        (ValueError, r"labels has shape \(2, 4\) and hidden \(2, 5, 4\)", lambda: lm(labels=labels[:, 1:])),
        (ValueError, r"weight has shape \(4, 9\).*dim 4", lambda: lm(weight=weight.T)),
        (TypeError, "weight has dtype torch.float64", lambda: lm(weight=weight.double())),
        (ValueError, "holds 99; expected classes 0 to 8", lambda: lm(labels=labels.clone().fill_(99))),
        (ValueError, "reduction is 'all'", lambda: lm(reduction="all")),
        (ValueError, "reduction is 'sum'; expected 'mean'", lambda: lm(reduction="sum", items=3)),
        (ValueError, "num_items_in_batch is 0", lambda: lm(items=0)),
        (ValueError, "num_items_in_batch is -2", lambda: lm(items=torch.tensor(-2))),
        (ValueError, r"num_items_in_batch has shape \(2,\)", lambda: lm(items=torch.ones(2))),
        (TypeError, "num_items_in_batch is a str", lambda: lm(items="3")),
        (TypeError, "ignore_index is a float", lambda: losses.count_targets(labels, ignore_index=1.5)),
        (TypeError, "shift is a Tensor", lambda: lm(shift=torch.ones(2))),
        (ValueError, "cu_seqlens is given and shift is False", lambda: lm(shift=False, cu_seqlens=starts)),
        (ValueError, "cu_seqlens runs from 0 to 4; expected 0 to 5", lambda: lm(cu_seqlens=starts.clamp(max=4))),
        (TypeError, "cu_seqlens has dtype torch.int64", lambda: losses.next_token_targets(labels, starts.long())),
        (ValueError, "labels has no dimension", lambda: losses.next_token_targets(labels[0, 0])),
        (ValueError, r"transform gives \(10,\)", lambda: mlm(lambda rows: rows[:, 0])),
        (TypeError, "what transform gives is a NoneType", lambda: mlm(lambda rows: None)),
        (ValueError, r"positive has shape \(5, 4\)", lambda: contrastive(query, query[1:])),
        (ValueError, r"positive has shape \(6, 0, 4\)", lambda: contrastive(query, query[:, None][:, :0])),
        (TypeError, "positive has dtype torch.float16 but query", lambda: contrastive(query, query.half())),
        (ValueError, r"negatives has shape \(3, 3\)", lambda: contrastive(query, query, negatives[:, :3])),
        (ValueError, r"negatives has shape \(3, 2, 4\)", lambda: contrastive(query, query, torch.randn(3, 2, 4))),
        (ValueError, r"labels has shape \(5,\); expected \(n,\) = \(6,\)", lambda: contrastive(query, query, labels=labels[0])),
        (TypeError, "labels has dtype torch.float32", lambda: contrastive(query, query, labels=query[:, 0])),
        (ValueError, "temperature is 0", lambda: contrastive(query, query, temperature=0.0)),
        (ValueError, "group is given and gather is False", lambda: contrastive(query, query, group=object())),
        (RuntimeError, "torch.distributed is not initialised", lambda: contrastive(query, query, gather=True)),
        (ValueError, "temperature is -1", lambda: losses.ContrastiveLoss(-1)),
        (ValueError, "expected at least 1 / max_scale = 0.1", lambda: losses.ContrastiveLoss(learned=True, max_scale=10)),
        (ValueError, "eval mode", lambda: losses.encode_twice(module.eval(), query)),
        (ValueError, "encoder gets no tensor", lambda: losses.encode_twice(module.train())),
        (ValueError, r"argument 0 \(6, 4\), mask \(3, 4\)", lambda: losses.encode_twice(module.train(), query, mask=negatives)),
        (TypeError, "mask is a int", lambda: losses.encode_twice(module.train(), query, mask=3)),
        (ValueError, r"encoder gives \(4, 12\) for 12 rows", lambda: losses.encode_twice(torch.t, query)),
    ):  # fmt: skip
        with pytest.raises(expected, match=message):
            call()
