"""Which module may import which? The picture in the design, checked against every import there is."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent

LAYERS = [line.split() for line in """
    __main__
    cli
    app server
    connection
    api
    pipeline upkeep
    stream telemetry limits cache routing ledger
    stops tokens
    call
    models
    auth discovery
    adapter stores database
    transport faults prices fanout mending
    schema
    sse text settings
    errors interrupt journal addresses
""".strip().splitlines()]  # fmt: skip
"""From the top; a module imports only from lines below its own, and from its own package."""

ADAPTERS_MAY_IMPORT = "adapter fanout faults mending sse text schema settings errors".split()

DOORS = {
    "httpx2": "gateway.adapter gateway.transport",
    "httptools": "gateway.connection gateway.transport",
    "litestar": "gateway.app gateway.api",
    "uvloop": "gateway.server",
    "click": "gateway.cli",
    "prometheus_client": "gateway.telemetry.metrics",
    "opentelemetry": "gateway.telemetry.traces",
    "yaml": "gateway.settings",
    "redis": "gateway.stores.redis",
    "hiredis": "gateway.stores.redis",
    "sqlalchemy": "gateway.database",
    "alembic": "gateway.database",
    "tiktoken": "gateway.tokens.encodings",
    "torch": "adapters.local",
    "transformers": "adapters.local",
    "tokenizers": "adapters.local",
    "safetensors": "adapters.local",
    "huggingface_hub": "adapters.local",
    "openai": "",
}
"""Where each dependency comes in, and nowhere else."""


RUN_ONLY = {"gateway.__main__", "gateway.database.migrations.env"}
"""What does its work when it is imported."""


def imports_of(path: Path) -> Iterable[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("gateway", "adapters")
    for path in sorted((ROOT / package).rglob("*.py"))
}
IMPORTS = [(module, imported) for module, path in MODULES.items() for imported in imports_of(path)]


def within(module: str, packages: Iterable[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def part(module: str) -> str:
    """`api` for `gateway.api.errors`; nothing for the version in `gateway` itself."""
    name = module.split(".")[1] if "." in module else ""
    return "" if name == "__version__" else name


def layer(module: str) -> int:
    return next(depth for depth, names in enumerate(LAYERS) if part(module) in names)


def test_every_module_has_its_layer() -> None:
    known = {name for names in LAYERS for name in names}
    assert {part(module) for module in MODULES if module.startswith("gateway.")} - known == set()


def test_imports_in_the_gateway_point_down() -> None:
    inside = [(m, i) for m, i in IMPORTS if within(m, ["gateway"]) and within(i, ["gateway"])]
    upward = [
        f"{module} imports {imported}"
        for module, imported in inside
        for name in [f"gateway.{imported.removeprefix('gateway.')}"]
        if part(name) and part(name) != part(module) and layer(name) <= layer(module)
    ]
    assert upward == []


def test_adapters_see_only_the_waist_and_what_is_below_it() -> None:
    allowed = [f"gateway.{name}" for name in ADAPTERS_MAY_IMPORT]
    used = [(m, i) for m, i in IMPORTS if within(m, ["adapters"]) and within(i, ["gateway"])]
    assert [f"{m} imports {i}" for m, i in used if part(i) and not within(i, allowed) and i != "gateway.errors"] == []


def test_nothing_in_the_gateway_imports_an_adapter() -> None:
    assert [m for m, imported in IMPORTS if within(m, ["gateway"]) and within(imported, ["adapters"])] == []


def test_adapters_do_not_import_each_other() -> None:
    between = [(m, i) for m, i in IMPORTS if within(m, ["adapters"]) and within(i, ["adapters"])]
    assert [f"{m} imports {i}" for m, i in between if part(m) != part(i)] == []


def test_every_dependency_has_one_door() -> None:
    strayed = [
        f"{module} imports {imported}: {package} comes in by {doors or 'no door'}"
        for package, doors in DOORS.items()
        for module, imported in IMPORTS
        if within(imported, [package]) and not within(module, doors.split())
    ]
    assert strayed == []


def test_no_module_of_the_gateway_and_no_adapter_loads_torch() -> None:
    loaded = [name for name in MODULES if within(name, ["gateway"]) and name not in RUN_ONLY]
    loaded += [f"adapters.{path.stem}" for path in (ROOT / "adapters").glob("*.py") if path.stem != "__init__"]
    code = f"""
import importlib, sys
for name in {[*loaded, "adapters.local", "adapters.local.adapter"]}:
    importlib.import_module(name)
print({{"torch", "transformers", "tokenizers"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
