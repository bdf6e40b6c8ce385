from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from PIL import Image
from torch import Tensor

from erase.diffusion.data import LatentSet, check_images, encode_in_batches, read_folder, read_image
from erase.evaluation import image_files


def picture(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)
    return path


# ------------------------------------------------------------ folders


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "b.png", "text": "a, cat"}\n\n{"file_name": "sub/a.jpg", "prompt": "ein Hund"}\n',
        ),
        ("manifest.jsonl", '{"file": "b.png", "prompt": "a, cat"}\n{"file": "sub/a.jpg", "prompt": "ein Hund"}'),
        ("metadata.csv", '\ufefffile_name,text\nb.png,"a, cat"\nsub/a.jpg,ein Hund\n'),
        (
            "metadata.jsonl",
            '{"file_name": "./b.png", "text": "a, cat"}\r\n{"file_name": "sub/./a.jpg", "text": "ein Hund"}',
        ),
    ],
)
def test_prompts_come_from_the_folders_own_file(tmp_path: Path, name: str, text: str) -> None:
    picture(tmp_path / "b.png")
    picture(tmp_path / "sub" / "a.jpg")
    (tmp_path / name).write_text(text, encoding="utf-8")
    items = read_folder(tmp_path, "unused")
    assert [(item.path.name, item.prompt) for item in items] == [("b.png", "a, cat"), ("a.jpg", "ein Hund")]


def test_one_prompt_for_all_and_line_breaks_in_csv(tmp_path: Path) -> None:
    picture(tmp_path / "a.PNG")
    assert [item.prompt for item in read_folder(tmp_path, "a cat")] == ["a cat"]
    (tmp_path / "metadata.csv").write_text('file_name,text\na.PNG,"a\ncat"\n')
    assert [item.prompt for item in read_folder(tmp_path)] == ["a\ncat"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (None, None, r"a\.png has no prompt: give one prompt"),
        ("metadata.jsonl", '{"file_name": "other.png", "text": "x"}', r"metadata\.jsonl names other\.png"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_n', r"metadata\.jsonl, line 2: broken JSON"),
        ("metadata.jsonl", '["a.png", "x"]', r"metadata\.jsonl, row 1: needs file_name and text"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png"}',
            r"row 1: needs file_name and text .* got \{'file_name': 'a.png'\}",
        ),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 3}', "row 1: needs file_name and text"),
        ("metadata.csv", "file_name,text\na.png,,more\n", r"metadata\.csv, row 1: needs file_name and text"),
    ],
)
def test_bad_metadata(tmp_path: Path, name: str | None, text: str, message: str) -> None:
    picture(tmp_path / "a.png")
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


def test_files_that_are_skipped_and_captions_are_counted(tmp_path: Path) -> None:
    for i in range(6):
        picture(tmp_path / f"{i}.png")
    (tmp_path / "6.gif").touch()
    (tmp_path / ".hidden.png").touch()
    lines = [f'{{"file_name": "{name}", "text": "own"}}' for name in ("0.png", "4.png", "6.gif")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    said: list[str] = []
    items = read_folder(tmp_path, "all", said.append)
    assert [item.prompt for item in items] == ["own", "all", "all", "all", "own", "all"]
    assert len(said) == 1
    assert "8 files: 6 used (2 with own captions), 1 skipped (.gif)" in said[0]


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such image folder: .*missing"):
        read_folder(tmp_path / "missing", "x")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"has no images \(\.png"):
        read_folder(tmp_path, "x")


# ------------------------------------------------------------ images


@pytest.mark.parametrize(("mode", "size"), [("RGB", (8, 8)), ("L", (20, 8)), ("RGBA", (9, 31)), ("P", (3, 5))])
def test_image_values_and_shape(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    image = Image.new("RGBA", size, (255, 0, 51, 255)).convert("RGB").convert(mode)
    image.save(tmp_path / "a.png")
    x = read_image(tmp_path / "a.png", 8)
    assert x.shape == (3, 8, 8)
    assert x.dtype == torch.float32
    expected = torch.tensor(image.convert("RGB").getpixel((0, 0))) / 127.5 - 1
    torch.testing.assert_close(x, expected.view(3, 1, 1).expand(3, 8, 8))


def test_transparent_pixels_are_white_or_refused(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert bool((read_image(tmp_path / "a.png", 8) == 1).all())
    items = read_folder(tmp_path, "x")
    check_images(items)
    with pytest.raises(ValueError, match=r"a\.png .+setting=white"):
        check_images(items, "setting")
    Image.new("RGBA", (8, 8), (0, 0, 0, 255)).save(tmp_path / "a.png")
    check_images(items, "setting")


def test_photographs_are_upright_as_in_evaluation(tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (8, 8)), Image.Exif()
    image.paste("red", (0, 0, 8, 4))
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    x = read_image(tmp_path / "a.png", 8)
    assert (float(x[0, 0, 0]), float(x[0, 0, 7]), float(x[0, 7, 7])) == (-1, 1, 1)
    shown = torch.from_numpy(np.array(image_files.read_image(tmp_path / "a.png"))).permute(2, 0, 1)
    torch.testing.assert_close(x, shown / 127.5 - 1)


def test_samples_of_16_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has mode I(;16)?, more than 8 bits"):
        check_images(read_folder(tmp_path, "x"))


def test_image_is_cropped_at_its_centre(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    pixels[:4, 8:16, 0] = 0
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    x = read_image(tmp_path / "wide.png", 8)
    assert bool((x[1:] == 1).all())
    assert bool((x[0, :4] == -1).all())
    assert bool((x[0, 4:] == 1).all())


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_broken_images(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    read_image(path, 8)
    for size in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"a\.{suffix} is not an image or is cut short"):
            read_image(path, 8)
    with pytest.raises(ValueError, match=r"none\.png is not an image or is cut short"):
        read_image(tmp_path / "none.png", 8)


def test_encoding_in_batches_keeps_the_order(tmp_path: Path) -> None:
    for i in range(5):
        picture(tmp_path / f"{i}.png", value=10 * i)
    sizes: list[int] = []

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(pixels))
        return pixels.mean((1, 2, 3)), pixels.std((1, 2, 3))

    mean, std = encode_in_batches(read_folder(tmp_path, "x"), encode, 8, batch_size=2)
    torch.testing.assert_close(mean, torch.arange(5) * 10 / 127.5 - 1)
    torch.testing.assert_close(std, torch.zeros(5))
    assert sizes == [2, 2, 1]


# ------------------------------------------------------------ batches


def latents(n: int) -> LatentSet:
    """Sample i: latent i, condition row i mod 2, anchor row 2."""
    mean = torch.arange(n).float().view(n, 1, 1, 1)
    table = {"text": torch.arange(3).float().view(3, 1, 1), "label": torch.arange(3)}
    return LatentSet(mean, torch.arange(n) % 2, table, mean / 10, torch.full((n,), 2))


def test_gather_keeps_a_sample_together() -> None:
    batch = latents(6).gather(torch.tensor([3, 0]))
    i = batch["mean"].flatten()
    assert torch.equal(batch["cond"]["text"].flatten(), i % 2)
    assert torch.equal(batch["cond"]["label"], i.long() % 2)
    assert torch.equal(batch["std"].flatten(), i / 10)
    assert batch["anchor"]["text"].flatten().tolist() == batch["anchor"]["label"].tolist() == [2, 2]
    more = replace(latents(6), attribute=torch.arange(6) % 3, weight=torch.arange(6).float())
    batch = more.gather(torch.tensor([5, 1]))
    assert batch["attribute"]["label"].tolist() == [2, 1]
    assert batch["weight"].tolist() == [5, 1]
    bare = LatentSet(torch.zeros(3, 1, 1, 1), torch.zeros(3).long(), {"label": torch.zeros(1)})
    assert bare.gather(torch.tensor([0])).keys() == {"mean", "cond"}


def test_a_batch_is_what_the_denoiser_takes() -> None:
    made = toys.latents(size=4)
    data = LatentSet(made["mean"], torch.arange(4), made["cond"], made["std"])
    assert toys.denoiser().losses(data.gather(torch.tensor([2, 1, 0])), toys.gen()).shape == (3,)
