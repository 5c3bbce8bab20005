"""DecoderLM: each way of reading the same tokens gives the same, kernels as plain torch in float64, and it learns."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from model_cases import DECODERS, SIZES, VOCAB, assert_close, assert_same, decoder, gradients, padded

import fastattn
from fastattn.models import DecoderLM, DecoderLMConfig, KeyValueCache

NAMES = pytest.mark.parametrize("name", DECODERS)


@NAMES
@pytest.mark.parametrize("side", ["right", "left", "scattered"])
def test_a_padded_batch_is_its_sequences_one_by_one(name, side):
    model = decoder(name)
    ids, mask, sequences = padded(side)
    output = model(ids, mask, labels=ids)
    alone = [model(sequence[None]).hidden[0] for sequence in sequences]
    assert_close(output.hidden[mask.bool()], torch.cat(alone))
    assert not output.hidden[~mask.bool()].any()
    logits = torch.cat([model.logits(hidden[:-1]) for hidden in alone])
    assert_close(output.loss, F.cross_entropy(logits, torch.cat([sequence[1:] for sequence in sequences])))


@NAMES
def test_labels_are_those_of_the_next_token(name):
    model = decoder(name)
    ids = torch.randint(VOCAB, (3, 8))
    labels = torch.randint(VOCAB, (3, 8))
    labels[0, :4] = labels[2, -1] = -100
    output = model(ids, labels=labels)
    logits = model.logits(output.hidden)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(output.loss, expected)
    masked = model(ids, torch.ones_like(ids), labels=labels)
    assert_close(masked.loss, expected)


@NAMES
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_accumulated_over_parts_are_those_of_the_whole_batch(name, masked):
    """Of parts with different numbers of labels."""
    model = decoder(name).train()
    ids, mask, _ = padded("right", (9, 2, 3, 9))
    labels = torch.where(mask.bool(), ids, -100)
    whole = gradients(model, model(ids, mask if masked else None, labels).loss)
    count = (labels[:, 1:] != -100).sum()
    parts = [slice(0, 1), slice(1, 4)]
    losses = [
        model(ids[part], mask[part] if masked else None, labels[part], num_items_in_batch=count).loss for part in parts
    ]
    assert_same(gradients(model, sum(losses)), whole, 1e-4)


def test_an_empty_sequence_takes_part_in_nothing():
    model = decoder("gpt")
    ids = torch.randint(VOCAB, (3, 5))
    mask = torch.ones_like(ids)
    mask[0] = 0
    assert_close(model(ids, mask, labels=ids).loss, model(ids[1:], labels=ids[1:]).loss)
    assert not model(ids, torch.zeros_like(ids)).hidden.any()


@NAMES
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_plain_torch_in_float64(name, masked):
    model = decoder(name).train()
    exact = copy.deepcopy(model).double()
    ids, mask, _ = padded("right")
    mask = mask if masked else None
    output = model(ids, mask, labels=ids)
    with fastattn.use_backend("eager"):
        expected = exact(ids, mask, labels=ids)
        expected_gradients = gradients(exact, expected.loss)
    assert_close(output.loss.double(), expected.loss)
    assert_close(output.hidden.double(), expected.hidden)
    assert_same(gradients(model, output.loss), expected_gradients, 1e-4)


@NAMES
def test_prompts_of_any_length_and_tokens_behind_them_are_the_whole_sequence(name):
    model = decoder(name)
    _, _, sequences = padded("right")
    prompts = [sequence[: max(1, len(sequence) - 3)] for sequence in sequences]
    more = torch.randint(VOCAB, (len(prompts), 4))
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    cache = model.new_cache(len(prompts), int(lengths.max()), 4)
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    with torch.inference_mode():
        last = model.prefill(torch.cat(prompts), starts, int(lengths.max()), cache)
        steps = [model.decode(more[:, :1], cache), model.decode(more[:, 1:3], cache), model.decode(more[:, 3:], cache)]
    for row, prompt in enumerate(prompts):
        whole = model(torch.cat([prompt, more[row]])[None]).hidden[0]
        assert_close(torch.cat([last[row, None], *(step[row] for step in steps)]), whole[len(prompt) - 1 :])
    assert cache.lengths.tolist() == (lengths + 4).tolist()


def test_a_reordered_cache_continues_the_sequences_it_was_given():
    model = decoder("llama")
    ids = torch.randint(VOCAB, (3, 5))
    starts = torch.arange(0, 16, 5, dtype=torch.int32)
    cache = model.new_cache(3, 5, 3)
    model.prefill(ids.flatten(), starts, 5, cache)
    rows = torch.tensor([2, 0, 2, 2])
    cache.reorder(rows)
    more = torch.randint(VOCAB, (4, 2))
    assert_close(model.decode(more, cache), model(torch.cat([ids[rows], more], dim=1)).hidden[:, 5:])
    cache.reset()
    assert_close(
        model.prefill(ids.flatten().repeat(2)[:20], torch.arange(0, 21, 5, dtype=torch.int32), 5, cache)[1:3],
        model(ids).hidden[1:, -1],
    )


@pytest.mark.parametrize("filled", [0, 3, 5])
@pytest.mark.parametrize("made_in_inference_mode", [False, True])
def test_rows_of_a_cache_can_be_reordered_again_and_again(filled, made_in_inference_mode):
    """What was made in inference mode, outside of it, too; and no two layers come to share memory."""
    with torch.inference_mode(made_in_inference_mode):
        cache = KeyValueCache(3, 4, 2, 5, 8)
        for x in (*cache.keys, *cache.values):
            x[:, :, :filled].normal_()
        cache.advance(torch.arange(4, dtype=torch.int32).clamp(max=filled), filled)
    for rows in ([2, 0, 2, 1], [3, 2, 1, 0], [0, 1, 1, 3], [3, 1], [0, 1, 1, 0, 1, 0], [5, 5, 2, 0, 1, 4], []):
        expected = [x[:, :, :filled][rows] for x in (cache.lengths[:, None, None], *cache.keys, *cache.values)]
        cache.reorder(torch.tensor(rows, dtype=torch.int64))
        tensors = (*cache.keys, *cache.values)
        given = [x[:, :, :filled] for x in (cache.lengths[:, None, None], *tensors)]
        assert all(map(torch.equal, given, expected))
        assert not any(x[:, :, filled:].any() for x in tensors)
        assert len({x.data_ptr() for x in tensors}) == (len(tensors) if rows else 1)


@NAMES
def test_checkpointing_changes_no_gradient_even_with_dropout(name):
    model = decoder(name, dropout=0.2, attention_dropout=0.1).train()
    ids, mask, _ = padded("right")
    found = []
    for model.config.checkpoint in (False, True):
        torch.manual_seed(5)
        found.append(gradients(model, model(ids, mask, labels=ids).loss))
    assert_same(found[1], found[0], 1e-6)
    torch.manual_seed(5)
    assert not torch.equal(model(ids).hidden, model(ids).hidden)
    assert torch.equal(model.eval()(ids).hidden, model(ids).hidden)


@NAMES
def test_it_learns_a_batch_by_heart(name):
    torch.manual_seed(0)
    model = DecoderLM(DECODERS[name])
    ids, mask, _ = padded("left")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids, mask, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(VOCAB)) < 0.2  # at the start every token is as likely as any other
    assert losses[-1] < 0.3


def test_weights_start_as_gpt2s():
    model = DecoderLM(DecoderLMConfig(vocab_size=500, d_model=64, layers=8, heads=4))
    branch = 0.02 / math.sqrt(16)
    expected = {"embedding": 0.02, "layers.3.attention.qkv": 0.02, "layers.3.attention.out": branch}
    expected |= {"layers.3.feed_forward.linear1": 0.02, "layers.3.feed_forward.linear2": branch}
    for part, std in expected.items():
        assert model.get_submodule(part).weight.std().item() == pytest.approx(std, rel=0.1), part
    assert not any(p.any() for key, p in model.named_parameters() if key.endswith("bias"))


def test_wrong_input_is_named():
    model = decoder("gpt")
    ids = torch.ones(2, 4, dtype=torch.int64)
    cache = model.new_cache(2, 4, 2)
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    for expected, message, call in (
        (TypeError, "input_ids has dtype torch.float32", lambda: model(ids.float())),
        (ValueError, "attention_mask has shape", lambda: model(ids, ids[:1])),
        (ValueError, "labels has shape", lambda: model(ids, labels=ids[:, 1:])),
        (ValueError, "49 tokens but max_positions is 48", lambda: model(ids.new_ones(1, 49))),
        (ValueError, "capacity 6", lambda: model.decode(ids.new_ones(2, 7), cache)),
        (ValueError, "the cache holds 2 sequences", lambda: model.decode(ids[:1], cache)),
        (ValueError, "a prompt is empty", lambda: model.prefill(ids[0], starts.clamp(max=4), 4, cache)),
        (ValueError, "rows has dtype", lambda: cache.reorder(torch.ones(2))),
        (ValueError, "expected kv_heads to divide heads", lambda: DecoderLMConfig(**SIZES, kv_heads=3)),
        (ValueError, "norm is 'batch'", lambda: DecoderLMConfig(**SIZES, norm="batch")),
        (ValueError, "layers is 0", lambda: DecoderLMConfig(**SIZES | {"layers": 0})),
    ):
        with pytest.raises(expected, match=message):
            call()
    model.prefill(ids.flatten(), starts, 4, cache)
    with pytest.raises(ValueError, match="empty one"):
        model.prefill(ids.flatten(), starts, 4, cache)
