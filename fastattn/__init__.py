"""fastattn: fused Transformer kernels for PyTorch, for training and inference.

fastattn.accelerate(model)     a pretrained or hand-written model, faster, in place
fastattn.nn                    torch.nn's Transformer modules, drop in
fastattn.models                whole models on the kernels: train them, or read pretrained weights
fastattn.denoising             collators that corrupt text for pre-training: BERT's, BART's, T5's
fastattn.losses                what they are trained by: language modelling, denoising, contrastive
fastattn.generation            tokens from a decoder: greedy, sampled, by beam search, whole or as a stream
fastattn.inspect               what attention attends to, of chosen layers, heads and queries; fastattn.plot draws it
fastattn.<op>                  the functions below them
fastattn.explain, use_backend  which kernel runs, and choosing it
fastattn.verify                the numerics rule, for our kernels and for your model
"""

from . import denoising, generation, inspect, losses, models, nn, plot, verify
from .accelerate import accelerate, restore
from .dispatch import explain, use_backend
from .ops import (
    additive_attention,
    attention,
    attention_summary,
    attention_varlen,
    attention_with_kvcache,
    decoder_layer,
    encoder_layer,
    feed_forward,
    info_nce,
    layer_norm,
    linear,
    linear_cross_entropy,
    rms_norm,
    rotary_embedding,
)

__version__ = "0.1.0"

__all__ = [
    "accelerate",
    "additive_attention",
    "attention",
    "attention_summary",
    "attention_varlen",
    "attention_with_kvcache",
    "decoder_layer",
    "denoising",
    "encoder_layer",
    "explain",
    "feed_forward",
    "generation",
    "info_nce",
    "inspect",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "losses",
    "models",
    "nn",
    "plot",
    "restore",
    "rms_norm",
    "rotary_embedding",
    "use_backend",
    "verify",
]
