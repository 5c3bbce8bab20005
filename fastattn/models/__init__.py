"""Whole models on fastattn's kernels, small enough to read.

DecoderLM           GPT-like and Llama-like language models, for training and, with a cache, for generation
KeyValueCache       what a decoder remembers while it generates
Encoder             BERT-like encoders, and heads on them:
SequenceClassifier  a class, or several, for each sequence
TokenTagger         a class for each token
SpanAnswerer        where in the sequence the answer stands
Embedder            a vector for each sequence
EncoderDecoder      T5-like models from sequences to sequences
EncoderDecoderCache what such a model remembers while it generates

All have save_pretrained and from_pretrained; DecoderLM also reads Hugging Face's GPT-2 and Llama, Encoder and the heads for
classes, tags and spans BERT, EncoderDecoder T5.
"""

from .cache import EncoderDecoderCache, KeyValueCache
from .decoder import DecoderLM, DecoderLMConfig, LanguageModelOutput
from .encoder import Encoder, EncoderConfig
from .encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from .heads import Embedder, HeadConfig, HeadOutput, SequenceClassifier, SpanAnswerer, SpanOutput, TokenTagger

__all__ = [
    "DecoderLM",
    "DecoderLMConfig",
    "Embedder",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderCache",
    "EncoderDecoderConfig",
    "HeadConfig",
    "HeadOutput",
    "KeyValueCache",
    "LanguageModelOutput",
    "SequenceClassifier",
    "SpanAnswerer",
    "SpanOutput",
    "TokenTagger",
]
