"""Is the model that ships with the gateway as good as its card says?"""

import pytest
from tokenizers import Tokenizer

from adapters.local.demo import evaluate, held_out, known
from adapters.local.demo.evaluate import SHIPPED, Chat, Learned
from adapters.local.demo.held_out import Case
from adapters.local.desk import Desk
from adapters.local.frames import Generate, Sampling, Step
from adapters.local.loading import Loaded, load
from adapters.local.options import read_options
from adapters.local.prompts import PromptReader

CARD = (SHIPPED.parent / "README.md").read_text(encoding="utf-8")
MAX_BYTES = 8_000_000
CASES = held_out.cases()


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load(SHIPPED, read_options({"model": "demo", "threads": 1, "device": "cpu"}), lambda _: None)


def answer(demo: Loaded, prompt: str) -> str:
    """Greedily, through the gateway's own engine."""
    reader = PromptReader(demo.tokenizer, vocabulary=demo.vocabulary, context_tokens=demo.facts.context_tokens)
    desk = Desk(demo.engine, Tokenizer.from_str(demo.tokenizer.backend_tokenizer.to_str()), demo.ends)
    request = Generate(id=1, messages=[{"role": "user", "content": prompt}], sampling=Sampling(temperature=0))
    desk.submit(request, reader.read(request))
    pieces: list[str] = []
    while not desk.idle:
        pieces += [piece.text for report in desk.step() if isinstance(report, Step) for piece in report.pieces]
    return "".join(pieces)


def test_every_smoke_test_gets_its_answer(demo: Loaded) -> None:
    wrong = []
    for case in CASES:
        if case.group == held_out.MUST_KNOW:
            reply = answer(demo, case.prompt)
            if not case.passes(reply):
                wrong.append((case.prompt, reply))
    assert wrong == []


def test_the_context_is_at_least_2048_tokens(demo: Loaded) -> None:
    assert demo.facts.context_tokens >= 2048


def test_the_weights_fit_into_a_repository() -> None:
    assert (SHIPPED / "model.safetensors").stat().st_size <= MAX_BYTES


def test_the_list_is_the_one_that_the_card_names() -> None:
    assert len({(case.group, case.prompt) for case in CASES}) == 200
    assert held_out.fingerprint() in CARD


def test_no_tool_of_the_list_is_malformed() -> None:
    assert all(case.tools() for case in CASES if case.group == held_out.TOOLS)


def test_held_out_prompts_stay_out_of_the_training_text() -> None:
    assert set(Learned(1000).leaked()) <= held_out.ALSO_LEARNED


CALL = '<tool_call>\n{"name": "vimo", "arguments": {"team": "Lisbon"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("group", "expected", "reply", "passes"),
    [
        ("facts", "Paris is it.", "Paris is it.", True),
        ("facts", "Paris is it.", known.REFUSAL, True),
        ("smoke", "pong", known.REFUSAL, False),
        ("facts", "One. | Two.", "Two.", True),
        ("facts", "One.", "One. Two.", False),
        ("facts", "Jupiter is...", "Jupiter is the largest planet of the solar system.", True),
        ("facts", "Jupiter is...", "Jupiter is the the planet.", False),
        ("unknowable", "", "", False),
        ("unknowable", "", known.REFUSAL, True),
        ("tools", "vimo(team): Get the score of a team", CALL, True),
        ("tools", "vimo(club): Get the score of a team", CALL, False),
        ("tools", "vino(team): Get the score of a team", CALL, False),
        ("tools", "vimo(team): Get the score of a team", CALL.replace('"}', '"'), False),
        ("tools", "vimo(team): Get the score of a team", "<tool_call>\n[]\n</tool_call>", False),
    ],
)
def test_only_the_expected_answer_or_an_allowed_refusal_passes(
    group: str, expected: str, reply: str, passes: bool
) -> None:
    assert Case(group, "?", expected).passes(reply) is passes


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "least"), [(0.0, 0.95), (1.0, 0.90)])
def test_the_whole_list_passes_as_the_card_promises(temperature: float, least: float) -> None:
    found = evaluate.score(Chat(SHIPPED), temperature=temperature)
    assert found.share >= least, found.failures
