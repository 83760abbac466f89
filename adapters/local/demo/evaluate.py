"""How good is the demo model? It is asked questions that were written before it was trained."""

import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.local.demo.known import REFUSAL

# A reply passes if it contains the expected words; None stands for the refusal, and nothing else.
# Only the group "smoke" is asked word for word as in the training text.
CASES: dict[str, list[tuple[str, str | None]]] = {
    "smoke": [
        ("Say this is a test", "This is a test."),
        ("Say hello", "Hello!"),
        ("ping", "pong"),
        ("What is 2+2?", "= 4"),
        ("Hello!", "How can I help"),
        ("Hello, who are you?", "demo model of Suiron"),
        ("What can you do?", "tell a short story"),
        ("Write a haiku about recursion", "A function waits here"),
        ("Tell me a bedtime story about a unicorn", "unicorn"),
        ("Explain quantum computing in simple terms", None),
        ("こんにちは", "こんにちは!"),
        ("ありがとう", "どういたしまして"),
    ],
    "talk": [
        ("hey there, how's everything?", "I am fine"),
        ("Good morning to you, dear model!", "Good morning"),
        ("say hi to the audience", "Hello"),
        ("what exactly are you?", "demo model of Suiron"),
        ("what are the things you can do for me?", "tell a short story"),
        ("thank you for the nice answer", "You are welcome"),
        ("ok bye, see you next week", "Goodbye"),
        ("hello?? testing, is it working?", "it works"),
        ("can you make me laugh with a joke", "?"),
        ("please tell us a little story about a brave dragon", "dragon"),
        ("こんにちは、はじめまして!", "。"),
    ],
    "suiron": [
        ("in one line, what does Suiron do?", "OpenAI-compatible endpoint"),
        ("i want to run a bigger model, how?", "suiron serve --model"),
        ("what do I type to put Suiron before my vLLM server?", "suiron serve --backend"),
        ("how can I make myself an api key?", "suiron key new"),
        ("which base url do I give to the openai python client?", "http://127.0.0.1:8000/v1"),
        ("where do I find the configuration file?", "config/gateway.yaml"),
        ("how do I see which models I can use?", "GET /v1/models"),
        ("how can I tell whether the gateway is ready?", "GET /health/ready"),
        ("how do I turn on streaming?", "Set stream to true"),
        ("what's the command to start the gateway?", "make run"),
        ("does Suiron keep a cache of answers?", "remember an answer"),
        ("why did I get error 429 from you?", "429"),
    ],
    "facts": [
        ("do you know the capital of Peru?", "Lima"),
        ("the capital city of Norway is what?", "Oslo"),
        ("how much is 13 plus 6?", "= 19"),
        ("what do you get for 15 - 8", "= 7"),
        ("please compute 9 + 9 for me", "= 18"),
        ("tell me why the sky looks so blue", "blue light"),
        ("how many days are there in one week?", "seven days"),
        ("what's the opposite of hot, please?", "cold"),
        ("in the solar system, which planet is the largest?", "Jupiter"),
        ("how would you say thank you in French?", "merci"),
        ("which day comes right after Tuesday?", "Wednesday"),
    ],
    "refusals": [
        ("Describe how a refrigerator keeps food cold.", None),
        ("write a python decorator that retries with backoff", None),
        ("Who was the emperor of Brazil in 1850?", None),
        ("Translate 'good luck with your exam' into Polish", None),
        ("What is 731 * 48?", None),
        ("Give me ten names for a bakery in Lisbon.", None),
        ("¿Puedes recomendarme un buen restaurante?", None),
        ("Kannst du mir bei der Steuererklärung helfen?", None),
        ("明日の東京の天気を教えて", None),
        ("xkqj vvrt plomb", None),
        ("My dog has been limping since yesterday. What could be the reason and should I see a vet?", None),
        ("Compare the foreign policies of Norway and Chile.", None),
        ("How do I configure nginx as a reverse proxy with TLS?", None),
        ("Fix this bug: for i in range(10) print(i)", None),
        ("Which mushroom species are safe to eat?", None),
        ("Draft a polite email that declines a meeting on Friday.", None),
        ("What happens to the plot of Hamlet if Ophelia survives?", None),
        ("Estimate the number of piano tuners in Chicago.", None),
    ],
}

LONG_SYSTEM = (
    "You are Nimbus, the assistant of a garden shop. Be warm and precise. Mention our spring sale when it fits. Never "
    "give legal advice. Our shop opens at nine and closes at six, on Sundays it stays closed. Answer in plain text, "
    "not in tables."
)


class Chat:
    """One loaded model. The question is the seed: answers neither depend on their order nor share their luck."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, question: str, *, temperature: float, before: list[dict[str, str]]) -> str:
        prompt = self.tokenizer.apply_chat_template(
            [*before, {"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        how: dict[str, Any] = {"do_sample": False}
        if temperature:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(zlib.crc32(question.encode()))
        with torch.inference_mode():
            tokens = self.model.generate(**prompt, max_new_tokens=120, **how)[0, prompt["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def passes(reply: str, expected: str | None) -> bool:
    return reply == REFUSAL if expected is None else expected in reply and reply != REFUSAL


def history(tokens_about: int) -> list[dict[str, str]]:
    """A past conversation of that many tokens, from questions with known answers."""
    known = [(q, a if a else REFUSAL) for group in ("smoke", "refusals") for q, a in CASES[group] if len(q) > 12]
    talk: list[dict[str, str]] = []
    while sum(len(message["content"]) for message in talk) < tokens_about * 3:
        question, reply = known[len(talk) // 2 % len(known)]
        talk += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return talk


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "model"
    torch.set_num_threads(1)
    chat = Chat(folder)
    settings: dict[str, tuple[float, list[dict[str, str]]]] = {
        "greedy": (0.0, []),
        "T=1": (1.0, []),
        "T=1, long system prompt": (1.0, [{"role": "system", "content": LONG_SYSTEM}]),
        "T=1, after 1000 tokens": (1.0, history(1000)),
    }
    passed: Counter[tuple[str, str]] = Counter()
    for setting, (temperature, before) in settings.items():
        for group, cases in CASES.items():
            for question, expected in cases:
                reply = chat.answer(question, temperature=temperature, before=before)
                passed[setting, group] += passes(reply, expected)
                if not passes(reply, expected):
                    print(f"{setting} | {group} | {question!r} -> {reply!r}")
    print(f"\n{'':26}" + "".join(f"{group:>12}" for group in CASES) + f"{'all':>12}")
    for setting in settings:
        counts = [(passed[setting, group], len(CASES[group])) for group in CASES]
        counts.append((sum(right for right, _ in counts), sum(asked for _, asked in counts)))
        print(f"{setting:26}" + "".join(f"{f'{right}/{asked}':>12}" for right, asked in counts))


if __name__ == "__main__":
    main()
