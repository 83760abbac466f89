"""How good is the demo model? It is asked 200 prompts that were written before it was trained."""

import argparse
import zlib
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.local.demo import corpus, held_out, known
from adapters.local.demo.held_out import Case, plain

SHIPPED = Path(__file__).parent / "model"
SAMPLED_CONVERSATIONS = 20_000  # of the endless training text


class Chat:
    """One loaded model. The question is the seed: answers neither depend on their order nor share their luck."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, case: Case, *, temperature: float, system: str = "") -> str:
        prompt = self.tokenizer.apply_chat_template(
            [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": case.prompt}],
            tools=case.tools(),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        how: dict[str, Any] = {"do_sample": False}
        if temperature:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(zlib.crc32(case.prompt.encode()))
        with torch.inference_mode():
            tokens = self.model.generate(**prompt, max_new_tokens=120, **how)[0, prompt["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


class Score:
    """Counts by group: passed, and how many of those were refusals of something that has an answer."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.failures: list[tuple[Case, str]] = []

    def add(self, case: Case, reply: str) -> None:
        self.asked[case.group] += 1
        if not case.passes(reply):
            self.failures.append((case, reply))
            return
        self.passed[case.group] += 1
        self.refused[case.group] += bool(case.expected) and reply == known.REFUSAL

    @property
    def share(self) -> float:
        return self.passed.total() / self.asked.total()

    def table(self) -> str:
        rows = [f"| {'group':12} | passed  | of these refused |", "| --- | --- | --- |"]
        for group, asked in self.asked.items():
            rows.append(f"| {group:12} | {f'{self.passed[group]}/{asked}':7} | {self.refused[group]} |")
        rows.append(f"| {'all':12} | {self.passed.total()}/{self.asked.total()} | {self.refused.total()} |")
        return "\n".join(rows)


def score(chat: Chat, *, temperature: float, system: str = "") -> Score:
    found = Score()
    for case in held_out.cases():
        found.add(case, chat.answer(case, temperature=temperature, system=system))
    return found


class Learned:
    """What users and the assistant say in a sample of the training text, and in every table."""

    def __init__(self, conversations: int) -> None:
        tables = (known.SUIRON, known.SMALL_TALK, known.JAPANESE, known.FACTS, known.WRITING)
        self.prompts = {plain(question) for table in tables for questions, _ in table for question in questions}
        self.replies = {answer for table in tables for _, answer in table}
        rng = Random(1)
        for _ in range(conversations):
            talk, _ = corpus.conversation(rng)
            self.prompts.update(plain(message["content"]) for message in talk if message["role"] == "user")
            self.replies.update(message["content"] for message in talk if message["role"] == "assistant")

    def leaked(self) -> Counter[str]:
        """How many held-out prompts of each group stand word for word in it."""
        return Counter(case.group for case in held_out.cases() if plain(case.prompt) in self.prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--system", default="", help="a system prompt before every question")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"list {held_out.fingerprint()}")
    learned = Learned(SAMPLED_CONVERSATIONS)
    print("in the training text, word for word:", dict(learned.leaked()) or "none")
    found = score(Chat(asked.folder), temperature=asked.temperature, system=asked.system)
    for case, reply in found.failures:
        kind = "another answer" if reply in learned.replies else "never learned"
        print(f"{case.group} | {kind} | {case.prompt!r} -> {reply!r}")
    print(f"\ntemperature {asked.temperature:g}: {found.share:.1%}\n{found.table()}")


if __name__ == "__main__":
    main()
