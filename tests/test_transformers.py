"""accelerate() on Hugging Face models: small random ones of every family, against their own eager selves."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForSeq2SeqLM

import fastattn.integrations.transformers  # noqa: F401  (registers "fastattn")
from fastattn import ops
from fastattn.accelerate import accelerate, restore
from fastattn.integrations.transformers.attention import attention_forward
from fastattn.integrations.transformers.packing import PackedSequences

VOCAB = 99
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 80,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
    "eos_token_id": None,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
DISTILBERT = {
    "vocab_size": VOCAB,
    "dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 80,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
ROBERTA = BERT | {"pad_token_id": 0}

# name -> (model class, configuration class, its arguments)
ENCODERS = {
    "bert": ("BertModel", "BertConfig", BERT),
    "roberta": ("RobertaModel", "RobertaConfig", ROBERTA),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", ROBERTA),
    "camembert": ("CamembertModel", "CamembertConfig", ROBERTA),
    "electra": ("ElectraModel", "ElectraConfig", BERT | {"embedding_size": 24}),
    "distilbert": ("DistilBertModel", "DistilBertConfig", DISTILBERT),
    "bert-relu": ("BertModel", "BertConfig", BERT | {"hidden_act": "relu"}),
}
DECODERS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama-biased": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"mlp_bias": True, "attention_bias": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA | {"head_dim": 16}),
}
SEQ2SEQ = {
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5-gated": ("T5ForConditionalGeneration", "T5Config", T5 | {"feed_forward_proj": "gated-gelu"}),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5),
}
# Families that no table row names: only their attention, and every nn.LayerNorm.
ATTENTION_ONLY = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", LLAMA | {"head_dim": 12, "sliding_window": 4}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", LLAMA),
}
FAMILIES = ENCODERS | DECODERS | SEQ2SEQ | ATTENTION_ONLY


def make(name: str, **changes) -> nn.Module:
    """A model whose every parameter is random, norms' and biases' too, so that none can be left out unseen."""
    model_class, config_class, arguments = FAMILIES[name]
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**(arguments | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def pair(name: str, **changes) -> tuple[nn.Module, nn.Module]:
    """(accelerated, eager) with equal weights."""
    model = make(name, **changes)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    accelerate(model)
    return model, eager


def batch(padding: str, lengths: tuple[int, ...] = (11, 6, 9)) -> dict[str, torch.Tensor]:
    """Token ids and their mask, padded on one side."""
    generator = torch.Generator().manual_seed(7)
    longest = max(lengths)
    ids = torch.randint(1, VOCAB, (len(lengths), longest), generator=generator)
    if padding == "none":
        return {"input_ids": ids}
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(length) if padding == "right" else slice(longest - length, None)] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def run(name: str, model: nn.Module, inputs: dict[str, torch.Tensor], **more) -> torch.Tensor:
    """The last hidden state or the logits. A decoder beside an encoder gets tokens of its own."""
    if name in SEQ2SEQ:
        more = {"decoder_input_ids": torch.arange(1, 8).expand(inputs["input_ids"].shape[0], -1)} | more | inputs
        inputs = {}
    output = model(**inputs, **more)
    return output.last_hidden_state if "last_hidden_state" in output else output.logits


def kept(name: str, output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The outputs that depend on something: not those at the padding."""
    mask = inputs.get("attention_mask")
    return output if mask is None or name in SEQ2SEQ else output * mask.bool()[..., None]


def assert_near(given, expected, what: str = "", tolerance: float = 2e-5, floor: float = 0.0) -> None:
    """Equal up to rounding: 2e-5 of the largest value, a hundred or so float32 roundings in a model of two layers."""
    error = (given - expected).abs().max().item()
    allowed = tolerance * expected.abs().max().item() + floor
    assert error <= allowed, f"{what}: off by {error:.2e}, allowed {allowed:.2e}"


def assert_gradients_near(model: nn.Module, eager: nn.Module) -> None:
    """Of all parameters. The floor is for gradients that are zero but for rounding, such as that of a key's bias."""
    references = {key: parameter.grad for key, parameter in eager.named_parameters() if parameter.grad is not None}
    floor = 1e-6 * max(grad.abs().max().item() for grad in references.values())
    for key, parameter in model.named_parameters():
        nothing = torch.zeros_like(parameter)  # a parameter not used has no gradient; compiled, it has one of zeros
        given = nothing if parameter.grad is None else parameter.grad
        assert_near(given, references.get(key, nothing), f"gradient of {key}", 5e-5, floor)


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


def test_an_accelerated_model_is_saved_as_the_model_that_it_is(tmp_path):
    model, _ = pair("bert")
    model.save_pretrained(tmp_path)
    assert "fastattn" not in (tmp_path / "config.json").read_text()
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    for (key, value), (other, saved) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(value, saved)


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


@pytest.mark.parametrize("name", FAMILIES)
def test_restore_gives_the_model_back_bit_for_bit(name):
    model = make(name)
    inputs = batch("right")
    before = run(name, model, inputs)
    state = {key: value.data_ptr() for key, value in model.state_dict().items()}
    parameters = list(map(id, model.parameters()))
    classes = [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    attention = model.config._attn_implementation
    accelerate(model)
    assert list(model.state_dict()) == list(state)
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == state
    assert list(map(id, model.parameters())) == parameters
    run(name, model, inputs)
    restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert model.config._attn_implementation == attention
    assert torch.equal(run(name, model, inputs), before)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "t5"])
def test_a_second_call_a_copy_and_a_pickle_are_accelerated_alike(name):
    model = make(name)
    report = accelerate(model)
    inputs = batch("right")
    expected = run(name, model, inputs)
    assert accelerate(model) == report
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(name, twin, inputs), expected)
        assert accelerate(twin) == report
        restore(twin)
        assert not any(type(module).__name__.startswith("Fused") for module in twin.modules())
        assert twin.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "fastattn"


def test_the_report_names_what_was_replaced_and_what_was_left():
    report = accelerate(make("bert"))
    replaced = {entry.name: entry for entry in report.replaced}
    assert replaced["encoder"].by == "no padding computed"
    assert replaced["encoder.layer.1.attention.self"].module == "BertSelfAttention"
    assert "feed-forward" in replaced["encoder.layer.0"].by
    left = {entry.name: entry.reason for entry in report.left}
    assert left["embeddings.word_embeddings"] == "a look-up: torch's runs"
    assert "encoder.layer.0.output.dense" not in left  # it is part of the fused layer
    assert "2 x BertLayer" in str(report)

    left = {entry.name: entry.reason for entry in accelerate(make("llama-biased")).left}
    assert left["model.layers.0.mlp"] == "its gate has a bias, which the op has no place for"
    left = {entry.name: entry.reason for entry in accelerate(make("bert", hidden_act="quick_gelu")).left}
    assert "QuickGELUActivation, is not one of" in left["encoder.layer.0"]
    left = {entry.name: entry.reason for entry in accelerate(make("bert", chunk_size_feed_forward=1)).left}
    assert "chunk_size_feed_forward" in left["encoder"]


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_a_chunked_feed_forward(name):
    model, eager = pair(name, chunk_size_feed_forward=11)
    inputs = batch("right")
    assert_near(*(kept(name, run(name, each, inputs), inputs) for each in (model, eager)))


@pytest.mark.parametrize(
    ("model_class", "config_class", "arguments"),
    [
        ("MPNetModel", "MPNetConfig", BERT),
        ("DebertaV2Model", "DebertaV2Config", BERT),
        ("SqueezeBertModel", "SqueezeBertConfig", BERT | {"embedding_size": 48}),
        ("XLNetModel", "XLNetConfig", {"vocab_size": VOCAB, "d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 80}),
    ],
)
def test_a_model_that_does_not_dispatch_its_attention_is_reported_and_unchanged(model_class, config_class, arguments):
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments)).eval()
    inputs = batch("right")
    before = model(**inputs).last_hidden_state
    report = accelerate(model)
    assert ["attention is hard-coded" in entry.reason for entry in report.left if entry.name == ""] == [True]
    assert_near(model(**inputs).last_hidden_state, before)
    restore(model)
    assert torch.equal(model(**inputs).last_hidden_state, before)


def test_from_pretrained_takes_the_name(tmp_path):
    eager = make("bert")
    eager.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="fastattn").eval()
    assert model.config._attn_implementation == "fastattn"
    eager.set_attn_implementation("eager")
    inputs = batch("right")
    # Equal at the padding too: nothing is packed.
    assert_near(model(**inputs).last_hidden_state, eager(**inputs).last_hidden_state)


def test_another_attention_may_be_set_on_an_accelerated_model():
    model, eager = pair("bert")
    model.set_attn_implementation("sdpa")
    inputs = batch("right")
    assert_near(model(**inputs).last_hidden_state, eager(**inputs).last_hidden_state)


class Adapted(nn.Linear):
    """What an adapter library puts in the place of a linear layer: it has a weight, and does more than multiply by
    it."""

    def forward(self, x):
        return super().forward(x) * 1.5


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("bert", "encoder.layer.0.intermediate.dense"),
        ("bert", "encoder.layer.1.attention.output.dense"),
        ("distilbert", "transformer.layer.0.ffn.lin2"),
        ("llama", "model.layers.0.mlp.gate_proj"),
    ],
)
def test_an_adapter_in_place_of_a_linear_layer_is_honoured(name, path, when):
    model = make(name)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    if when == "after":
        accelerate(model)
    for each in (model, eager):
        each.get_submodule(path).__class__ = Adapted
    if when == "before":
        accelerate(model)
    inputs = batch("right")
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            assert_near(*(kept(name, run(name, each, inputs), inputs) for each in (model, eager)))


_PARTS_OF_A_LAYER = ("attention", "attention.self", "attention.self.query")
_PARTS_OF_A_LAYER += ("attention.output", "attention.output.dense", "attention.output.LayerNorm")
_PARTS_OF_A_LAYER += (
    "intermediate",
    "intermediate.dense",
    "output",
    "output.dense",
    "output.LayerNorm",
    "output.dropout",
)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("path", _PARTS_OF_A_LAYER)
def test_a_hook_on_a_part_of_a_fused_module_is_called(path, recorded):
    model = make("bert")
    accelerate(model)
    seen = []
    model.get_submodule(f"encoder.layer.0.{path}").register_forward_hook(lambda *_: seen.append(path))
    with torch.set_grad_enabled(recorded):
        model(**batch("none"))
    assert seen == [path]


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
