"""
What does each adapter legitimately lack? The one table of it.

Under a feature's name is the parameter that the 400 for it names, or the reason why there can be none.
"""

UNASKED = "nothing asks for it"

LACKS: dict[str, dict[str, str]] = {
    "echo": {
        "a context": UNASKED,
        "tools": "tool_choice",
        "a named tool": "tool_choice",
        "json_schema": "response_format",
        "logprobs": "logprobs",
        "logprobs of a completion": "logprobs",
        "best_of": "best_of",
        "echo": "echo",
        "token ids": "prompt",
        "logit_bias": "logit_bias",
        "presence_penalty": "presence_penalty",
        "images": "messages[0].content[0].image_url",
    },
    "local": {
        "tools": "tools",
        "a named tool": "tools",
        "json_schema": "response_format",
        "logprobs": "logprobs",
        "logprobs of a completion": "logprobs",
        "best_of": "best_of",
        "images": "messages[0].content[0]",
    },
    "vllm": {"images": "messages[0].content[0].image_url"},
    "tgi": {
        "token ids": "prompt",
        "logit_bias": "logit_bias",
        "presence_penalty": "presence_penalty",
        "images": "messages[0].content[0].image_url",
    },
    "openai": {},
    "transformers": {
        "tools": "tool_choice",
        "a named tool": "tool_choice",
        "json_schema": "response_format",
        "logprobs": "logprobs",
        "logprobs of a completion": "logprobs",
        "best_of": "best_of",
        "echo": "echo",
        "token ids": "prompt",
        "logit_bias": "logit_bias",
        "presence_penalty": "presence_penalty",
        "images": "messages[0].content[0].image_url",
        "a context": "it has no check: what is too long, it tries",
    },
}
