"""The losses of language models against their formulas in plain torch, under the numerics rule: values and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import SIZES
from loss_cases import IGNORED, cross_entropy_cases, judged_in_the_inputs_dtype, targets, wide
from memory import most_memory_of, needs_linux
from torch import Tensor

import fastattn
from fastattn import losses, verify
from fastattn.losses import language_modelling


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
