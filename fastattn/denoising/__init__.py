"""Denoising objectives: collators that spoil tokenised text, for a model to restore. They come between tokenizer and model.

MaskTokens      an encoder says what stood at the chosen 15 % of places: Devlin et al. 2019, "BERT: Pre-training of Deep
                Bidirectional Transformers for Language Understanding"
InfillText      a decoder writes the whole text again, where each gap, of unknown length, shows as one mask token: Lewis et
                al. 2020, "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language Generation, Translation,
                and Comprehension"
CorruptSpans    a decoder writes the gaps alone, each behind the sentinel that stands in its place: Raffel et al. 2020,
                "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (T5)

    collate = MaskTokens.from_tokenizer(tokenizer, seed=1)
    loader = DataLoader(encoded_texts, batch_size=32, collate_fn=collate)     # each item as tokenizer(text) gives it

A collator takes a batch of tokenised texts and returns padded int64 tensors, `input_ids`, `attention_mask` and `labels`, as
`fastattn.models` and Hugging Face's models take them. See `Collator` for what may be passed, and for seeds and workers.
"""

from .collator import Collator
from .corrupt_spans import CorruptSpans
from .infill_text import InfillText
from .mask_tokens import MaskTokens

__all__ = ["Collator", "CorruptSpans", "InfillText", "MaskTokens"]
