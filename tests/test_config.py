import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from erase import resources
from erase.config import (
    PIPELINES,
    ClassifyConfig,
    DdpmConfig,
    SdConfig,
    arguments,
    dump,
    listing,
    merge,
    override,
    parse,
    read_preset,
)
from erase.methods import find_method, list_methods
from erase.store.files import differences, paths

SMALL: dict[str, Any] = {
    "pipeline": "sd",
    "model": "here",
    "method": {"name": "sfron", "fast_rate": 0.1},
    "train": {"steps": 3},
    "forget": {"prompts": "a cat", "anchors": ["a dog"]},
    "remain": {"prompts": ["a dog"]},
    "eval": {"prompts": ["a cat"]},
}


def changed(*words: str) -> SdConfig:
    return parse(override(SMALL, words), SdConfig)


# --- presets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", resources.list_presets())
def test_shipped_preset_is_whole(name: str) -> None:
    data = read_preset(resources.preset_path(name))
    if name == "sd_concept_sfron":  # leaves the concept to its user
        assert data["forget"]["prompts"] == []
        data = override(data, ["forget.prompts=a cat"])
    if name == "classify_sfron":  # leaves model and data, too
        for words, missing in (([], "model"), (["model=mine"], "data.source")):
            with pytest.raises(ValueError, match=missing):
                parse(override(data, words), ClassifyConfig)
        data = override(data, ["model=mine", "data.source=images"])
    config = parse(data, PIPELINES[data["pipeline"]])
    entry = find_method(config.method["name"])
    method = entry.build(**arguments(config.method, entry))
    assert method.name == config.method["name"]
    assert config.note
    assert data.keys() <= {f.name for f in dataclasses.fields(config)}
    for prompts in (getattr(part, "prompts", []) for part in (config.remain, config.eval)):  # of a DDPM there are none
        assert all(" " in p or p in resources.list_prompts() for p in prompts)
    if config.saliency.kind != "none" and not entry.fresh:
        assert (config.saliency.threshold is None) != (config.saliency.density is None)
    # what run.json keeps can be run again
    assert parse(dump(config), type(config)) == config


@pytest.mark.parametrize("name", [name for name in resources.list_presets() if name.startswith("ddpm_fashion")])
def test_only_training_the_embedded_ddpm_needs_data(name: str) -> None:
    config = parse(read_preset(resources.preset_path(name)), DdpmConfig)
    assert (config.data is None) != find_method(config.method["name"]).fresh


def test_a_preset_may_have_a_byte_order_mark_and_a_bare_no(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SMALL) + "precision: no\n", encoding="utf-8-sig")
    config = parse(read_preset(path), SdConfig)
    assert config.precision == "no"
    assert config.forget.prompts == ["a cat"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1, 2", "YAML"),
        ("a: b: c", "YAML"),
        ("- a\n- b\n", "must hold a YAML mapping; got list"),
        ("", "must hold a YAML mapping; got NoneType"),
        ("a: {x: 1}\nb: {y: 1, y: 2}", "'y' stands twice in one mapping, on line 2"),
        (b"\xff\xfe\x00bad", "YAML"),
    ],
)
def test_broken_preset_is_one_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=said) as caught:
        read_preset(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mapping_may_be_merged_into_others(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("a: &a {x: 1}\nb: {c: &b {<<: *a, x: 2}}\nd: {<<: *b}\n")
    assert read_preset(tmp_path / "mine.yaml") == {"a": {"x": 1}, "b": {"c": {"x": 2}}, "d": {"x": 2}}


def test_missing_preset_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such preset file"):
        read_preset(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        read_preset(tmp_path)


# --- key=value ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("train.lr=1e-3", 1e-3),
        ("train.lr=2", 2.0),
        ("train.steps=30", 30),
        ("train.batch_size = 4", 4),
        ("train.parameters=attn2.to_[kv]", "attn2.to_[kv]"),
        ("saliency.threshold=null", None),
        ("saliency.threshold=0.5", 0.5),
        ("saliency.kind=none", "none"),
        ("precision=no", "no"),
        ("precision=bf16", "bf16"),
        ("eval.blur=false", False),
        ("forget.prompts=a photo of a cat", ["a photo of a cat"]),
        ("forget.prompts=[a cat, a dog]", ["a cat", "a dog"]),
        ("forget.prompts=['a cat, asleep', \"b: c\"]", ["a cat, asleep", "b: c"]),
        ("forget.anchors=[]", []),
        ("forget.images=some/folder", Path("some/folder")),
        ("eval.nudity.preset=i2p", "i2p"),
        ("eval.nudity.threshold=0.35", 0.35),
        ("eval.nudity=null", None),
        ("note=", ""),
        ("note=a=b", "a=b"),
    ],
)
def test_a_word_sets_a_value(word: str, value: Any) -> None:
    found: Any = changed(word)
    for part in word.partition("=")[0].strip().split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "prompt",
    [
        "a photo: of a cat",
        "cat #1 of a litter",
        "#1 cat",
        "- a cat",
        "@home",
        "%d cats",
        "a cat's tail",
        "1 cat # dozing",
        "null and void",
        "a 'quoted' cat",
        "1e5 cats",
        "2024-01-01",
        "yes and no",
    ],
)
def test_a_prompt_is_kept_to_the_letter(prompt: str) -> None:
    assert changed(f"forget.prompts={prompt}").forget.prompts == [prompt]


def test_a_mapping_takes_the_place_of_a_group() -> None:
    made = {"draw": {"steps": 30, "guidance": 3.0}, "forget": {"fraction": 0.25}}
    found = override(made, ["draw={steps: 5}", "forget={}"])
    assert found == {"draw": {"steps": 5}, "forget": {}}


def test_a_day_that_there_is_not_is_text() -> None:
    assert override({}, ["concept=2024-13-45"]) == {"concept": "2024-13-45"}
    with pytest.raises(ValueError, match="cannot read the value of concept"):
        override({}, ["concept=[2024-13-45]"])


def test_override_changes_a_copy() -> None:
    before = dump(changed())
    assert changed("forget.prompts=[x]", "train.steps=9", "train.steps=10").train.steps == 10
    assert dump(changed()) == before


def test_merge_puts_later_settings_over_earlier_ones() -> None:
    below = {"a": {"x": 1, "y": {"z": [1, 2]}}, "b": {"k": 1}, "c": None}
    above = {"a": {"y": {"z": [3], "w": 4}}, "b": None, "c": {"d": 5}}
    copies = dump_of(below), dump_of(above)
    merged = merge(below, {"a": {"x": 0}}, above)
    assert merged == {"a": {"x": 0, "y": {"z": [3], "w": 4}}, "b": None, "c": {"d": 5}}
    merged["a"]["y"]["w"] = merged["c"]["d"] = 9
    assert (dump_of(below), dump_of(above)) == copies
    assert merge() == {}


@pytest.mark.parametrize(
    ("words", "gone", "left"),
    [
        (["forget.labels=[bag]"], ["forget.fraction"], {"forget.labels": ["bag"], "forget.seed": 3}),
        (["forget.labels=[]"], [], {"forget.fraction": 0.1}),
        (["forget.fraction=0.5"], [], {"forget.fraction": 0.5}),
        (["forget.labels=[bag]", "forget.fraction=0.5"], [], {"forget.labels": ["bag"], "forget.fraction": 0.5}),
        (["model=runs/a"], ["architecture.layers"], {"model": "runs/a"}),
        (["model=new"], [], {"architecture.layers": 2}),
        (["model=runs/a", "architecture.layers=3"], [], {"architecture.layers": 3}),
        (["method.name=salun"], ["method.lambd"], {"method.name": "salun"}),
        (["method.name=sfron"], [], {"method.lambd": 0.5}),
        (["forget.prompts=[mine.csv]"], ["forget.only"], {"forget.prompts": ["mine.csv"]}),
        (["forget.prompts=[all.csv]"], [], {"forget.only": ["cat"]}),
        (["forget.prompts=[mine.csv]", "forget.only=[dog]"], [], {"forget.only": ["dog"]}),
    ],
)
def test_a_choice_takes_the_place_of_another(words: list[str], gone: list[str], left: dict[str, Any]) -> None:
    below = {
        "model": "new",
        "architecture": {"layers": 2},
        "method": {"name": "sfron", "lambd": 0.5},
        "forget": {"fraction": 0.1, "seed": 3, "prompts": ["all.csv"], "only": ["cat"]},
    }
    before = dump_of(below)
    found = paths(override(below, words))
    assert not found.keys() & {*gone}
    assert found.items() >= left.items()
    assert dump_of(below) == before


def test_differences_are_named() -> None:
    old, new = {"a": 1, "b": {"c": [1]}}, {"b": {"c": [2]}, "a": 2}
    assert differences(old, new) == ["a was 1, now 2", "b.c was [1], now [2]"]
    assert differences({"a": 1}, {"a": 1, "d": "x"}) == ['d was not set, now "x"']
    assert differences({"a": 1, "d": None}, {"a": 1}) == ["d was null, now not set"]
    assert differences({"a": {}}, {}) == ["a was {}, now not set"]
    assert differences({"a": "x" * 99 + "y"}, {"a": "x" * 99 + "z"}) != []
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"c": 2, "b": 1}}) == []


def dump_of(data: Any) -> str:
    return yaml.safe_dump(data)


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.stpes=3", r"unknown setting train\.stpes; did you mean train\.steps\? allowed here: steps, batch_size"),
        ("sead=3", r"unknown setting sead; did you mean seed\?"),
        ("eval.nudity.presett=i2p", r"unknown setting eval\.nudity\.presett; did you mean eval\.nudity\.preset\?"),
        ("qqqq=3", r"unknown setting qqqq; allowed here: pipeline, model"),
        ("train.steps=many", r"train\.steps: must be a whole number; got 'many'"),
        ("train.steps=0", r"train\.steps: must be greater than or equal to 1; got 0"),
        ("train.steps=2.5", r"train\.steps: .*; got 2\.5"),
        ("train.steps=", r"train\.steps: .*; got ''"),
        ("train.lr=-1", r"train\.lr: .*greater than 0; got -1"),
        ("train.lr=.inf", r"train\.lr: .*finite"),
        ("train.lr=.nan", r"train\.lr: .*"),
        ("train.optimizer=lion", r"train\.optimizer: .*'adam', 'adamw', 'sgd' or 'adam8bit'; got 'lion'"),
        ("train=3", r"train: .*; got 3"),
        ("forget.loss=1", r"forget\.loss: .*"),
        ("forget.pictures=none", r"forget\.pictures: .*'own', 'anchor' or 'both'; got 'none'"),
        ("forget.prompts=", r"forget\.prompts\.0: .*at least 1 character"),
        ("forget.prompts={a: b}", r"forget\.prompts: .*list"),
        ("saliency.density=1.5", r"saliency\.density: .*less than or equal to 1; got 1\.5"),
        ("seed=-1", r"seed: .*; got -1"),
        ("seed=4294967296", r"seed: .*; got 4294967296"),
        ("precision=fp8", r"precision: .*'no', 'fp16', 'bf16' or 'auto'; got 'fp8'"),
        ("precision=yes", r"precision: .*; got True"),
        ("pipeline=ddpm", r"pipeline: .*'sd'"),
        ("train.steps", r"cannot read 'train\.steps': settings are given as key=value"),
        ("=3", r"cannot read '=3'"),
        ("train.steps.more=3", r"cannot set train\.steps\.more: steps is a single value, not a group"),
        ("forget.prompts=[a, b", r"cannot read the value of forget\.prompts: '\[a, b' is not a YAML value"),
        ("train..steps=3", r"unknown setting train\."),
    ],
)
def test_a_wrong_word_is_one_clear_line(word: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        changed(word)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


def test_a_path_as_a_key_of_a_file_is_told_to_be_nested() -> None:
    with pytest.raises(ValueError, match=r"^unknown setting 'train\.steps': .+ nested, as train: \{steps: …\}$"):
        parse({**override(SMALL, []), "train.steps": 3}, SdConfig)


@pytest.mark.parametrize("path", ["model", "train", "train.steps", "forget.prompts", "eval.prompts", "method"])
def test_a_missing_key_is_named(path: str) -> None:
    data = override(SMALL, [])
    *parents, last = path.split(".")
    node = data
    for parent in parents:
        node = node[parent]
    del node[last]
    with pytest.raises(ValueError, match=f"^the setting {path} is missing: give {path}=…$"):
        parse(data, SdConfig)


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="1"):
        parse({**SMALL, 1: 2}, SdConfig)


# --- method.* -------------------------------------------------------------------------------------


def test_method_settings_are_those_of_its_builder() -> None:
    entry = find_method("sfron")
    assert arguments({"name": "sfron", "fast_rate": "1e-3", "slow_steps": 2}, entry) == {
        "fast_rate": 1e-3,
        "slow_steps": 2,
    }
    # what a preset cannot hold is not offered
    plain = {"forget", "remain", "mask"}
    with pytest.raises(ValueError, match=r"unknown setting method\.qqqq") as caught:
        arguments({"fast_rate": 1.0, "qqqq": 1}, entry)
    offered = set(str(caught.value).split("allowed here: ")[1].split(", "))
    assert offered == set(inspect.signature(entry.build).parameters) - plain


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fast_rat": 1.0}, r"unknown setting method\.fast_rat; did you mean method\.fast_rate\?"),
        ({}, r"the setting method\.fast_rate is missing: give method\.fast_rate=…"),
        ({"fast_rate": "fast"}, r"method\.fast_rate: .*; got 'fast'"),
        ({"fast_rate": float("nan")}, r"method\.fast_rate: .*finite"),
        ({"fast_rate": None}, r"method\.fast_rate: .*; got None"),
        ({"fast_rate": 1.0, "fast_rule": "sdg"}, r"method\.fast_rule: .*'sgd'.*; got 'sdg'"),
        ({"fast_rate": 1.0, "slow_steps": 1.5}, r"method\.slow_steps: .*; got 1\.5"),
        ({"fast_rate": 1.0, "mask": "x"}, r"unknown setting method\.mask"),
        ({"fast_rate": 1.0, "robust": {"step": 3}}, r"unknown setting method\.robust\.step; did you mean .*steps\?"),
        ({"fast_rate": 1.0, "robust": 3}, r"method\.robust: a group of settings, given as method\.robust\.steps=…"),
        ({"fast_rate": 1.0, "robust": {"images": 2}}, r"method\.robust: robust needs .* images in \[0, 1\]; got"),
    ],
)
def test_wrong_method_settings_are_one_clear_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        arguments({"name": "sfron", **settings}, find_method("sfron"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_setting_is_explained(pipeline: str) -> None:
    """What `erase settings` prints."""
    found = list(listing.listed(PIPELINES[pipeline]))
    assert len({setting.path for setting in found}) == len(found)
    assert [setting.path for setting in found if not setting.text] == []


@pytest.mark.parametrize("method", list_methods())
def test_every_setting_of_a_method_is_explained(method: str) -> None:
    assert [setting.path for setting in listing.listed_method(find_method(method)) if not setting.text] == []
