"""accelerate() on Hugging Face models: small random ones of every family, against their own eager selves."""

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM
from transformers_cases import (
    ATTENTION_ONLY,
    DECODERS,
    ENCODERS,
    FAMILIES,
    SEQ2SEQ,
    assert_gradients_near,
    assert_near,
    batch,
    kept,
    make,
    pair,
    run,
)

from fastattn.accelerate import accelerate


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_eager_model(name, padding):
    model, eager = pair(name)
    inputs = batch(padding)
    out, expected = (kept(name, run(name, each, inputs), inputs) for each in (model, eager))
    assert_near(out, expected, "output")
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    for each, result in ((model, out), (eager, expected)):
        each.zero_grad()
        (result * weight).sum().backward()
    assert_gradients_near(model, eager)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS | SEQ2SEQ | ATTENTION_ONLY)
def test_greedy_generation_gives_the_same_tokens(name, padding, cache):
    model, eager = pair(name)
    settings = {"max_new_tokens": 8, "do_sample": False}
    if cache == "static":
        settings["cache_implementation"] = "static"
    tokens, expected = (each.generate(**batch(padding), **settings) for each in (model, eager))
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_computes_no_padding(name):
    model, _ = pair(name)
    inputs = batch("right")
    shapes = []
    for module in model.modules():
        if type(module).__name__.endswith("SelfAttention"):
            module.register_forward_hook(lambda _, given, result: shapes.append(result[0].shape[:2]))
    out = run(name, model, inputs)
    tokens = int(inputs["attention_mask"].sum())
    assert shapes == [(1, tokens)] * 2
    assert not out[inputs["attention_mask"] == 0].any()


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_takes_holes_in_the_mask_and_a_sequence_of_nothing(name):
    model, eager = pair(name)
    inputs = batch("right")
    inputs["attention_mask"][0, 3:5] = 0
    inputs["attention_mask"][1] = 0
    position_ids = torch.arange(11).expand(3, -1)
    out, expected = (kept(name, run(name, each, inputs, position_ids=position_ids), inputs) for each in (model, eager))
    assert_near(out, expected)
    inputs["attention_mask"].zero_()
    assert not run(name, model, inputs, position_ids=position_ids).any()


def test_unpad_false_computes_padding():
    model, eager = pair("bert")
    accelerate(model, unpad=False)
    inputs = batch("right")
    out, expected = (each(**inputs).last_hidden_state for each in (model, eager))
    assert_near(out, expected, "with padding")  # at the padding too


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "t5"])
def test_attentions_and_hidden_states_come_from_eager_attention_and_a_warning_says_so(name, monkeypatch):
    monkeypatch.setattr("fastattn.integrations.warn._said", set())
    model, eager = pair(name)
    inputs = batch("right")
    with pytest.warns(UserWarning, match="output_attentions asks for the attention weights"):
        run(name, model, inputs, output_attentions=True)
    more = {"decoder_input_ids": torch.arange(1, 8).expand(3, -1)} if name in SEQ2SEQ else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # once is enough
        out = model(**inputs, **more, output_attentions=True, output_hidden_states=True)
    expected = eager(**inputs, **more, output_attentions=True, output_hidden_states=True)
    compared = 0
    for field, value in expected.items():
        if field.endswith(("attentions", "hidden_states")):
            assert len(out[field]) == len(value)
            for ours, theirs in zip(out[field], value, strict=True):
                rows = inputs["attention_mask"].bool()
                if field.endswith("hidden_states") and ours.shape[1] == rows.shape[1]:
                    ours, theirs = ours[rows], theirs[rows]
                elif ours.dim() == 4 and ours.shape[2] == rows.shape[1]:
                    ours, theirs = ours.mT * rows[:, None, None], theirs.mT * rows[:, None, None]
                assert_near(ours, theirs, field)
                compared += 1
    assert compared >= 4


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("kind", ["additive", "bool"])
def test_a_mask_of_four_dimensions_passes_through(name, kind):
    model, eager = pair(name)
    inputs = batch("none")
    allowed = torch.rand(3, 1, 11, 11, generator=torch.Generator().manual_seed(1)) > 0.4
    allowed |= torch.eye(11, dtype=torch.bool)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    if name == "t5":  # its decoder reads the encoder's output under the same mask, so both get as many tokens
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    out = run(name, model, {**inputs, "attention_mask": allowed if kind == "bool" else additive})
    expected = run(name, eager, {**inputs, "attention_mask": additive})
    assert_near(out, expected)


def test_an_additive_mask_gets_a_gradient():
    model, eager = pair("bert")
    inputs = batch("none")
    grads = []
    for each in (model, eager):
        mask = torch.randn(3, 1, 11, 11, generator=torch.Generator().manual_seed(1)).requires_grad_()
        each(**inputs, attention_mask=mask).last_hidden_state.square().sum().backward()
        grads.append(mask.grad)
    assert_near(*grads, "gradient of the mask", tolerance=5e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_cross_attention(name):
    changes = {"is_decoder": True, "add_cross_attention": True} if name == "bert" else {"add_cross_attention": True}
    model, eager = pair(name, **changes)
    inputs = batch("right")
    encoded = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(1))
    encoder_mask = torch.ones(3, 7, dtype=torch.long)
    encoder_mask[1, 4:] = 0
    out, expected = (
        kept(name, run(name, each, inputs, encoder_hidden_states=encoded, encoder_attention_mask=encoder_mask), inputs)
        for each in (model, eager)
    )
    assert_near(out, expected)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    model, eager = pair(name)
    for each in (model, eager):
        each.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    inputs = batch("right")
    for each in (model, eager):
        kept(name, run(name, each, inputs), inputs).square().sum().backward()
    assert_gradients_near(model, eager)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "t5"])
def test_autocast_to_bfloat16(name):
    model, eager = pair(name)
    inputs = batch("right")
    with torch.no_grad():
        exact = kept(name, run(name, eager, inputs), inputs)
        with torch.autocast("cpu", torch.bfloat16):
            out, rounded = (kept(name, run(name, each, inputs), inputs) for each in (model, eager))
    assert out.dtype == rounded.dtype
    error, allowed = ((each.float() - exact).square().mean().sqrt() for each in (out, rounded))
    assert error <= 2 * allowed  # no further from float32 than twice the eager model under autocast


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "t5-gated"])
def test_a_bfloat16_model(name):
    model, eager = pair(name)
    inputs = batch("right")
    with torch.no_grad():
        exact = kept(name, run(name, eager, inputs), inputs)
        out, rounded = (kept(name, run(name, each.bfloat16(), inputs), inputs) for each in (model, eager))
    assert out.dtype == rounded.dtype == torch.bfloat16
    error, allowed = ((each.float() - exact).square().mean().sqrt() for each in (out, rounded))
    assert error <= 2 * allowed


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_torch_compile_traces_the_model_as_one_graph(name):
    model, eager = pair(name, num_hidden_layers=1)  # tracing is most of the time
    inputs = batch("right")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out, expected = (kept(name, run(name, each, inputs), inputs) for each in (compiled, eager))
    assert_near(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert_gradients_near(model, eager)


def test_t5_in_float16_keeps_its_last_matrix_in_float32(tmp_path):
    whole = make("t5-gated")
    whole.save_pretrained(tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16).eval()
    assert model.encoder.block[0].layer[-1].DenseReluDense.wo.weight.dtype == torch.float32
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    accelerate(model)
    with torch.no_grad():
        exact, out, rounded = (run("t5", each, batch("right")) for each in (whole, model, eager))
    error, allowed = ((each.float() - exact).square().mean().sqrt() for each in (out, rounded))
    assert error <= 2 * allowed


DROPOUT = {
    "bert": [{"hidden_dropout_prob": 0.3}, {"attention_probs_dropout_prob": 0.3}],
    "distilbert": [{"dropout": 0.3}, {"attention_dropout": 0.3}],
    "gpt2": [{"resid_pdrop": 0.3}, {"attn_pdrop": 0.3}],
    "llama": [{"attention_dropout": 0.3}],
    "t5": [{"dropout_rate": 0.3}],
}


@pytest.mark.parametrize(("name", "changes"), [(name, each) for name, some in DROPOUT.items() for each in some])
def test_dropout_acts_in_training_and_only_there(name, changes):
    model, eager = pair(name, **changes)
    inputs = batch("right")
    with torch.no_grad():
        assert_near(*(kept(name, run(name, each, inputs), inputs) for each in (model, eager)), "in eval mode")
        spread = []
        for each in (model, eager):
            each.train()
            torch.manual_seed(5)
            runs = torch.stack([kept(name, run(name, each, inputs), inputs) for _ in range(48)])
            assert not torch.equal(runs[0], runs[1])
            spread.append((runs.std(dim=0).square().mean().sqrt(), runs.mean(dim=0)))
        quiet = [kept(name, run(name, model.eval(), inputs), inputs) for _ in range(2)]
        assert torch.equal(*quiet)
    (std, mean), (expected_std, expected_mean) = spread
    # 48 runs know each standard deviation to 10 %; the root mean square over hundreds of elements is known far better.
    assert 0.8 < std / expected_std < 1.25
    assert (mean - expected_mean).square().mean().sqrt() < 2.0 * expected_std * (2 / 48) ** 0.5


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_a_chunked_feed_forward(name):
    model, eager = pair(name, chunk_size_feed_forward=11)
    inputs = batch("right")
    assert_near(*(kept(name, run(name, each, inputs), inputs) for each in (model, eager)))
