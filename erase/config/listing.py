"""What settings there are: their paths, values and documentation, read from the dataclasses and the methods."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from erase.config.read import options_in

if TYPE_CHECKING:  # methods import torch, which takes seconds
    from erase.methods import Entry

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
TYPES = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}


@dataclass(frozen=True)
class Setting:
    """A setting as a user meets it."""

    path: str
    """Such as `train.steps`."""
    values: str
    """What is allowed, in words."""
    default: str
    """As it is written; `required` where there is none."""
    text: str
    """What it is for; empty where its name says it."""

    def lines(self) -> str:
        """For a terminal."""
        head = f"{self.path}: {self.values}; {self.default}"
        return "\n".join([head, *textwrap.wrap(self.text, 112, initial_indent="    ", subsequent_indent="    ")])


def listed(kind: Any, before: str = "") -> Iterator[Setting]:
    """The settings of a configuration, in the order of its dataclasses."""
    texts, types = _attribute_texts(kind), inspect.get_annotations(kind, eval_str=True)
    for field in dataclasses.fields(kind):
        path, text = f"{before}{field.name}", texts.get(field.name, "")
        inner = next((option for option in options_in(types[field.name]) if dataclasses.is_dataclass(option)), None)
        if inner is not None:
            yield from listed(inner, f"{path}.")
        else:
            yield Setting(path, _values(types[field.name]), _default(field), text)


def listed_method(entry: Entry) -> Iterator[Setting]:
    """The settings of a method, as its builder documents them."""
    texts = _argument_texts(entry.build)
    for name, parameter in entry.settings.items():
        none = parameter.default is inspect.Parameter.empty
        default = "required" if none else f"default {_written(parameter.default)}"
        yield Setting(f"method.{name}", _values(parameter.annotation), default, texts.get(name, ""))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"default {_written(field.default)}"
    if field.default_factory is not dataclasses.MISSING:
        return f"default {_written(field.default_factory())}"
    return "required"


def _written(value: Any) -> str:
    """As in a preset."""
    words = {None: "null", True: "true", False: "false", "": "empty"}
    return words[value] if isinstance(value, bool | str | None) and value in words else str(value).replace("'", "")


def _values(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return "any value"
    schema = TypeAdapter(annotation).json_schema()
    return _allowed(schema, schema.get("$defs", {}))


def _allowed(schema: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        return _allowed(known[schema["$ref"].rpartition("/")[2]], known)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_allowed(part, known) for part in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(_written(value) for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any value")
    if kind == "array":
        return f"list of {_allowed(schema.get('items', {}), known)}"
    if kind == "object":
        return "mapping"
    if schema.get("format") == "path":
        return "path"
    bounds = [f"{sign} {schema[key]}" for key, sign in BOUNDS.items() if key in schema]
    return " ".join([TYPES.get(kind, kind), *([" and ".join(bounds)] if bounds else [])])


def _attribute_texts(kind: type) -> dict[str, str]:
    """The strings that follow the fields of a class: Python does not keep them."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _argument_texts(build: Any) -> dict[str, str]:
    """The `Args:` of a docstring, by name."""
    part = (inspect.getdoc(build) or "").partition("Args:\n")[2].split("\n\n")[0]
    rows = re.split(r"^    (\w+): ", part, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(rows[::2], rows[1::2], strict=True)}
