"""Whole models on fastattn's kernels, small enough to read.

DecoderLM      GPT-like and Llama-like language models, for training and, with a cache, for generation
KeyValueCache  what a decoder remembers while it generates
"""

from .cache import KeyValueCache
from .decoder import DecoderLM, DecoderLMConfig, LanguageModelOutput

__all__ = ["DecoderLM", "DecoderLMConfig", "KeyValueCache", "LanguageModelOutput"]
