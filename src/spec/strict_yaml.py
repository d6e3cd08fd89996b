"""Strict YAML, and dataclasses as its schema: every key known, typed and in range. No torch.

Every mistake a user can make raises `ValueError` with one sentence that names file or key, value
found, value expected and the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml

# ------------------------------------------------------------------------------------ strict YAML


LARGEST = 100_000  # values of a file, an alias counting as all that it stands for; ours: 5,000


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars (3e-4 is a number, 010 and `no` are not numbers or
    booleans in disguise) and merge keys, without silent duplicate keys and without aliases that
    blow a small file up."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.sizes: dict[yaml.Node, int] = {}  # of the collections that are complete

    def compose_sequence_node(self, anchor: Any) -> Any:
        node = super().compose_sequence_node(anchor)
        self._measure(node, node.value)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        self._measure(node, [part for pair in node.value for part in pair])
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a collection"
                raise ValueError(f"line {line}: found the key {shown}, expected a name")
            if key_node.value in seen:
                raise ValueError(
                    f"line {line}: the key {key_node.value!r} is there twice (first on line "
                    f"{seen[key_node.value]}); expected each key once, so remove one of them"
                )
            seen[key_node.value] = line
        return node

    def _measure(self, node: yaml.Node, parts: Sequence[yaml.Node]) -> None:
        size = 1
        for part in parts:
            if isinstance(part, yaml.CollectionNode) and part not in self.sizes:
                raise ValueError(
                    f"line {part.start_mark.line + 1}: found an alias inside of what it stands "
                    "for, expected plain values"
                )
            size += self.sizes.get(part, 1)
        if size > LARGEST:
            raise ValueError(
                f"line {node.start_mark.line + 1}: found {size:,} values, its aliases "
                f"written out, expected at most {LARGEST:,}"
            )
        self.sizes[node] = size


def _strict_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = node.value.replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_TAG = "tag:yaml.org,2002:"
_NUMBER_START = list("-+0123456789.")
for _tag, _pattern, _first in (
    ("merge", r"<<", ["<"]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", _NUMBER_START),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9_]+([eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        _NUMBER_START,
    ),
):
    _StrictLoader.add_implicit_resolver(f"{_TAG}{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_StrictLoader.add_constructor(f"{_TAG}float", _strict_float)


def parse_yaml(text: str, source: str) -> Any:
    """Strict YAML text to plain values; ValueError names `source` and the line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{source}:{where} is not valid YAML: {problem}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: {error}") from None
    except (AttributeError, LookupError) as error:  # `!!timestamp x`, `!!bool x`, `!!int ""`
        raise ValueError(f"{source}: found a tag that its value does not fit ({error})") from None


def read_yaml(path: Path, what: str) -> Any:
    """A strict YAML file's plain values; ValueError where it cannot be read as `what`."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path.absolute()}: found no such file, expected {what}") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: found a directory, expected {what}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; expected YAML text") from None
    return parse_yaml(text, str(path))


# --------------------------------------------------------------------------------- keys and types


def key(default: Any, says: str, ok: Callable[[Any], object] = lambda _: True) -> Any:
    """A field of a section: its default (MISSING: the file has to state it), what is expected, and
    whether a value of the annotated type is in range."""
    return field(default=default, metadata={"says": says, "ok": ok})


def one_of(default: str, *names: str) -> Any:
    return key(default, "one of " + ", ".join(names), lambda v: v in names)


def nearest(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def known_keys(where: str, section: Mapping[str, Any], valid: Sequence[str]) -> None:
    for name in section:
        if name not in valid:
            raise ValueError(
                f"{where}{name}: found an unknown key, expected one of {', '.join(valid)}"
                f"{nearest(name, valid)}"
            )


def mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: found {value!r}, expected a mapping of keys")
    return value


_EXPECTED = {
    "int": "a whole number below 2^53: ",
    "float": "a finite number: ",
    "str": "text: ",
    "tuple[float, ...]": "finite numbers: ",
    "tuple[int, ...]": "whole numbers: ",
}


def _coerce(value: Any, kind: str) -> Any:
    """`value` as the annotated `kind`, or raises TypeError. A bool is never a number."""
    if kind.endswith(" | None"):
        return None if value is None else _coerce(value, kind.removesuffix(" | None"))
    if kind == "int | str":
        kind = "str" if isinstance(value, str) else "int"
    if kind.startswith("tuple[") and isinstance(value, list):
        return tuple(_coerce(item, kind[6:].partition(",")[0]) for item in value)
    if isinstance(value, bool):
        good = kind == "bool"
    elif isinstance(value, int):
        good = kind in ("int", "float") and abs(value) < 2**53
    elif isinstance(value, float):
        good = kind == "float" and math.isfinite(value)
    else:
        good = kind == "str" and isinstance(value, str) and "\0" not in value
    if not good:
        raise TypeError
    return float(value) if kind == "float" else value


def _checked(where: str, spec: dataclasses.Field[Any], value: Any) -> Any:
    kind = str(spec.type)
    expected = _EXPECTED.get(kind.removesuffix(" | None"), "") + spec.metadata["says"]
    message = f"{where}{spec.name}: found {value!r}, expected {expected}"
    try:
        value = _coerce(value, kind)
    except TypeError:
        raise ValueError(message) from None
    if value == "" or value is not None and not spec.metadata["ok"](value):
        raise ValueError(message)
    return value


def build(kind: type, where: str, values: Any) -> Any:
    """A dataclass `kind` from a mapping, every key known, typed and in range."""
    values = mapping(where.rstrip("."), values)
    specs = {spec.name: spec for spec in dataclasses.fields(kind)}
    known_keys(where, values, list(specs))
    required = [name for name, spec in specs.items() if spec.default is dataclasses.MISSING]
    stated = {**dict.fromkeys(required), **values}
    return kind(**{name: _checked(where, specs[name], value) for name, value in stated.items()})
