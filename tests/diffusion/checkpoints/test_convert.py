"""Folder to single file and back: all tensors, all configuration, and the pictures stay as they are."""

import json
import shutil
from pathlib import Path
from typing import Any

import micro
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from erase.diffusion.checkpoints import convert, folders, vocabulary
from erase.diffusion.checkpoints.header import TEXTS
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.model import Model, open_model
from erase.evaluation.generate import image_generator
from erase.store.files import sha256
from erase.store.safetensors import open_safetensors

PARTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def openclip_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the manner of 2.x: OpenCLIP, linear projections, heads by width, prediction of the velocity."""
    work = tmp_path_factory.mktemp("openclip")
    pipe = micro.pipeline(work, prediction_type="v_prediction")
    config = pipe.text_encoder.config
    config.hidden_act, config.num_hidden_layers = "gelu", 2
    heads = {"use_linear_projection": True, "attention_head_dim": [2, 4]}
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        pipe.text_encoder = CLIPTextModel(config)
        pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, **heads})
    pipe.to(torch.float16).save_pretrained(work / "openclip-sd")
    return work / "openclip-sd"


@pytest.fixture(params=["micro_sd", "openclip_sd"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def copy(micro_sd: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(micro_sd, tmp_path / "copy"))


def pack(folder: Path, out: Path) -> convert.Converted:
    source = locate(folder)
    assert isinstance(source, folders.Source)
    return convert.to_file(source, out)


def unpack(file: Path, out: Path) -> convert.Converted:
    source = locate(file)
    assert not isinstance(source, folders.Source)
    return convert.to_folder(source, out)


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256(p) for p in folder.rglob("*") if p.is_file()}


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{part}.{n}": t
        for part in PARTS
        for p in (folder / part).glob("*.safetensors")
        for n, t in load_file(p).items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def pictures(model: Model) -> list[bytes]:
    draw = model.sampler(steps=2, guidance=3.0)
    return [image.tobytes() for image in draw(["a cat", "a dog"], [image_generator(1, 0), image_generator(1, 1)])]


def test_there_and_back_again(folder: Path, tmp_path: Path) -> None:
    done = pack(folder, tmp_path / "a.safetensors")
    assert (done.leftovers, done.left_out) == ((), ())
    back = unpack(tmp_path / "a.safetensors", tmp_path / "b")
    assert back.tensors == done.tensors == len(open_safetensors(tmp_path / "a.safetensors")[0])
    assert tree(tmp_path / "b") == tree(folder)  # every byte of every file
    pack(tmp_path / "b", tmp_path / "c.safetensors")
    assert sha256(tmp_path / "a.safetensors") == sha256(tmp_path / "c.safetensors")


def test_what_was_erased_is_told_in_every_form(folder: Path, tmp_path: Path) -> None:
    source, told = locate(folder), {"erase": "1", "erase_method": "sfron", "erase_forgotten": '["cat", "dog"]'}
    folders.save(source, {}, tmp_path / "erased", told)
    assert pack(tmp_path / "erased", tmp_path / "a.safetensors").left_out == ("README.md",)
    assert folders.forgotten(locate(tmp_path / "a.safetensors")) == ["cat", "dog"]
    unpack(tmp_path / "a.safetensors", tmp_path / "b")
    assert tree(tmp_path / "b") == tree(tmp_path / "erased")  # every byte of every file, the card's too
    assert folders.forgotten(locate(tmp_path / "b")) == ["cat", "dog"]
    folders.save(locate(tmp_path / "b"), {}, tmp_path / "undone", {})
    assert tree(tmp_path / "undone") == tree(folder)


def test_pictures_are_the_same_in_every_form_and_reader(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    pack(folder, file)
    expected = pictures(open_model(locate(folder)))
    assert pictures(open_model(locate(file))) == expected
    assert len(set(expected)) == 2
    theirs = StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), dtype=torch.float32, local_files_only=True, safety_checker=None
    )
    theirs.set_progress_bar_config(disable=True)
    assert pictures(micro.model(theirs)) == expected


@pytest.mark.slow
def test_the_embedded_model(tiny_sd: Path, tmp_path: Path) -> None:
    pack(tiny_sd, tmp_path / "a.safetensors")
    unpack(tmp_path / "a.safetensors", tmp_path / "b")
    assert tree(tmp_path / "b") == tree(tiny_sd)
    one, other = (open_model(locate(path)) for path in (tiny_sd, tmp_path / "a.safetensors"))
    assert pictures(one) == pictures(other)


def test_a_file_opens_like_its_folder(micro_sd: Path, tmp_path: Path) -> None:
    pack(micro_sd, tmp_path / "a.safetensors")
    model = open_model(locate(tmp_path / "a.safetensors"))
    for part in (model.pipe.unet, model.pipe.vae, model.pipe.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in part.parameters())
        assert not part.training
    (tmp_path / "alone").mkdir()
    (tmp_path / "a.safetensors").rename(tmp_path / "alone/any name.safetensors")
    assert pictures(open_model(locate(tmp_path / "alone"))) == pictures(model)


def test_each_tensor_keeps_its_dtype(copy: Path, tmp_path: Path) -> None:
    for number, (part, name) in enumerate(PARTS.items()):
        kinds = (torch.float16, torch.bfloat16, torch.float32)
        old = load_file(copy / part / name)
        new = {
            n: t.to(kinds[(i + number) % 3] if "_proj" not in n else kinds[number])
            for i, (n, t) in enumerate(old.items())
        }
        save_file(new, copy / part / name, metadata={"format": "pt"})
    pack(copy, tmp_path / "a.safetensors")
    unpack(tmp_path / "a.safetensors", tmp_path / "b")
    assert same(weights(tmp_path / "b"), weights(copy))


def rename(path: Path, change: Any, **more: Tensor) -> None:
    save_file({**{change(n): t for n, t in load_file(path).items()}, **more}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("openclip", [False, True])
def test_names_of_older_libraries_come_back(micro_sd: Path, openclip_sd: Path, tmp_path: Path, openclip: bool) -> None:
    copy = Path(shutil.copytree(openclip_sd if openclip else micro_sd, tmp_path / "old"))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def vae(name: str) -> str:
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        return name

    rename(copy / "vae" / PARTS["vae"], vae)
    positions = {"text_model.embeddings.position_ids": torch.arange(micro.MAX_TOKENS)[None]}
    rename(
        copy / "text_encoder" / PARTS["text_encoder"],
        lambda n: f"text_model.{n.removeprefix('text_model.')}",
        **positions,
    )
    pack(copy, tmp_path / "a.safetensors")
    done = unpack(tmp_path / "a.safetensors", tmp_path / "b")
    assert done.leftovers == ()
    found = weights(tmp_path / "b")
    assert same(found, weights(copy))
    assert "vae.decoder.mid_block.attentions.0.proj_attn.weight" in found
    assert pictures(open_model(locate(tmp_path / "a.safetensors"))) == pictures(open_model(locate(copy)))


def test_a_text_encoder_without_its_prefix(micro_sd: Path, tmp_path: Path) -> None:
    """Some old files of 1.x name its tensors so; a folder's may have the prefix or not."""
    pack(micro_sd, tmp_path / "a.safetensors")
    tensors, header = open_safetensors(tmp_path / "a.safetensors")
    old = {n.replace(".transformer.text_model.", ".transformer."): t for n, t in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "old.safetensors", metadata=header)
    expected = pictures(open_model(locate(micro_sd)))
    source = locate(tmp_path / "old.safetensors")
    assert pictures(open_model(source)) == expected
    unpack(tmp_path / "old.safetensors", tmp_path / "b")
    assert same(weights(tmp_path / "b"), weights(micro_sd))
    folders.save(source, {}, tmp_path / "saved.safetensors", {})
    assert same(dict(open_safetensors(tmp_path / "saved.safetensors")[0]), old)
    for prefix in ("", "text_model."):
        weights_file = tmp_path / "b/text_encoder" / PARTS["text_encoder"]
        rename(weights_file, lambda name, start=prefix: start + name.removeprefix("text_model."))
        assert pictures(open_model(locate(tmp_path / "b"))) == expected


def test_what_a_folder_has_no_place_for_is_kept_and_named(micro_sd: Path, tmp_path: Path) -> None:
    pack(micro_sd, tmp_path / "a.safetensors")
    tensors, header = open_safetensors(tmp_path / "a.safetensors")
    extra = {
        "alphas_cumprod": torch.rand(5),
        "model_ema.diffusion_modelinput_blocks00weight": torch.rand(3).half(),
        "global_step": torch.tensor(7),
        "cond_stage_model.logit_scale": torch.tensor(float("inf")),
    }
    save_file({**tensors, **extra}, tmp_path / "more.safetensors", metadata={**header, "ss_author": "somebody"})
    done = unpack(tmp_path / "more.safetensors", tmp_path / "b")
    assert set(done.leftovers) == set(extra)
    assert same(weights(tmp_path / "b"), weights(micro_sd))
    assert same(load_file(tmp_path / "b" / folders.LEFTOVERS), extra)
    pack(tmp_path / "b", tmp_path / "c.safetensors")
    again, meta = open_safetensors(tmp_path / "c.safetensors")
    assert same(dict(again), {**tensors, **extra})
    assert meta == {**header, "ss_author": "somebody"}


def test_an_erased_folder_does_not_keep_the_running_average(micro_sd: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(micro_sd, tmp_path / "copy"))
    extra = {"model_ema.diffusion_modelinput_blocks00weight": torch.rand(3), "alphas_cumprod": torch.rand(5)}
    save_file(extra, copy / folders.LEFTOVERS, metadata={"format": "pt"})
    folders.save(locate(copy), {}, tmp_path / "out", {})
    assert load_file(tmp_path / "out" / folders.LEFTOVERS).keys() == {"alphas_cumprod"}


def test_other_forms_of_a_folder(micro_sd: Path, copy: Path, tmp_path: Path) -> None:
    """Shards, pickles, a variant, a running average: the same file comes of them."""
    pack(micro_sd, tmp_path / "plain.safetensors")
    net = UNet2DConditionModel.from_pretrained(copy, subfolder="unet", dtype=torch.float16)
    shutil.rmtree(copy / "unet")
    net.save_pretrained(copy / "unet_ema", max_shard_size="40KB")
    shutil.copytree(micro_sd / "vae", copy / "unet", dirs_exist_ok=True)
    text = load_file(copy / "text_encoder/model.safetensors")
    torch.save(text, copy / "text_encoder/pytorch_model.bin")
    (copy / "text_encoder/model.safetensors").unlink()
    (copy / "vae" / PARTS["vae"]).rename(copy / "vae/diffusion_pytorch_model.fp16.safetensors")
    done = pack(copy, tmp_path / "other.safetensors")
    assert done.left_out == ("unet",)
    files = [open_safetensors(tmp_path / f"{name}.safetensors")[0] for name in ("plain", "other")]
    assert same(*map(dict, files))


def test_what_a_file_has_no_place_for_is_named(copy: Path, tmp_path: Path) -> None:
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker/config.json").write_text("{}")
    (copy / "README.md").write_text("a card")
    index = json.loads((copy / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (copy / "model_index.json").write_text(json.dumps(index))
    assert pack(copy, tmp_path / "a.safetensors").left_out == ("README.md", "safety_checker")
    unpack(tmp_path / "a.safetensors", tmp_path / "b")
    StableDiffusionPipeline.from_pretrained(tmp_path / "b")  # needs no safety checker


def test_nobodys_disk_is_told_of(copy: Path, tmp_path: Path) -> None:
    for place, key in (("unet/config.json", "_name_or_path"), ("tokenizer/tokenizer_config.json", "name_or_path")):
        config = json.loads((copy / place).read_text())
        (copy / place).write_text(json.dumps({**config, key: "/home/somebody/models/mine"}))
    pack(copy, tmp_path / "a.safetensors")
    assert b"somebody" not in (tmp_path / "a.safetensors").read_bytes()
    unpack(tmp_path / "a.safetensors", tmp_path / "b")
    assert json.loads((tmp_path / "b/unet/config.json").read_text())["_name_or_path"] == "mine"


def test_clips_own_vocabulary_is_not_stored(copy: Path, tmp_path: Path) -> None:
    for name, text in vocabulary.files().items():
        (copy / name).write_text(text)
    (copy / "tokenizer/tokenizer.json").unlink()
    pack(copy, tmp_path / "a.safetensors")
    texts = json.loads(open_safetensors(tmp_path / "a.safetensors")[1][TEXTS])
    assert not set(texts) & {f"tokenizer/{name}" for name in vocabulary.VOCABULARY}
    source = locate(tmp_path / "a.safetensors")
    assert not isinstance(source, folders.Source)
    convert.to_folder(source, tmp_path / "b")
    assert tree(tmp_path / "b") == tree(copy)


def test_clips_vocabulary() -> None:
    """Numbers that everybody's Stable Diffusion 1.x has."""
    numbers = vocabulary.vocabulary()
    assert len(numbers) == 49408
    words = ("<|startoftext|>", "a</w>", "photo</w>", "of</w>", "cat</w>", "<|endoftext|>", "!")
    assert [numbers[w] for w in words] == [49406, 320, 1125, 539, 2368, 49407, 0]
    assert vocabulary.is_clip(vocabulary.files())
    other = {"tokenizer/tokenizer.json": '{"model": {"vocab": {"a": 0}}}'}
    assert not vocabulary.is_clip(other)
    assert not vocabulary.is_clip({**vocabulary.files(), **other})
    assert not vocabulary.is_clip({})


def test_a_checkpoint_becomes_safetensors(micro_sd: Path, tmp_path: Path) -> None:
    pack(micro_sd, tmp_path / "a.safetensors")
    tensors = dict(open_safetensors(tmp_path / "a.safetensors")[0])
    torch.save({"state_dict": tensors, "global_step": 5, "callbacks": {}}, tmp_path / "old.ckpt")
    source = convertible(tmp_path / "old.ckpt", tmp_path / "a.safetensors")
    done = convert.to_safetensors(source, tmp_path / "b.safetensors")
    assert set(done.left_out) == {"global_step", "callbacks"}
    assert same(dict(open_safetensors(tmp_path / "b.safetensors")[0]), tensors)
    folders.save(source, {}, tmp_path / "saved", {"erase": "0"})
    assert same(dict(open_safetensors(tmp_path / "saved" / folders.SINGLE)[0]), tensors)
    done = convert.to_folder(source, tmp_path / "c")
    assert set(done.left_out) == {"global_step", "callbacks"}
    assert same(
        weights(tmp_path / "c"), {f"{n.split('.')[0]}.{n.split('.', 1)[1]}": t for n, t in usual(micro_sd).items()}
    )
    with pytest.raises(ValueError, match=r"a\.safetensors is a \.safetensors already"):
        convert.to_safetensors(convertible(tmp_path / "a.safetensors", tmp_path / "a.safetensors"), tmp_path / "d")


def usual(folder: Path) -> dict[str, Tensor]:
    """With the text encoder's names as the hub's folders have them."""
    return {n.replace("text_encoder.", "text_encoder.text_model."): t for n, t in weights(folder).items()}


def convertible(path: Path, known: Path) -> Any:
    """A source that takes its configuration from another file: the released models' does not fit micro ones."""
    import dataclasses

    found: Any = locate(known)
    usual = {
        ldm: dataclasses.replace(p, names=tuple(f"text_model.{n.removeprefix('text_model.')}" for n in p.names))
        if p.part == "text_encoder"
        else p
        for ldm, p in found.spelled.items()
    }
    from erase.diffusion.checkpoints import single_file

    left_out = single_file.read(path)[2]
    return dataclasses.replace(found, path=path, spelled=usual, left_out=left_out)


def test_converting_refuses(copy: Path, tmp_path: Path) -> None:
    pack(copy, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors exists: choose another name"):
        pack(copy, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="copy exists: choose another folder"):
        unpack(tmp_path / "a.safetensors", copy)
    index = json.loads((copy / "model_index.json").read_text())
    for part, kind in (("tokenizer", "T5Tokenizer"), ("text_encoder", "XLMRobertaModel")):
        (copy / "model_index.json").write_text(json.dumps({**index, part: ["transformers", kind]}))
        with pytest.raises(ValueError, match=f"has a {kind}; a single file needs a CLIPT"):
            pack(copy, tmp_path / "b.safetensors")
    (copy / "model_index.json").write_text(json.dumps(index))
    save_file({"first_stage_model.quant_conv.bias": torch.zeros(1)}, copy / folders.LEFTOVERS)
    with pytest.raises(
        ValueError, match=r"leftovers\.safetensors holds first_stage_model\.quant_conv\.bias, which its"
    ):
        pack(copy, tmp_path / "b.safetensors")
    (copy / folders.LEFTOVERS).unlink()
    whole = load_file(copy / "vae" / PARTS["vae"])
    save_file({n: t for n, t in whole.items() if n != "quant_conv.bias"}, copy / "vae" / PARTS["vae"])
    with pytest.raises(ValueError, match=r"is incomplete: .* call first_stage_model\.quant_conv\.bias"):
        pack(copy, tmp_path / "b.safetensors")
    (copy / "text_encoder/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"text_encoder has no weights \(model\.safetensors\)"):
        pack(copy, tmp_path / "b.safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {"copy", "a.safetensors"}


def test_mixed_dtypes_cannot_be_stacked(openclip_sd: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(openclip_sd, tmp_path / "copy"))
    path = copy / "text_encoder/model.safetensors"
    old = load_file(path)
    name = next(n for n in old if n.endswith("k_proj.weight"))
    save_file({**old, name: old[name].float()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="are of different dtypes"):
        pack(copy, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_nothing_is_left_behind(copy: Path, tmp_path: Path) -> None:
    pack(copy, tmp_path / "a.safetensors")
    tensors, header = open_safetensors(tmp_path / "a.safetensors")
    name = next(n for n in tensors if n.startswith("first_stage_model."))
    broken = {**tensors, name: torch.full_like(tensors[name], float("nan"))}
    save_file(broken, tmp_path / "b.safetensors", metadata=header)
    with pytest.raises(ValueError, match=r"b\.safetensors: .* holds NaN or infinite values"):
        unpack(tmp_path / "b.safetensors", tmp_path / "out")
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        open_model(locate(tmp_path / "b.safetensors"))
    assert {p.name for p in tmp_path.iterdir()} == {"copy", "a.safetensors", "b.safetensors"}
