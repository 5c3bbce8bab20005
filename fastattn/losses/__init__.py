"""Training objectives over the fused ops: no logits, no matrix of scores.

language_modelling_loss         each token is asked for the next one
masked_language_modelling_loss  corrupted places are asked for what stood there; no other position meets the vocabulary
token_statistics                how many tokens a language model gets right
next_token_targets              the shift of labels behind these
count_targets                   how many labels count, to normalise accumulated gradients by
contrastive_loss                InfoNCE: one- and two-sided, hard negatives, several positives, across ranks
encode_twice                    SimCSE's two dropout passes, in one

LanguageModellingLoss, MaskedLanguageModellingLoss and ContrastiveLoss are the modules: they hold the settings and what is
learnt (a head's transform, the temperature).
"""

from .contrastive import ContrastiveLoss, contrastive_loss, encode_twice
from .language_modelling import (
    LanguageModellingLoss,
    MaskedLanguageModellingLoss,
    TokenStatistics,
    count_targets,
    language_modelling_loss,
    masked_language_modelling_loss,
    next_token_targets,
    token_statistics,
)

__all__ = [
    "ContrastiveLoss",
    "LanguageModellingLoss",
    "MaskedLanguageModellingLoss",
    "TokenStatistics",
    "contrastive_loss",
    "count_targets",
    "encode_twice",
    "language_modelling_loss",
    "masked_language_modelling_loss",
    "next_token_targets",
    "token_statistics",
]
