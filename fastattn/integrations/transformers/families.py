"""Which class of which model is fused how: the table that a new model family is added to.

A row names a class of `transformers.models.<family>.modeling_<family>`, a pattern and where the class keeps the
pattern's parts. Attention needs no row: every model that dispatches it reaches `attention.attention_forward`. Norms
that are `nn.LayerNorm` need none either (integrations/torch_nn.py).
"""

from typing import Any

from transformers.activations import FastGELUActivation, GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation
from transformers.pytorch_utils import Conv1D

from fastattn.nn.feed_forward import ACTIVATION_MODULES, LINEAR_MODULES

from .. import patterns, swap
from .encoder_layer import EncoderLayer
from .packing import PackedEncoder


def register() -> None:
    """Fills the tables. GPT-2's matrices are stored (in, out) and are read as transposed views."""
    LINEAR_MODULES[Conv1D] = lambda conv: (conv.weight.t(), conv.bias)
    ACTIVATION_MODULES[GELUActivation] = lambda _: "gelu"
    ACTIVATION_MODULES[SiLUActivation] = lambda _: "silu"
    for tanh_form in (NewGELUActivation, FastGELUActivation, GELUTanh):
        ACTIVATION_MODULES[tanh_form] = lambda _: "gelu_tanh"

    for family, prefix in _LIKE_BERT.items():
        _like_bert(family, prefix)
    for family, prefix in _LIKE_LLAMA.items():
        _like_llama(family, prefix)
    for family, prefix in _LIKE_T5.items():
        _like_t5(family, prefix)
    _row("distilbert", "Transformer", PackedEncoder)
    _row(
        "distilbert",
        "TransformerBlock",
        patterns.PostNormBlock,
        attention="attention",
        norm1="sa_layer_norm",
        mlp="ffn",
        norm2="output_layer_norm",
    )
    _row(
        "distilbert",
        "FFN",
        patterns.ChunkedFeedForward,
        w1="lin1",
        activation="activation",
        w2="lin2",
        output_dropout="dropout",
    )
    _row("gpt2", "GPT2Block", patterns.PreNormBlock, norm1="ln_1", attention="attn", norm2="ln_2", mlp="mlp")
    _row("gpt2", "GPT2MLP", patterns.FeedForward, w1="c_fc", activation="act", w2="c_proj", output_dropout="dropout")


_LIKE_BERT = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
}


def _like_bert(family: str, prefix: str) -> None:
    _row(family, f"{prefix}Encoder", PackedEncoder)
    _row(
        family,
        f"{prefix}SelfOutput",
        patterns.DenseAddNorm,
        dense="dense",
        dropout="dropout",
        norm="LayerNorm",
    )
    _row(
        family,
        f"{prefix}Layer",
        EncoderLayer,
        w1="intermediate.dense",
        activation="intermediate.intermediate_act_fn",
        w2="output.dense",
        dropout="output.dropout",
        norm="output.LayerNorm",
        attention="attention",
        self_attention="attention.self",
        attention_output="attention.output",
        intermediate="intermediate",
        output="output",
    )


_LIKE_LLAMA = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def _like_llama(family: str, prefix: str) -> None:
    _row(family, f"{prefix}RMSNorm", patterns.RMSNorm, weight="weight", eps="variance_epsilon")
    _row(
        family,
        f"{prefix}MLP",
        patterns.FeedForward,
        w1="up_proj",
        gate="gate_proj",
        activation="act_fn",
        w2="down_proj",
    )
    _row(
        family,
        f"{prefix}DecoderLayer",
        patterns.PreNormBlock,
        norm1="input_layernorm",
        attention="self_attn",
        norm2="post_attention_layernorm",
        mlp="mlp",
    )


_LIKE_T5 = {"t5": "T5", "mt5": "MT5"}


def _like_t5(family: str, prefix: str) -> None:
    _row(family, f"{prefix}LayerNorm", patterns.RMSNorm, weight="weight", eps="variance_epsilon")
    _row(family, f"{prefix}DenseActDense", patterns.FeedForward, w1="wi", activation="act", dropout="dropout", w2="wo")
    _row(
        family,
        f"{prefix}DenseGatedActDense",
        patterns.FeedForward,
        gate="wi_0",
        w1="wi_1",
        activation="act",
        dropout="dropout",
        w2="wo",
    )


def _row(family: str, name: str, fused: type, **paths: str) -> None:
    settings: dict[str, Any] = {"paths": paths} if paths else {}
    swap.register(f"transformers.models.{family}.modeling_{family}.{name}", fused, **settings)
