import hashlib
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erase.evaluation.generate import generate, image_generator
from erase.evaluation.image_files import list_images, read_image
from erase.evaluation.manifest import (
    ManifestRow,
    check_images,
    generated_by,
    pair_rows,
    read_manifest,
    read_whole,
)
from erase.evaluation.prompt_files import PromptRow

# --- generators --------------------------------------------------------------


def test_image_generator_is_stable_and_distinct() -> None:
    draws = {
        (seed, index): tuple(torch.randn(4, generator=image_generator(seed, index)).tolist())
        for seed in (0, 1, 10, 2**31, 2**32 - 1)
        for index in (0, 1, 10)
    }
    assert len(set(draws.values())) == len(draws)
    # Golden: a change here changes every image ever reported. First 8 bytes of `printf erase:1:0 | sha256sum`.
    assert image_generator(1, 0).initial_seed() == 0xC5C4D30E75508072
    for seed, index in ((-1, 0), (2**32, 0), (0, -1)):
        with pytest.raises(ValueError, match="expected 0"):
            image_generator(seed, index)


# --- generate ----------------------------------------------------------------


@dataclass
class Painter:
    """A sampler whose pixels depend on prompt, generator and settings; stops like a killed run after `calls`."""

    calls: int = 1000
    seen: list[tuple[int, tuple[float | None, int | None, int | None]]] = field(default_factory=list)

    def __call__(
        self,
        prompts: list[str],
        generators: list[torch.Generator],
        *,
        guidance: float | None,
        width: int | None,
        height: int | None,
    ) -> list[Image.Image]:
        if len(self.seen) >= self.calls:
            raise KeyboardInterrupt
        self.seen.append((len(prompts), (guidance, width, height)))
        assert len({id(g) for g in generators}) == len(generators)
        shape = (height or 4, width or 4, 3)
        return [
            Image.fromarray(
                (torch.randint(0, 200, shape, generator=g) + len(p) + int(guidance or 0)).to(torch.uint8).numpy()
            )
            for p, g in zip(prompts, generators, strict=True)
        ]


ROWS = [
    PromptRow("a", 3),
    PromptRow("bb", 3, guidance=5.0),
    PromptRow("ccc", 4),
    PromptRow("a", 5, width=6),
    PromptRow("dddd", 2**32 - 1),
]


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in list_images(folder)}


def test_generate_writes_images_and_manifest(tmp_path: Path) -> None:
    painter, calls = Painter(), []
    manifest = generate(
        painter, ROWS, tmp_path / "out", per_prompt=2, batch_size=4, progress=lambda i, n: calls.append((i, n))
    )
    assert [row.file for row in manifest][:3] == ["00000-00.png", "00000-01.png", "00001-00.png"]
    assert manifest == read_manifest(tmp_path / "out")
    assert [tmp_path / "out" / row.file for row in manifest] == list_images(tmp_path / "out")
    assert (manifest[3].prompt, manifest[3].seed, manifest[3].index) == ("bb", 3, 1)
    settings = hashlib.sha256((tmp_path / "out/settings.json").read_bytes()).hexdigest()
    assert {row.settings for row in manifest} == {settings}
    assert painter.seen == [
        (4, (None, None, None)),
        (4, (None, None, None)),
        (4, (5.0, None, None)),
        (4, (None, 6, None)),
    ]
    assert calls == [(0, 10), (4, 10), (6, 10), (8, 10), (10, 10)]
    first = np.asarray(read_image(tmp_path / "out" / "00000-00.png"))
    expected = torch.randint(0, 200, (4, 4, 3), generator=image_generator(3, 0)) + 1
    assert np.array_equal(first, expected.numpy())


def test_an_image_does_not_depend_on_order_or_batch(tmp_path: Path) -> None:
    a = generate(Painter(), ROWS, tmp_path / "a", per_prompt=2, batch_size=3)
    b = generate(Painter(), ROWS[::-1], tmp_path / "b", per_prompt=2, batch_size=5)
    assert {(r.prompt, r.seed, r.index, r.sha256) for r in a} == {(r.prompt, r.seed, r.index, r.sha256) for r in b}


@pytest.mark.parametrize("cut", [False, True])
def test_a_killed_run_resumes_to_the_same_folder(tmp_path: Path, cut: bool) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    generate(Painter(), ROWS, whole, batch_size=2, settings={"steps": 3, "size": (1, 2)})
    with pytest.raises(KeyboardInterrupt):
        generate(Painter(calls=1), ROWS, part, batch_size=2, settings={"steps": 3, "size": (1, 2)})
    assert len(read_manifest(part)) == 2
    if cut:  # killed while the second batch's rows were being written
        (part / "00003-00.png").write_bytes((whole / "00003-00.png").read_bytes())
        with (part / "manifest.jsonl").open("a") as file:
            file.write('{"file": "00003-00.png", "pro')
        with pytest.raises(ValueError, match="line 3"):
            read_manifest(part)
    painter = Painter()
    generate(painter, ROWS, part, batch_size=2, resume=True, settings={"steps": 3, "size": (1, 2)})
    assert len(painter.seen) == 3
    assert pngs(part) == pngs(whole)
    for name in ("manifest.jsonl", "settings.json"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()


def test_resume_draws_again_what_was_changed_or_lost(tmp_path: Path) -> None:
    generate(Painter(), ROWS, tmp_path, batch_size=1)
    before = pngs(tmp_path)
    (tmp_path / "00001-00.png").unlink()
    (tmp_path / "00002-00.png").write_bytes(before["00003-00.png"])
    painter = Painter()
    generate(painter, ROWS, tmp_path, batch_size=1, resume=True)
    assert len(painter.seen) == 2
    assert pngs(tmp_path) == before


def test_resume_of_a_finished_or_new_folder(tmp_path: Path) -> None:
    manifest = generate(Painter(), ROWS, tmp_path, resume=True)
    assert generate(Painter(calls=0), ROWS, tmp_path, resume=True) == manifest


def test_what_differs_on_resume_is_named(tmp_path: Path) -> None:
    generate(Painter(), ROWS, tmp_path, settings={"steps": 3, "model": {"sha256": "a"}})
    with pytest.raises(ValueError, match=r"settings\.steps was 3, now 4; settings\.model\.sha256 was \"a\", now \"b\""):
        generate(Painter(), ROWS, tmp_path, resume=True, settings={"steps": 4, "model": {"sha256": "b"}})
    with pytest.raises(ValueError, match=r"rows was 5, now 4; prompts_sha256 was "):
        generate(Painter(), ROWS[:4], tmp_path, resume=True, settings={"steps": 3, "model": {"sha256": "a"}})
    with pytest.raises(ValueError, match=r"settings\.eta was not set, now null"):
        generate(Painter(), ROWS, tmp_path, resume=True, settings={"steps": 3, "model": {"sha256": "a"}, "eta": None})


def test_killed_before_the_first_batch(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        generate(Painter(calls=0), ROWS, tmp_path)
    assert len(generate(Painter(), ROWS, tmp_path, resume=True)) == len(ROWS)


NEW = [PromptRow("new", 9), *ROWS[::-1]]


def test_pictures_of_another_folder_are_copied(tmp_path: Path) -> None:
    """Those of rows that leave everything to the sampler; all others are drawn, to the same pictures."""
    old, out, whole = tmp_path / "old", tmp_path / "out", tmp_path / "whole"
    generate(Painter(), ROWS, old, per_prompt=2, settings={"size": (1, 2)})
    painter, calls = Painter(), []
    manifest = generate(
        painter,
        NEW,
        out,
        per_prompt=3,
        batch_size=1,
        reuse=old,
        settings={"size": (1, 2)},
        progress=lambda i, n: calls.append((i, n)),
    )
    assert calls == [(i, 18) for i in range(6, 19)]  # two of a, of ccc and of dddd are there
    others = [(5.0, None, None)] * 3 + [(None, 6, None)] * 3
    assert sorted(map(str, painter.seen)) == sorted(str((1, s)) for s in [*others, *[(None, None, None)] * 6])
    generate(Painter(), NEW, whole, per_prompt=3, settings={"size": (1, 2)})
    assert pngs(out) == pngs(whole)
    assert manifest == read_manifest(out) == read_manifest(whole)


@pytest.mark.parametrize("still_there", [True, False])
def test_a_killed_run_that_copied_resumes(tmp_path: Path, still_there: bool) -> None:
    """With the pictures of the other folder copied before: it may be gone."""
    old, out, whole = tmp_path / "old", tmp_path / "out", tmp_path / "whole"
    generate(Painter(), ROWS[:3], old)
    with pytest.raises(KeyboardInterrupt):
        generate(Painter(calls=1), NEW, out, batch_size=1, reuse=old)
    assert len(read_manifest(out)) == 3
    painter = Painter()
    if still_there:
        generate(painter, NEW, out, batch_size=1, resume=True, reuse=old)
    else:
        shutil.rmtree(old)
        generate(painter, NEW, out, batch_size=1, resume=True)
    assert len(painter.seen) == 3
    generate(Painter(), NEW, whole)
    assert pngs(out) == pngs(whole)
    assert (out / "manifest.jsonl").read_bytes() == (whole / "manifest.jsonl").read_bytes()


@pytest.mark.parametrize("back", [False, True])
def test_rows_with_settings_of_their_own_and_others_give_each_other_nothing(tmp_path: Path, back: bool) -> None:
    """The same prompts and seeds, drawn with another guidance and size there, or here."""
    old, out, whole = tmp_path / "old", tmp_path / "out", tmp_path / "whole"
    theirs, ours = ROWS, [PromptRow(row.prompt, row.seed) for row in ROWS]
    if back:
        theirs, ours = ours, theirs
    generate(Painter(), theirs, old)
    generate(Painter(), ours, out, reuse=old)
    generate(Painter(), ours, whole)
    assert pngs(out) == pngs(whole)


def test_a_picture_that_was_changed_or_lost_is_not_copied(tmp_path: Path) -> None:
    old, out = tmp_path / "old", tmp_path / "out"
    generate(Painter(), ROWS, old)
    whole = pngs(old)
    (old / "00000-00.png").write_bytes(b"broken")
    (old / "00002-00.png").unlink()
    generate(Painter(), ROWS, out, reuse=old)
    assert pngs(out) == whole


def test_images_serve_other_rows_again(tmp_path: Path) -> None:
    """What a record says of its rows, such as the file that they are from, is nothing that images depend on."""
    old, out = tmp_path / "old", tmp_path / "out"
    painter = Painter()
    generate(painter, ROWS, old, settings={"steps": 3, "prompt_file": {"name": "a.csv"}, "truncated_prompts": ["x"]})
    drawn = len(painter.seen)
    plain = [row for row in ROWS if (row.guidance, row.width, row.height) == (None, None, None)]
    assert plain
    generate(painter, plain, out, settings={"steps": 3, "prompt_file": None, "truncated_prompts": []}, reuse=old)
    assert len(painter.seen) == drawn


def test_a_folder_that_cannot_serve_again_is_refused(tmp_path: Path) -> None:
    old, out = tmp_path / "old", tmp_path / "out"
    with pytest.raises(ValueError, match=r"old: has no settings\.json, so its images cannot be used again"):
        generate(Painter(), ROWS, out, reuse=old)
    generate(Painter(), ROWS, old, settings={"steps": 3, "weights": {"unet": "a"}})
    said = r"old: made with other settings, so its images cannot be used again: settings\.steps was 3, now 4; "
    with pytest.raises(ValueError, match=said + r"settings\.weights\.unet was \"a\", now \"b\""):
        generate(Painter(), ROWS, out, reuse=old, settings={"steps": 4, "weights": {"unet": "b"}})
    assert not out.exists()


def test_generate_refuses(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty; resume, or give another folder"):
        generate(Painter(), ROWS, tmp_path / "used")
    with pytest.raises(ValueError, match=r"has no settings\.json"):
        generate(Painter(), ROWS, tmp_path / "used", resume=True)
    with pytest.raises(ValueError, match="a file, expected a folder"):
        generate(Painter(), ROWS, tmp_path / "used" / "note.txt")
    with pytest.raises(ValueError, match="no prompts"):
        generate(Painter(), [], tmp_path / "a")
    with pytest.raises(ValueError, match="batch_size is 0"):
        generate(Painter(), ROWS, tmp_path / "a", batch_size=0)
    with pytest.raises(ValueError, match="settings are not JSON"):
        generate(Painter(), ROWS, tmp_path / "a", settings={"model": object()})
    with pytest.raises(ValueError, match="returned 0 images for 8 prompts"):
        generate(lambda *_, **__: [], ROWS, tmp_path / "b")


# --- folders -----------------------------------------------------------------


def test_only_what_was_asked_for_is_counted(tmp_path: Path) -> None:
    weights = {"unet.safetensors": "ab"}
    generate(Painter(), ROWS, tmp_path, per_prompt=2, settings={"weights": weights})
    rows = read_manifest(tmp_path)
    assert generated_by(tmp_path) == weights
    assert check_images(tmp_path, ROWS, 2, weights) == [tmp_path / row.file for row in rows]
    with pytest.raises(ValueError, match=rf"{len(rows)} images, expected {len(ROWS)}: they cannot be counted"):
        check_images(tmp_path, ROWS, 1)
    with pytest.raises(
        ValueError, match=r"00000-00\.png is of .*, where .* was asked for: prompts or seeds were shuffled"
    ):
        check_images(tmp_path, ROWS[::-1], 2)
    with pytest.raises(ValueError, match=r"other weights than this run's.*base and erased swapped"):
        check_images(tmp_path, ROWS, 2, {"unet.safetensors": "cd"})
    shutil.copy(tmp_path / rows[0].file, tmp_path / rows[-1].file)
    with pytest.raises(ValueError, match=rf"{rows[-1].file}: not the image that manifest\.jsonl names for"):
        check_images(tmp_path, ROWS, 2)


def test_list_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        list_images(tmp_path / "absent")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds no images"):
        list_images(tmp_path)
    for name in ("b.PNG", "a.jpeg", "c.webp", ".d.png"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpeg", "b.PNG", "c.webp"]


def test_read_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such manifest"):
        read_manifest(tmp_path)
    path = tmp_path / "manifest.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="holds no images"):
        read_manifest(tmp_path)
    path.write_text(json.dumps({"file": "a.png", "label": 3, "seed": 1, "sha256": "x"}) + "\n")
    assert read_manifest(tmp_path) == [ManifestRow("a.png", "3", 1, 0, "x")]
    path.write_text('{"file": "a.png", "prompt": "a", "seed": 1, "sha256": "x"}\n{"file": "b.png"}\n')
    with pytest.raises(ValueError, match="line 2 is not a row"):
        read_manifest(tmp_path)
    path.write_text(2 * (json.dumps({"file": "a.png", "label": 3, "seed": 1, "sha256": "x"}) + "\n"))
    with pytest.raises(ValueError, match=r"a\.png stands there twice, and would count twice"):
        read_manifest(tmp_path)


def test_pairs_are_of_one_prompt_seed_and_setting(tmp_path: Path) -> None:
    made = {"steps": 3, "weights": "a", "model": "m", "prompt_file": "x"}
    other = {"weights": "b", "model": "n", "configs": {"unet": "1"}}
    generate(Painter(), ROWS, tmp_path / "base", per_prompt=2, settings=made)
    generate(Painter(), ROWS, tmp_path / "a", per_prompt=2, settings={**made, **other})
    assert [(a.file, b.file) for a, b in pair_rows(tmp_path / "base", tmp_path / "a")] == [
        (row.file, row.file) for row in read_manifest(tmp_path / "a")
    ]
    # in another order, where all is left to the sampler
    plain = [PromptRow("x", 1), PromptRow("y", 1), PromptRow("y", 1)]
    generate(Painter(), plain, tmp_path / "c", settings=made)
    generate(Painter(), plain[::-1], tmp_path / "d", settings={**made, "prompt_file": "y"})
    assert [(a.file[:5], b.file[:5]) for a, b in pair_rows(tmp_path / "c", tmp_path / "d")] == [
        ("00001", "00000"),
        ("00002", "00001"),
        ("00000", "00002"),
    ]
    generate(Painter(), ROWS, tmp_path / "e", per_prompt=2, settings={**made, "steps": 4})
    with pytest.raises(ValueError, match=r"other settings, so they are not pairs: settings\.steps was 3, now 4"):
        pair_rows(tmp_path / "base", tmp_path / "e")
    generate(Painter(), [replace(row, guidance=None) for row in ROWS], tmp_path / "f", per_prompt=2, settings=made)
    with pytest.raises(ValueError, match="so they are not pairs: prompts_sha256 was"):
        pair_rows(tmp_path / "base", tmp_path / "f")
    with pytest.raises(ValueError, match="13 images have no partner"):
        pair_rows(tmp_path / "base", tmp_path / "c")


def test_pictures_of_other_prompts_are_noticed(tmp_path: Path) -> None:
    """As after a shuffle of files, or of the manifest's prompts with it."""
    manifest = generate(Painter(), ROWS, tmp_path)
    assert read_whole(tmp_path) == manifest
    a, b = tmp_path / manifest[0].file, tmp_path / manifest[1].file
    a.rename(tmp_path / "c.png")
    b.rename(a)
    (tmp_path / "c.png").rename(b)
    with pytest.raises(ValueError, match=r"00000-00\.png: not the image that manifest\.jsonl names for 'a'"):
        read_whole(tmp_path)
    b.unlink()
    a.unlink()
    with pytest.raises(ValueError, match=r"00000-00\.png: no such file"):
        read_whole(tmp_path)


def test_read_image_is_rgb_and_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 3  # turned by 180 degrees
    image.save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png").getpixel((1, 0)) == (255, 0, 0)
    Image.new("L", (2, 2)).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").mode == "RGB"
    Image.new("RGBA", (2, 2), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.effect_noise((64, 64), 50).save(tmp_path / "noise.png")
    whole = (tmp_path / "noise.png").read_bytes()
    for name, data in (("cut.png", whole[: len(whole) // 2]), ("text.png", b"not an image"), ("none.png", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} is not an image"):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match="no such image"):
        read_image(tmp_path / "absent.png")
