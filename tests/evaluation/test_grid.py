import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erase.evaluation.columns import Column, headings, match, pick
from erase.evaluation.grid import blurred, grid, grid_from_folders, save_image

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def flat(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def folder(path: Path, rows: list[tuple[str, str, int, tuple[int, int, int]]]) -> Path:
    """A folder of flat images and its manifest, from (file, prompt, seed, colour)."""
    lines = []
    for file, prompt, seed, colour in rows:
        flat(path / file, colour)
        lines.append(json.dumps({"file": file, "prompt": prompt, "seed": seed, "index": 0, "sha256": ""}))
    (path / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return path


def blocks(image: Image.Image, colour: tuple[int, int, int]) -> list[tuple[int, int, int, int]]:
    """Left, top, width, height of the area of a colour (one a colour)."""
    where = np.argwhere((np.asarray(image) == colour).all(-1))
    (top, left), (bottom, right) = where.min(0), where.max(0)
    assert len(where) == (bottom - top + 1) * (right - left + 1), "not one rectangle"
    return [(int(left), int(top), int(right - left + 1), int(bottom - top + 1))]


def test_rows_columns_and_tiles(tmp_path: Path) -> None:
    a, b = flat(tmp_path / "a.png", RED), flat(tmp_path / "b.png", GREEN)
    c = flat(tmp_path / "c.png", BLUE, (32, 16))
    picture = grid([("base", [a, b]), ("erased", [c])], columns=["one", "two"], title="A title")
    ((ax, ay, aw, ah),) = blocks(picture, RED)
    ((bx, by, bw, bh),) = blocks(picture, GREEN)
    ((cx, cy, cw, ch),) = blocks(picture, BLUE)
    assert (aw, ah, bw, bh) == (96, 96, 96, 96)
    assert (ay, by) == (ay, ay)
    assert bx >= ax + aw
    assert (cx, cw, ch) == (ax, 96, 48)
    assert cy == ay + (by - ay) + 96 + 8 + 24  # the next row, centred in its tile
    ink = np.asarray(picture.convert("L")) < 128
    assert ink[ay : ay + 96, : ax - 8].any(), "no label at the left of row 1"
    assert ink[cy - 24 : cy + 72, : cx - 8].any(), "no label at the left of row 2"
    assert ink[:ay, bx:].any(), "no heading above column 2"


def test_tile_sizes(tmp_path: Path) -> None:
    for size, expected in ((32, 96), (40, 120), (64, 128), (96, 96), (200, 200), (512, 256)):
        path = flat(tmp_path / "a.png", RED, (size, size))
        assert blocks(grid([("a", [path])]), RED)[0][2:] == (expected, expected)
    assert blocks(grid([("a", [path])], tile=50), RED)[0][2:] == (50, 50)


def test_small_images_are_enlarged_pixel_for_pixel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = np.asarray(grid([("", [tmp_path / "a.png"])]))
    assert np.array_equal(picture[8:104:3, -104:-8:3], pixels)


def test_more_columns_than_shown_is_said(tmp_path: Path) -> None:
    path = flat(tmp_path / "a.png", RED)
    few, many = grid([("a", [path] * 3)], max_columns=3), grid([("a", [path] * 5)], max_columns=3)
    assert many.width == few.width
    assert many.height > few.height
    ink = np.asarray(many.convert("L")) < 128
    assert ink[few.height :].any()


def test_long_labels_stay_in_their_place(tmp_path: Path) -> None:
    a, b = flat(tmp_path / "a.png", RED), flat(tmp_path / "b.png", GREEN)
    long = "a photograph of " + "many words and " * 30 + "w" * 300
    picture = grid([(long, [a, b])], columns=[long, long], title=long)
    assert blocks(picture, RED)[0][2:] == (96, 96)
    assert blocks(picture, GREEN)[0][2:] == (96, 96)
    assert picture.width < 400
    assert picture.height < 300


def test_labels_with_accents_can_be_read(tmp_path: Path) -> None:
    """Pillow's own font draws a box in the place of every letter with an accent."""
    tile = flat(tmp_path / "a.png", RED)
    accented, plain = (
        grid([(label, [tile])], columns=[label], title=label) for label in ("estación Ünié", "estacion Unie")
    )
    assert accented.tobytes() == plain.tobytes()


def test_grid_refuses(tmp_path: Path) -> None:
    path = flat(tmp_path / "a.png", RED)
    with pytest.raises(ValueError, match="row 'erased' has no images"):
        grid([("base", [path]), ("erased", [])])
    with pytest.raises(ValueError, match="no rows"):
        grid([])
    with pytest.raises(ValueError, match="1 headings for 2 columns"):
        grid([("a", [path, path])], columns=["one"])
    with pytest.raises(ValueError, match="tile 0"):
        grid([("a", [path])], tile=0)
    with pytest.raises(ValueError, match=r"absent\.png: no such image"):
        grid([("a", [tmp_path / "absent.png"])])


# --- blur --------------------------------------------------------------------


def test_blurred_leaves_at_most_16_colours_and_the_rest_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(pixels)
    result = np.asarray(blurred(image, [(20, 10, 20, 30)]))
    assert len(np.unique(result[10:40, 20:40].reshape(-1, 3), axis=0)) <= 16
    outside = np.ones((64, 64), bool)
    outside[10 - 3 : 40 + 3, 20 - 2 : 40 + 2] = False
    assert np.array_equal(result[outside], pixels[outside])
    assert np.array_equal(np.asarray(image), pixels), "the original was changed"


def test_blurred_clips_to_the_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    image = Image.fromarray(pixels)
    whole = np.asarray(blurred(image, [(0, 0, 2**31, 2**31)]))
    assert len(np.unique(whole.reshape(-1, 3), axis=0)) <= 16
    for box in ((100, 100, 5, 5), (3, 3, 0, 5)):
        assert np.array_equal(np.asarray(blurred(image, [box])), pixels)


def test_grid_hides_boxes_and_refuses_what_nobody_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = flat(tmp_path / "a.png", RED), flat(tmp_path / "b.png", GREEN)
    Image.effect_noise((32, 32), 100).save(a)
    shown = np.asarray(grid([("", [a])]))
    hidden = np.asarray(grid([("", [a])], blur={a: [(0, 0, 32, 32)]}))
    assert not np.array_equal(shown, hidden)
    assert len(np.unique(hidden[8:104, -104:-8].reshape(-1, 3), axis=0)) <= 16
    monkeypatch.chdir(tmp_path)  # the same file by another path
    assert np.array_equal(np.asarray(grid([("", [Path("a.png")])], blur={a: [(0, 0, 32, 32)]})), hidden)
    with pytest.raises(ValueError, match=r"b\.png: not among the 1 images scanned"):
        grid([("", [a, b])], blur={a: []})


# --- folders -----------------------------------------------------------------


def test_folders_are_matched_by_prompt_and_seed(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", [("0.png", "cat", 1, RED), ("1.png", "dog", 2, GREEN), ("2.png", "x", 9, BLUE)])
    erased = folder(tmp_path / "erased", [("0.png", "dog", 2, (0, 200, 0)), ("1.png", "cat", 1, (200, 0, 0))])
    names, rows = match([base, erased])
    assert list(map(str, names)) == ["cat, seed 1", "dog, seed 2"]
    assert list(map(list, rows)) == [[base / "0.png", base / "1.png"], [erased / "1.png", erased / "0.png"]]
    picture = grid_from_folders([base, erased])
    ((x, y, *_),) = blocks(picture, RED)
    ((x2, y2, *_),) = blocks(picture, (200, 0, 0))
    assert x == x2
    assert y2 == y + 104
    assert not (np.asarray(picture) == BLUE).all(-1).any()
    assert picture.height > y2 + 96 + 8  # the note on what is left out


def test_twice_the_same_prompt_and_seed(tmp_path: Path) -> None:
    rows = [("0.png", "cat", 1, RED), ("1.png", "cat", 1, GREEN)]
    a, b = folder(tmp_path / "a", rows), folder(tmp_path / "b", rows)
    assert list(map(list, match([a, b])[1])) == [[a / "0.png", a / "1.png"], [b / "0.png", b / "1.png"]]


def test_folders_that_share_nothing(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", [("0.png", "cat", 1, RED)])
    b = folder(tmp_path / "b", [("0.png", "cat", 2, RED)])
    with pytest.raises(ValueError, match="none shares a prompt, seed and sample index"):
        grid_from_folders([a, b])
    c, d = flat(tmp_path / "c" / "0.png", RED).parent, flat(tmp_path / "d" / "1.png", RED).parent
    with pytest.raises(ValueError, match="none shares a file name"):
        grid_from_folders([c, d])
    with pytest.raises(ValueError, match=r"has no manifest\.jsonl, while another folder has"):
        grid_from_folders([a, c])
    with pytest.raises(ValueError, match="no such folder"):
        grid_from_folders([a, tmp_path / "absent"])
    with pytest.raises(ValueError, match="1 names for 2 folders"):
        grid_from_folders([a, a], names=["one"])


def test_folders_without_manifests_are_matched_by_name(tmp_path: Path) -> None:
    a = flat(tmp_path / "a" / "0.png", RED).parent
    b = flat(tmp_path / "b" / "0.png", GREEN).parent
    flat(b / "1.png", BLUE)
    columns, rows = match([a, b])
    assert columns == [Column("0")]
    assert list(map(list, rows)) == [[a / "0.png"], [b / "0.png"]]


def test_models_by_prompts_by_seeds(tmp_path: Path) -> None:
    """A block a prompt, a row a model, a seed a column; prompts and seeds are picked."""
    colours = {("cat", 1): RED, ("cat", 2): GREEN, ("Dog", 1): BLUE, ("Dog", 2): (9, 9, 200)}
    rows = [(f"{i}.png", prompt, seed, colour) for i, ((prompt, seed), colour) in enumerate(colours.items())]
    base = folder(tmp_path / "base", rows)
    faded = [
        (file, prompt, seed, (colour[0] // 2, colour[1] // 2, colour[2] // 2)) for file, prompt, seed, colour in rows
    ]
    erased = folder(tmp_path / "erased", faded)
    picture = grid_from_folders([base, erased], names=["before", "after"], title="Both")
    (where,) = zip(*(blocks(picture, colour) for colour in colours.values()), strict=True)
    (cat1, cat2, dog1, dog2) = where
    assert cat1[:2] < cat2[:2]
    assert cat1[1] == cat2[1]
    assert (dog1[0], dog2[0]) == (cat1[0], cat2[0])  # the same seed in each column
    assert dog1[1] > blocks(picture, (127, 0, 0))[0][1] > cat1[1]  # the other model is below, within the block
    ink = np.asarray(picture.convert("L")) < 128
    assert ink[: cat1[1], : cat1[0]].any(), "no title and prompt above"
    assert ink[dog1[1] - 20 : dog1[1], dog1[0] : dog1[0] + 96].any(), "no seed above the column"

    few = grid_from_folders([base, erased], prompts=["dog"], seeds=[2])
    assert blocks(few, (9, 9, 200))
    for colour in (RED, GREEN, BLUE):
        assert not (np.asarray(few) == colour).all(-1).any()
    first = grid_from_folders([base, erased], max_prompts=1)
    assert not (np.asarray(first) == BLUE).all(-1).any()
    assert first.height < picture.height
    for wanted, said in (
        ({"prompts": ["bird"]}, "no prompt contains 'bird'; the 2 prompts: cat, Dog"),
        ({"seeds": [7]}, "no image of seed 7; seeds: 1, 2"),
        ({"max_prompts": 0}, "max_prompts 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            grid_from_folders([base], **wanted)
    with pytest.raises(ValueError, match="both a prompt among a and a seed among 2"):
        pick([Column("a", 1), Column("b", 2)], ["a"], [2])


def test_headings_say_what_differs() -> None:
    assert headings("", [Column("cat", 1), Column("dog", 2, 1)]) == ("", ["cat, seed 1", "dog, seed 2, sample 1"])
    assert headings("cat", [Column("cat", 1), Column("cat", 2, 1)]) == ("cat", ["seed 1", "seed 2, sample 1"])
    assert headings("cat", [Column("cat", 1, 0), Column("cat", 1, 1)]) == ("cat, seed 1", ["sample 0", "sample 1"])


def test_save_image(tmp_path: Path) -> None:
    for name in ("a.png", "a.JPG", "a.webp"):
        save_image(Image.new("RGB", (8, 8), RED), tmp_path / "new" / name)
        assert Image.open(tmp_path / "new" / name).size == (8, 8)
    with pytest.raises(ValueError, match=r"suffix is '\.gif', expected one of \.png"):
        save_image(Image.new("RGB", (8, 8)), tmp_path / "a.gif")
