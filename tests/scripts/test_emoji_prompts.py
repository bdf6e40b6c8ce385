"""The emoji world's prompt sets: by lot, the same each time, with splits that are disjoint."""

import csv
from pathlib import Path

import emoji_world as world_of
import make_emoji_prompts as prompts
import numpy as np
import pytest
from emoji_world import STYLES, World
from make_emoji_prompts import Lots, Row
from micro_emoji import write

from erase import resources
from erase.evaluation.prompt_files import read_concepts, read_prompts

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "emoji"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_of.read_world(write(tmp_path_factory.mktemp("emoji")), 24)


@pytest.fixture(scope="module")
def lots(world: World) -> Lots:
    return prompts.draw_lots(world, tune=2, report=4, far=3)


@pytest.fixture(scope="module")
def sets(world: World, lots: Lots) -> dict[str, list[Row]]:
    return prompts.make_sets(world, lots)


def test_splits_are_disjoint(world: World, lots: Lots) -> None:
    assert (len(lots.tune), len(lots.report), len(lots.far)) == (2, 4, 3)
    assert set(lots.tune).isdisjoint(lots.report)
    erased = {*lots.single, *(k for some in lots.categories.values() for k in some)}
    assert erased == set(lots.anchors)
    assert erased.isdisjoint(lots.anchors.values())
    assert set(lots.far).isdisjoint(erased | set(lots.anchors.values()))
    kinds = [concept.subgroup for concept in world.concepts]
    assert all(kinds[a] != kinds[k] for k, a in lots.anchors.items())
    assert {name: {world.names[k] for k in some} for name, some in lots.categories.items()} == {
        "birds": {"duck", "owl", "dove"},
        "weapons": {"dagger", "archery bow", "kitchen knife"},
        "smoking": {"cigarette"},
    }


def test_the_same_each_time(world: World, lots: Lots, sets: dict[str, list[Row]]) -> None:
    again = prompts.draw_lots(world, tune=2, report=4, far=3)
    assert again == lots
    assert prompts.make_sets(world, again) == sets
    with pytest.raises(ValueError, match=r"^\d+ concepts have 3 others in their subgroup, expected 24$"):
        prompts.draw_lots(world, tune=4, report=20)


def test_neighbours_are_the_nearest_of_the_subgroup(world: World) -> None:
    cat = world.names.index("cat")
    found = prompts.near(world, cat)
    assert {world.names[k] for k in found} == {"cat face", "lion", "tiger"}
    apart = world_of.distances(world.drawings)[cat, found]
    assert (np.diff(apart) >= 0).all()


def test_held_out_cells_are_asked_for_in_their_own_set_alone(world: World, sets: dict[str, list[Row]]) -> None:
    held = {(world.names[k], list(STYLES)[s]) for k, s in np.argwhere(world.held)}
    for name, rows in sets.items():
        cells = {(thing, row["style"]) for row in rows for thing in row["object"].split("+")}
        assert cells == held if name == "emoji-held-out" else cells.isdisjoint(held)


def test_rows_say_what_they_ask_for(world: World, lots: Lots, sets: dict[str, list[Row]]) -> None:
    for name, rows in sets.items():
        for row in rows:
            things = row["object"].split("+")
            assert row["prompt"].startswith(STYLES[row["style"]][0].split("{}")[0])
            assert len(things) == (2 if name == "emoji-pairs" else 1)
            if name != "emoji-words":
                assert row["prompt"].endswith(" and ".join(map(world_of.with_article, things)))
    pairs = [row["object"].split("+") for row in sets["emoji-pairs"]]
    single, far = {world.names[k] for k in lots.single}, {world.names[k] for k in lots.far}
    assert {(left in single, right in single) for left, right in pairs} == {(True, False), (False, True)}
    assert all(len(single & {*pair}) == len(far & {*pair}) == 1 for pair in pairs)
    assert {row["object"] for row in sets["emoji-remain"]} == set(world.names)
    assert {row["language"] for row in sets["emoji-words"]} == {"en", "de", "es", "fr", "it"}


def test_a_style_becomes_one_other_style(sets: dict[str, list[Row]]) -> None:
    other: dict[str, set[str]] = {}
    for row in sets["emoji-styles"]:
        became = next(
            style
            for style, (phrase, _) in STYLES.items()
            if row["anchor"] == phrase.format(world_of.with_article(row["object"]))
        )
        other.setdefault(row["style"], set()).add(became)
    assert set(other) == set(STYLES) == set.union(*other.values())
    assert all(len(became) == 1 and style not in became for style, became in other.items())


def test_files_are_read_as_prompt_sets(sets: dict[str, list[Row]], tmp_path: Path) -> None:
    prompts.write_sets(sets, tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(sets)
    rows = read_prompts(tmp_path / "emoji-report.csv")
    assert [(row.prompt, row.object, row.style) for row in rows] == [
        (row["prompt"], row["object"], row["style"]) for row in sets["emoji-report"]
    ]
    assert [row.anchor for row in read_concepts(tmp_path / "emoji-report.csv")] == [
        row["anchor"] for row in sets["emoji-report"]
    ]
    seeds = [row.seed for path in tmp_path.iterdir() for row in read_prompts(path)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no copy of the drawings here")
def test_shipped_sets_are_what_the_script_writes(tmp_path: Path) -> None:
    world = world_of.read_world(SHARED)
    prompts.write_sets(prompts.make_sets(world, prompts.draw_lots(world)), tmp_path)
    shipped = {name for name in resources.list_prompts() if name.startswith("emoji-")}
    assert shipped == {path.stem for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        with path.open(newline="", encoding="utf-8") as made, resources.prompt_path(path.stem).open(newline="") as own:
            assert list(csv.reader(made)) == list(csv.reader(own))
