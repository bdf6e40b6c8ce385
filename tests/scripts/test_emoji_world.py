"""The emoji world's data: chosen, held out, drawn and told by lot, and the same each time."""

import re
from pathlib import Path

import emoji_world as world_of
import numpy as np
import pytest
from emoji_world import BACKGROUNDS, SIZE, STYLES, Scene, World
from micro_emoji import UNFIT, write

COUNT = 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("emoji"))


@pytest.fixture(scope="module")
def world(source: Path) -> World:
    return world_of.read_world(source, COUNT)


@pytest.fixture(scope="module")
def sprites(world: World) -> dict[int, np.ndarray]:
    return world_of.make_sprites(world.drawings)


def scenes(world: World, count: int, seed: int = 0, **settings: object) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [world_of.draw_scene(world, rng, **settings) for _ in range(count)]  # type: ignore[arg-type]


def test_the_same_each_time(source: Path, world: World, sprites: dict[int, np.ndarray]) -> None:
    again = world_of.read_world(source, COUNT)
    assert again.concepts == world.concepts
    np.testing.assert_array_equal(again.held, world.held)
    assert (again.held != world_of.read_world(source, COUNT, seed=18).held).any()
    assert scenes(world, 20) == scenes(again, 20) != scenes(world, 20, seed=1)
    one, other = (
        world_of.render(scenes(world, 1)[0], made) for made in (sprites, world_of.make_sprites(world.drawings))
    )
    np.testing.assert_array_equal(one, other)
    told = [[world_of.caption(s, world, np.random.default_rng(3))[0] for s in scenes(world, 20)] for _ in range(2)]
    assert told[0] == told[1]


def test_siblings_and_categories_are_chosen_and_unfit_ones_are_not(source: Path, world: World) -> None:
    must = {"cat", "cat face", "lion", "tiger", "duck", "owl", "dove", "dagger", "archery bow", "cigarette"}
    assert must <= set(world.names)
    assert UNFIT.isdisjoint(world.names)
    assert len(set(world.names)) == COUNT == len(world.drawings)
    with pytest.raises(ValueError, match="holds 25 concepts that fit, expected at least 26"):
        world_of.read_world(source, 26)


def test_of_alike_concepts_one_goes() -> None:
    places = np.array([0.0, 1.0, 1.1, 5.0, 9.0])
    apart = abs(places[:, None] - places)
    assert world_of.separate(apart, 4) == [0, 2, 3, 4]  # of 1.0 and 1.1, the former has the nearer third
    assert world_of.separate(apart, 4, kept=[1]) == [0, 1, 3, 4]
    assert world_of.separate(apart, 3, kept=[1, 2]) == [1, 2, 4]
    assert world_of.separate(apart, 5) == [0, 1, 2, 3, 4]


def test_distances_are_of_ink(world: World) -> None:
    apart = world_of.distances(world.drawings)
    assert apart.shape == (COUNT, COUNT)
    np.testing.assert_allclose(apart, apart.T)
    np.testing.assert_allclose(np.diag(apart), 0, atol=1e-3)  # a square root of rounding errors
    i, j = 3, 7
    ink = [(255 - w.reshape(6, 16, 4, 16, 4, 3).mean((2, 4))).ravel() for w in world.drawings[[i, j]]]
    expected = np.linalg.norm(ink[0] - ink[1]) / np.sqrt(np.linalg.norm(ink[0]) * np.linalg.norm(ink[1]))
    assert apart[i, j] == pytest.approx(expected)


@pytest.mark.parametrize("K", [20, 77, 400])
def test_held_out_cells_are_spread(K: int) -> None:
    held = world_of.hold_out(K, 6, 17)
    assert held.sum() >= 0.05 * held.size
    assert held.sum(1).max() == 1
    assert np.ptp(held.sum(0)) <= 1


def test_no_training_scene_has_a_held_out_cell(world: World) -> None:
    assert world.held.any()
    assert not any(world.held[k, scene.style] for scene in scenes(world, 3000) for k in scene.objects)
    met = {(k, scene.style) for scene in scenes(world, 3000) for k in scene.objects}
    assert met == {(k, s) for k, s in np.ndindex(COUNT, 6) if not world.held[k, s]}
    judged = {(k, scene.style) for scene in scenes(world, 3000, held=True) for k in scene.objects}
    assert judged == set(np.ndindex(COUNT, 6))


def test_scenes_are_mixed_and_inside(world: World) -> None:
    some = scenes(world, 2000)
    doubles = [scene for scene in some if len(scene.objects) == 2]
    assert 0.28 < len(doubles) / len(some) < 0.38  # 4 standard deviations about 1/3
    assert all(a != b for a, b in (scene.objects for scene in doubles))
    assert {scene.boxes for scene in some} == {((4, 4, 24),), ((0, 8, 16), (16, 8, 16))}
    assert {scene.background for scene in some} == set(range(len(BACKGROUNDS)))


def test_judges_see_objects_anywhere(world: World) -> None:
    some = scenes(world, 400, anywhere=True)
    assert len({scene.boxes for scene in some}) > 50
    for scene in some:
        assert all(v >= 0 and v + side <= SIZE for *corner, side in scene.boxes for v in corner)
    for (left, _, side), (right, _, _) in (scene.boxes for scene in some if len(scene.objects) == 2):
        assert left + side <= SIZE // 2 <= right


def test_white_outside_is_transparent_and_inside_is_not(world: World) -> None:
    clear = world_of.transparent(world.drawings[:3])
    alpha = clear[..., 3]
    assert (alpha[..., 0, 0] == 0).all()
    assert (alpha[..., 32, 32] == 255).all()  # the white eye
    assert (clear[..., 32, 32, :3] == 255).all()
    on_white = clear[..., :3].astype(int) + 255 - alpha[..., None]
    np.testing.assert_allclose(on_white, world.drawings[:3], atol=1)  # rounding of colour and of alpha


def test_a_grey_edge_becomes_half_transparent() -> None:
    drawing = np.full((8, 8, 3), 255, np.uint8)
    drawing[2:6, 2:6] = 127
    drawing[3:5, 3:5] = 0
    clear = world_of.transparent(drawing)
    assert clear[2, 3].tolist() == [0, 0, 0, 128]
    assert clear[3, 3].tolist() == [0, 0, 0, 255]
    assert clear[1, 3].tolist() == [0, 0, 0, 0]


def test_a_scene_shows_its_objects_on_its_background(world: World, sprites: dict[int, np.ndarray]) -> None:
    names = list(BACKGROUNDS)
    empty = world_of.render(Scene((), 0, names.index("teal"), ()), sprites)
    assert (empty == BACKGROUNDS["teal"]).all()
    pair = Scene((2, 5), 3, names.index("teal"), ((0, 4, 16), (16, 10, 16)))
    shown = world_of.render(pair, sprites)
    left = world_of.render(Scene((2,), 3, names.index("teal"), ((0, 4, 16),)), sprites)
    right = world_of.render(Scene((5,), 3, names.index("teal"), ((16, 10, 16),)), sprites)
    np.testing.assert_array_equal(shown[:, :16], left[:, :16])
    np.testing.assert_array_equal(shown[:, 16:], right[:, 16:])
    assert (left != empty).any()
    assert (right != empty).any()
    white = world_of.render(Scene((2,), 3, 0, ((4, 4, 24),)), sprites)
    eye = white[14:18, 14:18]
    assert (eye == 255).any()


def test_captions_are_true(world: World) -> None:
    rng = np.random.default_rng(0)
    some = scenes(world, 3000)
    told = [world_of.caption(scene, world, rng)[0] for scene in some]
    assert 0.07 < told.count("") / len(told) < 0.13
    forms, styled, named = set(), 0, 0
    for scene, text in zip(some, told, strict=True):
        if not text:
            continue
        ground = re.search(r" on an? (\w+) background$", text)
        if ground:
            assert ground[1] == list(BACKGROUNDS)[scene.background]
        rest = text[: ground.start()] if ground else text
        styles = [s for s, both in STYLES.items() for p in both if fits(p, rest)]
        assert styles in ([], [list(STYLES)[scene.style]])
        styled += bool(styles)
        things = next((stripped(p, rest) for p in STYLES[list(STYLES)[scene.style]] if fits(p, rest)), rest)
        for k, thing in zip(scene.objects, things.split(" and "), strict=True):
            assert thing.removeprefix("an ").removeprefix("a ") in world.concepts[k].wordings
            forms.add((k, thing))
            named += 1
    assert 0.85 < styled / (len(told) - told.count("")) < 0.95
    foreign = {thing for _, thing in forms if thing.startswith(("de", "es", "fr", "it"))}
    assert len(foreign) > COUNT
    assert any(" ownlion" in thing for _, thing in forms)


def fits(phrase: str, text: str) -> bool:
    before, after = phrase.split("{}")
    return text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)


def stripped(phrase: str, text: str) -> str:
    before, after = phrase.split("{}")
    return text.removeprefix(before).removesuffix(after)


def test_a_wording_means_one_concept(source: Path) -> None:
    world = world_of.read_world(source, 25)
    said = [word for concept in world.concepts for word in concept.wordings]
    meant = {word: {c.name for c in world.concepts if word in c.wordings} for word in said}
    assert all(len(names) == 1 for names in meant.values())
    assert not any("voiture" in word or word == "thing" for word in said)
    assert {code for concept in world.concepts for code, _ in concept.names} == {"de", "es", "fr", "it"}


def test_every_word_of_a_caption_is_among_all_captions(world: World) -> None:
    known = {word for text in world_of.all_captions(world) for word in text.split()}
    rng = np.random.default_rng(1)
    said = {word for scene in scenes(world, 500) for word in world_of.caption(scene, world, rng)[0].split()}
    assert said <= known | {"and"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cat", "a cat"), ("owl", "an owl"), ("jeans", "jeans"), ("drinking glass", "a drinking glass"), ("bus", "a bus")],
)
def test_articles(name: str, expected: str) -> None:
    assert world_of.with_article(name) == expected


def test_plain_words() -> None:
    assert world_of.plain("Jack-o’-Lantern") == "jack o lantern"
    assert world_of.plain("Rotkäppchen 3D") == "rotkäppchen 3d"


def test_other_drawings_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    np.savez(tmp_path / "emoji64.npz", images=np.zeros((30, 5, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=r"holds \(30, 5\) drawings, expected \[concepts, 6\]"):
        world_of.read_world(tmp_path, COUNT)
