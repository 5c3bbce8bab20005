"""Where Hugging Face's models keep their weights: one table a family.

A row gives, for one of our weights, theirs: renamed; several, joined along the rows (query, key, value); or transposed (GPT-2's
Conv1D). "{}" stands for the number of the layer.
"""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """One of our weights made of theirs.

    Attributes:
        sources: their names; several are joined along the first dimension, after they are transposed.
        transposed: whether theirs are (in, out).
    """

    sources: tuple[str, ...]
    transposed: bool = False

    def of_layer(self, number: int) -> "Weight":
        return Weight(tuple(source.format(number) for source in self.sources), self.transposed)

    def join(self, tensors: list[Tensor]) -> Tensor:
        if self.transposed:
            tensors = [tensor.T for tensor in tensors]
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0].contiguous()


@dataclass(frozen=True)
class Family:
    """How to read a family of Hugging Face's models.

    Attributes:
        model: name of our class.
        prefix: what the model with a head puts before the names of the model without.
        table: our configuration to our names and theirs, without the prefix.
        config: the fields of their config.json to those of our configuration; raises ValueError for what we have not.
        copies: our configuration to names that may be there beside the weight whose copy they are.
        ignore: pattern of names that hold no weights: buffers of older versions, parts we leave out.
        architecture: name of their class, where its weights alone would not say that it is this one; None for any.
    """

    model: str
    prefix: str
    table: Callable[[Any], dict[str, Weight]]
    config: Callable[[dict[str, Any]], dict[str, Any]]
    copies: Callable[[Any], dict[str, str]]
    ignore: str
    architecture: str | None = None

    def weights(self, config: Any) -> Iterator[tuple[str, Weight]]:
        """(our name, weight) for every weight of a model."""
        for name, weight in self.table(config).items():
            layers = config.decoder_layers if name.startswith("decoder.") else config.layers
            for number in range(layers if "{}" in name else 1):
                yield name.format(number), weight.of_layer(number)

    def ignored(self, name: str) -> bool:
        return re.search(self.ignore, name) is not None


_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def _activation(given: str) -> str:
    if given not in _ACTIVATIONS:
        raise ValueError(f"the activation {given!r} is not supported; expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[given]


def _require(fields: dict[str, Any], **expected: Any) -> None:
    """Options that we have in one setting only; a missing one has it."""
    for name, value in expected.items():
        if fields.get(name, value) != value:
            raise ValueError(f"the option {name}={fields[name]!r} is not supported; expected {value!r}")


def _affine(ours: str, *theirs: str, transposed: bool = False) -> dict[str, Weight]:
    """The weight and the bias of one of our modules, of one of theirs or of several joined."""
    return {
        f"{ours}.weight": Weight(tuple(f"{name}.weight" for name in theirs), transposed),
        f"{ours}.bias": Weight(tuple(f"{name}.bias" for name in theirs)),
    }


def _gpt2_config(fields: dict[str, Any]) -> dict[str, Any]:
    _require(fields, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    _require(fields, embd_pdrop=fields.get("resid_pdrop", 0.1))  # we have one probability for both
    return {
        "vocab_size": fields["vocab_size"],
        "d_model": fields["n_embd"],
        "layers": fields["n_layer"],
        "heads": fields["n_head"],
        "dim_feedforward": fields.get("n_inner"),
        "max_positions": fields["n_positions"],
        "norm_eps": fields.get("layer_norm_epsilon", 1e-5),
        "activation": _activation(fields.get("activation_function", "gelu_new")),
        "tied_head": fields.get("tie_word_embeddings", True),
        "dropout": fields.get("resid_pdrop", 0.1),
        "attention_dropout": fields.get("attn_pdrop", 0.1),
        "initial_std": fields.get("initializer_range", 0.02),
    }


_GPT2 = {
    "embedding.weight": Weight(("wte.weight",)),
    "positions.weight": Weight(("wpe.weight",)),
    **_affine("layers.{}.norm1", "h.{}.ln_1"),
    **_affine("layers.{}.attention.qkv", "h.{}.attn.c_attn", transposed=True),
    **_affine("layers.{}.attention.out", "h.{}.attn.c_proj", transposed=True),
    **_affine("layers.{}.norm2", "h.{}.ln_2"),
    **_affine("layers.{}.feed_forward.linear1", "h.{}.mlp.c_fc", transposed=True),
    **_affine("layers.{}.feed_forward.linear2", "h.{}.mlp.c_proj", transposed=True),
    **_affine("norm", "ln_f"),
}


def _llama_config(fields: dict[str, Any]) -> dict[str, Any]:
    _require(fields, attention_bias=False, mlp_bias=False)
    if fields.get("pretraining_tp") not in (None, 1):
        raise ValueError(f"the option pretraining_tp={fields['pretraining_tp']!r} is not supported; expected 1")
    # transformers 5 keeps all of it in rope_parameters; 4 had rope_theta, and rope_scaling for what is not plain.
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"rotary positions with {rope} are not supported; expected rope_type 'default' of the whole head"
        )
    return {
        "vocab_size": fields["vocab_size"],
        "d_model": fields["hidden_size"],
        "layers": fields["num_hidden_layers"],
        "heads": fields["num_attention_heads"],
        "kv_heads": fields.get("num_key_value_heads"),
        "head_dim": fields.get("head_dim"),
        "dim_feedforward": fields["intermediate_size"],
        "max_positions": fields.get("max_position_embeddings", 2048),
        "positions": "rotary",
        "rope_theta": rope.get("rope_theta", fields.get("rope_theta", 10000.0)),
        "norm": "rms",
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "activation": _activation(fields.get("hidden_act", "silu")),
        "gated": True,
        "bias": False,
        "tied_head": fields.get("tie_word_embeddings", False),
        "attention_dropout": fields.get("attention_dropout", 0.0),
        "initial_std": fields.get("initializer_range", 0.02),
    }


_LLAMA_ATTENTION = "layers.{}.self_attn."
_LLAMA = {
    "embedding.weight": Weight(("embed_tokens.weight",)),
    "layers.{}.norm1.weight": Weight(("layers.{}.input_layernorm.weight",)),
    "layers.{}.attention.qkv.weight": Weight(tuple(f"{_LLAMA_ATTENTION}{x}_proj.weight" for x in "qkv")),
    "layers.{}.attention.out.weight": Weight((f"{_LLAMA_ATTENTION}o_proj.weight",)),
    "layers.{}.norm2.weight": Weight(("layers.{}.post_attention_layernorm.weight",)),
    "layers.{}.feed_forward.linear1.weight": Weight(("layers.{}.mlp.up_proj.weight",)),
    "layers.{}.feed_forward.linear_gate.weight": Weight(("layers.{}.mlp.gate_proj.weight",)),
    "layers.{}.feed_forward.linear2.weight": Weight(("layers.{}.mlp.down_proj.weight",)),
    "norm.weight": Weight(("norm.weight",)),
}


def _head(config: Any) -> dict[str, Weight]:
    return {} if config.tied_head else {"head.weight": Weight(("lm_head.weight",))}


def _tied_head(config: Any, embedding: str) -> dict[str, str]:
    return {"lm_head.weight": embedding} if config.tied_head else {}


def _bert_config(fields: dict[str, Any]) -> dict[str, Any]:
    _require(fields, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    return {
        "vocab_size": fields["vocab_size"],
        "d_model": fields["hidden_size"],
        "layers": fields["num_hidden_layers"],
        "heads": fields["num_attention_heads"],
        "dim_feedforward": fields["intermediate_size"],
        "max_positions": fields["max_position_embeddings"],
        "token_types": fields.get("type_vocab_size", 2),
        "norm_eps": fields.get("layer_norm_eps", 1e-12),
        "activation": _activation(fields.get("hidden_act", "gelu")),
        "dropout": fields.get("hidden_dropout_prob", 0.1),
        "attention_dropout": fields.get("attention_probs_dropout_prob", 0.1),
        "initial_std": fields.get("initializer_range", 0.02),
    }


_BERT_LAYER = "encoder.layer.{}."
_BERT = {
    "embedding.weight": Weight(("embeddings.word_embeddings.weight",)),
    "positions.weight": Weight(("embeddings.position_embeddings.weight",)),
    "token_types.weight": Weight(("embeddings.token_type_embeddings.weight",)),
    **_affine("norm", "embeddings.LayerNorm"),
    **_affine("layers.{}.attention.qkv", *(f"{_BERT_LAYER}attention.self.{x}" for x in ("query", "key", "value"))),
    **_affine("layers.{}.attention.out", f"{_BERT_LAYER}attention.output.dense"),
    **_affine("layers.{}.norm1", f"{_BERT_LAYER}attention.output.LayerNorm"),
    **_affine("layers.{}.feed_forward.linear1", f"{_BERT_LAYER}intermediate.dense"),
    **_affine("layers.{}.feed_forward.linear2", f"{_BERT_LAYER}output.dense"),
    **_affine("layers.{}.norm2", f"{_BERT_LAYER}output.LayerNorm"),
}


def _bert_head_config(fields: dict[str, Any], **head: Any) -> dict[str, Any]:
    if fields.get("problem_type") == "regression":
        raise ValueError("the option problem_type='regression' is not supported; expected a classification")
    labels = len(fields["id2label"]) if fields.get("id2label") else fields.get("num_labels", 2)
    dropout = fields.get("classifier_dropout")
    dropout = fields.get("hidden_dropout_prob", 0.1) if dropout is None else dropout
    return {"encoder": _bert_config(fields), "labels": labels, "dropout": dropout} | head


def _span_config(fields: dict[str, Any]) -> dict[str, Any]:
    config = _bert_head_config(fields, dropout=0.0)  # theirs has none
    if config["labels"] != 2:
        raise ValueError(f"the head has {config['labels']} scores a token; expected 2, of a span's first and last")
    return config


def _bert_head(
    model: str, architecture: str, head: str, config: Callable[[dict[str, Any]], dict[str, Any]], pooler: bool = False
) -> Family:
    """The family of a head on BERT; `head` is the name of its linear layer."""
    table = {f"encoder.{name}": weight for name, weight in _BERT.items()} | _affine("head", head)
    ignore = _BERT_BUFFER if pooler else f"{_BERT_BUFFER}|{_BERT_POOLER}"
    if pooler:
        table |= _affine("pooler", "pooler.dense")
    return Family(model, "bert.", lambda _: table, config, lambda _: {}, ignore, architecture)


def _t5_config(fields: dict[str, Any]) -> dict[str, Any]:
    _require(fields, is_encoder_decoder=True)
    gated, _, activation = fields.get("feed_forward_proj", "relu").rpartition("-")
    tied = fields.get("tie_word_embeddings", True)
    return {
        "vocab_size": fields["vocab_size"],
        "d_model": fields["d_model"],
        "layers": fields["num_layers"],
        "decoder_layers": fields.get("num_decoder_layers"),
        "heads": fields["num_heads"],
        "head_dim": fields["d_kv"],
        "dim_feedforward": fields["d_ff"],
        "buckets": fields.get("relative_attention_num_buckets", 32),
        "max_distance": fields.get("relative_attention_max_distance", 128),
        "norm_eps": fields.get("layer_norm_epsilon", 1e-6),
        # T5 1.1 says "gated-gelu" and means the approximation.
        "activation": "gelu_tanh" if gated and activation == "gelu" else _activation(activation),
        "gated": gated == "gated",
        "tied_head": tied,
        "scaled_head": fields.get("scale_decoder_outputs", tied),
        "dropout": fields.get("dropout_rate", 0.1),
        "start_token": fields.get("decoder_start_token_id", 0),
    }


def _t5_stack(ours: str, gated: bool, cross: bool) -> dict[str, Weight]:
    block, layer = f"{ours}.block.{{}}.layer", f"{ours}.layers.{{}}"
    last = 2 if cross else 1
    network = f"{block}.{last}.DenseReluDense"
    rows = {
        f"{ours}.bias.relative_attention_bias.weight": f"{ours}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        f"{layer}.norm1.weight": f"{block}.0.layer_norm.weight",
        f"{layer}.attention.out.weight": f"{block}.0.SelfAttention.o.weight",
        f"{layer}.norm2.weight": f"{block}.{last}.layer_norm.weight",
        f"{layer}.feed_forward.linear1.weight": f"{network}.{'wi_1' if gated else 'wi'}.weight",
        f"{layer}.feed_forward.linear2.weight": f"{network}.wo.weight",
        f"{ours}.norm.weight": f"{ours}.final_layer_norm.weight",
    }
    if gated:
        rows[f"{layer}.feed_forward.linear_gate.weight"] = f"{network}.wi_0.weight"
    if cross:
        rows[f"{layer}.norm_cross.weight"] = f"{block}.1.layer_norm.weight"
        rows[f"{layer}.cross.query.weight"] = f"{block}.1.EncDecAttention.q.weight"
        rows[f"{layer}.cross.out.weight"] = f"{block}.1.EncDecAttention.o.weight"
    table = {name: Weight((source,)) for name, source in rows.items()}
    table[f"{layer}.attention.qkv.weight"] = Weight(tuple(f"{block}.0.SelfAttention.{x}.weight" for x in "qkv"))
    if cross:
        table[f"{layer}.cross.key_value.weight"] = Weight(tuple(f"{block}.1.EncDecAttention.{x}.weight" for x in "kv"))
    return table


def _t5_table(config: Any) -> dict[str, Weight]:
    stacks = _t5_stack("encoder", config.gated, cross=False) | _t5_stack("decoder", config.gated, cross=True)
    return {"embedding.weight": Weight(("shared.weight",))} | stacks | _head(config)


def _t5_copies(config: Any) -> dict[str, str]:
    return {f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")} | _tied_head(
        config, "shared.weight"
    )


def _mt5_config(fields: dict[str, Any]) -> dict[str, Any]:
    return _t5_config(fields) | {"scaled_head": False}  # whether the head is tied or not


_BERT_BUFFER = r"embeddings\.position_ids$"
_BERT_POOLER = r"^(bert\.)?pooler\."
# Older checkpoints have one, which nothing reads.
_CROSS_BIAS = r"EncDecAttention\.relative_attention_bias\."

# By the "model_type" of their config.json: a family for each of our classes that reads it.
FAMILIES: dict[str, tuple[Family, ...]] = {
    "bert": (
        Family(
            "Encoder",
            "bert.",
            lambda config: _BERT,
            _bert_config,
            lambda config: {},
            rf"{_BERT_BUFFER}|{_BERT_POOLER}|^cls\.",  # cls: the heads of pretraining
        ),
        _bert_head(
            "SequenceClassifier",
            "BertForSequenceClassification",
            "classifier",
            functools.partial(_bert_head_config, pooling="cls", pooler=True),
            pooler=True,
        ),
        _bert_head("TokenTagger", "BertForTokenClassification", "classifier", _bert_head_config),
        _bert_head("SpanAnswerer", "BertForQuestionAnswering", "qa_outputs", _span_config),
    ),
    "gpt2": (
        Family(
            "DecoderLM",
            "transformer.",
            lambda config: _GPT2 | _head(config),
            _gpt2_config,
            lambda config: _tied_head(config, "wte.weight"),
            r"\.attn\.(masked_)?bias$",  # the causal mask, which older versions stored
        ),
    ),
    "llama": (
        Family(
            "DecoderLM",
            "model.",
            lambda config: _LLAMA | _head(config),
            _llama_config,
            lambda config: _tied_head(config, "embed_tokens.weight"),
            r"\.rotary_emb\.inv_freq$",
        ),
    ),
    "t5": (Family("EncoderDecoder", "", _t5_table, _t5_config, _t5_copies, _CROSS_BIAS),),
    "mt5": (Family("EncoderDecoder", "", _t5_table, _mt5_config, _t5_copies, _CROSS_BIAS),),
}
