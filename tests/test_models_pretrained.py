"""Models saved and read back, and Hugging Face's read: output against output."""

import json

import pytest
import torch
import transformers_cases
from model_cases import DECODERS, decoder
from safetensors.torch import load_file, save_file

from fastattn.models import DecoderLM

HUGGING_FACE = {
    "gpt2": {},
    "gpt2-relu": {"activation_function": "relu", "n_inner": 60, "tie_word_embeddings": False},
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "llama-tied": {"tie_word_embeddings": True, "head_dim": 20, "num_key_value_heads": 4},
}


def theirs(name: str, **changes):
    return transformers_cases.make(name.split("-")[0], **(HUGGING_FACE[name] | changes))


@pytest.mark.parametrize("name", DECODERS)
def test_a_saved_model_comes_back(name, tmp_path):
    model = decoder(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "new" / "folder")
    found = DecoderLM.from_pretrained(tmp_path / "new" / "folder")
    assert found.config == model.config
    assert not found.training
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.state_dict().items())
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(found(ids).hidden, model(ids).hidden)
    wide = DecoderLM.from_pretrained(tmp_path / "new" / "folder", dtype=torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in wide.parameters())


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_faces_decoders_give_the_same_loss_logits_and_gradients(name, tmp_path):
    reference = theirs(name)
    reference.save_pretrained(tmp_path, max_shard_size="20KB" if name == "llama" else "1GB")
    model = DecoderLM.from_pretrained(tmp_path)
    inputs = transformers_cases.batch("right")
    kept = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~kept, -100)
    expected = reference(**inputs, labels=labels)
    output = model(**inputs, labels=labels)
    transformers_cases.assert_near(model.logits(output.hidden)[kept], expected.logits[kept], "logits")
    transformers_cases.assert_near(output.loss, expected.loss, "loss")
    shared = reference.get_input_embeddings().weight
    (given,) = torch.autograd.grad(output.loss, model.embedding.weight)
    transformers_cases.assert_near(given, torch.autograd.grad(expected.loss, shared)[0], "gradient", 5e-5)


def test_a_model_without_its_head_is_read_where_the_head_is_tied(tmp_path):
    reference = theirs("gpt2")
    reference.transformer.save_pretrained(tmp_path)
    model = DecoderLM.from_pretrained(tmp_path)
    ids = torch.arange(10)[None]
    transformers_cases.assert_near(model(ids).hidden, reference.transformer(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"activation_function": "mish"}, "activation 'mish'"),
        ("gpt2", {"model_type": "mamba"}, "model_type 'mamba'; DecoderLM can read 'gpt2', 'llama'"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn.* not supported"),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "linear.* not supported",
        ),
        ("llama", {"fastattn_model": "Other"}, "holds a Other; expected a DecoderLM"),
    ],
)
def test_options_that_are_not_supported_are_named(name, option, message, tmp_path):
    theirs(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | option))
    with pytest.raises(ValueError, match=message):
        DecoderLM.from_pretrained(tmp_path)


def test_missing_and_left_over_weights_are_listed(tmp_path):
    theirs("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.9.mlp.up_proj.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"missing \['layers.1.mlp.up_proj.*left over \['layers.9.mlp.up_proj"):
        DecoderLM.from_pretrained(tmp_path)
    decoder("gpt").save_pretrained(tmp_path)
    weights = load_file(path)
    weights["more"] = weights.pop("norm.bias")
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"missing \['norm.bias'\], left over \['more'\]"):
        DecoderLM.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="has neither"):
        DecoderLM.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        DecoderLM.from_pretrained(tmp_path / "nowhere")


def test_a_tied_head_that_differs_is_an_error(tmp_path):
    theirs("gpt2").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(weights, path)
    DecoderLM.from_pretrained(tmp_path)
    weights["lm_head.weight"] += 1.0
    save_file(weights, path)
    with pytest.raises(ValueError, match="they differ"):
        DecoderLM.from_pretrained(tmp_path)
