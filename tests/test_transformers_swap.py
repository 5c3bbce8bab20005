"""accelerate() on Hugging Face models, as objects: saved, copied, restored, reported on, and changed by others."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel
from transformers_cases import BERT, FAMILIES, VOCAB, assert_near, batch, kept, make, pair, run

from fastattn.accelerate import accelerate, restore


def test_an_accelerated_model_is_saved_as_the_model_that_it_is(tmp_path):
    model, _ = pair("bert")
    model.save_pretrained(tmp_path)
    assert "fastattn" not in (tmp_path / "config.json").read_text()
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    for (key, value), (other, saved) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(value, saved)


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
