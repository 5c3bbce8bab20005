"""The loop: prompts are read once, packed, and then a token of each text at a time, against a cache of keys and values."""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastattn.ops import _checks

from .beams import BeamSearch
from .sampling import Sampler


class Cache(Protocol):
    """What a model remembers of the texts it writes, a row each."""

    def reorder(self, rows: Tensor) -> None:
        """Makes row i what row rows[i] was; the number of rows may change."""


CacheT = TypeVar("CacheT", bound=Cache)


class Decoder(Protocol[CacheT]):
    """What a model must have; `fastattn.models.DecoderLM` and `EncoderDecoder` have it.

    new_cache(batch, longest, new)      room for `batch` prompts of at most `longest` tokens, and `new` tokens behind each
    prefill(input_ids, cu_seqlens, max_seqlen, cache)
                                        reads the packed prompts (tokens,); (batch, d_model), what the next tokens follow from
    decode(input_ids, cache)            reads a token more of each row, (rows, 1); (rows, 1, d_model), likewise
    logits(hidden)                      (rows, d_model) to (rows, vocabulary)
    """

    def new_cache(self, batch: int, longest: int, new: int) -> CacheT: ...
    def prefill(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, cache: CacheT) -> Tensor: ...
    def decode(self, input_ids: Tensor, cache: CacheT) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


def generate(
    model: Decoder,
    prompts: Tensor | Sequence[Tensor | Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    stop_tokens: int | Sequence[int] = (),
    seed: int | None = None,
) -> list[Tensor]:
    """The tokens that the model goes on with after each prompt, or, an encoder and decoder, writes when it has read it.

    Prompts of unequal lengths are packed, so that no padding is computed, and a text that has ended takes no further part.
    The answer to a prompt does not depend on the others but for rounding and, where tokens are drawn, for the order of draws.

    Args:
        model: `fastattn.models.DecoderLM`, `EncoderDecoder` or another `Decoder`, in eval mode.
        prompts: for each text its token numbers, at least one; a tensor (batch, seq) of texts of one length.
        max_new_tokens: how many to add at most.
        temperature, top_k, top_p: see `Sampler`; temperature 0 takes the most probable token.
        num_beams: above 1, beam search (see `BeamSearch`), which draws nothing.
        length_penalty, early_stopping: of beam search.
        stop_tokens: numbers of the tokens that end a text.
        seed: of the draws; None takes torch's default generator.

    Returns:
        A list with a (new tokens,) int64 tensor for each prompt; a stop token that ended it is its last.

    Raises:
        TypeError, ValueError: arguments that do not fit together, an empty prompt, more tokens than the model has positions for.
    """
    if _checks.integer("num_beams", num_beams) < 1:
        raise ValueError(f"num_beams must be at least 1, got {num_beams}")
    if num_beams == 1:
        given = {"length_penalty": length_penalty != 1.0, "early_stopping": early_stopping is not False}
        for name in (name for name, is_given in given.items() if is_given):
            raise ValueError(f"{name} is of beam search; set num_beams above 1, or leave it out")
        new: list[list[int]] = [[] for _ in prompts]
        steps = stream(
            model,
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stop_tokens,
            seed=seed,
        )
        for step in steps:
            for prompt, token in step:
                new[prompt].append(token)
        return [torch.tensor(tokens, dtype=torch.int64) for tokens in new]
    if temperature != 0.0 or top_k is not None or top_p is not None or seed is not None:
        raise ValueError("beam search draws nothing; leave out temperature, top_k, top_p and seed, or num_beams")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping must be True, False or 'never', got {early_stopping!r}")
    penalty = _checks.number("length_penalty", length_penalty)
    return _beam_search(model, prompts, max_new_tokens, num_beams, penalty, early_stopping, stop_tokens)


def stream(
    model: Decoder,
    prompts: Tensor | Sequence[Tensor | Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: int | Sequence[int] = (),
    seed: int | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """As `generate` without beams, yielding after each step a list of (prompt's place in `prompts`, new token)."""
    sampler = Sampler(temperature, top_k, top_p)
    packed, stops = _prepare(model, prompts, max_new_tokens, stop_tokens)
    generator = None
    if seed is not None:
        generator = torch.Generator(packed[0].device).manual_seed(_checks.integer("seed", seed))
    return _steps(model, packed, max_new_tokens, sampler, stops, generator)


@torch.inference_mode()
def _first(model: Decoder, packed: tuple[Tensor, Tensor, int], max_new_tokens: int) -> tuple[Tensor, Cache]:
    """Logits of each prompt's next token, and the cache that has the prompts."""
    ids, cu_seqlens, longest = packed
    cache = model.new_cache(cu_seqlens.shape[0] - 1, longest, max_new_tokens)
    return model.logits(model.prefill(ids, cu_seqlens, longest, cache)), cache


@torch.inference_mode()
def _next(model: Decoder, tokens: Tensor, cache: Cache) -> Tensor:
    return model.logits(model.decode(tokens[:, None], cache)[:, 0])


def _steps(
    model: Decoder,
    packed: tuple[Tensor, Tensor, int],
    max_new_tokens: int,
    sampler: Sampler,
    stops: Tensor,
    generator: torch.Generator | None,
) -> Iterator[list[tuple[int, int]]]:
    logits, cache = _first(model, packed, max_new_tokens)
    prompts = list(range(logits.shape[0]))
    for step in range(1, max_new_tokens + 1):
        tokens = sampler.choose(logits, generator)
        yield list(zip(prompts, tokens.tolist()))
        if step == max_new_tokens:
            return
        rows = torch.isin(tokens, stops, invert=True).nonzero().squeeze(1) if stops.numel() else None
        if rows is not None and rows.numel() < len(prompts):
            prompts = [prompts[row] for row in rows.tolist()]
            if not prompts:
                return
            with torch.inference_mode():
                cache.reorder(rows)
            tokens = tokens[rows]
        logits = _next(model, tokens, cache)


def _beam_search(model, prompts, max_new_tokens, beams, length_penalty, early_stopping, stop_tokens) -> list[Tensor]:
    packed, stops = _prepare(model, prompts, max_new_tokens, stop_tokens)
    logits, cache = _first(model, packed, max_new_tokens)
    search = BeamSearch(len(prompts), beams, max_new_tokens, stops, length_penalty, early_stopping)
    rows = torch.arange(len(prompts), device=logits.device).repeat_interleave(beams)
    logits = logits[rows]
    tokens, parents = search.advance(logits)
    rows = rows[parents]  # the cache still has a row a prompt
    while not search.done:
        with torch.inference_mode():
            cache.reorder(rows)
        tokens, rows = search.advance(_next(model, tokens, cache))
    return [texts[0].cpu() for texts in search.best()]


def _prepare(model, prompts, max_new_tokens, stop_tokens) -> tuple[tuple[Tensor, Tensor, int], Tensor]:
    """The prompts end to end, where each begins, and the longest; the stop tokens as a tensor."""
    if _checks.integer("max_new_tokens", max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if isinstance(model, nn.Module) and model.training:
        raise ValueError("the model is in training mode, in which dropout would change its answers; call model.eval()")
    if isinstance(prompts, Tensor) and prompts.ndim != 2:
        raise ValueError(
            f"prompts has {prompts.ndim} dimensions; expected (batch, seq), or a list with a vector for each prompt"
        )
    if len(prompts) == 0:
        raise ValueError("prompts is empty; give at least one prompt")
    ids = [torch.as_tensor(prompt) for prompt in prompts]
    for place, prompt in enumerate(ids):
        if prompt.ndim != 1 or prompt.numel() == 0:
            raise ValueError(
                f"prompt {place} has shape {tuple(prompt.shape)}; expected (tokens,) with at least one token"
            )
        if prompt.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"prompt {place} has dtype {prompt.dtype}; expected token numbers, int64 or int32")
    device = next(model.parameters()).device if isinstance(model, nn.Module) else ids[0].device
    lengths = torch.tensor([0, *(len(prompt) for prompt in ids)])
    packed = torch.cat([prompt.to(device, torch.int64) for prompt in ids])
    stops = torch.as_tensor(stop_tokens, dtype=torch.int64, device=device).reshape(-1)
    return (packed, lengths.cumsum(0).to(device, torch.int32), int(lengths.max())), stops
