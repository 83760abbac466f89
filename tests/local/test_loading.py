"""Where a model comes from, and what is said when it cannot be had."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from adapters.local.frames import Loading
from adapters.local.loading import Loaded, load
from adapters.local.options import read_options
from adapters.local.sources import CannotLoad, find, revision_of
from gateway.settings import SettingsError


def ignore(_: Loading) -> None: ...


def attempt(model: Path) -> Loaded:
    return load(model, read_options({"model": str(model), "threads": 1, "device": "cpu"}), ignore)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def change_config(folder: Path, **members: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | members))


def test_progress_and_facts_are_told(tiny: Path) -> None:
    told: list[Loading] = []
    loaded = load(tiny, read_options({"model": str(tiny), "dtype": "bfloat16", "device": "cpu"}), told.append)
    facts = loaded.facts
    assert (facts.model, facts.context_tokens, facts.has_template) == ("tiny", 256, True)
    assert facts.revision == revision_of(tiny)
    assert (facts.dtype, facts.device) == ("bfloat16", "cpu")
    assert 10_000 < facts.parameters < 100_000
    assert loaded.ends == {loaded.tokenizer.eos_token_id}
    weights = [each.fraction for each in told if each.stage == "weights"]
    assert weights == sorted(weights)
    assert (weights[0], weights[-1]) == (0.0, 1.0)
    assert told[-1] == Loading("warm-up", 1.0)


def test_the_revision_is_of_the_files_and_not_of_where_they_lie(tiny: Path, copy: Path) -> None:
    before = revision_of(tiny)
    (copy / "README.md").write_text("# Another one")
    assert revision_of(copy) == before
    weights = next(copy.glob("*.safetensors"))
    spoiled = bytearray(weights.read_bytes())
    spoiled[-1] ^= 1
    weights.write_bytes(spoiled)
    other = revision_of(copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert len({before, other, revision_of(copy)}) == 3


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CannotLoad, match="there is no folder"):
        find(read_options({"model": str(tmp_path / "none")}), ignore)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CannotLoad, match=r"no config\.json"):
        attempt(tmp_path)


def test_weights_that_may_hold_code_are_not_loaded(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CannotLoad, match="no \\*\\.safetensors weights"):
        attempt(copy)


def test_a_model_of_another_kind(copy: Path) -> None:
    change_config(copy, model_type="t5", architectures=["T5ForConditionalGeneration"])
    with pytest.raises(CannotLoad, match="no causal language model"):
        attempt(copy)


def test_a_model_with_code_of_its_own(copy: Path) -> None:
    change_config(copy, model_type="mine", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(CannotLoad, match="trust_remote_code"):
        attempt(copy)


def test_a_model_that_does_not_remember_in_keys_and_values(copy: Path) -> None:
    config = MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3)
    torch.manual_seed(0)
    MambaForCausalLM(config).save_pretrained(copy)
    with pytest.raises(CannotLoad, match="does not know its kind of memory"):
        attempt(copy)


def test_broken_weights(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(CannotLoad, match="weights of copy cannot be loaded") as refused:
        attempt(copy)
    assert "\n" not in str(refused.value)


def test_a_name_that_is_neither() -> None:
    with pytest.raises(CannotLoad, match="neither a folder nor a model id"):
        find(read_options({"model": "not a model"}), ignore)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modle": "demo"}, "options.modle: unknown key 'modle'; did you mean 'model'"),
        ({"dtype": "float8"}, "options.dtype: expected one of auto, float32, bfloat16"),
        ({"threads": 0}, "threads"),
        ({"device": "tpu"}, "options.device: expected auto, cpu, cuda or cuda:1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        read_options(options)


def test_a_model_is_named_without_its_path() -> None:
    assert read_options({}).name == "suiron-demo"
    assert read_options({"model": "/srv/models/mine/"}).name == "mine"
    assert read_options({"model": "org/theirs"}).name == "org/theirs"
