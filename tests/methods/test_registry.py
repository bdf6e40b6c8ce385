import inspect
import re

import pytest

from erase.engine.method import Method
from erase.methods import builder, list_methods


def test_every_method_has_a_builder_with_a_source() -> None:
    assert list_methods() == sorted(list_methods())
    assert "sfron" in list_methods()
    for name in list_methods():
        build = builder(name)
        module = inspect.getmodule(build)
        assert build.__name__ == name
        assert module is not None
        assert re.search(r"arXiv \d{4}\.\d{5}", module.__doc__ or ""), f"{name} names no paper"
        assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(build).parameters.values())


def test_built_methods_carry_their_name() -> None:
    for name in list_methods():
        build = builder(name)
        needed = {
            key: 0.1 for key, p in inspect.signature(build).parameters.items() if p.default is inspect.Parameter.empty
        }
        assert isinstance(build(**needed), Method)
        assert build(**needed).name == name


def test_unknown_method_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"^no method 'sfro', did you mean sfron\?; methods: .*sfron"):
        builder("sfro")
    for name in ("", "qqqq", "sfron.sfron", "__init__", "../sfron"):
        with pytest.raises(ValueError, match=r"^no method .*; methods: .*sfron"):
            builder(name)
