"""Which token comes next? Exactly the distribution that was asked for, for each row of a batch by itself."""

import random
from collections import Counter
from typing import Any

import torch

from adapters.local.frames import Sampling

GREEDY_BELOW = 1e-5
HEAD = 256


class Chooser:
    """What the choice of one sequence's tokens depends on, beside the logits."""

    __slots__ = ("counts", "rng", "sampling")

    def __init__(self, sampling: Sampling, seed: int | None) -> None:
        self.sampling = sampling
        self.rng = random.Random(None if seed is None else seed % 2**64)  # random drops the sign
        self.counts: Counter[int] = Counter()

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature < GREEDY_BELOW


def choose(logits: Any, choosers: list[Chooser]) -> list[int]:
    """
    One token for each row of *logits* [rows, vocabulary], counted in its chooser.

    A drawn token costs its chooser one random number, so that neither the neighbours nor the way it is computed change
    what a seed gives.
    """
    edited = logits.float()
    if any(_edits(chooser) for chooser in choosers):
        edited = edited.clone()
        for row, chooser in zip(edited, choosers, strict=True):
            _edit(row, chooser)
    tokens = edited.argmax(-1)
    drawn = [index for index, chooser in enumerate(choosers) if not chooser.greedy]
    if drawn:
        tokens[drawn] = _draw(edited[drawn], [choosers[index] for index in drawn])
    chosen: list[int] = tokens.tolist()
    for chooser, token in zip(choosers, chosen, strict=True):
        chooser.counts[token] += 1
    return chosen


def _edits(chooser: Chooser) -> bool:
    sampling = chooser.sampling
    return bool(sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty)


def _edit(row: Any, chooser: Chooser) -> None:
    """OpenAI's formula: logit - count x frequency_penalty - (count > 0) x presence_penalty, over what was generated."""
    sampling = chooser.sampling
    if chooser.counts and (sampling.presence_penalty or sampling.frequency_penalty):
        seen = torch.tensor(list(chooser.counts), device=row.device)
        counts = torch.tensor(list(chooser.counts.values()), dtype=row.dtype, device=row.device)
        row[seen] -= counts * sampling.frequency_penalty + sampling.presence_penalty
    if sampling.logit_bias:
        biased = torch.tensor(list(sampling.logit_bias), device=row.device)
        row[biased] += torch.tensor(list(sampling.logit_bias.values()), dtype=row.dtype, device=row.device)


def _draw(logits: Any, choosers: list[Chooser]) -> Any:
    """
    Inverse CDF over the tokens in order of their probability.

    Mostly the likeliest few hundred decide, which saves sorting the vocabulary; the rows where they do not are drawn
    again, with the same random number, from all of it.
    """
    temperatures = _column([chooser.sampling.temperature for chooser in choosers], logits)
    uniform = _column([chooser.rng.random() for chooser in choosers], logits, torch.float64)
    scaled = logits / temperatures
    tokens, decided = _draw_from(scaled, HEAD, uniform, choosers)
    if not bool(decided.all()):
        open_rows = (~decided).nonzero()[:, 0]
        among = [choosers[index] for index in open_rows.tolist()]
        tokens[open_rows], _ = _draw_from(scaled[open_rows], scaled.shape[1], uniform[open_rows], among)
    return tokens


def _draw_from(scaled: Any, size: int, uniform: Any, choosers: list[Chooser]) -> tuple[Any, Any]:
    """
    Tokens drawn from the *size* likeliest, and for which rows these were enough to be exact.

    top_k comes first, then top_p over the mass that it keeps, then min_p: transformers' order. One token always stays.
    """
    vocabulary = scaled.shape[1]
    size = min(size, vocabulary)
    top, ids = torch.topk(scaled, size)
    chances = (top - torch.logsumexp(scaled, -1, keepdim=True)).double().exp()
    mass = chances.cumsum(-1)
    ranks = [min(chooser.sampling.top_k or vocabulary, vocabulary) for chooser in choosers]
    top_k = _column(ranks, scaled, torch.long)
    top_p = _column([chooser.sampling.top_p for chooser in choosers], scaled, torch.float64)
    min_p = _column([chooser.sampling.min_p for chooser in choosers], scaled, torch.float64)

    kept_by_k = torch.where(top_k <= size, mass.gather(1, (top_k - 1).clamp(max=size - 1)), 1.0)
    keep = torch.arange(size, device=scaled.device) < top_k
    keep &= (mass - chances < top_p * kept_by_k) | (top_p >= 1)
    keep &= chances >= min_p * chances[:, :1]
    keep[:, 0] = True

    kept = (chances * keep).cumsum(-1)
    free = (top_k >= vocabulary) & (top_p >= 1) & (min_p == 0)
    goal = torch.where(free, uniform, uniform * kept[:, -1:])
    position = torch.searchsorted(kept, goal, right=True)
    tokens = ids.gather(1, torch.minimum(position, keep.sum(-1, keepdim=True) - 1))[:, 0]

    unranked = top_k >= vocabulary
    decided = (top_k <= size) | (unranked & ~keep[:, -1:]) | (free & (goal < kept[:, -1:]))
    return tokens, decided[:, 0]


def _column(values: list[Any], like: Any, dtype: Any = None) -> Any:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]
