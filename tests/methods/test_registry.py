import inspect
import re
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import pytest

from erase.engine.method import Method
from erase.methods import NEEDS, Entry, builder, find_method, list_methods


def is_plain(hint: Any) -> bool:
    """Whether a preset can hold it: made of bool, int, float, str, None, literals, and records of these alone."""
    if get_origin(hint) is Literal or hint in (bool, int, float, str, type(None)):
        return True
    if hasattr(hint, "__pydantic_config__"):
        fields = {name: part for name, part in get_type_hints(hint).items() if get_origin(part) is not ClassVar}
        return all(map(is_plain, fields.values()))
    return bool(get_args(hint)) and all(is_plain(part) for part in get_args(hint))


def built(name: str) -> Method:
    """With settings that are required at 0.1, and without needs."""
    settings = find_method(name).settings.items()
    return builder(name)(**{key: 0.1 for key, p in settings if p.default is inspect.Parameter.empty})


def test_every_method_has_a_builder_with_a_source() -> None:
    assert list_methods() == sorted(list_methods())
    assert "sfron" in list_methods()
    for name in list_methods():
        build = builder(name)
        module = inspect.getmodule(build)
        assert build.__name__ == find_method(name).name == name
        assert module is not None
        assert re.search(r"arXiv \d{4}\.\d{5}", module.__doc__ or ""), f"{name} names no paper"
        assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(build).parameters.values())


@pytest.mark.parametrize("name", list_methods())
def test_an_entry_says_what_the_method_is(name: str) -> None:
    """Its name, the data it trains on, and which arguments are settings: all that a preset can hold."""
    entry, method = find_method(name), built(name)
    assert method.name == name
    assert entry.data == tuple(side for side in ("forget", "remain") if getattr(method, side) is not None)
    for key, parameter in inspect.signature(builder(name), eval_str=True).parameters.items():
        assert is_plain(parameter.annotation) == (key not in entry.needs), key
        assert parameter.default is None or key not in entry.needs or key in ("forget", "remain")


def test_needs_and_data_that_nobody_has_are_refused_at_once() -> None:
    def mine(*, forget: Any = None) -> Any: ...

    assert Entry(mine, needs=("forget",), data=("forget",)).settings == {}
    for entry, said in (
        ({"needs": ("teacher",)}, "mine needs 'teacher'"),
        ({"needs": ("mask",)}, "mine needs 'mask'"),
        ({"data": ("retain",)}, "mine .*'retain'"),
    ):
        with pytest.raises(ValueError, match=said):
            Entry(mine, **entry)  # type: ignore[arg-type]


def test_what_a_run_reads() -> None:
    def mine(*, mask: Any = None, fisher: Any = None) -> Any: ...

    for entry, masked, expected in (
        (Entry(mine), True, (False, False)),
        (Entry(mine, data=("forget",)), False, (True, False)),
        (Entry(mine, needs=("mask",)), True, (True, True)),
        (Entry(mine, needs=("mask",)), False, (False, False)),
        (Entry(mine, needs=("fisher",)), False, (False, True)),
    ):
        assert (entry.reads("forget", masked), entry.reads("remain", masked)) == expected
    assert NEEDS.keys() >= {"mask", "fisher"}


def test_unknown_method_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"^no method 'sfro'; did you mean sfron\? methods: .*sfron"):
        builder("sfro")
    for name in ("", "qqqq", "sfron.sfron", "__init__", "../sfron"):
        with pytest.raises(ValueError, match=r"^no method .* methods: .*sfron"):
            builder(name)
