"""The parts that accelerate() gives Hugging Face models: whole layers as one op, attention functions, packing."""

import pytest
import torch
from torch import nn
from transformers_cases import assert_near, batch, kept, make, pair, run

from fastattn import ops
from fastattn.integrations.transformers.attention import attention_forward
from fastattn.nn.packed_sequences import PackedSequences


@pytest.fixture
def whole_layers(monkeypatch):
    """How many layers have run as one op."""
    calls = []
    fused = ops.encoder_layer
    monkeypatch.setattr(ops, "encoder_layer", lambda *args, **kwargs: (calls.append(1), fused(*args, **kwargs))[1])
    return calls


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_layer_is_one_op_at_inference(name, padding, whole_layers):
    model, eager = pair(name, hidden_dropout_prob=0.1)
    inputs = batch(padding)
    with torch.no_grad():
        assert_near(*(kept(name, run(name, each, inputs), inputs) for each in (model, eager)))
    assert len(whole_layers) == model.config.num_hidden_layers
    run(name, model, inputs)  # recorded
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run(name, model, inputs)
    with torch.no_grad():
        run(name, model.train(), inputs)  # drops
    assert len(whole_layers) == model.config.num_hidden_layers


def test_a_causal_layer_is_no_encoder_layer(whole_layers):
    model, eager = pair("bert", is_decoder=True)
    inputs = batch("none")
    with torch.no_grad():
        assert_near(run("bert", model, inputs), run("bert", eager, inputs))
    assert not whole_layers


def test_a_layer_as_one_op_never_answers_with_old_weights(whole_layers):
    model, eager = pair("bert")
    inputs = batch("right")
    other = {name: value + 0.1 * torch.randn_like(value) for name, value in make("bert").state_dict().items()}

    def change(model, step):
        generator = torch.Generator().manual_seed(step)
        dense = model.encoder.layer[1].intermediate.dense
        if step == 0:
            model.load_state_dict(other)
        elif step == 1:
            dense.weight.data += torch.randn(dense.weight.shape, generator=generator)
        elif step == 2:
            dense.weight = nn.Parameter(torch.randn(dense.weight.shape, generator=generator))
        elif step == 3:
            model.encoder.layer[0].attention.self.key = nn.Linear(*dense.weight.shape[1:] * 2)
            model.encoder.layer[0].attention.self.key.load_state_dict(
                model.encoder.layer[1].attention.self.key.state_dict()
            )
        elif step == 4:
            model.to(torch.bfloat16)

    with torch.no_grad():
        for step in range(5):
            for each in (model, eager):
                change(each, step)
            given, expected = (kept("bert", run("bert", each, inputs), inputs) for each in (model, eager))
            if step < 4:
                assert_near(given, expected, f"after step {step}")
            else:
                torch.testing.assert_close(given.float(), expected.float(), rtol=0.1, atol=0.1)
    assert len(whole_layers) == 5 * model.config.num_hidden_layers


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_softcap_and_attention_sinks(heads, masked):
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.gpt_oss import modeling_gpt_oss

    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 4 // heads, False
    query = torch.randn(2, 4, 7, 8, requires_grad=True)
    key, value = (torch.randn(2, heads, 9, 8, requires_grad=True) for _ in range(2))
    mask = torch.randn(2, 1, 7, 9) if masked else None
    sinks = torch.randn(4, requires_grad=True)
    module.sinks = sinks
    weight = torch.randn(2, 7, 4, 8)

    def compare(inputs, ours, theirs):
        assert_near(ours, theirs)
        grads = (torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, theirs))
        for given, expected in zip(*grads, strict=True):
            assert_near(given, expected, "gradient")

    ours, _ = attention_forward(module, query, key, value, mask, scaling=0.3, softcap=2.0)
    theirs, _ = modeling_gemma2.eager_attention_forward(module, query, key, value, mask, scaling=0.3, softcap=2.0)
    compare([query, key, value], ours, theirs)
    ours, _ = attention_forward(module, query, key, value, mask, scaling=0.3, s_aux=sinks)
    theirs, _ = modeling_gpt_oss.eager_attention_forward(module, query, key, value, mask, scaling=0.3)
    compare([query, key, value, sinks], ours, theirs)


def test_a_window_without_a_mask():
    torch.manual_seed(0)
    module = nn.Module()
    module.is_causal = True
    query, key, value = torch.randn(3, 1, 2, 12, 8).unbind()
    distance = torch.arange(12)[:, None] - torch.arange(12)
    mask = (distance >= 0) & (distance < 4)
    given, _ = attention_forward(module, query, key, value, None, sliding_window=4)
    expected, _ = attention_forward(module, query, key, value, mask[None, None])
    assert_near(given, expected)


def test_packing_there_and_back():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    x = torch.randn(3, 3, 5)
    sequences = PackedSequences.from_padding(mask)
    assert sequences.cu_seqlens.tolist() == [0, 2, 2, 4]
    assert sequences.max_seqlen == 2
    assert torch.equal(sequences.pack(x)[0], x[mask])
    assert torch.equal(sequences.unpack(sequences.pack(x), 3, 3), x * mask[..., None])
