"""How is the demo model made? From nothing or from earlier weights, on one core, in half an hour a run."""

import argparse
import copy
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapters.local.demo import corpus

SEED = 0
VOCABULARY = 2048
CONTEXT = 2048
BATCH_TOKENS = 2048
PEAK_RATE = 2.5e-3
FUSED_FROM = 400  # tokens: below, plain attention trains twice as fast on a CPU; above, five times slower
SHARPNESS = 2.0  # clients ask for temperature 1 if they ask for nothing, which is too hot for so small a model
SAVED_EVERY = 300  # steps
COPYING = 0.06  # share of the samples
FIRST_MERGED = 260  # below are the special tokens and the single bytes
PROMPT_WEIGHT = 0.05  # a little, so that the model also learns what a question looks like

END_OF_TEXT, TURN_START, TURN_END, PADDING = SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
REPLY_START = f"{TURN_START}assistant\n"

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
  {%- if content is string -%}{{ content }}
  {%- elif content -%}{%- for part in content if part.text is defined -%}{{ part.text }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set opens_with_system = messages and messages[0].role in ('system', 'developer') -%}
{%- if tools -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if opens_with_system -%}{{- text(messages[0].content) + '\\n\\n' -}}{%- endif -%}
  {{- 'You may call these tools:\\n<tools>\\n' -}}
  {%- for tool in tools -%}{{- tool | tojson + '\\n' -}}{%- endfor -%}
  {{- '</tools>\\nA call looks like this:\\n\
<tool_call>\\n{"name": "...", "arguments": {...}}\\n</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if not (loop.first and opens_with_system and tools) -%}
    {{- '<|im_start|>' + ('system' if message.role == 'developer' else message.role) + '\\n' + text(message.content) -}}
    {%- for call in message.tool_calls or [] -%}
      {%- set arguments = call.function.arguments -%}
      {%- if not loop.first or message.content -%}{{- '\\n' -}}{%- endif -%}
      {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
      {{- arguments if arguments is string else arguments | tojson -}}
      {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

Sample = tuple[list[int], list[float]]  # token ids, and the weight of each in the loss


def make_tokenizer() -> Any:
    """Byte-level BPE with single digits, so that sums are written in the same pieces everywhere."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*corpus.vocabulary(Random(SEED), 20_000), CHAT_TEMPLATE], trainer)
    # Not "special": a server that strips special tokens must still see the tool call.
    bpe.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in ("<tool_call>", "</tool_call>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=PADDING,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def make_model(tokenizer: Any) -> Any:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    ends = tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT])
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
    )
    return model


def chat_sample(tokenizer: Any, messages: list[corpus.Message], tools: list[corpus.Tool] | None = None) -> Sample:
    """Only replies weigh fully: the rest is what other people say."""
    ids: list[int] = []
    weights: list[float] = []

    def add(text: str, weight: float) -> None:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(piece)
        weights.extend([weight] * len(piece))

    before, *replies = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False).split(REPLY_START)
    add(before, PROMPT_WEIGHT)
    for reply in replies:
        said, _, after = reply.partition(TURN_END)
        add(REPLY_START, PROMPT_WEIGHT)
        add(said + TURN_END, 1.0)
        add(after, PROMPT_WEIGHT)
    return ids[:CONTEXT], weights[:CONTEXT]


def text_sample(tokenizer: Any, text: str) -> Sample:
    ids = tokenizer.encode(text + END_OF_TEXT, add_special_tokens=False)
    return ids, [1.0] * len(ids)


def repeated_sample(tokenizer: Any, rng: Random) -> Sample:
    """Something random, over again: from nothing else does so small a model learn to copy what it has never seen."""
    if rng.random() < 0.5:
        few = rng.choices(range(FIRST_MERGED, len(tokenizer)), k=rng.choice([16, 64, 1000]))
        ids = rng.choices(few, k=rng.randint(6, 40))
    else:
        names = [corpus.random_name(rng) for _ in range(rng.randint(1, 10))]
        ids = tokenizer.encode("\n".join(names) + "\n", add_special_tokens=False)
    again = rng.randint(1, 2)
    return ids * (1 + again), [0.0] * len(ids) + [1.0] * len(ids) * again


def samples(tokenizer: Any, rng: Random, count: int, copying: float) -> list[Sample]:
    """A share of bare copying, 6 % plain texts and 2 % long conversations, which hold an eighth of all tokens."""
    made = []
    for _ in range(count):
        kind = rng.random()
        if rng.random() < copying:
            made.append(repeated_sample(tokenizer, rng))
        elif kind < 0.06:
            made.append(text_sample(tokenizer, corpus.plain_text(rng)))
        elif kind < 0.08:
            made.append(chat_sample(tokenizer, corpus.long_conversation(rng)))
        else:
            made.append(chat_sample(tokenizer, *corpus.conversation(rng)))
    return made


def batches(tokenizer: Any, seed: int, copying: float) -> Iterator[list[Sample]]:
    """Batches of samples of about one length, shuffled within a pool; endless, and the same for the same seed."""
    rng = Random(seed)
    while True:
        pool = sorted(samples(tokenizer, rng, 512, copying), key=lambda sample: len(sample[0]))
        filled: list[list[Sample]] = [[]]
        for sample in pool:
            if filled[-1] and len(sample[0]) * (len(filled[-1]) + 1) > BATCH_TOKENS:
                filled.append([])
            filled[-1].append(sample)
        rng.shuffle(filled)
        yield from filled


def losses(model: Any, batch: list[Sample], padding: int) -> tuple[Any, Any]:
    """The weighted loss to learn from, and the plain loss of the replies to look at."""
    width = max(len(ids) for ids, _ in batch)
    tokens = torch.tensor([ids + [padding] * (width - len(ids)) for ids, _ in batch])
    weights = torch.tensor([w + [0.0] * (width - len(w)) for _, w in batch])[:, 1:].flatten()
    model.set_attn_implementation("sdpa" if width >= FUSED_FROM else "eager")
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens[:, :-1]).logits
    each = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    replies = weights == 1.0
    return (each * weights).sum() / weights.sum(), each.detach()[replies].mean()


def learning_rate(peak: float, step: int, done: float) -> float:
    """Warm up for 100 steps, stay for a quarter of the time, then fall along a cosine to almost nothing."""
    fall = 1.0 if done < 0.25 else 0.5 * (1 + math.cos(math.pi * (min(done, 1.0) - 0.25) / 0.75))
    return peak * min(1.0, (step + 1) / 100) * (0.99 * fall + 0.01)


def make_optimizer(model: Any) -> Any:
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    gains = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def fit(model: Any, tokenizer: Any, out: Path, *, minutes: float, rate: float, seed: int, copying: float) -> None:
    """Train for so many minutes of wall time; what has been learned so far is in `out` every few hundred steps."""
    optimizer = make_optimizer(model)
    started, cpu_started, seen, smooth = time.monotonic(), time.process_time(), 0, 0.0
    for step, batch in enumerate(batches(tokenizer, seed, copying)):
        spent_s = time.monotonic() - started
        done = spent_s / (minutes * 60)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(rate, step, done)
        loss, reply_loss = losses(model, batch, tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += sum(len(ids) for ids, _ in batch)
        smooth = float(reply_loss) if step == 0 else 0.98 * smooth + 0.02 * float(reply_loss)
        if step % 100 == 0:
            cpu_s = time.process_time() - cpu_started
            print(
                f"{spent_s / 60:5.1f} min (cpu {cpu_s / 60:5.1f})  step {step:5d}  {seen / 1e6:6.2f} M tokens  "
                f"reply loss {smooth:.4f}",
                flush=True,
            )
        if step % SAVED_EVERY == SAVED_EVERY - 1:
            save(model, tokenizer, out)
    save(model, tokenizer, out)


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """The last gain is the scale of all logits: multiplied by two, temperature 1 samples as 0.5 did before."""
    shipped = copy.deepcopy(model)
    with torch.no_grad():
        shipped.model.norm.weight *= SHARPNESS
    shipped.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def load(folder: Path) -> tuple[Any, Any]:
    """The model and tokenizer that `save` wrote."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight /= SHARPNESS
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="go on from this model instead of from nothing")
    parser.add_argument("--rate", type=float, default=PEAK_RATE, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=1, help="of the training text")
    parser.add_argument("--copying", type=float, default=COPYING, help="share of samples that are bare copying")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    if asked.start:
        model, tokenizer = load(asked.start)
    else:
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    fit(
        model,
        tokenizer,
        asked.out,
        minutes=asked.minutes,
        rate=asked.rate,
        seed=asked.seed,
        copying=asked.copying,
    )


if __name__ == "__main__":
    main()
