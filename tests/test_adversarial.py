"""Adversarial training on embeddings, by the fast gradient method: a step along the gradient that raises the loss.

Source: Miyato, Dai and Goodfellow, "Adversarial Training Methods for Semi-Supervised Text Classification", 2017.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from nn_reference import left_aligned, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from transformers_cases import BERT

import fastattn
import fastattn.nn as fnn
from fastattn import verify

EPS = 0.02  # length of the step, as the paper's epsilon; small, so that the loss is close to its tangent
LENGTHS, LONGEST, WIDTH = [7, 4, 5], 7, BERT["hidden_size"]
LABELS = torch.tensor([0, 2, 1])
PADDING = left_aligned(LENGTHS, LONGEST)

Loss = Callable[[nn.Module, Tensor], Tensor]


def bert() -> tuple[nn.Module, nn.Module, Loss]:
    """(accelerated, as it was, loss of a model and its embeddings)."""
    torch.manual_seed(0)
    plain = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=3)).eval()
    plain.set_attn_implementation("eager")
    fast = copy.deepcopy(plain)
    fastattn.accelerate(fast)
    mask = (~PADDING).long()
    return fast, plain, lambda model, x: model(inputs_embeds=x, attention_mask=mask, labels=LABELS).loss


def encoder() -> tuple[nn.Module, nn.Module, Loss]:
    torch.manual_seed(0)
    arguments = {
        "d_model": WIDTH,
        "nhead": 4,
        "dim_feedforward": 80,
        "dropout": 0.0,
        "activation": "gelu",
        "batch_first": True,
    }
    plain, fast = (
        module.TransformerEncoder(module.TransformerEncoderLayer(**arguments), 2, enable_nested_tensor=False)
        for module in (nn, fnn)
    )
    randomise(plain)
    fast.load_state_dict(plain.state_dict())

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(model(x, src_key_padding_mask=PADDING)[:, 0, :3], LABELS)

    return fast, plain, loss


@pytest.fixture(params=[bert, encoder], ids=["bert", "encoder"])
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Loss]:
    return request.param()


@pytest.fixture
def embeddings() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(LENGTHS), LONGEST, WIDTH, generator=generator)


def gradient(model: nn.Module, loss: Loss, embeddings: Tensor) -> Tensor:
    x = embeddings.detach().requires_grad_()
    return torch.autograd.grad(loss(model, x), x)[0]


def test_the_gradient_of_the_embeddings_is_right(models, embeddings):
    fast, plain, loss = models
    wide = copy.deepcopy(plain).double()
    given, eager = (gradient(model, loss, embeddings) for model in (fast, plain))
    comparison = verify.compare(given, eager, gradient(wide, loss, embeddings.double()), "gradient of the embeddings")
    assert comparison.passed, str(comparison)
    assert not given[PADDING].any()


def test_the_fast_gradient_step_raises_the_loss(models, embeddings):
    """By what the gradient promises, eps · ‖g‖, up to the curvature that is the same both ways."""
    model, _, loss = models
    direction = gradient(model, loss, embeddings)
    step = EPS * direction / direction.norm()
    with torch.no_grad():
        before, after, back = (loss(model, embeddings + r) for r in (torch.zeros_like(step), step, -step))
    assert back < before < after
    torch.testing.assert_close((after - back) / 2, EPS * direction.norm(), rtol=0.01, atol=0)
