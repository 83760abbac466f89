"""How do files become a model? Weights only: code that comes with them is never run."""

from pathlib import Path
from typing import Any

import torch
import transformers
from msgspec import Struct
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from adapters.local.engine import Engine
from adapters.local.frames import Loading, Ready
from adapters.local.options import Options
from adapters.local.sources import CannotLoad, Report, first_line, revision_of

DEFAULT_CONTEXT = 2048
"""For the rare model that does not say."""


class Loaded(Struct):
    """`ends` are the token ids that end a text; `vocabulary` is the number of ids that the model knows."""

    engine: Engine
    tokenizer: Any
    ends: frozenset[int]
    vocabulary: int
    facts: Ready


def load(folder: Path, options: Options, report: Report) -> Loaded:
    """Raises CannotLoad."""
    torch.set_num_threads(options.threads or 1)
    name = options.name
    config = _read_config(folder, name)
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = _read_tokenizer(folder, name)
    model = _read_weights(folder, name, _dtype(options.dtype, config, device), report).to(device)
    context_tokens = _context_tokens(config, tokenizer)
    facts = Ready(
        model=name,
        revision=revision_of(folder),
        context_tokens=context_tokens,
        has_template=bool(tokenizer.chat_template),
        dtype=str(model.dtype).removeprefix("torch."),
        device=device,
        parameters=sum(weight.numel() for weight in model.parameters()),
        version=transformers.__version__,
    )
    vocabulary = model.get_input_embeddings().num_embeddings
    return Loaded(_warm_up(model, name, report), tokenizer, _ends(model, tokenizer), vocabulary, facts)


def _read_config(folder: Path, name: str) -> Any:
    if not (folder / "config.json").is_file():
        raise CannotLoad(f"{name} is not a transformers model: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise CannotLoad(f"{name} has no *.safetensors weights; other formats may hold code and are not loaded")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as exc:  # whatever is wrong with somebody's file
        if "trust_remote_code" in str(exc):
            raise CannotLoad(f"{name} needs code of its own (trust_remote_code), which is never run here") from None
        raise CannotLoad(f"{name} has a config.json that transformers cannot read: {first_line(exc)}") from None
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    architectures = getattr(config, "architectures", None) or []
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (architectures and not known & set(architectures)):
        kind = architectures[0] if architectures else config.model_type
        raise CannotLoad(f"{name} is no causal language model, but a {kind}")
    return config


def _read_tokenizer(folder: Path, name: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as exc:
        raise CannotLoad(f"{name} has no tokenizer that transformers can read: {first_line(exc)}") from None
    if not tokenizer.is_fast:
        raise CannotLoad(f"{name} has no fast tokenizer (tokenizer.json)")
    return tokenizer


def _read_weights(folder: Path, name: str, dtype: Any, report: Report) -> Any:
    def watched(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _Watched(args[0] if args else (), report, kwargs.get("desc", ""))

    report(Loading("weights", 0.0))
    previous = transformers.utils.logging.set_tqdm_hook(watched)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
    except MemoryError:
        raise CannotLoad(f"{name} does not fit into memory") from None
    except Exception as exc:
        raise CannotLoad(f"the weights of {name} cannot be loaded: {first_line(exc)}") from None
    finally:
        transformers.utils.logging.set_tqdm_hook(previous)


def _warm_up(model: Any, name: str, report: Report) -> Engine:
    """An engine that has seen its model work, so that what it cannot run fails here and not at the first request."""
    report(Loading("warm-up", 0.0))
    engine = Engine(model)
    try:
        works = engine.reads_in_pieces()
    except Exception as exc:
        raise CannotLoad(f"{name} cannot be run here: {first_line(exc)}") from None
    if not works:
        raise CannotLoad(f"{name} cannot be run here: this engine does not know its kind of memory")
    report(Loading("warm-up", 1.0))
    return engine


class _Watched:
    """Stands in for a progress bar around the weights."""

    def __init__(self, items: Any, report: Report, stage: str) -> None:
        self._items = items
        self._report = report if stage == "Loading weights" else lambda _: None

    def __iter__(self) -> Any:
        for done, item in enumerate(self._items, 1):
            yield item
            self._report(Loading("weights", done / len(self._items)))

    def __getattr__(self, _: str) -> Any:
        return lambda *args, **kwargs: None


def _dtype(wanted: str, config: Any, device: str) -> Any:
    if wanted != "auto":
        return getattr(torch, wanted)
    stored = config.get_text_config().dtype or config.dtype
    if device != "cpu":
        return stored or torch.float32
    halved = stored in (torch.bfloat16, torch.float16)
    return torch.bfloat16 if halved and _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Whether products of bfloat16 are computed in hardware; elsewhere float32 is faster."""
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private names, hence the default
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)


def _context_tokens(config: Any, tokenizer: Any) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT
    stated = tokenizer.model_max_length
    return int(min(positions, stated) if stated and stated > 0 else positions)


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    stated = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = stated if isinstance(stated, list) else [stated]
    return frozenset(end for end in [*ends, tokenizer.eos_token_id] if end is not None)
