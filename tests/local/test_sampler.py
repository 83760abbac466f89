"""Which token comes next: held against transformers' own warpers and OpenAI's formula."""

import math
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as warpers

from adapters.local.frames import Sampling
from adapters.local.sampler import Chooser, choose

CASES: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"top_p": 0.8},
    {"top_k": 5},
    {"temperature": 0.9, "top_k": 10, "top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 300, "top_p": 0.9},
    {"top_p": 1e-9},
]


def by_transformers(logits: Any, sampling: Sampling) -> Any:
    warped = logits[None].clone()
    if sampling.temperature != 1:
        warped = warpers.TemperatureLogitsWarper(sampling.temperature)(None, warped)
    if sampling.top_k:
        warped = warpers.TopKLogitsWarper(sampling.top_k)(None, warped)
    if sampling.top_p < 1:
        warped = warpers.TopPLogitsWarper(sampling.top_p)(None, warped)
    if sampling.min_p:
        warped = warpers.MinPLogitsWarper(sampling.min_p)(None, warped)
    return torch.softmax(warped[0], -1)


@pytest.mark.parametrize(("vocabulary", "spread"), [(40, 1.5), (1000, 0.3)], ids=["peaked", "flat"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_distribution_is_the_one_that_transformers_defines(
    vocabulary: int, spread: float, case: dict[str, Any]
) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * spread
    sampling = Sampling(**case)
    exact = by_transformers(logits, sampling)
    rows, rounds = 200, 20
    choosers = [Chooser(sampling, seed) for seed in range(rows)]
    seen = torch.zeros(vocabulary)
    for _ in range(rounds):
        seen += torch.bincount(torch.tensor(choose(logits.expand(rows, -1), choosers)), minlength=vocabulary)
    drawn = seen / (rows * rounds)
    noise = 0.5 * float(torch.sqrt(2 * exact * (1 - exact) / (math.pi * rows * rounds)).sum())
    assert float(drawn[exact == 0].sum()) == 0
    assert 0.5 * float((drawn - exact).abs().sum()) < 1.5 * noise + 1e-9


def test_zero_keeps_one_token() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]]).expand(3, -1)
    samplings = [Sampling(temperature=0), Sampling(top_p=0), Sampling(top_k=1)]
    assert choose(logits, [Chooser(sampling, 1) for sampling in samplings]) == [1, 1, 1]


def test_a_seed_gives_the_same_tokens_alone_and_among_neighbours() -> None:
    logits = torch.randn(50, 2000, generator=torch.Generator().manual_seed(2)) * 0.3
    alone, among = Chooser(Sampling(seed=7), 7), Chooser(Sampling(seed=7), 7)
    neighbours = [Chooser(Sampling(temperature=0), None), Chooser(Sampling(top_p=0.5), 3)]
    for row in logits:
        (one,) = choose(row[None], [alone])
        others = choose(torch.stack([row.flip(0), row, row]), [neighbours[0], among, neighbours[1]])
        assert others[1] == one


def test_penalties_are_openais_formula_over_what_was_generated() -> None:
    logits = torch.tensor([[5.0, 4.0, 2.9, 2.0]])
    chooser = Chooser(Sampling(temperature=0, presence_penalty=0.6, frequency_penalty=0.7), None)
    # After its first use a token loses 1.3, and 0.7 for each further one.
    assert [choose(logits, [chooser])[0] for _ in range(6)] == [0, 1, 0, 0, 2, 1]


def test_penalties_may_be_negative_and_bias_can_force_and_ban() -> None:
    logits = torch.tensor([[1.0, 1.5, 0.9]])
    loyal = Chooser(Sampling(temperature=0, frequency_penalty=-2, logit_bias={0: 1.0}), None)
    assert [choose(logits, [loyal])[0] for _ in range(3)] == [0, 0, 0]
    assert choose(logits, [Chooser(Sampling(logit_bias={2: 100.0}), 1)]) == [2]
    banned = Chooser(Sampling(logit_bias={1: -100.0}), 1)
    assert 1 not in [choose(logits, [banned])[0] for _ in range(200)]
    assert logits.tolist() == torch.tensor([[1.0, 1.5, 0.9]]).tolist()
