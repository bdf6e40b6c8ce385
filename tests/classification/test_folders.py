"""Classifiers on disk: the form that goes in comes out, and what is no classifier of ours to change is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import micro_classify
import pytest
import torch
from micro_classify import RESNET, SWIN, VIT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erase.classification import folders, models

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(params=["one file", "shards"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A ViT in half precision, with much beside it."""
    net: Any = micro_classify.model(VIT).net
    models.save(micro_classify.model(VIT), tmp_path / "in")
    if request.param == "shards":
        (tmp_path / "in" / FILE).unlink()
        net.half().save_pretrained(tmp_path / "in", max_shard_size="1KB")
        assert (tmp_path / "in" / INDEX).exists()
    else:
        net.half().save_pretrained(tmp_path / "in")
    (tmp_path / "in/runs").mkdir()
    for name in ("optimizer.pt", "pytorch_model.bin", "tf_model.h5", "runs/model.safetensors", "notes.txt"):
        (tmp_path / "in" / name).touch()
    return tmp_path / "in"


def test_a_folder_is_written_again_in_its_form(folder: Path, tmp_path: Path) -> None:
    source = folders.locate(folder)
    before = dict(folders.tensors(source))
    values = {name: t.float() + 1 for name, t in before.items() if "classifier" in name}
    meta = {"erase": "0", "erase_method": "sfron", "erase_base": "in"}
    seen: list[int] = []
    folders.save(source, values, tmp_path / "out", meta, seen.append)
    after = folders.tensors(folders.saved(source, tmp_path / "out"))
    assert len(seen) == len(before)
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, before[name] + 1 if name in values else before[name])
    kept = {
        p.name for p in folder.glob("*") if p.name in ("config.json", "preprocessor_config.json", "notes.txt", INDEX)
    }
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*kept, "README.md", *(p.name for p in source.weights)}
    for path in source.weights:
        with safe_open(tmp_path / "out" / path.name, framework="pt") as f:
            assert f.metadata() == {"format": "pt", **meta}
    models.open_model(tmp_path / "out")
    assert folders.header(folders.locate(tmp_path / "out"))["erase_base"] == "in"
    assert len(folders.fingerprint(source)) == len(source.weights)
    folders.save(folders.locate(tmp_path / "out"), values, tmp_path / "again", {})  # undone: no card, no provenance
    assert not (tmp_path / "again/README.md").exists()
    assert folders.header(folders.locate(tmp_path / "again")) == {"format": "pt"}
    with pytest.raises(ValueError, match="out exists: choose another folder"):
        folders.save(source, values, tmp_path / "out", meta)


def test_values_that_do_not_fit_leave_nothing(folder: Path, tmp_path: Path) -> None:
    source = folders.locate(folder)
    for name, value, said in (
        ("classifier.bias", torch.full((3,), 1e6), "classifier.bias holds values beyond the range of float16"),
        ("classifier.bias", torch.zeros(2), r"classifier.bias has shape \[3\], got \[2\]"),
        ("nothing.bias", torch.zeros(3), "has no tensor named 'nothing.bias'"),
    ):
        with pytest.raises(ValueError, match=said):
            folders.save(source, {name: value}, tmp_path / "out", {})
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("architecture", [RESNET, VIT, SWIN], ids=lambda a: str(a["model_type"]))
def test_weights_are_stored_under_the_names_of_the_file(architecture: dict[str, Any], tmp_path: Path) -> None:
    """Of a folder with the library's names in memory, too: the names of each file are kept."""
    models.save(micro_classify.model(architecture), tmp_path / "a")
    net = models.open_model(tmp_path / "a").net
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    save_file(
        {n: t.contiguous() for n, t in net.state_dict().items()}, tmp_path / "b" / FILE, metadata={"format": "pt"}
    )
    for name in ("a", "b"):
        found = models.stored(models.open_model(tmp_path / name).net)
        expected = load_file(tmp_path / name / FILE)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_a_single_file_goes_before_a_list_of_shards(tmp_path: Path) -> None:
    """As transformers takes it."""
    models.save(micro_classify.model(), tmp_path / "in")
    (tmp_path / "in" / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert [p.name for p in folders.locate(tmp_path / "in").weights] == [FILE]
    folders.save(folders.locate(tmp_path / "in"), {}, tmp_path / "out", {})
    assert not (tmp_path / "out" / INDEX).exists()


def test_what_is_no_classifier_of_ours_to_change(tmp_path: Path) -> None:
    models.save(micro_classify.model(), tmp_path / "in")
    outside = tmp_path / "secret.txt"
    outside.touch()
    (tmp_path / "in/link.txt").symlink_to(outside)
    with pytest.raises(ValueError, match=r"link\.txt is a link out of the folder"):
        folders.locate(tmp_path / "in")
    (tmp_path / "in/link.txt").unlink()
    weights = (tmp_path / "in" / FILE).rename(tmp_path / "in/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"is not a complete image classifier: it has no model\.safetensors"):
        folders.locate(tmp_path / "in")
    (tmp_path / "in" / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match=r"names '\.\./secret\.safetensors'"):
        folders.locate(tmp_path / "in")
    (tmp_path / "in" / INDEX).unlink()
    weights.rename(tmp_path / "in" / FILE)
    assert folders.describe(folders.locate(tmp_path / "in")) == {
        "kind": "image classifier of transformers",
        "architectures": ["ResNetForImageClassification"],
        "weights": sum(t.numel() for t in load_file(tmp_path / "in" / FILE).values()),
        "dtype": "F32",
        "labels": list(micro_classify.LABELS),
    }
