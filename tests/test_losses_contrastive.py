"""The contrastive loss against its formula in plain torch, values and every gradient; and SimCSE's pairs."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import DEPTHS, SIZES, Values
from loss_cases import contrast, wide
from memory import most_memory_of, needs_linux
from norm_cases import DTYPES
from torch import Tensor, nn

import fastattn
from fastattn import losses, verify
from fastattn.models import Embedder, EncoderConfig, HeadConfig


def contrast_written_out(
    query, positive, negatives=None, temperature=0.07, symmetric=False, *, labels=None, normalise=False
) -> Tensor:
    """The matrix of all scores, and where in it the positives stand."""
    n = len(query)
    positive = positive.unsqueeze(1) if positive.ndim == 2 else positive
    several = positive.shape[1]
    candidates = positive.flatten(0, 1)
    if negatives is not None:
        candidates = torch.cat((candidates, negatives.flatten(0, -2)))
    if normalise:
        query, candidates = (x / x.norm(dim=-1, keepdim=True) for x in (query, candidates))
    if isinstance(temperature, Tensor):
        temperature = temperature.to(wide(query)).reshape(())
    scores = (query @ candidates.T).to(wide(query)) / temperature
    group = torch.arange(n) if labels is None else labels
    wanted = torch.zeros(scores.shape, dtype=torch.bool)
    wanted[:, : n * several] = group.unsqueeze(1) == group.repeat_interleave(several)

    def side(scores: Tensor, wanted: Tensor) -> Tensor:
        return -(torch.where(wanted, scores.log_softmax(1), 0.0).sum(1) / wanted.sum(1)).mean()

    loss = side(scores, wanted)
    if symmetric:
        loss = (loss + side(scores[:, : n * several].T, wanted[:, : n * several].T)) / 2
    return loss


@st.composite
def contrastive_cases(draw: st.DrawFn) -> tuple[tuple, dict[str, Any]]:
    values, normalise = Values(draw, dtypes=DTYPES), draw(st.booleans())
    n, dim = draw(SIZES), draw(DEPTHS) + 10 * normalise  # a norm of few elements leaves no gradient
    temperature = draw(st.sampled_from((0.07, 1.0)))
    scale = 1.0 if normalise else min(temperature, 1.0) ** 0.5 * dim**-0.25  # scores of size 1
    several = draw(st.sampled_from(((), (1,), (3,))))
    extra = draw(st.sampled_from((None, (5,), (300,), (n, 2))))
    tensors = (values(n, dim, scale=scale), values(n, *several, dim, scale=scale))
    negatives = None if extra is None else values(*extra, dim, scale=scale)
    if draw(st.booleans()):
        temperature = torch.tensor([temperature]).requires_grad_(draw(st.booleans()))
    labels = torch.randint(-3, 8, (n,), generator=values.generator) if draw(st.booleans()) else None
    return (*tensors, negatives, temperature, draw(st.booleans())), {"labels": labels, "normalise": normalise}


@settings(max_examples=60)
@given(case=contrastive_cases())
def test_the_contrastive_loss_is_its_formula(case: tuple) -> None:
    """The loss, and what the temperature gets, are differences of scores, which may leave next to nothing, in eager as well:
    they are judged with the size of a score, over the temperature, added to the loss.
    """
    arguments, options = case
    query, positive, *_ = (x.detach().double() for x in arguments[:2])
    size = 1.0 if options["normalise"] else (query.norm(dim=-1).mean() * positive.norm(dim=-1).mean()).item()

    def with_a_score(loss):
        return lambda *args, **kwargs: (loss(*args, **kwargs) + size / args[3]).sum()

    ours, formula = map(with_a_score, (losses.contrastive_loss, contrast_written_out))
    verify.check(ours, *arguments, **options, backend="cpu", eager=formula).raise_if_failed()


@given(data=st.data())
def test_the_contrastive_loss_is_its_formula_exactly(data: st.DataObject) -> None:
    """In float64, on sizes down to one, where the rule would ask for more luck than precision."""
    draw = data.draw
    n, dim, several, extra = (draw(st.integers(1, 6)) for _ in range(4))
    leaves = contrast((n, dim), (n, several, dim), (extra, dim), dtype=torch.float64, seed=draw(st.integers(0, 1000)))
    leaves.append(torch.tensor(0.5, dtype=torch.float64, requires_grad=True))
    labels = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))) if draw(st.booleans()) else None
    options = {"labels": labels, "normalise": draw(st.booleans())}
    symmetric = draw(st.booleans())
    ours, formula = (f(*leaves, symmetric, **options) for f in (losses.contrastive_loss, contrast_written_out))
    found, expected = (torch.autograd.grad(loss, leaves) for loss in (ours, formula))
    for got, want in zip((ours, *found), (formula, *expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_learnt_temperature_has_its_gradient(normalise: bool, symmetric: bool) -> None:
    query, positive = contrast((40, 12), (40, 12))
    module = losses.ContrastiveLoss(0.2, learned=True, symmetric=symmetric, normalise=normalise)
    module(query, positive).backward()
    log_scale = torch.tensor(math.log(5.0), dtype=torch.float64, requires_grad=True)
    wide_leaves = [x.detach().double() for x in (query, positive)]
    contrast_written_out(
        *wide_leaves, temperature=1 / log_scale.exp(), symmetric=symmetric, normalise=normalise
    ).backward()
    torch.testing.assert_close(module.logit_scale.grad.double(), log_scale.grad, rtol=1e-5, atol=1e-6)


def test_a_learnt_temperature_has_a_bound_and_leaves_it_again() -> None:
    module = losses.ContrastiveLoss(0.2, learned=True, max_scale=20.0, normalise=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=20.0)
    rows = torch.eye(8)
    for _ in range(6):  # every query is its positive: the more scale, the better
        loss = module(rows, rows) + module(rows, rows.flip(1).flip(1))  # two calls in one graph
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert module.temperature.item() >= 1 / 20.0001
    assert module.temperature.item() == pytest.approx(1 / 20, rel=1e-3)
    optimizer.param_groups[0]["lr"] = 0.02
    for _ in range(3):  # and now all are wrong
        optimizer.zero_grad()
        module(rows, rows.roll(1, 0)).backward()
        optimizer.step()
    assert 1 / 19 < module.temperature.item() < 1.0
    with torch.no_grad():
        module.logit_scale.fill_(9.0)
    assert module.eval().temperature.item() == pytest.approx(1 / 20)
    assert module.logit_scale.item() == 9.0


@needs_linux
@pytest.mark.parametrize("symmetric", [False, True])
def test_several_positives_form_no_matrix_of_scores(symmetric: bool) -> None:
    """Of 3000 queries and 6000 positives, 72 MB in float32, and half as much for which of them are whose."""
    query, positive = contrast((3000, 16), (3000, 2, 16))
    labels = torch.randint(0, 100, (3000,))
    call = lambda: losses.contrastive_loss(query, positive, symmetric=symmetric, labels=labels).backward()  # noqa: E731
    with fastattn.use_backend("cpu"):
        assert most_memory_of(call) < 36 << 20


def test_contrastive_loss_under_autocast_is_that_of_rounded_rows() -> None:
    leaves = contrast((30, 12), (30, 2, 12))
    labels = torch.randint(0, 9, (30,))
    rounded = [x.detach().bfloat16() for x in leaves]
    expected = losses.contrastive_loss(*rounded, temperature=0.3, labels=labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.contrastive_loss(*leaves, temperature=0.3, labels=labels)
    assert torch.equal(loss, expected)
    loss.backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.any() for x in leaves)


def test_a_row_of_zeros_has_no_direction() -> None:
    """Nor a gradient that is NaN."""
    for dtype in (torch.float32, torch.float16):
        query, positive = (torch.zeros(3, 4, dtype=dtype).requires_grad_() for _ in range(2))
        loss = losses.contrastive_loss(query, positive, normalise=True)
        assert loss.item() == pytest.approx(math.log(3), rel=1e-3)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (query, positive)))


def test_the_contrastive_loss_of_no_row() -> None:
    leaves = [torch.zeros(*s, requires_grad=True) for s in ((0, 4), (0, 2, 4), (3, 4))]
    loss = losses.contrastive_loss(*leaves, labels=torch.zeros(0, dtype=torch.int64), symmetric=True)
    assert loss.isnan()
    assert [g.shape for g in torch.autograd.grad(loss, leaves)] == [x.shape for x in leaves]


# --- SimCSE


def test_two_passes_drop_different_elements_and_are_one_call() -> None:
    torch.manual_seed(0)
    config = HeadConfig(EncoderConfig(vocab_size=40, d_model=16, layers=1, heads=2, dropout=0.2), pooling="mean")
    model = Embedder(config).train()
    batch = {"input_ids": torch.randint(1, 40, (5, 7)), "attention_mask": torch.ones(5, 7, dtype=torch.int64)}
    batch["attention_mask"][1, 4:] = 0
    calls = []
    model.register_forward_hook(lambda module, args, out: calls.append(out))
    query, positive = losses.encode_twice(model, **batch)
    assert len(calls) == 1
    assert torch.equal(calls[0], torch.cat((query, positive)))
    assert query.shape == (5, 16)
    assert ((query - positive).norm(dim=-1) > 1e-3).all()
    assert (F.cosine_similarity(query, positive) > 0.5).all()  # row by row the same sentence
    losses.contrastive_loss(query, positive, temperature=0.05).backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if name.endswith("weight"))


def test_without_dropout_both_passes_are_the_encoder() -> None:
    encoder = nn.Linear(6, 4)
    x = torch.randn(3, 6)
    for half in losses.encode_twice(encoder, x):
        torch.testing.assert_close(half, encoder(x))
