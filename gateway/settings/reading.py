"""How is a configuration read? From YAML; unknown and duplicate keys are refused with file, line and path."""

import math
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml
from msgspec import Struct

from gateway.settings.consistency import inconsistencies
from gateway.settings.faults import fault_in
from gateway.settings.shape import Settings, SettingsError, Steps, shown


def load(path: Path) -> Settings:
    """Raises SettingsError for the first fault found."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise SettingsError(f"{path}: cannot be read: {exc.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: cannot be read: it is not UTF-8") from None
    return parse(text, str(path))


def placed(error: SettingsError, file: Path) -> str:
    """What an error says of a configuration from *file*, with its line there, if it is about one place."""
    if not error.path:
        return str(error)
    root = _Loader(file.read_text(encoding="utf-8")).get_single_node()
    return f"{file}:{_line_of(root, error.path)}: {error}"


def parse(text: str, file: str) -> Settings:
    """Settings from YAML; *file* is its name for messages. Raises SettingsError."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        document = {} if root is None else loader.construct_document(root) or {}
        fault = fault_in(document, Settings, ())
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        raise SettingsError(f"{file}:{mark.line + 1 if mark else 1}: {exc.problem or exc.context}") from None
    except (yaml.YAMLError, ValueError) as exc:  # a character that no YAML has; a date that no calendar has
        raise SettingsError(f"{file}: {str(exc).splitlines()[0]}") from None
    except RecursionError:
        raise SettingsError(f"{file}: nested too deeply") from None
    if fault is None:
        settings = msgspec.convert(document, Settings)
        fault = next(inconsistencies(settings), None)
        if fault is None:
            return settings
    path, what = fault
    raise SettingsError(f"{file}:{_line_of(root, path)}: {shown(path)}: {what}")


Options = TypeVar("Options", bound=Struct)


def read_options(given: dict[str, Any], kind: type[Options]) -> Options:
    """An upstream's `options`, as its adapter knows them. Raises SettingsError."""
    if fault := fault_in(given, kind, ("options",)):
        path, what = fault
        raise SettingsError(what, path)
    return msgspec.convert(given, kind)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the configuration, for editors."""
    return msgspec.json.schema(Settings)


class _Loader(yaml.SafeLoader):
    """
    Refuses duplicate keys, of which YAML's own loader takes the last, and `.nan`, which no bound keeps out.

    `off`, `no`, `on` and `yes` are words.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' occurs twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        number: float = self.construct_yaml_float(node)
        if math.isnan(number):
            raise yaml.MarkedYAMLError(problem=f"{node.value} is no number", problem_mark=node.start_mark)
        return number


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|false|True|False|TRUE|FALSE"), list("tfTF"))


def _line_of(node: yaml.Node | None, path: Steps) -> int:
    """The line on which *path* stands, or what is nearest around it."""
    line = 1
    for step in path:
        if isinstance(node, yaml.MappingNode):
            key, node = next((pair for pair in node.value if pair[0].value == str(step)), (None, None))
        elif isinstance(node, yaml.SequenceNode):
            key = node = node.value[int(step)]
        else:
            break
        line = line if key is None else key.start_mark.line + 1
    return line
