"""Bad arguments of the ops without a test file of their own: each gives an error that says what was wrong, never a crash."""

import pytest
import torch

import fastattn

T = torch.randn


def additive(**changed):
    given = {
        "query": T(2, 3, 4),
        "key": T(2, 5, 6),
        "value": T(2, 5, 2),
        "w_query": T(7, 4),
        "w_key": T(7, 6),
        "v": T(7),
    }
    return fastattn.additive_attention(**{**given, **changed})


def rotary(**changed):
    given = {"q": T(2, 4, 5, 8), "k": T(2, 2, 5, 8), "cos": T(5, 8), "sin": T(5, 8)}
    return fastattn.rotary_embedding(**{**given, **changed})


def cross_entropy(**changed):
    given = {"x": T(3, 4), "weight": T(6, 4), "target": torch.tensor([0, 5, -100])}
    return fastattn.linear_cross_entropy(**{**given, **changed})


def contrastive(**changed):
    given = {"query": T(4, 6), "positive": T(4, 6), "negatives": T(3, 6)}
    return fastattn.info_nce(**{**given, **changed})


CASES = [
    (additive, {"query": [1.0]}, TypeError, "query is a list"),
    (additive, {"query": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "query has dtype torch.int64"),
    (additive, {"key": T(2, 5, 6).double()}, TypeError, "key has dtype torch.float64 but query"),
    (additive, {"key": T(2, 5, 6, device="meta")}, ValueError, "key is on meta"),
    (additive, {"query": T(4)}, ValueError, "query has shape"),
    (additive, {"key": T(3, 5, 6)}, ValueError, "leading dimensions"),
    (additive, {"value": T(2, 4, 2)}, ValueError, "value has 4"),
    (additive, {"w_query": T(7, 5)}, ValueError, "w_query has shape"),
    (additive, {"w_query": T(7)}, ValueError, "w_query has shape"),
    (additive, {"w_key": T(8, 6)}, ValueError, "w_key has shape"),
    (additive, {"v": T(8)}, ValueError, "v has shape"),
    (additive, {"attn_mask": torch.ones(4, 5, dtype=torch.bool)}, ValueError, "does not broadcast"),
    (additive, {"attn_mask": torch.ones(3, 5, dtype=torch.int32)}, TypeError, "attn_mask has dtype"),
    (additive, {"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
    (rotary, {"q": T(4, 5, 8)}, ValueError, "q has shape"),
    (rotary, {"k": T(2, 2, 6, 8)}, ValueError, "only the number of heads may differ"),
    (rotary, {"k": T(2, 2, 5, 8).half()}, TypeError, "k has dtype"),
    (rotary, {"cos": T(6, 8), "sin": T(6, 8)}, ValueError, "cos has shape"),
    (rotary, {"cos": T(5, 7), "sin": T(5, 7)}, ValueError, "rotary_dim even"),
    (rotary, {"cos": T(5, 6)}, ValueError, "must be equal"),
    (rotary, {"cos": torch.ones(5, 8, dtype=torch.int64)}, TypeError, "cos has dtype"),
    (cross_entropy, {"x": T(3, 5)}, ValueError, "x has 5 features"),
    (cross_entropy, {"weight": T(6)}, ValueError, "weight has shape"),
    (cross_entropy, {"target": torch.tensor([0, 6, 1])}, ValueError, "target holds 6"),
    (cross_entropy, {"target": torch.tensor([0, -1, 1])}, ValueError, "target holds -1"),
    (cross_entropy, {"target": torch.tensor([0, 1])}, ValueError, "target has shape"),
    (cross_entropy, {"target": torch.tensor([0, 1, 2], dtype=torch.int32)}, TypeError, "int64"),
    (cross_entropy, {"bias": T(5)}, ValueError, "bias has shape"),
    (cross_entropy, {"class_weight": T(5)}, ValueError, "class_weight has shape"),
    (cross_entropy, {"reduction": "average"}, ValueError, "reduction is 'average'"),
    (cross_entropy, {"label_smoothing": -0.1}, ValueError, "label_smoothing"),
    (cross_entropy, {"softcap": 0.0}, ValueError, "softcap is 0.0"),
    (contrastive, {"query": T(4)}, ValueError, "query has shape"),
    (contrastive, {"positive": T(5, 6)}, ValueError, "positive has shape"),
    (contrastive, {"negatives": T(3, 5)}, ValueError, "negatives has shape"),
    (contrastive, {"negatives": T(3, 6).bfloat16()}, TypeError, "negatives has dtype"),
    (contrastive, {"temperature": 0.0}, ValueError, "temperature is 0.0"),
    (contrastive, {"temperature": T(2)}, ValueError, "temperature has shape"),
    (contrastive, {"query": T(4, 6).to_sparse()}, TypeError, "layout"),
]


@pytest.mark.parametrize(("call", "changed", "error", "words"), CASES)
def test_bad_input_is_a_clear_error(call, changed: dict, error: type[Exception], words: str) -> None:
    call()
    with pytest.raises(error, match=words.replace("(", r"\(")):
        call(**changed)


def test_zero_sizes_give_empty_or_zero_results() -> None:
    assert additive(query=T(2, 0, 4)).shape == (2, 0, 2)
    assert torch.equal(additive(key=T(2, 0, 6), value=T(2, 0, 2)), torch.zeros(2, 3, 2))
    assert [x.shape for x in rotary(q=T(0, 4, 5, 8), k=T(0, 2, 5, 8))] == [(0, 4, 5, 8), (0, 2, 5, 8)]
    empty = {"x": T(0, 4), "target": torch.tensor([], dtype=torch.int64)}
    assert cross_entropy(**empty, reduction="sum") == 0.0
    assert cross_entropy(**empty, reduction="none").shape == (0,)


def test_nan_propagates() -> None:
    x = T(3, 4)
    x[1, 2] = torch.nan
    loss = cross_entropy(x=x, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
