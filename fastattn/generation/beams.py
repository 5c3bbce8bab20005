"""Beam search: of all continuations of a prompt's best `beams` unfinished texts, again the best are kept.

A text's score is the sum of its tokens' log-probabilities; a finished one's is divided by length ** length_penalty, where length
counts new tokens. Each step:

    candidates (batch, beams · vocabulary)      the best beams · max(2, 1 + stop tokens) of them, so that enough go on
        among the first `beams`: those that end are offered to the finished texts, of which the best `beams` stay
        of all: the best `beams` that do not end go on

A prompt is done when its finished texts are `beams` (early_stopping True), or when no unfinished one can become better: as
judged by its score over its length now (False), or over the length that is best for it ("never"). The rules, ties apart, are
those of transformers' `generate`, and so are the answers.
"""

from typing import Literal

import torch
from torch import Tensor

_NEVER = -1.0e9  # the score of what does not exist; finite, so that it can be divided and compared


class BeamSearch:
    """The state of one search.

    Args:
        batch, beams: prompts, and texts kept for each.
        max_new_tokens: length at which every text ends.
        stop_tokens: (count,), int64; a text ends with any of them. May be empty.
        length_penalty: above 0 favours long texts, below 0 short ones.
        early_stopping: True, False or "never", see above.
    """

    def __init__(
        self,
        batch: int,
        beams: int,
        max_new_tokens: int,
        stop_tokens: Tensor,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
    ) -> None:
        device = stop_tokens.device
        self.beams, self.max_new_tokens, self.stop_tokens = beams, max_new_tokens, stop_tokens
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.length = 0
        self._candidates = beams * max(2, 1 + stop_tokens.numel())
        shape = (batch, beams)
        self.texts = torch.zeros(*shape, max_new_tokens, dtype=torch.int64, device=device)
        # The first step's beams are copies of the prompt: only one of them may be continued.
        self.scores = torch.full(shape, _NEVER, device=device)
        self.scores[:, 0] = 0.0
        self.finished_texts = self.texts.clone()
        self.finished_lengths = torch.zeros(shape, dtype=torch.int64, device=device)
        self.finished_scores = torch.full(shape, _NEVER, device=device)
        self.finished = torch.zeros(shape, dtype=torch.bool, device=device)
        self._improvable = torch.ones(batch, 1, dtype=torch.bool, device=device)
        self.done = False

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the next tokens' logits (batch · beams, vocabulary); sets `done`.

        Returns:
            tokens (batch · beams,): what to continue with; rows (batch · beams,): which row each continues.
        """
        batch, beams = self.scores.shape
        log_probs = logits.float().log_softmax(-1).view(batch, beams, -1)
        vocabulary = log_probs.shape[-1]
        every = (log_probs + self.scores[:, :, None]).view(batch, -1)
        scores, places = every.topk(min(self._candidates, every.shape[1]))
        parents, tokens = places // vocabulary, places % vocabulary
        texts = _take(self.texts, parents)
        texts[:, :, self.length] = tokens
        self.length += 1
        last = self.length == self.max_new_tokens
        ends = torch.ones_like(tokens, dtype=torch.bool) if last else torch.isin(tokens, self.stop_tokens)

        self._finish(texts, scores, ends)
        running = scores + ends * _NEVER
        self.scores, best = running.topk(beams)
        self.texts = _take(texts, best)
        self._judge(bool(ends.all()))
        rows = parents.gather(1, best) + torch.arange(batch, device=best.device)[:, None] * beams
        return tokens.gather(1, best).flatten(), rows.flatten()

    def best(self, count: int = 1) -> list[list[Tensor]]:
        """For each prompt its best `count` finished texts, best first, each with the stop token that ended it."""
        rows = zip(self.finished_texts, self.finished_lengths.tolist())
        return [[text[:length] for text, length in zip(texts[:count], lengths)] for texts, lengths in rows]

    def _finish(self, texts: Tensor, scores: Tensor, ends: Tensor) -> None:
        offered = ends.clone()
        offered[:, self.beams :] = False
        closed = ~self._improvable
        if self.early_stopping is True:
            closed = closed | self.finished.all(1, keepdim=True)
        final = (scores / self.length**self.length_penalty).masked_fill(closed | ~offered, float("-inf"))
        self.finished_scores, best = torch.cat((self.finished_scores, final), 1).topk(self.beams)
        lengths = torch.full_like(best[:, :1], self.length).expand_as(offered)
        self.finished_texts = _take(torch.cat((self.finished_texts, texts), 1), best)
        self.finished_lengths = torch.cat((self.finished_lengths, lengths), 1).gather(1, best)
        self.finished = torch.cat((self.finished, offered), 1).gather(1, best)

    def _judge(self, all_end: bool) -> None:
        longest = self.early_stopping == "never" and self.length_penalty > 0.0
        length = self.max_new_tokens if longest else self.length
        possible = self.scores[:, :1] / length**self.length_penalty
        worst = self.finished_scores.min(1, keepdim=True).values.where(self.finished, _NEVER)
        self._improvable = self._improvable & (possible > worst).any(1, keepdim=True)
        complete = self.early_stopping is True and bool(self.finished.all())
        self.done = all_end or complete or not bool(self._improvable.any())


def _take(texts: Tensor, which: Tensor) -> Tensor:
    """(batch, m, length) and (batch, n) to (batch, n, length)."""
    return texts.gather(1, which[:, :, None].expand(-1, -1, texts.shape[2]))
