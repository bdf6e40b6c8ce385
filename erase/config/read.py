"""Read settings: presets, layers over each other, `key=value` words; and say clearly what is wrong with them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from erase.nearest import meant
from erase.store import files

if TYPE_CHECKING:  # methods import torch, which takes seconds
    from erase.methods import Entry

from erase.config.kinds import NEW

T = TypeVar("T")
_FINITE = ConfigDict(allow_inf_nan=False)
ONE_OF = (("forget.fraction", "forget.labels", "forget.ids", "forget.split"),)
"""Settings that say the same in different ways: who sets one of them later takes the place of the others."""


class _Once(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The node as it is written, before other mappings are merged into it."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        found = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in found:
                raise yaml.YAMLError(f"{key.value!r} stands twice in one mapping, on line {key.start_mark.line + 1}")
            found.add((key.tag, key.value))
        return node


def read_preset(path: Path) -> dict[str, Any]:
    """A preset file as a mapping.

    Raises:
        ValueError: for a file that is missing or no YAML mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Once)  # a safe loader
    except FileNotFoundError:
        raise ValueError(f"no such preset file: {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; a preset is a YAML file") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not is a ValueError
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a YAML mapping; got {type(data).__name__}")
    return data


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings put over each other, later ones win; a list or value is replaced as a whole."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = out.get(key)
            if isinstance(value, Mapping):
                out[key] = merge(below if isinstance(below, dict) else {}, value)
            else:
                out[key] = value
    return out


def over(below: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """`merge`, but what the layer chooses takes the place of what is below: see `superseded`."""
    named = files.paths(layer)
    check_concept(below, named)
    return merge(_without(below, superseded(below, named)), layer)


def superseded(below: Mapping[str, Any], named: Mapping[str, Any]) -> list[str]:
    """Paths of what gives way to the settings that are named, by path.

    The others of `ONE_OF`, another method's settings, a new model's architecture where the model is there, and the
    choice among forget prompts where these are others.
    """
    gone = [
        other
        for group in ONE_OF
        if any(named.get(path) not in (None, []) for path in group)
        for other in group
        if other not in named
    ]
    prompts = named.get("forget.prompts")
    if prompts is not None and "forget.only" not in named and prompts != files.paths(below).get("forget.prompts"):
        gone.append("forget.only")
    if named.get("model", NEW) != NEW:
        gone.append("architecture")
    name = named.get("method.name")
    if name is not None and name != files.paths(below).get("method.name"):
        gone.append("method")
    return gone


def check_concept(below: Mapping[str, Any], named: Mapping[str, Any]) -> None:
    """Refuse another concept where what is below fits one alone: its anchors, remain prompts and judges would stay.

    Raises:
        ValueError: for other forget prompts than those of a preset with a `concept`, unless `concept` is named, too.
    """
    own, given = below.get("concept"), named.get("forget.prompts")
    given = [given] if isinstance(given, str) else given
    if own is None or given is None or "concept" in named or given == files.paths(below).get("forget.prompts"):
        return
    raise ValueError(
        f"forget.prompts is {given!r}, but the anchors, remain prompts and judges of this preset are for {own}: use "
        f"the preset sd_concept_sfron, or add concept={own} if these prompts are other words for it"
    )


def _without(data: Mapping[str, Any], gone: Sequence[str], before: str = "") -> dict[str, Any]:
    """A copy of nested settings but for some paths."""
    return {
        k: _without(v, gone, f"{before}{k}.") if isinstance(v, Mapping) else v
        for k, v in data.items()
        if f"{before}{k}" not in gone
    }


def override(data: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with `a.b=value` words applied; what they choose takes the place of others, see `superseded`.

    Values are numbers (`1e-3` too), true, false, null, `[lists]` and `{mappings}` of YAML, or text, which is
    kept to the letter (a prompt may hold `:` and `#`).

    Raises:
        ValueError: for a word without `=`, a path through something that is no mapping, or a broken list.
    """
    return put(data, read_words(words))


def read_words(words: Sequence[str]) -> dict[str, Any]:
    """What `key=value` words set, by path; values as `override` has them.

    Raises:
        ValueError: for a word without `=`, or a broken list.
    """
    given = {}
    for word in words:
        key, equals, text = (part.strip() for part in word.partition("="))
        if not equals or not key:
            raise ValueError(f"cannot read {word!r}: settings are given as key=value, such as train.steps=30")
        try:
            given[key] = _value(text)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"cannot read the value of {key}: {text!r} is not a YAML value") from error
    return given


def put(data: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `data` with values set by path (`train.steps`); what they choose takes the place of others.

    A mapping takes the place of a whole group; in a file it is put over the group.

    Raises:
        ValueError: for a path through something that is no mapping.
    """
    named = files.paths(given)
    check_concept(data, named)
    out = _without(data, superseded(data, named))
    for key, value in given.items():
        node = out
        *parents, last = key.split(".")
        for parent in parents:
            child = node.get(parent)
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ValueError(f"cannot set {key}: {parent} is a single value, not a group of settings")
            node = child
        node[last] = value
    return out


def _value(text: str) -> Any:
    if text.startswith(("[", "{", '"', "'")):
        return yaml.safe_load(text)
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # it takes 2024-13-45 for a date
        return text
    plain = (value is None and text in ("null", "~")) or (isinstance(value, bool | int | float) and "#" not in text)
    return value if plain else _number(text)


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as a string; people mean a number."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _new_adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind) if dataclasses.is_dataclass(kind) else TypeAdapter(kind, config=_FINITE)


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(_new_adapter)
"""One takes hundredths of a second to make, and a comparison asks for hundreds."""


def parse(data: Mapping[str, Any], kind: type[T]) -> T:
    """A configuration of `kind` from a mapping.

    Raises:
        ValueError: naming the first wrong key, what was got and what is allowed.
    """
    try:
        found: T = _adapter(kind).validate_python(_numbers(data))
    except ValidationError as error:
        raise ValueError(_first(error, kind)) from None
    return found


def _numbers(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {k: _numbers(v) for k, v in data.items()}
    return _number(data)


PLAIN = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "list_type": "must be a list, such as [a, b]",
}
"""What pydantic's errors are called in messages."""


def _first(error: ValidationError, kind: Any, *before: str) -> str:
    """The first error in plain words; `before` is where the value of `kind` stands."""
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "unexpected_keyword_argument"), errors[0])
    path = ".".join(str(part) for part in (*before, *first["loc"]))
    if first["type"] == "unexpected_keyword_argument":
        *_, last = (str(part) for part in first["loc"])
        if "." in last:
            group, _, key = last.partition(".")
            return f"unknown setting {last!r}: settings in a file are nested, as {group}: {{{key}: …}}"
        return _unknown(path, _keys(kind, first["loc"][:-1]))
    if first["type"] in ("missing", "missing_argument"):
        return f"the setting {path} is missing: give {path}=…"
    if first["type"] == "too_short":
        return f"{path} is empty: name at least {first['ctx']['min_length']}"
    if first["type"] == "dataclass_type":
        key = next(iter(_keys(kind, first["loc"])), "key")
        return f"{path}: a group of settings, given as {path}.{key}=… and so on; got {first['input']!r}"
    if first["type"] == "value_error":  # of a check of ours, which says what was got
        return f"{path}: {first['ctx']['error']}"
    said = first["msg"].replace("Input should be", "must be")
    return f"{path}: {PLAIN.get(first['type'], said[0].lower() + said[1:])}; got {first['input']!r}"


def _keys(kind: Any, path: Sequence[int | str]) -> list[str]:
    """The settings of a group, by the path to it within one of `kind`."""
    group = _group(kind)
    for part in path:
        group = _group(inspect.get_annotations(group, eval_str=True).get(str(part))) if group is not None else None
    return [f.name for f in dataclasses.fields(group)] if group is not None else []


def _group(annotation: Any) -> Any:
    return next((option for option in options_in(annotation) if dataclasses.is_dataclass(option)), None)


def options_in(annotation: Any) -> list[Any]:
    """What an annotation is made of: `A | None`, or one of these with a validator."""
    return [annotation, *(option for part in getattr(annotation, "__args__", ()) for option in options_in(part))]


def _unknown(path: str, allowed: Sequence[str]) -> str:
    parents, _, last = path.rpartition(".")
    more = f"erase settings explains all {len(allowed)} that are allowed here"
    return f"unknown setting {path}{meant(last, allowed, 'allowed here', more, f'{parents}.' if parents else '')}"


def dump(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    plain: dict[str, Any] = _adapter(type(config)).dump_python(config, mode="json")
    return plain


def arguments(settings: Mapping[str, Any], entry: Entry, prefix: str = "method") -> dict[str, Any]:
    """Settings checked against those of a method, without `name`.

    Raises:
        ValueError: for an unknown key, a missing one, or a value of the wrong type.
    """
    allowed = entry.settings
    out = {}
    for key, value in settings.items():
        if key == "name":
            continue
        if key not in allowed:
            raise ValueError(_unknown(f"{prefix}.{key}", [*allowed]))
        try:
            out[key] = _adapter(allowed[key].annotation).validate_python(_number(value))
        except ValidationError as error:
            raise ValueError(_first(error, allowed[key].annotation, prefix, key)) from None
    for name, parameter in allowed.items():
        if parameter.default is inspect.Parameter.empty and name not in out:
            raise ValueError(f"the setting {prefix}.{name} is missing: give {prefix}.{name}=…")
    return out
