"""What the tests of accelerate() on Hugging Face models share: small random models of every family, inputs, comparisons."""

import copy

import torch
import transformers
from torch import nn

import fastattn.integrations.transformers  # noqa: F401  (registers "fastattn")
from fastattn.accelerate import accelerate

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
