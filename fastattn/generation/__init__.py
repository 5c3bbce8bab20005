"""Tokens from a decoder, or an encoder and decoder: greedy, sampled, or by beam search, all at once or as they come.

generate(model, prompts, …)    the new tokens of each prompt
stream(model, prompts, …)      the same, step by step
"""

from .beams import BeamSearch
from .decoding import generate, stream
from .sampling import Sampler

__all__ = ["BeamSearch", "Sampler", "generate", "stream"]
