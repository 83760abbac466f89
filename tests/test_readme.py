"""What the README says is so."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from gateway.cli import main
from gateway.settings import Model, Settings, Target, Upstream, parse
from tests.house import running

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
JAPANESE = (ROOT / "README.ja.md").read_text(encoding="utf-8")

both = pytest.mark.parametrize("text", [README, JAPANESE], ids=["README.md", "README.ja.md"])


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@both
def test_its_links_lead_somewhere(text: str) -> None:
    missing = [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (ROOT / link).exists()]

    assert missing == []


@both
def test_its_yaml_is_configuration_that_loads(text: str) -> None:
    needed: dict[str, Any] = {
        "upstreams": {"echo": {"adapter": "echo"}},
        "models": {"smart": {"targets": [{"upstream": "echo"}], "prices": {"input": 1, "output": 2}}},
    }
    for block in blocks("yaml", text):
        document = yaml.safe_load(block)
        merged = {name: {**needed.get(name, {}), **document.get(name, {})} for name in {*needed, *document}}

        assert parse(yaml.safe_dump(merged), "README.md").models


@both
def test_its_commands_and_their_options_exist(text: str) -> None:
    said = re.findall(r"(?:suiron|gateway) ((?:serve|check|schema|key new)\b[^\n#`]*)", text)
    assert {line.split()[0] for line in said} == {"serve", "check", "schema", "key"}
    for line in said:
        command = ["key", "new"] if line.startswith("key") else [line.split()[0]]
        shown = CliRunner().invoke(main, [*command, "--help"]).output
        for option in re.findall(r"--[a-z]+", line):
            assert option in shown


@both
def test_its_make_targets_exist(text: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z-]+)", text)) - {"a"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_dependency_is_justified() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(
        r"^(?:dependencies|\w+) = \[(.*?)\]$", project.partition("[project.scripts]")[0], re.DOTALL | re.M
    )
    names = {name.lower() for block in lists for name in re.findall(r'"([A-Za-z0-9_-]+)', block)}
    decisions = README.partition("## Decisions")[2].lower()

    assert [name for name in sorted(names) if name not in decisions] == []


def test_its_profiles_and_services_are_those_of_the_compose_file() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    profiles = {profile for service in services.values() for profile in service.get("profiles", [])}

    assert set(re.findall(r"--profile (\w+)", JAPANESE)) <= profiles
    assert set(re.findall(r"ghcr\.io/\S+:\S+", JAPANESE)) == {services["tgi"]["image"]}


@pytest.mark.anyio
@pytest.mark.parametrize("number", range(len(blocks("python", JAPANESE))))
async def test_a_snippet_of_the_course_runs(number: int) -> None:
    models = {name: Model(targets=[Target(upstream="echo")]) for name in ("suiron-demo", "tgi")}
    async with running(Settings(upstreams={"echo": Upstream(adapter="echo")}, models=models)) as house:
        snippet = blocks("python", JAPANESE)[number].replace("http://127.0.0.1:8000", house.url)
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", snippet, stdout=pipe, stderr=pipe)
        output, errors = await process.communicate()

    assert process.returncode == 0, errors.decode()
    assert re.findall(r'"content": "([^"]+)"', snippet)[-1].split()[0] in output.decode()


@pytest.mark.slow
def test_in_a_fresh_copy_make_run_without_torch_serves_the_snippet_it_prints(tmp_path: Path) -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["make", "run", "EXTRAS=", "ARGS=--port 0"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as gateway:
        try:
            printed = ""
            assert gateway.stdout is not None
            while "suiron serve --backend" not in printed:
                line = gateway.stdout.readline()
                assert line, printed
                printed += line
            snippet = printed[printed.index("from openai") : printed.index("\n\nServe")]
            python = tmp_path / ".venv-light" / "bin" / "python"
            answer = subprocess.run([python, "-c", snippet], capture_output=True, text=True, check=True, timeout=60)
            assert answer.stdout == "Hello!\n"
            os.killpg(gateway.pid, signal.SIGINT)  # as Ctrl-C does
            gateway.wait(30)
        finally:
            if gateway.poll() is None:
                os.killpg(gateway.pid, signal.SIGKILL)
