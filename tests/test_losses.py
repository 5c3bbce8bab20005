"""fastattn.losses against the formulas written out in plain torch, under the numerics rule: values and every gradient."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import DEPTHS, SIZES, Values
from loss_cases import IGNORED, contrast, cross_entropy_cases, judged_in_the_inputs_dtype, targets
from memory import most_memory_of, needs_linux
from norm_cases import DTYPES
from torch import Tensor, nn

import fastattn
from fastattn import losses, verify
from fastattn.losses import language_modelling
from fastattn.models import Embedder, EncoderConfig, HeadConfig


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Linear + cross entropy, written out."""
    logits = F.linear(hidden, weight, bias).to(wide(hidden))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counted = target != IGNORED
    place = target.masked_fill(~counted, 0)
    of_class = torch.ones(len(weight)).to(logits) if class_weight is None else class_weight.to(logits)
    lse = logits.logsumexp(-1)
    surprise = (lse.unsqueeze(-1) - logits) * of_class
    asked = surprise.gather(-1, place.unsqueeze(-1)).squeeze(-1)
    loss = (1 - label_smoothing) * asked + label_smoothing * surprise.mean(-1)
    loss, penalty = (torch.where(counted, x, 0.0) for x in (loss, z_loss * lse.square()))
    if reduction == "mean":
        return loss.sum() / torch.where(counted, of_class[place], 0.0).sum() + penalty.sum() / counted.sum()
    return (loss + penalty).sum() if reduction == "sum" else loss + penalty


def next_token_loss(hidden, weight, labels, bias, *, reduction="mean", **options) -> Tensor:
    """Places that have a next token, and that token."""
    loss = cross_entropy(hidden[..., :-1, :], weight, labels[..., 1:], bias, reduction=reduction, **options)
    return torch.cat((loss, loss.new_zeros(*labels.shape[:-1], 1)), -1) if reduction == "none" else loss


@given(case=cross_entropy_cases())
def test_the_next_token_loss_is_its_formula(case: tuple) -> None:
    arguments, options = case
    verify.check(
        losses.language_modelling_loss, *arguments, **options, backend="cpu", eager=next_token_loss
    ).raise_if_failed()


@given(case=cross_entropy_cases(), shift=st.booleans())
def test_the_module_is_the_function(case: tuple, shift: bool) -> None:
    (hidden, weight, labels, bias), options = case
    module = losses.LanguageModellingLoss(shift=shift, **options)
    expected = losses.language_modelling_loss(hidden, weight, labels, bias, shift=shift, **options)
    assert torch.equal(module(hidden, weight, labels, bias), expected)
    if not shift:
        with fastattn.use_backend("cpu"):
            assert torch.equal(fastattn.linear_cross_entropy(hidden, weight, labels, bias, **options), expected)


@given(data=st.data())
def test_sequences_laid_end_to_end_are_their_own(data: st.DataObject) -> None:
    """Empty ones, too, wherever they stand."""
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    hidden, weight = (torch.randn(rows, 6, generator=generator).double() for rows in (sum(lengths), 11))
    labels = targets((sum(lengths),), 11, generator)
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    parts = zip(hidden.split(lengths), labels.split(lengths), strict=True)
    alone = [losses.language_modelling_loss(h, weight, some, reduction="none") for h, some in parts]
    together = losses.language_modelling_loss(
        hidden.unsqueeze(0), weight, labels.unsqueeze(0), cu_seqlens=starts, reduction="none"
    )
    torch.testing.assert_close(together, torch.cat(alone).unsqueeze(0), rtol=1e-12, atol=1e-12)
    count = losses.count_targets(labels, cu_seqlens=starts)
    assert count == (together != 0).sum()
    moved = losses.next_token_targets(labels, starts)
    assert torch.equal(moved, torch.cat([losses.next_token_targets(some) for some in labels.split(lengths)]))


@given(data=st.data())
def test_accumulated_parts_are_the_batch(data: st.DataObject) -> None:
    """Parts of any sizes, some without a label that counts; their number is an int or a tensor."""
    draw = data.draw
    sizes, masked = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    hidden, weight, bias = (torch.randn(s, generator=generator) for s in ((sum(sizes), 5, 7), (13, 7), (13,)))
    labels = targets((sum(sizes), 5), 13, generator, ignored=0.6)
    labels[-1, -1] = 3  # one, at least
    dtype = draw(st.sampled_from((torch.float64, torch.float32)))
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    options = {"label_smoothing": draw(st.sampled_from((0.0, 0.1))), "z_loss": draw(st.sampled_from((0.0, 0.1)))}
    loss = losses.masked_language_modelling_loss if masked else losses.language_modelling_loss
    count = sum(losses.count_targets(some, shift=not masked) for some in labels.split(sizes))
    whole = loss(leaves[0], leaves[1], labels, leaves[2], **options)
    given_count = count if draw(st.booleans()) else int(count)
    parts = [
        loss(some, leaves[1], wanted, leaves[2], num_items_in_batch=given_count, **options)
        for some, wanted in zip(leaves[0].split(sizes), labels.split(sizes), strict=True)
    ]
    expected = torch.autograd.grad(whole, leaves)
    for part in parts:
        part.backward()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for got, want in zip((sum(parts), *(x.grad for x in leaves)), (whole, *expected), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# --- the masked loss


def bert_transform(rows: Tensor, w: Tensor, b: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    return fastattn.layer_norm(fastattn.linear(rows, w, b, "gelu"), gain, offset)


def masked_with_transform(hidden, weight, labels, bias, transform, **options) -> Tensor:
    between = None if transform is None else lambda rows: bert_transform(rows, *transform)
    return losses.masked_language_modelling_loss(hidden, weight, labels, bias, between, **options)


def every_place_transformed(hidden, weight, labels, bias, transform, **options) -> Tensor:
    if transform is not None:
        w, b, gain, offset = transform
        hidden = F.layer_norm(F.gelu(F.linear(hidden, w, b)), gain.shape, gain, offset)
    return cross_entropy(hidden, weight, labels, bias, **options)


@settings(max_examples=25)
@given(case=cross_entropy_cases(classes=SIZES, depths=st.integers(1, 70)), transformed=st.booleans())
def test_the_masked_loss_is_that_of_all_places(case: tuple, transformed: bool) -> None:
    (hidden, weight, labels, bias), options = case
    transform = None
    if transformed:
        generator = torch.Generator().manual_seed(0)
        width, dim = 12, hidden.shape[-1] + 8  # a norm of few elements is a matter of luck
        weight = torch.randn(len(weight), dim, generator=generator) * dim**-0.5
        shapes = ((dim, width), (dim,), (dim,), (dim,))
        transform = [torch.randn(s, generator=generator).to(hidden.dtype).requires_grad_() for s in shapes]
        weight = weight.to(hidden.dtype).requires_grad_()
        hidden = torch.randn(*hidden.shape[:-1], width, generator=generator).to(hidden.dtype).requires_grad_()
    ours, formula = map(judged_in_the_inputs_dtype, (masked_with_transform, every_place_transformed))
    verify.check(ours, hidden, weight, labels, bias, transform, **options, eager=formula).raise_if_failed()


def test_other_places_meet_neither_transform_nor_vocabulary() -> None:
    hidden, weight = torch.full((4, 9, 6), torch.nan), torch.randn(20, 5, requires_grad=True)
    labels = torch.full((4, 9), IGNORED)
    places = torch.tensor([0, 1, 3]), torch.tensor([2, 8, 0])
    labels[places] = torch.tensor([4, 0, 19])
    hidden[places] = torch.randn(3, 6)
    hidden.requires_grad_()
    seen = []
    module = losses.MaskedLanguageModellingLoss(fastattn.nn.Linear(6, 5, activation="gelu"))
    module.transform.register_forward_hook(lambda _, given, out: seen.append(given[0].shape))
    loss = module(hidden, weight, labels)
    loss.backward()
    assert seen == [(3, 6)]
    assert loss.isfinite()
    assert torch.equal(hidden.grad.any(-1), labels != IGNORED)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in module.parameters())
    expected = cross_entropy(module.transform(hidden[places]), weight, labels[places], None)
    torch.testing.assert_close(loss, expected)


# --- nothing that counts


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 1), (3, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_where_no_label_counts(shape: tuple[int, int], masked: bool) -> None:
    hidden, weight = torch.randn(*shape, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    labels = torch.full(shape, IGNORED)
    loss = losses.masked_language_modelling_loss if masked else losses.language_modelling_loss
    assert loss(hidden, weight, labels).isnan()
    for options in ({"reduction": "sum"}, {"num_items_in_batch": 3}, {"reduction": "none"}):
        out = loss(hidden, weight, labels, z_loss=0.1, **options)
        assert out.shape == (shape if "none" in options.values() else ())
        for zero in (out, *torch.autograd.grad(out.sum(), (hidden, weight))):
            assert not zero.any()
    statistics = losses.token_statistics(hidden, weight, labels, shift=not masked)
    assert (statistics.correct, statistics.total) == (0, 0)
    assert statistics.accuracy.isnan()


# --- statistics


@given(data=st.data())
def test_statistics_are_those_of_the_largest_logits(data: st.DataObject) -> None:
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    rows, classes, shift = draw(st.integers(1, 30)), draw(st.integers(1, 9)), draw(st.booleans())
    shapes = ((2, rows, 5), (classes, 5), (classes,))
    hidden, weight, bias = (torch.randn(s, generator=generator) for s in shapes)
    labels = targets((2, rows), classes, generator)
    logits = F.linear(hidden, weight, bias)
    if shift:
        logits, wanted = logits[:, :-1], labels[:, 1:]
    else:
        wanted = labels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_modelling, "LOGITS_AT_A_TIME", draw(st.sampled_from((1, 40, 2**23))))
        module = losses.LanguageModellingLoss(shift=shift)
        statistics = module.statistics(hidden.requires_grad_(), weight, labels, bias)
    assert statistics.correct == (logits.argmax(-1) == wanted).sum()
    assert statistics.total == (wanted != IGNORED).sum() == losses.count_targets(labels, shift=shift)
    twice = statistics + statistics
    assert (twice.correct, twice.total) == (2 * statistics.correct, 2 * statistics.total)
    if statistics.total:
        assert twice.accuracy.item() == pytest.approx(statistics.correct.item() / statistics.total.item())


@needs_linux
def test_statistics_never_form_the_logits() -> None:
    """Of 4096 tokens and 40,000 words, 625 MiB in float32."""
    hidden, weight = torch.randn(1, 4096, 8), torch.randn(40_000, 8)
    labels = torch.randint(0, 40_000, (1, 4096))
    assert most_memory_of(lambda: losses.token_statistics(hidden, weight, labels)) < 96 << 20


@needs_linux
def test_losses_never_form_the_logits() -> None:
    """Of 2048 tokens, 312 MiB."""
    hidden, weight = torch.randn(1, 2048, 8, requires_grad=True), torch.randn(40_000, 8, requires_grad=True)
    labels = torch.randint(0, 40_000, (1, 2048))
    for loss in (losses.language_modelling_loss, losses.masked_language_modelling_loss):
        call = lambda loss=loss: loss(hidden, weight, labels, num_items_in_batch=5000).backward()  # noqa: E731
        assert most_memory_of(call) < 64 << 20


# --- contrastive


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


# --- modules and messages

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
