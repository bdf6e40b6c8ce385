"""Single files of XL, SD3 and Flux: folder to file and back, erased in the form they came in, and read by diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import micro_flux
import micro_sd3
import micro_sdxl
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5EncoderModel

from erase.diffusion.checkpoints import convert, folders
from erase.diffusion.checkpoints.header import NAMES, TEXTS
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.diffusion.describe import describe
from erase.diffusion.families import family
from erase.diffusion.model import Model, open_model
from erase.evaluation.generate import image_generator
from erase.store.files import sha256
from erase.store.safetensors import digest, open_safetensors


@dataclass(frozen=True)
class Row:
    """What a test must know of a family's files."""

    pipeline: Callable[[Path], Any]
    moved: str
    """A weight that learns, one of several that the file stacks where it stacks any."""
    place: str
    """What the file calls the tensor that holds it."""
    rows: tuple[int | None, int | None] = (None, None)
    """Where it begins and ends in that tensor."""
    alone: bool = False
    """Whether the file has the network that learns and nothing else."""


def sd3(work: Path) -> Any:
    """Its readers take a projection of the first encoder for the identity."""
    pipe = micro_sd3.pipeline(work)
    pipe.text_encoder.text_projection.weight.data = torch.eye(micro_sd3.POOLED[0])
    return pipe


ROWS = {
    "sdxl": Row(
        micro_sdxl.pipeline,
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    ),
    "sd3": Row(
        sd3,
        "transformer_blocks.0.attn.add_k_proj.weight",
        "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",
        (16, 32),
    ),
    "flux": Row(
        micro_flux.pipeline,
        "single_transformer_blocks.0.attn.to_k.weight",
        "single_blocks.0.linear1.weight",
        (16, 32),
        alone=True,
    ),
}


@dataclass(frozen=True)
class Case:
    name: str
    row: Row
    folder: Path
    file: Path

    @property
    def rest(self) -> Path | None:
        """What must be named beside the file."""
        return self.folder if self.row.alone else None

    def open(self, path: Path | None = None) -> SingleFile:
        found = locate(path or self.file, components=self.rest)
        assert isinstance(found, SingleFile)
        return found

    def edit(self, tensors: Mapping[str, Tensor | None], out: Path, **header: str | None) -> Path:
        """The file with other tensors or another header; `None` takes one out."""
        old, meta = open_safetensors(self.file)
        whole = {n: t.contiguous() for n, t in {**old, **tensors}.items() if t is not None}
        save_file(whole, out, metadata={k: v for k, v in {**meta, **header}.items() if v is not None})
        return out


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name == "sd3")) for name in ROWS]
)  # its own tests, and those of names, are not slow
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Not to be changed by a test."""
    work, row = tmp_path_factory.mktemp(request.param), ROWS[request.param]
    row.pipeline(work).to(torch.float16).save_pretrained(work / "pipeline")
    source = locate(work / "pipeline")
    assert isinstance(source, folders.Source)
    convert.to_file(source, work / "file.safetensors")
    return Case(request.param, row, work / "pipeline", work / "file.safetensors")


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256(p) for p in folder.rglob("*") if p.is_file()}


def images(model: Model) -> list[bytes]:
    draw = model.sampler(steps=2, guidance=3.0)
    return [image.tobytes() for image in draw(["a cat", "a dog"], [image_generator(1, 0), image_generator(1, 1)])]


def test_there_and_back_again(case: Case, tmp_path: Path) -> None:
    back = convert.to_folder(case.open(), tmp_path / "b")
    assert back.tensors == len(open_safetensors(case.file)[0])
    assert back.leftovers == ()
    assert tree(tmp_path / "b") == tree(case.folder)  # every byte of every file
    again = locate(tmp_path / "b")
    assert isinstance(again, folders.Source)
    convert.to_file(again, tmp_path / "c.safetensors")
    assert sha256(tmp_path / "c.safetensors") == sha256(case.file)


def test_images_are_the_same_and_it_is_described_alike(case: Case) -> None:
    expected = images(open_model(locate(case.folder)))
    assert len(set(expected)) == 2
    assert images(open_model(case.open())) == expected
    one, other = describe(case.open()), describe(locate(case.folder))
    assert one.pop("kind").endswith("single file")
    assert other.pop("kind").endswith("pipeline")
    assert one == other
    assert digest(folders.tensors(case.open())) == digest(folders.tensors(locate(case.folder)))


def test_what_was_erased_leaves_in_the_same_form(case: Case, tmp_path: Path) -> None:
    before, header = open_safetensors(case.file)
    row = case.row
    change = {row.moved: folders.tensors(case.open())[row.moved].float() + 0.25}
    told = {"erase": "1", "erase_forgotten": '["cat"]'}
    folders.save(case.open(), change, tmp_path / "out", told)
    path = tmp_path / "out" / folders.SINGLE
    after, meta = open_safetensors(path)
    assert meta == {**header, **told}
    assert after.keys() == before.keys()
    for name in after:
        assert after[name].dtype == before[name].dtype
        if name == row.place:
            kept = torch.ones(len(after[name]), dtype=torch.bool)
            kept[slice(*row.rows)] = False
            assert torch.equal(after[name][slice(*row.rows)], change[row.moved].half())
            assert torch.equal(after[name][kept], before[name][kept])
        else:
            assert torch.equal(after[name], before[name]), name
    assert folders.forgotten(case.open(tmp_path / "out")) == ["cat"]
    opened = open_model(case.open(tmp_path / "out")).net.get_parameter(row.moved)
    assert torch.equal(opened, change[row.moved].half().float())
    convert.to_folder(case.open(path), tmp_path / "folder")
    assert folders.forgotten(locate(tmp_path / "folder")) == ["cat"]
    with pytest.raises(ValueError, match="has no tensor named 'qqqq'"):
        folders.save(case.open(), {"qqqq": torch.zeros(1)}, tmp_path / "x", {})
    folders.save(case.open(), {}, tmp_path / "same.safetensors", {})
    assert sha256(tmp_path / "same.safetensors") == sha256(case.file)


def test_a_file_without_a_network_needs_the_rest(case: Case, tmp_path: Path) -> None:
    """The network that learns alone, as it is handed around; and the folder that has all else."""
    begins = ("conditioner.", "first_stage_model.", "text_encoders.")
    gone = {name: None for name in open_safetensors(case.file)[0] if name.startswith(begins)}
    path = case.edit(gone, tmp_path / "alone.safetensors", **{TEXTS: None, NAMES: None})
    with pytest.raises(ValueError, match=r"components=DIR .* \(vae, text_encoder, text_encoder_2.*\)"):
        locate(path)


def test_what_a_file_may_not_hold(case: Case, tmp_path: Path) -> None:
    whole, row = open_safetensors(case.file)[0], case.row
    held = whole[row.place]
    stem = row.place.rpartition(".")[0]
    for tensors, said in (
        ({row.place: None}, "is incomplete: it lacks"),
        ({row.place: held[:-3]}, r"must have the shape \[.*\]; got \["),
        ({row.place: held[None]}, r"must have the shape \[.*\]; got \["),
        ({row.place: held.int()}, "is of I32; weights are F16, BF16, F32 or F64"),
        ({f"{stem}.alpha": torch.zeros(1)}, f"{stem}.alpha is not a tensor of the".replace(".", r"\.")),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            case.open(case.edit(tensors, tmp_path / "x.safetensors"))
        assert "\n" not in str(caught.value)
    for size in (4, 100, case.file.stat().st_size - 5):
        (tmp_path / "cut.safetensors").write_bytes(case.file.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"cut\.safetensors is cut short or not a safetensors file"):
            case.open(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.weight.quant_state.bitsandbytes__nf4", "4 bits of bitsandbytes"),
        ("x.weight.absmax", "4 bits of bitsandbytes"),
        ("x.SCB", "8 bits of bitsandbytes"),
        ("x.qweight", "4 or 8 bits of SVDQuant"),
        ("x.scale_weight", "scaled fp8"),
        ("scaled_fp8", "scaled fp8"),
    ],
)
def test_quantised_weights_are_refused_with_the_reason(tmp_path: Path, name: str, said: str) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2), name: torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"is quantised, {said}.*: get the same model in F16, BF16 or F32"):
        locate(tmp_path / "x.safetensors")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"x\.gguf is GGUF: .*: get the same model in F16, BF16 or F32"):
        locate(tmp_path / "x.gguf")


def test_an_encoder_in_8_bits_is_read_and_kept(case: Case, tmp_path: Path) -> None:
    """It does not learn; the network that does is refused in 8 bits."""
    whole = open_safetensors(case.file)[0]
    eight = torch.float8_e4m3fn
    with pytest.raises(ValueError, match=r"x\.safetensors is fp8 \(float8_e4m3fn\)"):
        case.open(case.edit({case.row.place: whole[case.row.place].to(eight)}, tmp_path / "x.safetensors"))
    names = [n for n in whole if n.endswith(("token_embedding.weight", "shared.weight"))]
    if not names:
        assert case.row.alone
        return
    path = case.edit({name: whole[name].to(eight) for name in names}, tmp_path / "eight.safetensors")
    assert len(set(images(open_model(case.open(path))))) == 2
    folders.save(case.open(path), {}, tmp_path / "out.safetensors", {})
    assert digest(open_safetensors(tmp_path / "out.safetensors")[0]) == digest(open_safetensors(path)[0])


def test_the_rest_must_be_of_the_same_family(case: Case, micro_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"components=.* is a StableDiffusionPipeline, but .*"):
        locate(case.file, components=micro_sd)
    with pytest.raises(ValueError, match=r"is for a single file, and .* is not one: leave it out"):
        locate(case.folder, components=case.folder)
    broken = Path(shutil.copytree(case.folder, tmp_path / "broken"))
    whole = case.open().held
    for part in (name for name in family(case.name).PARTS if name not in whole):
        (broken / part).rename(tmp_path / "away")
        with pytest.raises(ValueError, match=f"is incomplete: the subfolder {part} is missing"):
            locate(case.file, components=broken)
        (tmp_path / "away").rename(broken / part)


# --- Stable Diffusion XL --------------------------------------------------------------------------


@pytest.fixture
def sdxl(tmp_path: Path) -> Case:
    row = ROWS["sdxl"]
    row.pipeline(tmp_path).to(torch.float16).save_pretrained(tmp_path / "pipeline")
    source = locate(tmp_path / "pipeline")
    assert isinstance(source, folders.Source)
    convert.to_file(source, tmp_path / "file.safetensors")
    return Case("sdxl", row, tmp_path / "pipeline", tmp_path / "file.safetensors")


def test_diffusers_reads_xl(sdxl: Case) -> None:
    theirs = StableDiffusionXLPipeline.from_single_file(
        str(sdxl.file), config=str(sdxl.folder), dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    theirs.set_progress_bar_config(disable=True)
    assert images(Model(family("sdxl"), theirs)) == images(open_model(locate(sdxl.folder)))


def test_a_unet_of_xl_with_the_rest(sdxl: Case, tmp_path: Path) -> None:
    gone = {n: None for n in open_safetensors(sdxl.file)[0] if not n.startswith("model.diffusion_model.")}
    path = sdxl.edit(gone, tmp_path / "unet.safetensors")
    source = locate(path, components=sdxl.folder)
    expected = images(open_model(locate(sdxl.folder)))
    assert images(open_model(source)) == expected
    assert isinstance(source, SingleFile)
    convert.to_folder(source, tmp_path / "b")
    assert tree(tmp_path / "b") == tree(sdxl.folder)
    assert {"unet.safetensors", "vae/diffusion_pytorch_model.safetensors"} <= folders.fingerprint(source).keys()


def test_an_encoder_that_is_no_openclip_is_refused(sdxl: Case, tmp_path: Path) -> None:
    config = sdxl.folder / "text_encoder_2/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "quick_gelu"}))
    source = locate(sdxl.folder)
    assert isinstance(source, folders.Source)
    with pytest.raises(ValueError, match=r"text_encoder_2's hidden_act is 'quick_gelu'.* OpenCLIP \(gelu\)"):
        convert.to_file(source, tmp_path / "x.safetensors")


# --- Stable Diffusion 3, Flux ---------------------------------------------------------------------


@pytest.mark.parametrize("begin", ["", "model.diffusion_model."])
@pytest.mark.parametrize("case", ["sd3", "flux"], indirect=True)
def test_a_network_of_others_is_known_by_its_shapes(case: Case, tmp_path: Path, begin: str) -> None:
    """Without a header, under both kinds of names; it is written again under the names that it had."""
    whole = {n: t for n, t in open_safetensors(case.file)[0].items() if not n.startswith(("first_", "text_encoders."))}
    bare = {begin + n.removeprefix("model.diffusion_model."): t for n, t in whole.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    source = locate(tmp_path / "bare.safetensors", components=case.folder)
    assert isinstance(source, SingleFile)
    assert images(open_model(source)) == images(open_model(locate(case.folder)))
    old = folders.tensors(source)[case.row.moved]
    folders.save(source, {case.row.moved: old + 1}, tmp_path / "out.safetensors", {})
    assert open_safetensors(tmp_path / "out.safetensors")[0].keys() == bare.keys()
    again = locate(tmp_path / "out.safetensors", components=case.folder)
    assert torch.equal(folders.tensors(again)[case.row.moved], old + 1)
    other = begin or "model.diffusion_model."
    name = next(iter(bare)).removeprefix(begin)
    twice = {("" if begin else other) + name: bare[begin + name].clone()}
    save_file({**bare, **twice}, tmp_path / "twice.safetensors")
    with pytest.raises(ValueError, match="holds a tensor twice: as"):
        locate(tmp_path / "twice.safetensors", components=case.folder)


def test_diffusers_reads_sd3(tmp_path: Path) -> None:
    """All but T5, whose embedding diffusers 0.42 leaves empty with transformers 5, of anybody's file."""
    sd3(tmp_path).to(torch.float16).save_pretrained(tmp_path / "pipeline")
    source = locate(tmp_path / "pipeline")
    assert isinstance(source, folders.Source)
    convert.to_file(source, tmp_path / "file.safetensors")
    t5 = T5EncoderModel.from_pretrained(tmp_path / "pipeline", subfolder="text_encoder_3", dtype=torch.float32)
    theirs = StableDiffusion3Pipeline.from_single_file(
        str(tmp_path / "file.safetensors"),
        text_encoder_3=t5,
        config=str(tmp_path / "pipeline"),
        dtype=torch.float32,
        local_files_only=True,
    )
    theirs.set_progress_bar_config(disable=True)
    assert images(Model(family("sd3"), theirs)) == images(open_model(source))


def test_a_projection_that_readers_ignore_is_refused(tmp_path: Path) -> None:
    micro_sd3.pipeline(tmp_path).save_pretrained(tmp_path / "pipeline")
    source = locate(tmp_path / "pipeline")
    assert isinstance(source, folders.Source)
    with pytest.raises(ValueError, match=r"text_projection\.weight is not the identity matrix"):
        convert.to_file(source, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_sd3_without_t5(tmp_path: Path) -> None:
    """The file has no T5 then, and a file that has one goes with a folder that has none."""
    pipe = sd3(tmp_path)
    pipe.to(torch.float16).save_pretrained(tmp_path / "with")
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "without")
    for name in ("with", "without"):
        source = locate(tmp_path / name)
        assert isinstance(source, folders.Source)
        convert.to_file(source, tmp_path / f"{name}.safetensors")
    back = locate(tmp_path / "without.safetensors")
    assert isinstance(back, SingleFile)
    convert.to_folder(back, tmp_path / "b")
    assert tree(tmp_path / "b") == tree(tmp_path / "without")
    expected = images(open_model(locate(tmp_path / "without")))
    assert images(open_model(back)) == expected
    assert images(open_model(locate(tmp_path / "with.safetensors", components=tmp_path / "without"))) == expected
    assert images(open_model(locate(tmp_path / "with.safetensors"))) != expected


def test_a_tokenizer_that_is_no_text_is_carried(tmp_path: Path) -> None:
    sd3(tmp_path).to(torch.float16).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "pipeline/tokenizer_3/spiece.model").write_bytes(bytes(range(256)))
    source = locate(tmp_path / "pipeline")
    assert isinstance(source, folders.Source)
    convert.to_file(source, tmp_path / "a.safetensors")
    back = locate(tmp_path / "a.safetensors")
    assert isinstance(back, SingleFile)
    convert.to_folder(back, tmp_path / "b")
    assert tree(tmp_path / "b") == tree(tmp_path / "pipeline")
    tensors, header = open_safetensors(tmp_path / "a.safetensors")
    texts = json.dumps({**json.loads(header[TEXTS]), "tokenizer_3/spiece.model": "no base64!"})
    save_file(dict(tensors), tmp_path / "c.safetensors", metadata={**header, TEXTS: texts})
    with pytest.raises(ValueError, match=r"tokenizer_3/spiece\.model in its header is not base64"):
        locate(tmp_path / "c.safetensors")


def test_the_rest_of_another_flux_is_refused(tmp_path: Path) -> None:
    for name in ("dev", "schnell"):
        micro_flux.pipeline(tmp_path / f"{name}-work", schnell=name == "schnell").save_pretrained(tmp_path / name)
    source = locate(tmp_path / "schnell")
    assert isinstance(source, folders.Source)
    convert.to_file(source, tmp_path / "schnell.safetensors")
    with pytest.raises(ValueError, match=r"guidance_embeds=False and components=.* guidance_embeds=True"):
        locate(tmp_path / "schnell.safetensors", components=tmp_path / "dev")
    assert describe(locate(tmp_path / "schnell.safetensors", components=tmp_path / "schnell"))["tokens"] == 256
