"""What the README says is so."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from gateway.cli import main
from gateway.settings import parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_its_links_lead_somewhere() -> None:
    missing = [link for link in re.findall(r"\]\(([^)#:]+)\)", README) if not (ROOT / link).exists()]

    assert missing == []


def test_its_yaml_is_configuration_that_loads() -> None:
    needed = {"upstreams": {"echo": {"adapter": "echo"}}, "models": {"smart": {"targets": [{"upstream": "echo"}]}}}
    for block in blocks("yaml"):
        document = yaml.safe_load(block)
        merged = {name: {**needed.get(name, {}), **document.get(name, {})} for name in {*needed, *document}}

        assert parse(yaml.safe_dump(merged), "README.md").models


def test_its_commands_and_their_options_exist() -> None:
    said = re.findall(r"suiron ((?:serve|check|schema|key new)\b[^\n#`]*)", README)
    assert {line.split()[0] for line in said} == {"serve", "check", "schema", "key"}
    for line in said:
        command = ["key", "new"] if line.startswith("key") else [line.split()[0]]
        shown = CliRunner().invoke(main, [*command, "--help"]).output
        for option in re.findall(r"--[a-z]+", line):
            assert option in shown


def test_its_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z-]+)", README)) - {"a"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_dependency_is_justified() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(
        r"^(?:dependencies|\w+) = \[(.*?)\]$", project.partition("[project.scripts]")[0], re.DOTALL | re.M
    )
    names = {name.lower() for block in lists for name in re.findall(r'"([A-Za-z0-9_-]+)', block)}
    decisions = README.partition("## Decisions")[2].lower()

    assert [name for name in sorted(names) if name not in decisions] == []


@pytest.mark.slow
def test_in_a_fresh_copy_make_run_without_torch_serves_the_snippet_it_prints(tmp_path: Path) -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["make", "run", "EXTRAS=", "ARGS=--port 0"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as gateway:
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
        finally:
            subprocess.run(["pkill", "-INT", "-f", f"{tmp_path}/.venv-light/bin/suiron"], check=False)
            gateway.send_signal(signal.SIGINT)
            gateway.wait(30)
