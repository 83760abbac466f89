"""What can be configured, and what is said of a configuration that is wrong?"""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.settings import Server, Settings, SettingsError, Timeouts, json_schema, load, parse

MANUAL = Path(__file__).parent.parent / "config" / "gateway.yaml"
SHA = "a" * 64

GOOD = f"""\
server:
  port: 9000
auth:
  keys:
    - name: alice
      sha256: {SHA}
      models: [org/name.with.dots]
upstreams:
  gpu:
    adapter: openai
    base_url: http://gpu:8000/v1
    api_key: {{env: GPU_KEY}}
    timeouts: {{connect_s: 1}}
    extra_fields: [top_k]
  echo:
    adapter: echo
models:
  org/name.with.dots:
    targets:
      - upstream: gpu
      - upstream: echo
        model: x
"""


def fault_of(text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        parse(text, "g.yaml")
    return str(caught.value)


def test_a_good_configuration_is_read() -> None:
    settings = parse(GOOD, "g.yaml")
    assert settings.server.port == 9000
    assert settings.upstreams["gpu"].timeouts == Timeouts(connect_s=1)
    assert [target.model for target in settings.models["org/name.with.dots"].targets] == [None, "x"]


@pytest.mark.parametrize("text", ["", "\n# nothing\n", "---\n", "{}", "null"])
def test_an_empty_configuration_is_all_defaults(text: str) -> None:
    assert parse(text, "g.yaml") == Settings()


def test_anchors_aliases_and_merges_are_followed() -> None:
    settings = parse(
        "upstreams:\n  a: &a {adapter: echo, max_connections: 5}\n  b: *a\n  c:\n    <<: *a\n    max_connections: 7\n",
        "",
    )
    assert settings.upstreams["b"] == settings.upstreams["a"]
    assert (settings.upstreams["c"].adapter, settings.upstreams["c"].max_connections) == ("echo", 7)


WRONG = [
    # in the good configuration: exchange this, for that, and be told
    ("server:", "sever:", "1: sever: unknown key 'sever'; did you mean 'server'?"),
    ("  port:", "  prot:", "2: server.prot: unknown key 'prot'; did you mean 'port'?"),
    (
        "  port:",
        "  zzz:",
        "2: server.zzz: unknown key 'zzz'; known are: body_timeout_s, cors, drain_delay_s, grace_s, header_timeout_s, "
        "hold_s, host, keep_alive_s, max_body_bytes, max_connections, port, trusted_proxies, write_stall_s",
    ),
    ("9000", "http", "2: server.port: expected a whole number, got text"),
    ("9000", "90000", "2: server.port: expected a whole number <= 65535"),
    ("port: 9000", "hold_s: 0", "2: server.hold_s: expected a number > 0"),
    ("port: 9000", "hold_s: .inf", "2: server.hold_s: expected a number <= 86400"),
    ("port: 9000", "hold_s: .nan", "2: .nan is no number"),
    (
        "server:",
        "database: {url: 'postgresql://me:secret@host/db'}\nserver:",
        "1: database.url: expected sqlite:////path/to/file, or postgresql://user@host/database (a password goes into "
        "`password`)",
    ),
    ("server:", "database: {url: ledger.db}\nserver:", "1: database.url: expected sqlite:////path/to/file, or "),
    ("port: 9000", "hold_s: 1e1", "2: server.hold_s: expected a number, got text"),
    ("\n  port: 9000", "", "1: server: expected a mapping, got nothing"),
    ("\n  port: 9000", " [1]", "1: server: expected a mapping, got a list"),
    ("    - name: alice\n      sha256", "    - sha256", "5: auth.keys[0]: 'name' is missing"),
    ("name: alice", "name: al ice", "5: auth.keys[0].name: expected 1 to 64 of A-Z a-z 0-9 . _ @ -"),
    (
        f"sha256: {SHA}",
        "sha256: sk-suiron-canary",
        "6: auth.keys[0].sha256: expected 64 digits of 0-9 a-f, as `suiron key new` prints",
    ),
    ("[org/name.with.dots]", "[7]", "7: auth.keys[0].models[0]: expected text, got a whole number"),
    (
        "models: [org/name.with.dots]",
        "models:\n        - org/name.with.dots\n        - org/name.with.dot",
        "9: auth.keys[0].models[1]: there is no model 'org/name.with.dot'; did you mean 'org/name.with.dots'?",
    ),
    (
        "upstreams:\n",
        f"    - name: alice\n      sha256: {'b' * 64}\nupstreams:\n",
        "8: auth.keys[1].name: a second key 'alice'",
    ),
    (
        "adapter: echo",
        "adaptor: echo",
        "16: upstreams.echo.adaptor: unknown key 'adaptor'; did you mean 'adapter'?",
    ),
    ("    adapter: echo", "    max_connections: 5", "15: upstreams.echo: 'adapter' is missing"),
    (
        "adapter: echo",
        "adapter: adapters/echo.py",
        "16: upstreams.echo.adapter: expected a name such as openai, or package.module:Class",
    ),
    ("[top_k]", "[top_k, 7]", "14: upstreams.gpu.extra_fields[1]: expected text, got a whole number"),
    ("connect_s: 1", "connect_s: soon", "13: upstreams.gpu.timeouts.connect_s: expected a number, got text"),
    (
        "connect_s: 1",
        "conect_s: 1",
        "13: upstreams.gpu.timeouts.conect_s: unknown key 'conect_s'; did you mean 'connect_s'?",
    ),
    ("env: GPU_KEY", "", "12: upstreams.gpu.api_key: a secret is either {env: NAME} or {file: PATH}"),
    ("env: GPU_KEY", "env: A, file: b", "12: upstreams.gpu.api_key: a secret is either {env: NAME} or {file: PATH}"),
    ("{env: GPU_KEY}", "sk-canary", "12: upstreams.gpu.api_key: expected {env: NAME} or {file: PATH}"),
    *(
        ("http://gpu:8000/v1", url, "11: upstreams.gpu.base_url: not like http://host:port/v1 (")
        for url in (
            "gpu:8000",
            "//gpu/v1",
            "ftp://gpu/v1",
            "http://",
            "http:///v1",
            "http://gpu:port/v1",
            "http://gpu:99999/v1",
            "http://user:canary@gpu/v1",
            "http://gpu/v1?key=canary",
            "http://gpu/v1#a",
            "'http://g pu/v1'",
            "http://[::1/v1",
            "http://[:::]/v1",
            "http://gpü/v1",
        )
    ),
    (
        "http://gpu:8000/v1",
        "http://gpu:8000/v1/chat/completions/",
        "11: upstreams.gpu.base_url: ends before /chat/completions/, as http://host:port/v1 does",
    ),
    ("  port: 9000", "  port: 9000\ntelemetry: {log: JSON}", "3: telemetry.log: expected one of text, json, off"),
    ("  port: 9000", "  port: 9000\nstore: {url: 'http://a'}", "3: store.url: expected redis://host:6379/0, "),
    (
        "upstream: gpu",
        "upstream: gpus",
        "20: models.\"org/name.with.dots\".targets[0].upstream: there is no upstream 'gpus'; did you mean 'gpu'?",
    ),
    (
        "        model: x",
        "        modle: x",
        "22: models.\"org/name.with.dots\".targets[1].modle: unknown key 'modle'; did you mean 'model'?",
    ),
    ("model: x", "model: 7", '22: models."org/name.with.dots".targets[1].model: expected text, got a whole number'),
    ("- upstream: gpu", "- gpu", '20: models."org/name.with.dots".targets[0]: expected {upstream: NAME}'),
    (
        "targets:\n      - upstream: gpu\n      - upstream: echo\n        model: x",
        "targets: []",
        '19: models."org/name.with.dots".targets: expected a list with something in it',
    ),
    ("    targets:", "    target:", '19: models."org/name.with.dots".target: unknown key'),
    ("  org/name.with.dots:\n", "  7:\n", "17: models: the key 7 is not text: put it in quotes"),
    ("  port: 9000", "  port: 9000\n  port: 9001", "3: the key 'port' occurs twice"),
    ("    adapter: echo", "    adapter: echo\n  gpu:\n    adapter: echo", "17: the key 'gpu' occurs twice"),
    ("  port: 9000", "  port: 9000\n\tx: 1", "3: found character '\\t' that cannot start any token"),
    ("[top_k]", "[top_k", "15: "),
    ("[top_k]", "*nowhere", "14: found undefined alias"),
    ("[top_k]", "!!python/object:os.system x", "14: could not determine a constructor for the tag"),
    ("  port: 9000", "  ? [a]\n  : b", "2: found unhashable key"),
]


@pytest.mark.parametrize(("there", "instead", "said"), WRONG, ids=[f"{b[:50]!r}" for _, b, _ in WRONG])
def test_a_fault_is_told_with_its_line_its_path_and_what_to_write(there: str, instead: str, said: str) -> None:
    assert GOOD.count(there) >= 1
    fault = fault_of(GOOD.replace(there, instead, 1))
    assert fault.startswith(f"g.yaml:{said}")
    assert "\n" not in fault
    assert "canary" not in fault, "no secret is repeated"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "g.yaml:1: the document: expected a mapping, got a list"),
        ("just text", "g.yaml:1: the document: expected a mapping, got text"),
        ("a: 1\n---\nb: 2\n", "g.yaml:2: but found another document"),
        ("a: \0", "g.yaml: unacceptable character #x0000: special characters are not allowed"),
        ("a: 2026-99-99", "g.yaml: month must be in 1..12"),
        ("a: &a [*a]", "g.yaml:1: a: unknown key 'a'"),
        ("[" * 5000, "g.yaml: nested too deeply"),
    ],
)
def test_what_is_no_configuration_at_all_is_refused_in_a_sentence(text: str, said: str) -> None:
    fault = fault_of(text)
    assert fault.startswith(said)
    assert "\n" not in fault


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("host: é".encode("latin-1"))
    for path, why in (("missing.yaml", "No such file"), ("latin.yaml", "it is not UTF-8"), (".", "Is a directory")):
        with pytest.raises(SettingsError, match=re.escape(f"{tmp_path / path}: cannot be read: {why}")):
            load(tmp_path / path)


def test_a_secret_comes_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    monkeypatch.setenv("SUIRON_TEST_KEY", " from-the-environment ")
    monkeypatch.delenv("SUIRON_TEST_NONE", raising=False)

    def reveal(source: str) -> str:
        upstream = parse(f"upstreams: {{a: {{adapter: openai, api_key: {{{source}}}}}}}", "").upstreams["a"]
        assert upstream.api_key is not None
        return upstream.api_key.reveal()

    assert reveal("env: SUIRON_TEST_KEY") == "from-the-environment"
    assert reveal(f"file: {tmp_path}/key") == "from-a-file"
    with pytest.raises(SettingsError, match="the environment variable SUIRON_TEST_NONE is not set"):
        reveal("env: SUIRON_TEST_NONE")
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        reveal(f"file: {tmp_path}/nothing")


# The manual.


def test_the_manual_works_as_it_stands() -> None:
    settings = load(MANUAL)
    assert settings.server == Server()
    assert not settings.auth.keys
    assert all(upstream.api_key is None and not upstream.base_url for upstream in settings.upstreams.values())


def test_the_manual_works_with_every_example_taken_in() -> None:
    text = MANUAL.read_text()
    opened = re.sub(r"^(limits|store|database): \{\}$", r"\1:", text.replace("  keys: []\n", ""), flags=re.MULTILINE)
    settings = parse(re.sub(r"^#(?=  )", "", opened, flags=re.MULTILINE), "manual")
    assert [key.name for key in settings.auth.keys] == ["alice", "bobs-app"]
    assert settings.upstreams["vllm"].timeouts == Timeouts(), "the manual shows the defaults"


def test_the_manual_has_every_key() -> None:
    structs = {
        name: definition
        for name, definition in json_schema()["$defs"].items()
        if definition.get("type") == "object" and "properties" in definition
    }
    text = MANUAL.read_text()
    keys = {(name, key) for name, definition in structs.items() for key in definition["properties"]}
    assert len(keys) > 25
    assert [(name, key) for name, key in sorted(keys) if not re.search(rf"(?<![\w]){key}:", text)] == []


def test_the_schema_refuses_what_the_gateway_refuses() -> None:
    schema: dict[str, Any] = json.loads(json.dumps(json_schema()))
    assert schema["$ref"] == "#/$defs/Settings"
    for definition in schema["$defs"].values():
        if "properties" in definition:
            assert definition["additionalProperties"] is False
    assert schema["$defs"]["Upstream"]["required"] == ["adapter"]
    assert schema["$defs"]["Model"]["properties"]["targets"]["minItems"] == 1
    assert set(schema["$defs"]["Settings"]["properties"]) == set(msgspec.structs.asdict(Settings()))
