"""Would the containers start? No engine runs here: the files are checked, and the Dockerfile's steps done by hand."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
import yaml

from gateway import __version__
from gateway.settings import load

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
IGNORE = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+(\.\d+)?(-[a-z-]+)?")
ENGINES = {"tgi", "vllm"}

METRICS = {
    "suiron_requests_total": {"model", "target", "status", "outcome"},
    "suiron_time_to_first_token_seconds": {"model", "target"},
    "suiron_time_between_tokens_seconds": {"model", "target"},
    "suiron_request_duration_seconds": {"model", "target"},
    "suiron_gateway_overhead_seconds": {"model"},
    "suiron_tokens_total": {"model", "kind"},
    "suiron_requests_in_flight": {"model"},
    "suiron_upstream_errors_total": {"target", "kind"},
    "suiron_event_loop_lag_seconds": set(),
}
"""What the dashboard may ask for: metrics, and their labels beside `instance` and `le`."""


class Step(NamedTuple):
    word: str
    rest: str


def stages() -> dict[str, list[Step]]:
    """The steps of each stage of the Dockerfile, those of the stages it builds on before its own."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    found: dict[str, list[Step]] = {}
    for line in filter(None, text.splitlines()):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, name = rest.split(" AS ")
            found[name] = [*found.get(base, [Step("FROM", base)])]
        else:
            found[name].append(Step(word, rest.strip()))
    return found


STAGES = stages()


def last(stage: str, word: str) -> str:
    return [step.rest for step in STAGES[stage] if step.word == word][-1]


def test_the_compose_file_follows_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, ROOT / "docker-compose.yml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_image_is_pinned() -> None:
    bases = {step.rest for steps in STAGES.values() for step in steps if step.word == "FROM"}
    images = {service["image"] for service in SERVICES.values()} | bases

    assert [image for image in images if not PINNED.fullmatch(image)] == []
    assert SERVICES["gateway"]["image"] == f"suiron:{__version__}"


def test_what_runs_by_default_and_what_by_profile() -> None:
    profiles = {name: service.get("profiles", []) for name, service in SERVICES.items()}

    assert {name for name, profile in profiles.items() if not profile} == {
        "gateway", "loadbalancer", "redis", "postgres"
    }  # fmt: skip
    assert {name: profile for name, profile in profiles.items() if profile} == {
        "tgi": ["tgi"],
        "vllm": ["vllm"],
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
    }
    assert SERVICES["gateway"]["deploy"]["replicas"] == 2


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_a_health_check_and_no_rights_it_does_not_need(name: str) -> None:
    service = SERVICES[name]

    assert service["healthcheck"]["test"][0] == "CMD"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert name in ENGINES or (service["read_only"] and "/tmp" in service["tmpfs"])
    assert "privileged" not in service
    assert not service.get("user", "1").startswith("0")


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_reached_from_this_machine_only_unless_it_is_the_load_balancer(name: str) -> None:
    ports = SERVICES[name].get("ports", [])
    assert all(port.startswith("127.0.0.1:") for port in ports) or name == "loadbalancer"


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_mounts_and_names_is_there(name: str) -> None:
    service = SERVICES[name]
    sources = [volume.split(":")[0] for volume in service.get("volumes", [])]

    assert [path for path in sources if path.startswith(".") and not (ROOT / path).is_file()] == []
    assert {volume for volume in sources if not volume.startswith(".")} <= set(COMPOSE["volumes"])
    assert all(volume.endswith(":ro") for volume in service.get("volumes", []) if volume.startswith("."))
    assert set(service["networks"]) <= set(COMPOSE["networks"])
    assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
    assert set(service.get("depends_on", [])) <= set(SERVICES)


def test_secrets_come_from_files_that_are_neither_committed_nor_built_in() -> None:
    files = [secret["file"] for secret in COMPOSE["secrets"].values()]
    environments = [service.get("environment", {}) for service in SERVICES.values()]

    assert all(file.startswith("./secrets/") for file in files)
    assert "secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    assert IGNORE[1] == "*"
    assert [
        name for environment in environments for name in environment if re.search(r"PASSWORD(?!_*FILE)|TOKEN|KEY", name)
    ] == []


def test_the_gateways_configuration_names_services_by_their_ports_and_lets_nobody_in_yet() -> None:
    settings = load(ROOT / "config" / "compose.yaml")
    addresses = {name: re.split("[:/]+", up.base_url)[1:3] for name, up in settings.upstreams.items() if up.base_url}

    assert addresses == {name: [name, SERVICES[name]["command"][-1]] for name in ENGINES}
    assert [key.sha256 for key in settings.auth.keys] == ["0" * 64]
    assert (settings.server.host, settings.server.port) == ("0.0.0.0", 8000)


def test_the_gateways_share_a_redis_and_a_postgresql_and_keep_their_journals_on_a_volume() -> None:
    settings = load(ROOT / "config" / "compose.yaml")
    gateway, redis, postgres = SERVICES["gateway"], SERVICES["redis"], SERVICES["postgres"]
    login = postgres["environment"]

    assert settings.store.url == "redis://redis:6379/0"
    assert redis["command"][-2:] == ["--maxmemory-policy", "noeviction"]
    assert settings.database.url == f"postgresql://{login['POSTGRES_USER']}@postgres/{login['POSTGRES_DB']}"
    assert settings.database.password is not None
    assert settings.database.password.file == login["POSTGRES_PASSWORD_FILE"]
    assert gateway["secrets"] == postgres["secrets"] == ["postgres_password"]
    assert "state:/var/lib/suiron" in gateway["volumes"]
    assert settings.database.journal == "/var/lib/suiron/journal"
    assert last("gateway", "VOLUME") == "/var/lib/suiron"
    assert "-o suiron -g suiron /var/lib/suiron" in last("gateway", "RUN")


def test_the_load_balancer_and_prometheus_know_where_the_services_are() -> None:
    nginx = (ROOT / "config" / "nginx.conf").read_text()
    jobs = yaml.safe_load((ROOT / "config" / "prometheus.yml").read_text())["scrape_configs"]
    asked = {(name, found["port"]) for job in jobs for found in job["dns_sd_configs"] for name in found["names"]}

    assert "server gateway:8000 resolve;" in nginx
    assert "proxy_buffering off;" in nginx
    assert "location = /metrics {" in nginx
    assert asked == {("gateway", 8000), ("tgi", 8080), ("vllm", 8000)}


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads((ROOT / "config" / "grafana" / "suiron.json").read_text())
    source = yaml.safe_load((ROOT / "config" / "grafana" / "datasource.yaml").read_text())["datasources"][0]
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    names = {name for query in queries for name in re.findall(r"suiron_\w+", query)}

    assert {name.removesuffix("_bucket") for name in names} == set(METRICS)
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    for query in queries:
        metrics = [name.removesuffix("_bucket") for name in re.findall(r"suiron_\w+", query)]
        known = {"instance", "le"}.union(*(METRICS[name] for name in metrics))
        grouped = [label for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(", ")]
        chosen = re.findall(r'(\w+)=~"', query)
        assert {*grouped, *chosen} <= known, query
        assert query.count("(") == query.count(")"), query


@pytest.mark.parametrize("target", ["gateway", "local"])
def test_a_target_of_the_dockerfile_runs_as_nobody_in_particular(target: str) -> None:
    assert last(target, "USER") == "10001:10001"
    assert json.loads(last(target, "ENTRYPOINT")) == ["suiron"]
    assert json.loads(last(target, "CMD")) == ["serve", "--config", "/etc/suiron/gateway.yaml"]
    assert list(STAGES)[-1] == "gateway"


def test_the_dockerfile_copies_only_what_is_there_and_fetches_nothing_by_itself() -> None:
    steps = [step for steps in STAGES.values() for step in steps]
    copied = [step.rest.split()[:-1] for step in steps if step.word == "COPY" and "--from" not in step.rest]

    assert {step.word for step in steps} <= set(
        "FROM ENV ARG WORKDIR COPY RUN EXPOSE HEALTHCHECK ENTRYPOINT CMD USER VOLUME".split()
    )
    assert [step.rest for step in steps if re.search(r"\b(curl|wget|git|apt|apt-get)\b", step.rest)] == []
    for source in {source for sources in copied for source in sources}:
        assert (ROOT / source).exists()
        assert f"!{source}" in IGNORE


def test_both_ask_for_health_in_the_same_way() -> None:
    _, _, command = last("gateway", "HEALTHCHECK").partition("CMD ")
    assert SERVICES["gateway"]["healthcheck"]["test"] == ["CMD", *json.loads(command)]


@pytest.mark.slow
def test_the_dockerfiles_steps_make_a_gateway_that_serves_and_writes_nothing(tmp_path: Path) -> None:
    image = Image(tmp_path)
    image.build("wheel")
    image.build("installed")
    image.build("gateway", skip="useradd")
    shutil.copy(ROOT / "config" / "compose.yaml", tmp_path / "etc/suiron/compose.yaml")
    before = image.files()

    assert image.run("suiron", "--version").strip() == f"suiron, version {__version__}"
    assert "fine: 3 models" in image.run("suiron", "check", str(tmp_path / "etc/suiron/compose.yaml"))
    assert image.run("python", "-c", "import importlib.util as u; print(u.find_spec('torch'))").strip() == "None"
    image.serve_and_ask()
    assert image.files() == before


class Image:
    """A folder that the steps of stages are done in, as if it were the root of a file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.workdir = root
        names = ("PATH", "LANG", "SSL_CERT_FILE")
        self.env = {name: os.environ[name] for name in names if name in os.environ}
        self.env |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}

    def inside(self, text: str) -> str:
        return re.sub(r"(?<![\w.:/])/(wheels|src|opt|etc|tmp)\b", rf"{self.root}/\1", text)

    def build(self, stage: str, skip: str = "nothing") -> None:
        for word, rest in STAGES[stage]:
            if word == "RUN" and skip not in rest:
                subprocess.run(["sh", "-c", self.inside(rest)], cwd=self.workdir, env=self.env, check=True)
            elif word == "COPY" and "--from" not in rest:
                self.copy(*rest.split())
            elif word == "WORKDIR":
                self.workdir = Path(self.inside(rest))
                self.workdir.mkdir(parents=True, exist_ok=True)
            elif word == "ENV":
                for name, _, value in (part.partition("=") for part in shlex.split(rest)):
                    self.env[name] = self.inside(value.replace("$PATH", self.env["PATH"]))

    def copy(self, *words: str) -> None:
        *sources, destination = words
        for source in sources:
            target = self.workdir / self.inside(destination)
            if destination.endswith("/"):
                target = target / Path(source).name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, target)

    def run(self, *command: str) -> str:
        path = shutil.which(command[0], path=self.env["PATH"]) or command[0]
        done = subprocess.run([path, *command[1:]], cwd=self.workdir, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def serve_and_ask(self) -> None:
        """What ENTRYPOINT and CMD start answers what HEALTHCHECK asks, and has its page."""
        command = [self.inside(word) for word in json.loads(last("gateway", "ENTRYPOINT") or "[]")]
        command += [self.inside(word) for word in json.loads(last("gateway", "CMD"))]
        program = str(self.root / "opt/suiron/bin" / command[0])
        pipe = subprocess.PIPE
        options: dict[str, Any] = {"cwd": self.workdir, "env": self.env, "stdout": pipe, "text": True}
        with subprocess.Popen([program, *command[1:], "--port", "0"], **options) as gateway:
            try:
                assert gateway.stdout is not None
                said = ""
                while "Health" not in said:
                    said = gateway.stdout.readline()
                    assert gateway.poll() is None
                base = said.split()[-1].removesuffix("/health/ready")
                health = json.loads(last("gateway", "HEALTHCHECK").partition("CMD ")[2])
                self.run(*(word.replace("http://127.0.0.1:8000", base) for word in health))
                assert "Suiron" in httpx2.get(f"{base}/").text
            finally:
                gateway.terminate()
                gateway.communicate(timeout=10)

    def files(self) -> set[str]:
        return {str(path) for path in self.root.rglob("*")}
