"""Language models with equal weights: Hugging Face's, and fastattn.models.DecoderLM read from its folder."""

import functools
import importlib
import os
import tempfile
from typing import Any

import torch
from torch import nn

from fastattn.models import DecoderLM

NEEDS = ("transformers", "safetensors")


@functools.lru_cache(maxsize=1)  # a case and its definition ask for the same
def pair(kind: str, dim: int, layers: int, words: int) -> tuple[DecoderLM, nn.Module]:
    """(ours, theirs) in float32: "gpt" is GPT-2's architecture, "llama" Llama's; 64 features a head, random weights."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers: Any = importlib.import_module("transformers")

    transformers.utils.logging.disable_progress_bar()
    heads = max(1, dim // 64)
    tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    with torch.device("cpu"):
        if kind == "gpt":
            sizes = {"n_positions": 1024, "n_embd": dim, "n_layer": layers, "n_head": heads}
            none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=words, **sizes, **none, **tokens))
        else:
            sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 1024}
            sizes |= {"hidden_size": dim, "intermediate_size": -(-8 * dim // 3 // 32) * 32}  # of three matrices
            theirs = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(vocab_size=words, tie_word_embeddings=True, **sizes, **tokens)
            )
        for parameter in theirs.parameters():
            parameter.data *= 4  # no two logits are close, so that rounding decides nothing
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = DecoderLM.from_pretrained(folder)
    return ours, theirs.eval()
