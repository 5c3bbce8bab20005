"""What collators need of a Hugging Face tokenizer. It is only asked, so transformers need not be installed."""

import re
from typing import Any

MARKERS = (
    "##",
    "Ġ",
    "▁",
)  # WordPiece's, of pieces that continue a word; byte-level BPE's and SentencePiece's, of first ones
ROLES = ("bos", "eos", "sep", "pad", "cls", "mask")
SENTINEL = re.compile(r"▁?<extra_id_(\d+)>")


def common(tokenizer: Any, pad_id: int | None = None) -> dict[str, Any]:
    """Arguments of every collator: vocab_size, pad_id, special_ids. pad_id: to be used in place of the tokenizer's."""
    for name in ("get_vocab", "all_special_ids", "pad_token_id"):
        if not hasattr(tokenizer, name):
            raise TypeError(f"tokenizer is a {type(tokenizer).__name__} without {name}; expected one of Hugging Face's")
    pad = tokenizer.pad_token_id if pad_id is None else pad_id
    if pad is None:
        raise ValueError(
            "the tokenizer has no token for padding: add one, tokenizer.add_special_tokens({'pad_token': '[PAD]'}), and room "
            "for it to the model's embedding"
        )
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
    twins = [role for role, token in roles.items() if token == pad and role != "pad"]
    if twins:
        raise ValueError(
            f"the tokenizer's token {pad} is for padding and is its {twins[0]}_token, too, so that neither could be told from "
            "the other: add one, tokenizer.add_special_tokens({'pad_token': '[PAD]'}), and room for it to the model's embedding"
        )
    # Unknown text is text. GPT-like tokenizers have one token for the end and for what is unknown: that stays special.
    unknown = {getattr(tokenizer, "unk_token_id", None)} - set(roles.values())
    return {
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "pad_id": pad,
        "special_ids": [token for token in tokenizer.all_special_ids if token not in unknown],
    }


def mask_id(tokenizer: Any) -> int:
    token = getattr(tokenizer, "mask_token_id", None)
    if token is None:
        raise ValueError(
            "the tokenizer has no mask token: add one, tokenizer.add_special_tokens({'mask_token': '[MASK]'}), and room for "
            "it to the model's embedding"
        )
    return token


def sentinel_ids(tokenizer: Any) -> list[int]:
    """T5's <extra_id_0>, <extra_id_1>, … in this order."""
    found = {
        int(match[1]): token for piece, token in tokenizer.get_vocab().items() if (match := SENTINEL.fullmatch(piece))
    }
    if not found:
        raise ValueError(
            "the tokenizer has no sentinels: add them, tokenizer.add_tokens([f'<extra_id_{i}>' for i in range(100)], "
            "special_tokens=True), and room for them to the model's embedding; or pass sentinel_ids"
        )
    return [found[number] for number in sorted(found)]


def continuation_ids(tokenizer: Any, marker: str) -> list[int]:
    """The pieces that go on with the word of the piece before them."""
    if marker not in MARKERS:
        raise ValueError(f"word_marker is {marker!r}; expected one of {', '.join(map(repr, MARKERS))}")
    pieces = tokenizer.get_vocab()
    marked = {
        token for piece, token in pieces.items() if piece.startswith(marker) and (piece != marker or marker != "##")
    }
    if not marked:
        raise ValueError(
            f"no token of the tokenizer begins with word_marker {marker!r}; expected the marker that it uses"
        )
    return sorted(marked if marker == "##" else set(pieces.values()) - marked)
