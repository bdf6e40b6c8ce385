"""`erase.store.labelled`: each source gives the pixels that were written, and each fault of a source one clear line."""

import gzip
import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from erase.store import labelled
from erase.store.class_names import class_number, distinct
from erase.store.labelled import LabelledImages, read_labelled, scaled

LABELS = [2, 0, 1, 1, 0, 2]


def noise(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(
    folder: Path, images: np.ndarray, labels: list[int], part: str = "train", mark: str = "-", gz: bool = False
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for what, array in (("images", images), ("labels", np.array(labels))):
        name = f"{part}-{what}{mark}idx{array.ndim}-ubyte{'.gz' if gz else ''}"
        (folder / name).write_bytes(gzip.compress(idx(array)) if gz else idx(array))


def write_image(path: Path, array: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


def refused(message: str, source: str | Path, split: Any = "train", **options: Any) -> None:
    """`message` is a part of the error, word for word, and the error is one line."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_labelled(source, split, **options)
    assert "\n" not in str(error.value)


def names_of(K: int) -> list[str]:
    return [f"class {k}" for k in range(K)]


# ---------------------------------------------------------------------------------------------------------- the set


@pytest.fixture
def six() -> LabelledImages:
    return LabelledImages(torch.from_numpy(noise(6, 1, 2, 3)), torch.tensor(LABELS), ("a", "b", "c"))


def same(got: LabelledImages, whole: LabelledImages, index: list[int]) -> bool:
    return (
        torch.equal(got.pixels, whole.pixels[index])
        and torch.equal(got.labels, whole.labels[index])
        and got.names == whole.names
    )


def test_parts_keep_the_pairs_the_order_and_the_names(six: LabelledImages) -> None:
    assert len(six) == 6
    assert same(six.of([2, 1]), six, [0, 2, 3, 5])
    assert same(six.without([2, 1]), six, [1, 4])
    assert same(six.of([]), six, [])
    assert same(six.without([]), six, [0, 1, 2, 3, 4, 5])
    assert same(six.take(torch.tensor([4, 0, 4])), six, [4, 0, 4])
    assert same(six.take(six.labels == 1), six, [2, 3])


@pytest.mark.parametrize("label", [-1, 3])
def test_a_number_that_is_no_class_is_refused(six: LabelledImages, label: int) -> None:
    for part in (six.of, six.without):
        with pytest.raises(ValueError, match=f"no class {label}: the classes are numbered 0–2"):
            part([0, label])


def test_a_subset_is_drawn_without_replacement_by_its_seed_alone() -> None:
    whole = LabelledImages(torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1), torch.arange(200) % 2, ("a", "b"))
    torch.manual_seed(1)
    first = whole.subset(50, seed=3)
    torch.manual_seed(2)
    drawn = first.pixels.flatten().long()
    assert len(first) == 50
    assert torch.equal(drawn, drawn.unique())  # sorted, none twice
    assert torch.equal(first.labels, drawn % 2)
    assert first.names == whole.names
    assert torch.equal(whole.subset(50, seed=3).pixels, first.pixels)
    assert not torch.equal(whole.subset(50, seed=4).pixels, first.pixels)
    assert len(whole.subset(200, seed=0)) == 200
    # not the first 50: of 200, a fair draw has about 25 above the middle
    assert 10 < int((drawn >= 100).sum()) < 40


@pytest.mark.parametrize("count", [0, 7])
def test_a_subset_larger_than_the_set_or_empty_is_refused(six: LabelledImages, count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot choose {count} of 6 images: give a count from 1 to 6"):
        six.subset(count, seed=0)


def test_scaled_maps_bytes_onto_minus_one_to_one() -> None:
    got = scaled(torch.tensor([[0, 255], [51, 204]], dtype=torch.uint8))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor([[-1.0, 1.0], [-0.6, 0.6]]))
    with pytest.raises(ValueError, match=r"must be uint8 .* got torch.float32"):
        scaled(got)


# -------------------------------------------------------------------------------------------------------------- IDX


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(("split", "part"), [("train", "train"), ("test", "t10k")])
def test_idx_files_are_read_as_written(tmp_path: Path, split: Any, part: str, gz: bool, mark: str) -> None:
    other = "t10k" if part == "train" else "train"
    images = noise(6, 4, 5)
    write_idx(tmp_path, images, LABELS, part, mark, gz)
    write_idx(tmp_path, noise(3, 4, 5, seed=1), [0, 1, 2], other, mark, gz)
    got = read_labelled(str(tmp_path), split, names=names_of(3), shape=(1, 4, 5))
    assert got.pixels.dtype == torch.uint8
    assert torch.equal(got.pixels, torch.from_numpy(images)[:, None])
    assert got.labels.dtype == torch.long
    assert got.labels.tolist() == LABELS
    assert got.names == ("class 0", "class 1", "class 2")


def test_idx_classes_are_digits_unless_named(tmp_path: Path) -> None:
    write_idx(tmp_path, noise(10, 2, 2), list(range(10)))
    assert read_labelled(tmp_path, "train").names == tuple("0123456789")


def test_half_an_idx_set_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, noise(6, 2, 2), LABELS)
    refused("no t10k-images-idx3-ubyte (or .gz): add it", tmp_path, "test")
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    refused("no train-labels-idx1-ubyte (or .gz): add it", tmp_path)
    write_idx(tmp_path / "other", noise(6, 2, 2), LABELS, "t10k")
    refused("no train-images-idx3-ubyte (or .gz): add it", tmp_path / "other")


@pytest.mark.parametrize(
    ("what", "damage", "message"),
    [
        ("images-idx3", lambda raw: b"\0\0\x08\x01" + raw[4:], "starts with 00000801, must be 00000803"),
        ("labels-idx1", lambda raw: b"\0\0\x0d\x01" + raw[4:], "starts with 00000d01, must be 00000801"),
        ("images-idx3", lambda raw: raw[:-1], "cut short or damaged, 23 bytes for a size of 6×2×2"),
        ("labels-idx1", lambda raw: raw[:-2], "cut short or damaged, 4 bytes for a size of 6: get the file again"),
        ("images-idx3", lambda raw: raw + b"\0", "cut short or damaged, 25 bytes for a size of 6×2×2"),
        ("images-idx3", lambda raw: raw[:15], "cut short, 15 bytes where the header alone has 16"),
        ("images-idx3", lambda raw: b"", "cut short, 0 bytes"),
        ("images-idx3", lambda raw: idx(noise(6, 0, 2)), "0 bytes for a size of 6×0×2"),
        ("images-idx3", lambda raw: gzip.compress(raw)[:-9], "gzip cut short or damaged"),
        ("labels-idx1", lambda raw: gzip.compress(raw)[:12], "gzip cut short or damaged"),
        ("labels-idx1", lambda raw: gzip.compress(raw)[:-8] + bytes(8), "gzip cut short or damaged"),
        ("labels-idx1", lambda raw: gzip.compress(raw)[:10] + b"\xff" * 20, "gzip cut short or damaged"),
    ],
)
def test_a_broken_idx_file_is_named(tmp_path: Path, what: str, damage: Callable[[bytes], bytes], message: str) -> None:
    write_idx(tmp_path, noise(6, 2, 2), LABELS)
    path = tmp_path / f"train-{what}-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    refused(message, tmp_path, names=names_of(3))
    refused(f"{path}: ", tmp_path, names=names_of(3))


def test_labels_must_fit_the_images_and_the_names(tmp_path: Path) -> None:
    write_idx(tmp_path, noise(6, 2, 2), LABELS)
    refused(f"{tmp_path}, train: label 2 is out of range, 2 names (0–1): give all", tmp_path, names=names_of(2))
    refused(f"{tmp_path}, train: class 3 (class 3) has no images", tmp_path, names=names_of(4))
    refused("class names must differ; got a, b, a", tmp_path, names=["a", "b", "a"])
    write_idx(tmp_path, noise(6, 2, 2), [2, 0, 2, 2, 0, 2])
    refused("class 1 (class 1) has no images", tmp_path, names=names_of(3))
    write_idx(tmp_path, noise(5, 2, 2), LABELS)
    refused("5 images but 6 labels", tmp_path, names=names_of(3))


def test_idx_images_of_another_shape_than_the_models_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, noise(6, 4, 5), LABELS)
    for shape, text in (((1, 5, 4), "1×5×4"), ((3, 4, 5), "3×4×5")):
        message = f"C×H×W is 1×4×5, wanted {text}: resize or convert the files first"
        refused(message, tmp_path, names=names_of(3), shape=shape)


# ---------------------------------------------------------------------------------------------------- class folders


@pytest.mark.parametrize(
    ("suffix", "size"),
    [("png", (4, 5)), ("png", (4, 5, 3)), ("BMP", (4, 5)), ("BMP", (4, 5, 3)), ("webp", (4, 5, 3))],
)
def test_class_folders_are_read_in_order_of_class_and_file(tmp_path: Path, suffix: str, size: tuple[int, ...]) -> None:
    arrays = noise(3, *size)
    for path, array in zip(("cat/b", "cat/a", "ant/c"), arrays, strict=True):
        options = {"lossless": True} if suffix == "webp" else {}
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.fromarray(array).save(tmp_path / f"{path}.{suffix}", **options)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / "._a.png").write_text("what macOS leaves behind")
    (tmp_path / ".cache").mkdir()
    got = read_labelled(tmp_path, "train")
    wanted = torch.from_numpy(arrays.reshape(3, 4, 5, -1)).permute(0, 3, 1, 2)[[2, 1, 0]]
    assert got.pixels.dtype == torch.uint8
    assert got.pixels.is_contiguous()
    assert torch.equal(got.pixels, wanted)
    assert got.labels.dtype == torch.long
    assert got.labels.tolist() == [0, 1, 1]
    assert got.names == ("ant", "cat")


@pytest.mark.parametrize("suffix", ["jpg", "jpeg"])
def test_jpegs_are_read(tmp_path: Path, suffix: str) -> None:
    write_image(tmp_path / f"cat/a.{suffix}", np.full((8, 8, 3), 90, np.uint8))
    pixels = read_labelled(tmp_path, "train", shape=(3, 8, 8)).pixels
    assert (pixels.int() - 90).abs().max() <= 2  # JPEG rounds, even a flat image


def test_names_give_class_folders_their_numbers(tmp_path: Path) -> None:
    for k in range(3):
        write_image(tmp_path / f"{'abc'[k]}/x.png", np.full((2, 2), k, np.uint8))
    got = read_labelled(tmp_path, "train", names=["c", "a", "b"])
    assert got.names == ("c", "a", "b")
    assert got.labels.tolist() == [0, 1, 2]
    assert got.pixels[:, 0, 0, 0].tolist() == [2, 0, 1]
    refused("names must be its class folders, a, b, c; got a, b", tmp_path, names=["a", "b"])
    refused("names must be its class folders, a, b, c; got a, b, d", tmp_path, names=["a", "b", "d"])


def test_train_and_test_folders_are_the_splits(tmp_path: Path) -> None:
    for k, path in enumerate(("train/a", "train/b", "test/a", "test/b", "old/z")):
        write_image(tmp_path / path / "x.png", np.full((2, 2), k, np.uint8))
    for split, values in (("train", [0, 1]), ("test", [2, 3])):
        got = read_labelled(tmp_path, split)  # type: ignore[arg-type]
        assert got.pixels[:, 0, 0, 0].tolist() == values
        assert got.names == ("a", "b")
    write_image(tmp_path / "train" / "c" / "x.png", noise(2, 2))
    for split in ("train", "test"):
        refused("train/ and test/ must have the same class folders; c is in one only", tmp_path, split)


@pytest.mark.parametrize(
    ("paths", "split", "message"),
    [
        (["a/x", "b/x"], "test", "has no train/ and test/ with class folders, which split 'test' needs"),
        (["train/a/x"], "test", "has no test/ with class folders, which split 'test' needs"),
        (["test/a/x"], "train", "has no train/ with class folders, which split 'train' needs"),
        (["train/x", "test/x"], "train", "has no train/ and test/ with class folders, which split 'train' needs"),
        (["x", "y"], "train", "has neither IDX files (train-images-idx3-ubyte, …) nor one subfolder per class"),
    ],
)
def test_a_split_that_is_not_there_is_refused(tmp_path: Path, paths: list[str], split: str, message: str) -> None:
    for path in paths:
        write_image(tmp_path / f"{path}.png", noise(2, 2))
    refused(f"{tmp_path} {message}", tmp_path, split)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "truck"):
        write_image(tmp_path / name / "x.png", noise(2, 2))
    assert read_labelled(tmp_path, "train").names == ("train", "truck")


def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "x.png", noise(2, 2))
    write_image(tmp_path / "b" / "deeper" / "x.png", noise(2, 2))
    refused(f"class folder {tmp_path / 'b'} has no images", tmp_path)


@pytest.mark.parametrize(
    ("size", "got"), [((4, 6), "6×4 L"), ((5, 5), "5×5 L"), ((4, 5, 3), "5×4 RGB")], ids=["width", "height", "mode"]
)
def test_the_first_image_that_differs_is_named(tmp_path: Path, size: tuple[int, ...], got: str) -> None:
    first = write_image(tmp_path / "a" / "1.png", noise(4, 5))
    odd = write_image(tmp_path / "a" / "2.png", noise(*size))
    write_image(tmp_path / "b" / "1.png", noise(9, 9))
    refused(f"{odd} is {got}, expected 5×4 L as {first}: give data.size=", tmp_path)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1", "I;16"])
@pytest.mark.parametrize("number", [1, 3])
def test_other_modes_than_l_and_rgb_are_refused(tmp_path: Path, mode: str, number: int) -> None:
    write_image(tmp_path / "a" / "2.png", noise(4, 5))
    odd = write_image(tmp_path / "a" / f"{number}.png", noise(4, 5), mode)
    read = Image.open(odd).mode  # I for I;16 in Pillow 10
    refused(f"{odd} has mode {read}, allowed are L and RGB: give data.size=4, or convert the files first", tmp_path)


def test_files_of_any_size_and_mode_are_made_alike(tmp_path: Path) -> None:
    """Transparent pixels are white; 16 bits are refused, which Pillow would clip."""
    Image.new("RGBA", (8, 4), (0, 255, 0, 0)).save(write_image(tmp_path / "a" / "1.png", noise(4, 4)))
    write_image(tmp_path / "a" / "2.png", np.full((4, 9), 7, np.uint8))
    image = read_labelled(tmp_path, "train", size=4).pixels
    assert image.shape == (2, 3, 4, 4)
    assert (set(image[0].flatten().tolist()), set(image[1].flatten().tolist())) == ({255}, {7})
    write_image(tmp_path / "a" / "1.png", noise(5, 4))
    assert read_labelled(tmp_path, "train", size=4).pixels.shape == (2, 1, 4, 4)
    odd = write_image(tmp_path / "a" / "3.png", noise(4, 5), "I;16")
    refused(f"{odd} has mode {Image.open(odd).mode}, more than 8 bits a sample", tmp_path, size=4)


def test_photographs_are_upright(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 2, 0)).save(tmp_path / "a/1.png", exif=exif)
    assert read_labelled(tmp_path, "train").pixels.tolist() == [[[[0, 0], [255, 255]]]]


def test_files_that_are_skipped_are_counted(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "1.png", noise(4, 4))
    for name in ("a/2.gif", "a/3.GIF", "a/notes.txt", "a/.hidden"):
        (tmp_path / name).touch()
    said: list[str] = []
    read_labelled(tmp_path, "train", say=said.append)
    assert "4 files: 1 used, 3 skipped (.gif 2, .txt)" in said[0]


def test_classes_are_numbered_by_name() -> None:
    data = LabelledImages(
        torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.tensor([0, 1, 2, 1]), ("a", "b", "c")
    )
    found = data.ordered(("c", "a, first", "b"))
    assert found is not None
    assert (found.labels.tolist(), found.names) == ([1, 2, 0, 2], ("c", "a, first", "b"))
    assert torch.equal(found.pixels, data.pixels)
    for names in (("a", "b", "d"), ("a", "b"), ("a", "b", "c", "d")):
        assert data.ordered(names) is None


def test_a_part_has_every_class() -> None:
    data = LabelledImages(torch.arange(23, dtype=torch.uint8).view(23, 1, 1, 1), torch.arange(23) % 3 // 2, ("a", "b"))
    rest, part = data.parted(0.2, seed=3)
    assert sorted(rest.pixels.flatten().tolist() + part.pixels.flatten().tolist()) == list(range(23))
    assert torch.bincount(part.labels).tolist() == [3, 1]
    assert part.digest == data.parted(0.2, seed=3)[1].digest != data.parted(0.2, seed=4)[1].digest
    with pytest.raises(ValueError, match="class b has one image"):
        data.take(torch.tensor([0, 1, 2])).parted(0.2, seed=0)


def test_files_of_another_shape_than_the_models_are_refused(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a" / "1.png", noise(4, 5, 3))
    assert len(read_labelled(tmp_path, "train", shape=(3, 4, 5))) == 1
    for shape, text in (((1, 4, 5), "1×4×5"), ((3, 5, 4), "3×5×4")):
        message = f"{path}: C×H×W is 3×4×5, wanted {text}: resize or convert the files first"
        refused(message, tmp_path, shape=shape)


@pytest.mark.parametrize("keep", [0, 20, 200])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_a_corrupt_image_is_named(tmp_path: Path, suffix: str, keep: int) -> None:
    write_image(tmp_path / "a" / "1.png", noise(16, 16, 3))
    path = write_image(tmp_path / "a" / f"2.{suffix}", noise(16, 16, 3))
    path.write_bytes(path.read_bytes()[:keep])
    refused(f"{path} is not an image or is cut short (", tmp_path)


def test_an_image_too_large_for_pillow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_image(tmp_path / "a" / "1.png", noise(4, 5))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)
    refused(f"{path} is not an image or is cut short (Image size (20 pixels) exceeds limit", tmp_path)


def test_a_source_that_is_missing_or_no_folder_is_refused(tmp_path: Path) -> None:
    refused(f"no such folder: {tmp_path / 'gone'}", tmp_path / "gone")
    refused(f"no such folder: {write_image(tmp_path / 'x.png', noise(2, 2))}", tmp_path / "x.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(f"{empty} has neither IDX files", empty)
    refused("split must be 'train' or 'test'; got 'validation'", tmp_path, "validation")


# ---------------------------------------------------------------------------------------------------- fashion-mnist


def test_fashion_mnist_is_debians_folder_with_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "FASHION_FOLDER", tmp_path / "fashion")
    hint = "install Debian's package dataset-fashion-mnist, give a folder with its IDX files, or forget without data"
    refused(f"no such folder: {tmp_path / 'fashion'}: {hint}", "fashion-mnist")
    with pytest.raises(ValueError, match="no such folder") as error:
        read_labelled(tmp_path / "other", "train")
    assert "Debian" not in str(error.value)
    write_idx(tmp_path / "fashion", noise(10, 2, 2), list(range(10)))
    names = read_labelled("fashion-mnist", "train").names
    assert ", ".join(names) == "t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot"
    assert read_labelled("fashion-mnist", "train", names=names_of(10)).names == tuple(names_of(10))


def test_a_folder_of_that_name_is_given_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / "fashion-mnist", noise(10, 2, 2), list(range(10)))
    monkeypatch.chdir(tmp_path)
    for source in ("./fashion-mnist", Path("fashion-mnist")):
        got = read_labelled(source, "train", shape=(1, 2, 2))
        assert got.names == tuple("0123456789")


def test_debians_fashion_mnist() -> None:
    if not labelled.FASHION_FOLDER.is_dir():
        text = f"{labelled.FASHION_FOLDER} is missing: apt-get install dataset-fashion-mnist"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    splits: dict[Any, tuple[int, list[int], float]] = {
        "train": (60_000, [9, 0, 0, 3, 0, 2, 7, 2, 5, 5], 0.2860),  # the mean that recipes normalize with
        "test": (10_000, [9, 2, 1, 1, 6, 1, 4, 6, 5, 7], 0.2868),
    }
    for split, (count, first, mean) in splits.items():
        got = read_labelled("fashion-mnist", split, shape=(1, 28, 28))
        assert got.pixels.shape == (count, 1, 28, 28)
        assert torch.bincount(got.labels).tolist() == [count // 10] * 10
        assert got.labels[:10].tolist() == first
        assert float(got.pixels.float().mean()) / 255 == pytest.approx(mean, abs=5e-5)  # given to four digits


# ----------------------------------------------------------------------------------------------------- datasets:NAME


class FakeImage:
    """Stands for `datasets.Image`."""


class FakeValue:
    """Stands for `datasets.Value`."""


class FakeClassLabel:
    """Stands for `datasets.ClassLabel`."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)


class FakeRows:
    """Stands for `datasets.Dataset`: rows by number, columns by name."""

    def __init__(self, features: dict[str, Any], **columns: list[Any]) -> None:
        self.features, self.columns = features, columns

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        return {name: cells[key]() if callable(cells[key]) else cells[key] for name, cells in self.columns.items()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], FakeRows]:
    """What the fake `datasets` finds, by name and split."""
    found: dict[tuple[str, str], FakeRows] = {}

    def load_dataset(path: str, *, split: str) -> FakeRows:
        if (path, split) not in found:
            raise FileNotFoundError(f"Dataset {path!r}\n  has no {split}")
        return found[path, split]

    module = ModuleType("datasets")
    vars(module).update(Image=FakeImage, ClassLabel=FakeClassLabel, load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return found


def pictures(arrays: np.ndarray) -> list[Callable[[], Image.Image]]:
    return [lambda array=array: Image.fromarray(array) for array in arrays]


@pytest.mark.parametrize("size", [(4, 5), (4, 5, 3)])
def test_a_data_set_is_read_by_the_types_of_its_columns(hub: dict[Any, FakeRows], size: tuple[int, ...]) -> None:
    arrays = noise(6, *size)
    features = {"label": FakeValue(), "photo": FakeImage(), "kind": FakeClassLabel("x", "y", "z")}
    rows = FakeRows(features, label=[9] * 6, photo=pictures(arrays), kind=LABELS)
    hub["some/set", "train"] = rows
    hub["some/set", "test"] = FakeRows(features, label=[9] * 3, photo=pictures(arrays[:3]), kind=[0, 1, 2])
    got = read_labelled("datasets:some/set", "train", shape=(len(size) * 2 - 3, 4, 5))
    assert torch.equal(got.pixels, torch.from_numpy(arrays.reshape(6, 4, 5, -1)).permute(0, 3, 1, 2))
    assert got.labels.dtype == torch.long
    assert got.labels.tolist() == LABELS
    assert got.names == ("x", "y", "z")
    assert read_labelled("datasets:some/set", "test").labels.tolist() == [0, 1, 2]
    assert read_labelled("datasets:some/set", "train", names=["p", "q", "r"]).names == ("p", "q", "r")
    refused("datasets:some/set, train[0]: C×H×W is", "datasets:some/set", shape=(1, 5, 4))


@pytest.mark.parametrize("column", ["label", "labels", "fine_label"])
def test_a_data_set_is_read_by_the_names_of_its_columns(hub: dict[Any, FakeRows], column: str) -> None:
    arrays = noise(6, 4, 5)
    features: dict[str, Any] = {"id": FakeValue(), "img": FakeValue(), column: FakeValue()}
    hub["set", "train"] = FakeRows(features, id=[7] * 6, img=pictures(arrays), **{column: LABELS})
    got = read_labelled("datasets:set", "train")
    assert torch.equal(got.pixels, torch.from_numpy(arrays)[:, None])
    assert got.labels.tolist() == LABELS
    assert got.names == ("0", "1", "2")


def test_of_several_columns_of_a_type_the_known_name_is_taken(hub: dict[Any, FakeRows]) -> None:
    features = {
        "label": FakeValue(),
        "coarse_label": FakeClassLabel("one"),
        "fine_label": FakeClassLabel("x", "y", "z"),
        "mask": FakeImage(),
        "image": FakeImage(),
    }
    columns = {"mask": pictures(noise(6, 4, 5, seed=1)), "image": pictures(noise(6, 4, 5))}
    hub["set", "train"] = FakeRows(features, label=[5] * 6, coarse_label=[0] * 6, fine_label=LABELS, **columns)
    got = read_labelled("datasets:set", "train")
    assert got.names == ("x", "y", "z")
    assert torch.equal(got.pixels, torch.from_numpy(noise(6, 4, 5))[:, None])


def test_unfit_columns_are_refused(hub: dict[Any, FakeRows]) -> None:
    def rows(images: list[Any], labels: list[Any], label: Any = None, name: str = "label") -> None:
        features = {"image": FakeImage(), name: label or FakeValue()}
        hub["set", "train"] = FakeRows(features, image=images, **{name: labels})

    good = pictures(noise(3, 4, 5))
    rows(good, [0, 1, 2], name="target")
    refused("ClassLabel column, or one named label or labels or fine_label; has image, target", "datasets:set")
    for value in ("cat", 1.0, None):
        rows(good, [0, 1, value])
        refused(f"datasets:set, train: column label must hold whole numbers; got {value!r}", "datasets:set")
    rows([], [])
    refused("column label must hold whole numbers; got no rows", "datasets:set")
    rows(good, [0, -1, 1], FakeClassLabel("x", "y"))  # what a hidden label looks like
    refused("label -1 is out of range, 2 names (0–1)", "datasets:set")
    rows(good, [0, 0, 2], FakeClassLabel("x", "y", "z"))
    refused("class 1 (y) has no images", "datasets:set")
    rows(good, [0, 1, 10**12])  # an id, no class
    refused("label 1000000000000 is out of range, 3 names (0–2)", "datasets:set")
    rows([good[0], [[0, 1], [2, 3]], good[2]], [0, 1, 2])
    refused("train[1] is not an image or is cut short (column image holds list, expected images)", "datasets:set")
    rows([*good[:2], lambda: Image.new("CMYK", (5, 4))], [0, 1, 2])
    refused("datasets:set, train[2] has mode CMYK, allowed are L and RGB", "datasets:set")
    rows([*good[:2], lambda: Image.new("L", (5, 5))], [0, 1, 2])
    refused("datasets:set, train[2] is 5×5 L, expected 5×4 L as datasets:set, train[0]", "datasets:set")


@pytest.mark.parametrize("kind", [FileNotFoundError, ConnectionError, RuntimeError, ValueError])
@pytest.mark.usefixtures("hub")
def test_a_data_set_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    refused("datasets:set, test: cannot be loaded (Dataset 'set' has no test)", "datasets:set", "test")

    def load_dataset(path: str, *, split: str) -> FakeRows:
        raise kind(f"{path}\n  {split}")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", load_dataset)
    refused("datasets:set, train: cannot be loaded (set train)", "datasets:set")


def test_without_the_package_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("datasets:set needs the package datasets: pip install datasets", "datasets:set")


def test_a_broken_install_of_the_package_is_not_called_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "datasets.py").write_text("import surely_not_installed")
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        read_labelled("datasets:set", "train")


# --- names of classes -----------------------------------------------------------------------------


def test_a_class_is_found_by_name_synonym_and_number() -> None:
    names = ("tench, Tinca tinca", "crane (1)", "missile", "crane (3)", "projectile, missile", "7")
    found = {"tench, Tinca tinca": 0, "tench": 0, "Tinca tinca": 0, "crane (3)": 3, "missile": 2, "projectile": 4}
    assert {label: class_number(label, names) for label in found} == found
    assert [class_number(label, names) for label in (3, "3", "7")] == [3, 3, 5]  # a name goes before a number
    with pytest.raises(
        ValueError, match=r"several classes are called 'crane': 1 crane \(1\), 3 crane \(3\); give a num"
    ):
        class_number("crane", names)
    for label in ("6", 6, -1, "Crane", "tinca"):
        with pytest.raises(ValueError, match=f"no class {label!r} of mine; .*the classes are: 0 tench, Tinca tinca, 1"):
            class_number(label, names, "mine")


def test_of_many_classes_the_closest_are_named() -> None:
    names = ["golden retriever, goldie", *(f"class {i}" for i in range(1, 1000))]
    said = "no class 'Golden Retriever'; did you mean 'golden retriever'.* 1000 .*0 golden retriever, goldie to 999"
    with pytest.raises(ValueError, match=said):
        class_number("Golden Retriever", names)
    for label, meant in (("retriever", "golden retriever"), ("GOLDE", "goldie"), ("clas 7", "class 7")):
        with pytest.raises(ValueError, match=f"did you mean.+{meant}'"):
            class_number(label, names)
    with pytest.raises(ValueError, match="give a number, 0 to 199"):
        class_number("cat", [str(k) for k in range(200)])


def test_names_that_several_classes_have_get_their_numbers() -> None:
    assert distinct(["crane", "tench", "crane"]) == ["crane (0)", "tench", "crane (2)"]
    assert distinct(("a", "b")) == ["a", "b"]
