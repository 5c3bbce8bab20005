"""A tokenizer of one's own: byte-pair encoding, trained on the text that a model is to be trained on."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def train_tokenizer(texts: list[str], words: int, special_tokens: list[str]) -> Tokenizer:
    """A vocabulary of so many tokens, the special ones first. It is of bytes: any text can be written, and read back as it was.

    Source: Sennrich et al., 2016; of bytes Radford et al., 2019 (GPT-2).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
