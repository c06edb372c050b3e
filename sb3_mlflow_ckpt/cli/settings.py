"""Owns settings as texts: what a flag, a YAML file or an environment variable says becomes a layer of values.

Values stay unvalidated: `config.build_config` checks them and names where they came from. Imports no click.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from yaml.constructor import ConstructorError

from sb3_mlflow_ckpt.config import (
    ENVIRONMENT_PREFIX,
    INHERIT,
    LARGEST_WHOLE,
    Layer,
    TrainingConfig,
    inheritable_fields,
)
from sb3_mlflow_ckpt.errors import ConfigError
from sb3_mlflow_ckpt.redaction import redact
from sb3_mlflow_ckpt.strict_json import LONGEST_INTEGER

_FLOAT = "tag:yaml.org,2002:float"
_INTEGER = "tag:yaml.org,2002:int"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_LARGEST_FILE = 2**20
_DEPTH = 32
# Anchors let a few lines stand for more than a machine can hold.
_MOST_VALUES = 100_000
_MOST_MERGED = 64
_PAIR = re.compile(r"(?P<key>[^\s=:{}\[\]]+)=(?P<value>.*)", re.DOTALL)
_NEARLY = 0.85
_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "true|false", dict: "MAPPING", list: "LIST"}


@dataclass(frozen=True)
class Setting:
    """A field of `TrainingConfig` as it is written outside of Python.

    Attributes:
        name: The key in a file.
        flag: The command's option.
        variable: The environment variable.
        metavar: The type in a few characters.
        default: The default as a text; None where the default is "unset".
        inherited: Whether a resumed run takes it from its checkpoint.
        description: One sentence.
        types: The Python types that it takes.
    """

    name: str
    flag: str
    variable: str
    metavar: str
    default: str | None
    inherited: bool
    description: str
    types: tuple[Any, ...]

    @property
    def is_switch(self) -> bool:
        return bool in self.types

    @property
    def takes_mapping(self) -> bool:
        return dict in self.types

    @property
    def takes_list(self) -> bool:
        return list in self.types


def settings() -> list[Setting]:
    """Return every setting, in the order of `TrainingConfig`."""
    inherited = set(inheritable_fields())
    return [
        Setting(
            name=name,
            flag=f"--{name.replace('_', '-')}",
            variable=f"{ENVIRONMENT_PREFIX}{name.upper()}",
            metavar=_metavar(name, info.annotation),
            default=_default_text(info.get_default(call_default_factory=True)),
            inherited=name in inherited,
            description=info.description or "",
            types=tuple(get_origin(member) or member for member in _members(info.annotation)),
        )
        for name, info in TrainingConfig.model_fields.items()
    ]


def flag_layer(given: Mapping[str, str | Sequence[str] | None]) -> Layer:
    """Return the layer of the command's options.

    Args:
        given: The texts of each option by the setting's name; None, an empty sequence or `inherit` is "not given".
    """
    known = {setting.name: setting for setting in settings()}
    values: dict[str, Any] = {}
    for name, texts in given.items():
        setting = known[name]
        texts = [texts] if isinstance(texts, str) else list(texts or ())
        texts = [text for text in texts if text != INHERIT]
        if texts:
            values[name] = _value(setting, texts, setting.flag)
    return Layer("the flags", values, {name: known[name].flag for name in values})


def environment_layer(environ: Mapping[str, str]) -> Layer:
    """Return the layer of environment variables; an empty one is "not given".

    Raises:
        ConfigError: One is misspelt.
    """
    known = {setting.variable.removeprefix(ENVIRONMENT_PREFIX): setting for setting in settings()}
    for variable in environ:
        name = variable.removeprefix(ENVIRONMENT_PREFIX)
        if not variable.startswith(ENVIRONMENT_PREFIX) or name in known:
            continue
        # Others may have names of their own: only what is nearly a setting was meant to be one.
        if close := difflib.get_close_matches(name, known, n=1, cutoff=_NEARLY):
            raise ConfigError(variable, "it is no setting", hint=f"Did you mean {known[close[0]].variable}?")
    given = [(s, environ[s.variable]) for s in settings() if environ.get(s.variable, "") not in ("", INHERIT)]
    return Layer(
        "the environment",
        {setting.name: _value(setting, [text], setting.variable) for setting, text in given},
        {setting.name: setting.variable for setting, _ in given},
    )


def file_layer(path: str | Path, given_as: str = "--config") -> Layer:
    """Return the layer of a YAML file; an empty file is an empty layer.

    Args:
        path: The file.
        given_as: How an error calls the way in which the file was named.

    Raises:
        ConfigError: The file cannot be read, or is not one YAML mapping without duplicate keys.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError("config", f"{path} cannot be read: {error.strerror or error}", given_as) from error
    except ValueError as error:
        raise ConfigError("config", f"{str(path)!r} is not a path: {error}", given_as) from error
    if len(content) > _LARGEST_FILE:
        raise ConfigError("config", f"is larger than {_LARGEST_FILE} bytes", str(path))
    values = _load(content, "config", str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(
            "config", f"holds {_kind(values)}, not settings", str(path), "Write one setting a line: n_envs: 4"
        )
    return Layer(str(path), values)


def _members(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (Union, types.UnionType)
    return tuple(m for m in get_args(annotation) if m is not type(None)) if union else (annotation,)


def _metavar(name: str, annotation: Any) -> str:
    if name == "learning_rate":
        return "NUMBER|lin_NUMBER"
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return "|".join(_METAVARS[get_origin(member) or member] for member in _members(annotation))


def _default_text(value: Any) -> str | None:
    if value is None:
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(setting: Setting, texts: Sequence[str], source: str) -> Any:
    """Return what the texts of one option or variable say; a scalar's last text wins."""
    if setting.takes_list:
        return [item for text in texts for item in _items(text, setting.name, source)]
    if setting.takes_mapping:
        if setting.is_switch and not any(_is_mapping_text(text) for text in texts):
            return texts[-1]
        return {key: value for text in texts for key, value in _mapping(text, setting.name, source).items()}
    return texts[-1]


def _is_mapping_text(text: str) -> bool:
    return text.lstrip().startswith("{") or ":" in text or _PAIR.fullmatch(text.strip()) is not None


def _mapping(text: str, key: str, source: str) -> dict[str, Any]:
    pair = None if text.lstrip().startswith("{") else _PAIR.fullmatch(text.strip())
    value = {pair["key"]: _load(pair["value"], key, source)} if pair else _load(text, key, source)
    if not isinstance(value, dict):
        shown = redact(repr(text))
        raise ConfigError(key, f"{shown} is neither a mapping such as '{{a: 1, b: 2}}' nor a pair such as a=1", source)
    return value


def _items(text: str, key: str, source: str) -> list[Any]:
    if not text.lstrip().startswith(("[", "{")):
        return [text]
    value = _load(text, key, source)
    return value if isinstance(value, list) else [value]


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"only {str(value)[:40]!r}"


class _Duplicate(yaml.YAMLError):
    """A key stands twice in one mapping."""

    def __init__(self, key: str, first: int, second: int) -> None:
        super().__init__(key)
        self.key = key if key.isprintable() else repr(key)
        self.lines = f"line {first}" if first == second else f"lines {first} and {second}"


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `3e-4` is a number, a date stays a text, and no key is given twice.

    Of YAML's tags only those of JSON's kinds are taken.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Checked here, not in the constructor: merge keys (`<<`) may repeat a key on purpose.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise _Duplicate(key.value, lines[key.value], line)
                lines[key.value] = line
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        if any(isinstance(value, yaml.SequenceNode) and len(value.value) > _MOST_MERGED for value in merged):
            raise ConstructorError(problem="it merges too many mappings", problem_mark=node.start_mark)
        super().flatten_mapping(node)
        if len(node.value) > _MOST_VALUES:
            raise ConstructorError(problem="it merges too much", problem_mark=node.start_mark)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > LONGEST_INTEGER:
            raise ConstructorError(problem="it holds an integer that is too long", problem_mark=node.start_mark)
        return self.construct_yaml_int(node)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        number = self.construct_yaml_float(node)
        # As in `config`: 1e6 is an integer, since buffer sizes and the like are written so.
        whole = number.is_integer() and abs(number) <= LARGEST_WHOLE and not set(node.value) & {".", "-"}
        return int(number) if whole else number


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}
_Loader.add_constructor(_FLOAT, _Loader.construct_number)
_Loader.add_constructor(_INTEGER, _Loader.construct_integer)


def _load(content: str | bytes, key: str, source: str) -> Any:
    try:
        value = yaml.load(content, _Loader)
        _check_size(value)
    except _Duplicate as error:
        raise ConfigError(error.key, f"is given twice, on {error.lines}", source) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join((error.problem or error.context or "it cannot be parsed").split())
        raise ConfigError(key, f"is not valid YAML{place}: {problem}", source) from error
    except yaml.YAMLError as error:
        raise ConfigError(key, f"is not valid YAML: {' '.join(str(error).split())}", source) from error
    except RecursionError as error:
        raise ConfigError(key, "is nested too deeply, or holds itself", source) from error
    except (ValueError, TypeError) as error:
        # What PyYAML's own constructors raise for a value that its tag does not admit, such as `!!int x`.
        raise ConfigError(key, f"is not valid YAML: {' '.join(str(error).split())[:200]}", source) from error
    return value


def _check_size(value: Any) -> None:
    """Raise for a value that is nested too deeply, holds itself, or stands by its anchors for far more than it is."""
    if _size(value, {}, 0) > _MOST_VALUES:
        raise ValueError(f"it stands for more than {_MOST_VALUES} values")


def _size(value: Any, known: dict[int, tuple[int, int]], depth: int) -> int:
    """Return how many values a value is when its anchors are written out; each part is walked once a depth."""
    if depth > _DEPTH:
        raise RecursionError
    if not isinstance(value, (dict, list)):
        return 1
    at, size = known.get(id(value), (-1, 0))
    if at < depth:
        # The deepest place decides whether it is nested too deeply.
        size = 1 + sum(_size(item, known, depth + 1) for item in (value.values() if isinstance(value, dict) else value))
        known[id(value)] = depth, size
    return size
