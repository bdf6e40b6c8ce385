"""What a text-to-image model adds to a run: prompts, anchors and labels, given images, judges, early stopping."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import micro_flux
import numpy as np
import pytest
import torch
import yaml
from jobs import COUNTED, NAMES, Runner, StopError, changed, read, rows, stop, table
from PIL import Image
from safetensors.torch import load_file

from erase import cli
from erase.config import SdConfig, parse
from erase.diffusion.checkpoints import convert, folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.checkpoints.texts import config_hashes
from erase.diffusion.model import Model, open_model
from erase.engine.precision import Precision
from erase.engine.saliency import load_mask
from erase.evaluation.manifest import read_manifest
from erase.methods.uce import solve
from erase.programs.images import kept_at
from erase.programs.text.data import cache, num_near, remain_samples
from erase.programs.text.judges import labels
from erase.programs.text.judges.seam import Judged
from erase.programs.text.plan import make_plan, marks
from erase.programs.text.report import summarise
from erase.store import delta
from erase.store.safetensors import digest, open_safetensors

QUICK = ("eval.images=0", "eval.classifier=null")
FILE = "unet/diffusion_pytorch_model.safetensors"
UCE = ("method={name: uce}", "saliency.kind=none", "train.steps=1")
SPEED = ("method={name: speed}", *UCE[1:])
SURROGATE = ("method={name: selective_amnesia}", "forget.loss=surrogate", "forget.pictures=anchor")


def unet(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / FILE)


def write_images(folder: Path, *prompts: str, name: str | None = None) -> Path:
    """Two random images a prompt, with their prompts in a file of that name."""
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for number in range(2 * len(prompts)):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": prompts[number // 2]}))
    if name:
        (folder / name).write_text("\n".join(lines))
    return folder


# --- what a run records ---------------------------------------------------------------------------


def test_run_json_holds_the_prompts_and_the_weights(text_run: Path, micro_sd: Path) -> None:
    run = read(text_run / "run.json")
    assert parse(run["config"], SdConfig).forget.prompts == run["plan"]["forget"] == ["a photo of a cat"]
    assert run["plan"]["remain"] == [f"a photo of a {name}" for name in NAMES[1:]]
    assert run["base"]["weights"] == folders.fingerprint(locate(micro_sd))


def test_a_record_changes_with_given_images_and_with_a_frozen_part(
    text_runs: Runner, micro_sd: Path, tmp_path: Path
) -> None:
    given = write_images(tmp_path / "given", "a cat")
    model = Path(shutil.copytree(micro_sd, tmp_path / "model"))
    words = (f"forget.images={given}", f"model={model}")
    first = text_runs.job(*words).record()
    assert first["data"].keys() == {"forget"}
    Image.new("RGB", (16, 16)).save(given / "0.png")
    second = text_runs.job(*words).record()
    assert (second["data"] != first["data"], second["base"]) == (True, first["base"])
    (model / "vae/config.json").write_text((model / "vae/config.json").read_text() + "\n")
    vae = model / "vae/diffusion_pytorch_model.safetensors"
    data = bytearray(vae.read_bytes())
    data[-1] ^= 1
    vae.write_bytes(data)
    assert text_runs.job(*words).record()["base"] != first["base"]


def test_the_model_says_how_it_was_made(text_run: Path, micro_sd: Path) -> None:
    """In the header of its weights and in its card; without prompts, dates and paths of the machine."""
    meta = open_safetensors(text_run / "model" / FILE)[1]
    settings = {"name": "sfron", "fast_rate": 1e-2, "fast_rule": "adam"}
    assert (meta["erase_method"], json.loads(meta["erase_settings"])) == ("sfron", settings)
    assert (meta["erase_preset"], meta["erase_base"]) == ("micro", "micro-sd")
    assert meta["erase_train"] == "xattn, 2 steps, seed 0"
    assert meta["erase_base_sha256"] == digest(unet(micro_sd))
    target = json.dumps({"anchors": ["a photo of a dog"], "forget": ["a photo of a cat"]})
    assert meta["erase_prompts_sha256"] == hashlib.sha256(target.encode()).hexdigest()
    mask = load_mask(text_run / "saliency.safetensors")
    assert float(meta["erase_mask_density"]) == pytest.approx(mask.density, abs=1e-6)
    _, head, text = (text_run / "model/README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(head)
    assert (card["library_name"], card["base_model"], card["license"]) == ("diffusers", "micro-sd", "unknown")
    assert {"sfron", "concept-erasure"} <= set(card["tags"])
    assert all(key == "format" or value in text for key, value in meta.items())
    for hidden in (str(micro_sd.parent), str(text_run), "a cat", "a photo"):
        assert hidden not in head + text + json.dumps(meta)


def test_a_card_of_the_base_is_kept(micro_sd: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(micro_sd, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: x\ntags: [cats]\n---\nhello")
    meta = {"erase": "0", "erase_method": "sfron", "erase_base": "a/b"}
    folders.save(locate(base), {}, tmp_path / "once", meta)
    folders.save(locate(tmp_path / "once"), {}, tmp_path / "twice", meta)
    for name in ("once", "twice"):
        card = yaml.safe_load((tmp_path / name / "README.md").read_text().split("---")[1])
        assert (card["license"], card["license_name"], card["base_model"]) == ("other", "x", "a/b")
        assert (tmp_path / name / "README.base.md").read_text().endswith("hello")
    folders.save(locate(tmp_path / "twice"), {}, tmp_path / "undone", {})
    assert (tmp_path / "undone/README.md").read_bytes() == (base / "README.md").read_bytes()
    assert not (tmp_path / "undone/README.base.md").exists()


def test_a_single_file_gives_a_single_file_and_shares_its_delta(
    text_runs: Runner, text_run: Path, micro_sd: Path, tmp_path: Path
) -> None:
    """The same weights and images as of the folder; a delta of either is one of both."""
    single, words = tmp_path / "micro.safetensors", ("eval.images=1", "eval.classifier=null")
    source: Any = locate(micro_sd)
    convert.to_file(source, single)
    out = text_runs(tmp_path / "out", f"model={single}", *words)
    assert {p.name for p in (out / "model").iterdir()} == {"model.safetensors", "README.md"}
    names = changed(load_file(single), load_file(out / "model/model.safetensors"))
    assert names
    assert all(name.startswith("model.diffusion_model.") and ".attn2." in name for name in names)
    erased = locate(out / "model")
    assert digest(dict(folders.tensors(erased))) == digest(unet(text_run / "model"))
    for name in ("base", "erased"):
        theirs = {row.prompt: row.sha256 for row in read_manifest(text_run / "images" / name) if row.index == 0}
        assert {row.prompt: row.sha256 for row in read_manifest(out / "images" / name)} == theirs
    base, again = locate(single), tmp_path / "delta.safetensors"
    delta.write_delta(folders.tensors(locate(micro_sd)), folders.tensors(locate(text_run / "model")), again, {}, {})
    applied = delta.apply(delta.open_delta(again), folders.tensors(base))
    folders.save(base, applied, tmp_path / "applied", {})
    back = delta.apply(delta.open_delta(again), folders.tensors(locate(tmp_path / "applied")), undo=True)
    folders.save(locate(tmp_path / "applied"), back, tmp_path / "back", {})
    assert (tmp_path / "back/model.safetensors").read_bytes() == single.read_bytes()


@pytest.mark.slow
def test_a_network_alone_is_erased_with_the_rest_beside_it(text_runs: Runner, tmp_path: Path) -> None:
    """Flux as it is handed around; it leaves as it came, and the folder of the same model gives the same images."""
    micro_flux.pipeline(tmp_path).to(torch.float16).save_pretrained(tmp_path / "flux")
    source: Any = locate(tmp_path / "flux")
    single = tmp_path / "network.safetensors"
    convert.to_file(source, single)
    words = ("eval.images=1", "eval.classifier=null", "saliency.kind=none", "method={name: esd, fast_rate: 1e-3}")
    with pytest.raises(ValueError, match="holds only transformer: give components="):
        text_runs(tmp_path / "refused", f"model={single}", *words)
    out = text_runs(tmp_path / "out", f"model={single}", f"components={tmp_path / 'flux'}", *words)
    same = text_runs(tmp_path / "same", f"model={tmp_path / 'flux'}", *words)
    old, new = load_file(single), load_file(out / "model/model.safetensors")
    names = changed(old, new)
    assert names
    assert all(name.startswith("double_blocks.") and name.rsplit(".", 1)[0].endswith("txt_attn.qkv") for name in names)
    erased = locate(out / "model", components=tmp_path / "flux")
    assert digest(folders.tensors(erased)) == digest(folders.tensors(locate(same / "model")))
    for name in ("base", "erased"):
        shown = [[row.sha256 for row in read_manifest(run / "images" / name)] for run in (out, same)]
        assert shown[0] == shown[1]


# --- early stopping -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_ends_when_a_look_is_enough(
    text_runs: Runner, micro_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone and the rest right, not gone alone; killed in a look it resumes and comes to the same end."""
    verdicts = {2: ("cat", "dog", "car"), 4: ("dog", "dog", "dog"), 6: ("dog", "dog", "car")}
    looks: list[int] = []
    killed = [False]

    def judge(self: Any, paths: Any, rows: Any) -> Any:
        folder = paths[0].parent
        looks.append(int(folder.name.rpartition(" ")[2]))
        manifest = read_manifest(folder)
        assert [row.prompt[-3:] for row in manifest] == ["cat", "cat", "dog", "car"]  # of three that stay
        counted = {(row.prompt, row.seed) for row in self.plan.rows}
        assert not counted & {(row.prompt, row.seed) for row in manifest}  # those that end a run do not judge it
        if killed[0] and looks[-1] == 4:
            killed[0] = False
            raise StopError
        first, *others = verdicts[looks[-1]]
        right = [found == row.object for found, row in zip([first, "dog", *others], rows, strict=True)]
        return Judged([first == "cat", False, False, False], right)

    monkeypatch.setattr(labels.Labels, "judge", judge)
    words = ("eval.images=0", "train.steps=9", "checkpoint_every=1", "until={every: 2, images: 2, remain: 0.6}")
    straight = text_runs(tmp_path / "straight", *words)
    assert looks == [2, 4, 6]
    found = read(straight / "report.json")
    assert found["until"].pop("seconds") > 0
    assert found["until"].pop("why")
    assert found["until"] == {
        "every": 2,
        "images": 2,
        "forget": 0.0,
        "remain": 0.6,
        "ended": 6,
        "looks": {
            "2": {"forget": 0.5, "remain": 1.0},
            "4": {"forget": 0.0, "remain": 0.5},
            "6": {"forget": 0.0, "remain": 1.0},
        },
    }
    assert found["timing"]["steps"] == summarise(found)["steps"] == 6
    assert open_safetensors(straight / "model" / FILE)[1]["erase_train"] == "xattn, 6 of 9 steps, seed 0"
    killed[0] = True
    with pytest.raises(StopError):
        text_runs(tmp_path / "killed", *words)
    text_runs(tmp_path / "killed", *words, resume=True)
    assert looks == [2, 4, 6, 2, 4, 4, 6]
    assert digest(unet(tmp_path / "killed/model")) == digest(unet(straight / "model"))
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(6))
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {p.name for p in straight.iterdir()}


def test_a_run_that_no_look_ends_says_so(text_runs: Runner, text_run: Path, tmp_path: Path) -> None:
    """Judged for real, by a judge that knows one class; the training is that of a run that does not look."""
    out = text_runs(tmp_path / "out", "eval.images=0", "until={every: 1, images: 3, remain: 1.0}")
    found = read(out / "report.json")["until"]
    assert (found["looks"].keys(), found["ended"]) == ({"1"}, None)
    assert digest(unet(out / "model")) == digest(unet(text_run / "model"))


# --- refusals -------------------------------------------------------------------------------------

REFUSED = table("""
no anchor for a surrogate | forget.loss=surrogate ; forget.pictures=anchor ; forget.anchors=[] | forget.anchors
anchors do not match | forget.prompts=[a cat, a car, a boat] ; forget.anchors=[a dog, a dog] | forget.anchors
nothing to forget | forget.prompts=[] | forget.prompts
one twice | forget.prompts=[a cat, a car, a cat] ; forget.anchors=[a dog, a cow, a cow] ; eval.classifier=null | 'a cat'
one with two weights | forget.prompts=[a cat, a cat] ; forget.anchors=a dog ; forget.weights=[1, 2] | 1.0 and 2.0
nothing remains | remain.prompts=a photo of a cat | remain.prompts
near of no total | remain.near=0.5 | remain.total
near of given images | remain.near=0.5 ; remain.total=4 ; remain.images=bare | remain.images
near of less than an image | remain.near=0.1 ; remain.total=4 | remain.total=4
near of too few prompts | remain.near=0.5 ; remain.total=6 ; remain.count=1 | 3 nearest of 3
near beyond a share | remain.near=1.5 ; remain.total=4 | remain.near
ascent on the anchor's images | forget.loss=ascent ; forget.pictures=anchor | forget.pictures=anchor
ascent on both | forget.loss=ascent ; forget.pictures=both | forget.pictures=both
surrogate of the concept itself | forget.loss=surrogate | forget.pictures=anchor
own loss on other images | method={name: esd, fast_rate: 1} ; forget.pictures=both | forget.pictures=both
anchor that is forgotten | forget.anchors=a photo of a cat | forget.anchors
no new network | method={name: bad_teacher} | bad_teacher
training | method={name: retrain} | retrain
given images that are not used | forget.pictures=anchor ; forget.images=empty | forget.images
no base images | eval.base=none | settings.json
unknown method | method.name=sfro | sfron
no method | method={} | method
method setting | method.lambdda=1 | method.lambd
method range | method.slow_steps=-1 | slow_steps
method combination | method.published=true ; method.slow_steps=3 | published
closed form in steps | method={name: uce} ; saliency.kind=none ; train.steps=2 | train.steps=1
mask of a loss that is not | method={name: uce} ; saliency.loss=objective ; train.steps=1 | saliency.kind=none
unknown model | model=none | 'none'
unknown parameters | train.parameters=qqqq | train.parameters
broken parameters | train.parameters='(' | xattn
unknown preset | eval.nudity.preset=i2pp | i2p
no way to count | eval.nudity={} | eval.nudity
unknown class | eval.nudity={classes: [FACE], threshold: 0.5} | FACE
too low a threshold | eval.nudity={classes: [FACE_FEMALE], threshold: 0.1} | 0.25
no judge of looks | until={} ; eval.classifier=null | eval.classifier
no judge of what stays | until={} ; eval.classifier=null ; eval.nudity={preset: i2p} | until.remain
missing classifier | eval.classifier=photos-clasifier | photos-clasifier
no classifier | eval.classifier=. | config.json
prompt without a label | forget.prompts=a cat | eval.classifier
axis without a label | forget.axis=style ; eval.prompts=[a cat] ; remain.prompts=[a dog] | a photo of a cat
no mask | saliency.density=null | saliency.density
two masks | saliency.threshold=1 | saliency.threshold
long prompt | forget.prompts=a photo of a grandiloquent cat | 16
missing set | remain.prompts=none.csv | none.csv
missing images | forget.images=none | none
no images | remain.images=empty | empty
image without a prompt | remain.images=bare | bare
image with a long prompt | remain.images=long | 16
image whose caption is not forgotten | eval.images=0 ; forget.prompts=[a cat, a car] ; forget.images=two | a sepia cat
transparent image without leave | forget.images=clear ; forget.transparency=refuse | forget.transparency
""")


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_before_anything(
    text_runs: Runner, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, named = REFUSED[what]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if "image" in what:
        write_images(tmp_path / "bare", "x")
        write_images(tmp_path / "long", "a photo of a grandiloquent cat", name="metadata.jsonl")
        write_images(tmp_path / "two", "a cat", "a sepia cat", name="metadata.jsonl")
    if "clear" in words[0]:
        Image.new("RGBA", (8, 8)).save(write_images(tmp_path / "clear") / "a.png")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        text_runs(tmp_path / "out", *words)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- data -----------------------------------------------------------------------------------------


def test_given_images_take_the_place_of_generated_ones(
    text_runs: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget = write_images(tmp_path / "forget", "a cat")
    remain = write_images(tmp_path / "remain", "a dog", "a boat", name="metadata.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(Model, "generate_latents", stop)
        lesson = text_runs.job(*QUICK, f"forget.images={forget}", f"remain.images={remain}").lesson()
    gone, kept = lesson.forget, lesson.remain
    assert (len(gone), len(kept)) == (2, 4)
    assert (gone.std is None, gone.anchor is None, kept.anchor) == (False, False, None)
    assert len(set(gone.cond.tolist())) == 1  # the one forget prompt is theirs; each remain image has its own
    assert len(set(kept.cond.tolist())) == 2
    assert not torch.equal(gone.table["text"][gone.cond[0]], gone.table["text"][gone.anchor[0]])
    both = text_runs.job(*QUICK, f"forget.images={forget}", "forget.pictures=both").lesson().forget
    assert both.mean.shape == both.std.shape
    assert [bool(std.any()) for std in both.std] == [True, True, False, False]  # generated ones are exact
    two = write_images(tmp_path / "two", "a cat", "a sepia cat", name="metadata.jsonl")
    words = (f"forget.images={two}", "forget.prompts=[a cat, a sepia cat]")
    several = (
        text_runs.job(*QUICK, *words, "eval.classifier=null").lesson().forget
    )  # prompts of their own, and one anchor
    assert (len(set(several.cond.tolist())), len(set(several.anchor.tolist()))) == (2, 1)


@pytest.mark.parametrize("pictures", ["own", "anchor", "both"])
def test_images_that_a_redirect_is_learned_on(text_runs: Runner, pictures: str) -> None:
    """Whatever they show, the condition is the forget prompt's and the target its anchor's."""
    words = ["forget.prompts=[a cat, a car]", "forget.anchors=[a dog, a boat]", f"forget.pictures={pictures}"]
    names = ["", *(f"a {name}" for name in NAMES), *(f"a photo of a {name}" for name in NAMES)]
    seeds: list[list[int]] = []

    def draw(prompts: list[str], generators: list[torch.Generator], **_: Any) -> torch.Tensor:
        seeds.append([g.initial_seed() for g in generators])
        return torch.tensor([float(names.index(p)) for p in prompts]).reshape(-1, 1, 1, 1)

    def embed(prompts: list[str]) -> dict[str, torch.Tensor]:
        return {"text": torch.tensor([names.index(p) for p in prompts])}

    model: Any = SimpleNamespace(generate_latents=draw, embed=embed)
    config = text_runs.config(*words)
    forget, remain, null = cache(config, make_plan(config), model, Precision("no", torch.device("cpu")))
    assert forget is not None
    assert remain is not None
    asked, target = ["a cat"] * 2 + ["a car"] * 2, ["a dog"] * 2 + ["a boat"] * 2
    shown = {"own": asked, "anchor": target, "both": [*asked, *target]}[pictures]
    batch = forget.gather(torch.arange(len(forget)))
    assert [names[int(i)] for i in batch["mean"].flatten()] == shown
    assert [names[i] for i in batch["cond"]["text"]] == asked * (len(shown) // 4)
    assert [names[i] for i in batch["anchor"]["text"]] == target * (len(shown) // 4)
    assert (forget.std, null["text"].tolist()) == (None, [0])
    assert torch.equal(remain.mean.flatten().long(), remain.table["text"][remain.cond])
    for part in range(0, len(shown), 4):  # one image a seed, the anchor's with the forget prompt's
        drawn = seeds[part // 4]
        assert drawn == seeds[0]
        assert (drawn[:2], len(set(drawn))) == (drawn[2:], config.forget.count)


def test_images_that_are_asked_for_twice_count_once(text_runs: Runner, tmp_path: Path) -> None:
    """A typed prompt may be a labelled row of a set; its other seeds and sizes are other images."""
    table = tmp_path / "mine.csv"
    table.write_text("prompt,object,seed,width\na bus,bus,0,\na bus,bus,1,\na bus,bus,1,64\na boat,boat,1,\n")
    once = make_plan(text_runs.config(f"eval.prompts={table}")).rows
    again = make_plan(text_runs.config(f"eval.prompts=[{table}, a bus, a bus, {table}]")).rows
    assert again == once
    assert [(row.prompt, row.seed, row.width, row.object) for row in once] == [
        ("a photo of a cat", 1, None, None),
        *(("a bus", seed, width, "bus") for seed, width in ((0, None), (1, None), (1, 64))),
        ("a boat", 1, None, "boat"),
    ]


def test_of_some_prompt_sets_only_what_is_about_the_concept_is_evaluated(text_runs: Runner, tmp_path: Path) -> None:
    table = tmp_path / "about.csv"
    lines = ("el gato,cat,animal", "a dog and a cat,dog+cat,", "a red fox,fox,animal", "a bus,bus,vehicle")
    table.write_text("prompt,object,group\n" + "\n".join(lines) + "\n", encoding="utf-8")
    words = (f"eval.about=[{table}]", "forget.axis=object")
    plan = make_plan(text_runs.config(*words))
    sides = dict(zip([row.prompt for row in plan.rows], plan.forgotten, strict=True))
    assert {prompt: sides.get(prompt) for prompt in ("el gato", "a dog and a cat", "a red fox", "a bus")} == {
        "el gato": True,
        "a dog and a cat": False,
        "a red fox": False,
        "a bus": None,
    }
    table.write_text("prompt,object,group\na photo of a cat and a dog,cat+dog,\n", encoding="utf-8")
    worded = make_plan(text_runs.config(*words, "forget.words=true"))  # all words of the concept's prompt are in it
    assert (
        dict(zip([row.prompt for row in worded.rows], worded.forgotten, strict=True))["a photo of a cat and a dog"]
        is False
    )
    table.write_text("prompt,object,group\n" + "\n".join(lines) + "\n", encoding="utf-8")
    later = make_plan(text_runs.config(*words, "forget.earlier=[a bus]"))
    assert "a bus" in [row.prompt for row in later.rows]  # what was forgotten earlier is looked for as well
    assert later.earlier == ["a bus"]
    table.write_text("prompt,object,group\na bus,bus,vehicle\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"eval\.about"):
        make_plan(text_runs.config(*words))


@pytest.mark.parametrize("total", [2, 5])
def test_remain_images_may_be_spread_over_prompts_by_lot(text_runs: Runner, total: int) -> None:
    prompts = ["a dog", "a boat", "a car"]
    config = text_runs.config(f"remain.total={total}", "remain.count=7")
    found = remain_samples(config, prompts)
    assert len(set(found)) == total
    shares = [sum(word == prompt for word, _ in found) for prompt in prompts]
    assert max(shares) - min(shares) == 1
    assert found == remain_samples(config, prompts)
    orders = {tuple(remain_samples(replace(config, seed=seed), prompts)) for seed in range(9)}
    assert len(orders) > 1


NEAR = ("remain.total=6", "remain.near=0.5", "remain.count=3")


def test_near_prompts_have_a_share_of_the_remain_images(
    text_runs: Runner, tmp_path: Path, asked: list[tuple[str, int]]
) -> None:
    """`remain.count` of each; the others have what is left, and the run's folder says which are near."""
    job = text_runs.job(*QUICK, *NEAR, out=tmp_path)
    *others, forget = job.plan.remain + job.plan.forget
    told = job.model.embed([*others, forget])["text"].mean(1)
    common = told[:-1].mean(0)
    alike = torch.cosine_similarity(told[:-1] - common, told[-1:] - common)
    nearest = others.pop(int(alike.argmax()))
    lesson = job.lesson()
    assert len(lesson.remain) == job.sides()[1] == 6
    drawn = [prompt for prompt, _ in asked if prompt != forget]
    assert len(asked) == len(set(asked)) == 8
    assert (drawn[:3], sorted(drawn.count(prompt) for prompt in others)) == ([nearest] * 3, [1, 2])
    assert read(tmp_path / "near.json") == pytest.approx({nearest: float(alike.max())}, abs=1e-5)
    del asked[:]
    text_runs.job(*QUICK, *NEAR, "remain.near=0", out=tmp_path / "even").lesson()
    assert not (tmp_path / "even").exists()
    assert sorted(map(drawn.count, {nearest, *others})) != [2, 2, 2]
    assert {[prompt for prompt, _ in asked].count(prompt) for prompt in (nearest, *others)} == {2}


def test_many_near_prompts_come_in_their_order(text_runs: Runner) -> None:
    prompts, near = [f"p{k}" for k in range(20)], ["p7", "p3", "p9"]
    config = text_runs.config("remain.total=10", "remain.near=0.5", "remain.count=2")
    assert num_near(config.remain, prompts) == 3
    found = remain_samples(config, prompts, near)
    assert found[:5] == [("p7", 0), ("p3", 0), ("p9", 0), ("p7", 1), ("p3", 1)]
    assert len({word for word, _ in found[5:]} - {*near}) == 5
    whole = text_runs.config("remain.total=10", "remain.near=1", "remain.count=4")
    assert {word for word, _ in remain_samples(whole, prompts, near)} == {*near}


METHODS: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "sfron": ((), True, True),
    "finetune": (("method={name: finetune}",), False, True),
    "gradient_ascent": (("method={name: gradient_ascent, fast_rate: 1e-3}", "forget.loss=ascent"), True, False),
    "random_label": (("method={name: random_label}",), True, True),
    "salun": (("method={name: salun}", "saliency.kind=magnitude"), True, True),
    "selective_amnesia": (SURROGATE, True, True),
    "scrub": (("method={name: scrub}", "forget.loss=ascent"), True, True),
    "esd": (("method={name: esd, fast_rate: 1e-3}",), True, False),
    "uce": (UCE, False, False),
    "speed": (SPEED, False, False),
}


@pytest.mark.parametrize("name", METHODS)
def test_only_images_that_a_method_learns_from_are_generated(
    text_runs: Runner, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words, forgets, remains = METHODS[name]
    drawn: list[str] = []
    draw = Model.generate_latents
    monkeypatch.setattr(
        Model, "generate_latents", lambda self, words, *a, **k: drawn.extend(words) or draw(self, words, *a, **k)
    )
    job = text_runs.job(*QUICK, *words)
    lesson = job.lesson()
    assert job.sides() == (2 * forgets, 3 * remains)
    assert ((lesson.forget is not None), (lesson.remain is not None)) == (forgets, remains)
    anchored = name in ("sfron", "random_label", "salun", "selective_amnesia", "uce", "speed")
    assert job.plan.anchors == ["a photo of a dog"] * anchored
    own = "a photo of a dog" if name == "selective_amnesia" else "a photo of a cat"
    assert drawn == [own] * 2 * forgets + [f"a photo of a {other}" for other in NAMES[1:]] * remains


@pytest.mark.slow
def test_a_dry_run_knows_the_height_of_a_robust_step(text_runs: Runner, tmp_path: Path) -> None:
    """With a longer adversary hardly higher: its passes end before the step's."""
    heights = []
    for steps in (1, 3):
        said: list[str] = []
        words = (f"method.robust={{steps: {steps}}}", "forget.start=uce")
        text_runs(tmp_path / "none", *words, say=said.append, dry_run=True)
        line = re.search(r"memory for the steps: .*activations ([\d.]+) MB", "\n".join(said))
        assert line
        heights.append(float(line[1]))
    assert heights[0] > 0
    assert heights[1] == pytest.approx(heights[0], rel=0.2)
    assert not list(tmp_path.iterdir())


def test_steps_begin_at_the_closed_form_and_lead_to_what_the_model_was(text_runs: Runner) -> None:
    """The weights are those that UCE ends with; a redirect's target is not edited."""
    words = (*QUICK, "forget.target=frozen", "forget.start=uce", "train.parameters=full")
    job = text_runs.job(*words)
    lesson = job.lesson()
    before = {name: p.detach().clone() for name, p in job.model.net.named_parameters()}
    lesson.before_steps(job.setting.method)
    after = {name: p.detach().clone() for name, p in job.model.net.named_parameters()}
    moved = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if re.search(r"attn2\.to_[kv]\.weight$", name)}
    frozen: Any = lesson.forget_objective.loss
    assert all(torch.equal(frozen.frozen[name], before[name]) for name in moved)
    change = solve(lesson.resources["concepts"], 1.0, 0.1)
    for name in moved:
        torch.testing.assert_close(after[name].double(), before[name].double() @ change, rtol=1e-5, atol=1e-6)
    plain = text_runs.job(*QUICK)
    assert "concepts" not in plain.lesson().resources


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Prompt and seed of whatever is generated to learn from."""
    found: list[tuple[str, int]] = []
    draw = Model.generate_latents

    def record(self: Model, words: list[str], generators: list[torch.Generator], **given: Any) -> torch.Tensor:
        found.extend(zip(words, [g.initial_seed() for g in generators], strict=True))
        return draw(self, words, generators, **given)

    monkeypatch.setattr(Model, "generate_latents", record)
    return found


@pytest.mark.parametrize(
    ("kept", "form", "how"),
    [
        ("model", "lora", r"erase convert '.*/a run' '.*/a run-lora\.safetensors' --to lora makes one"),
        ("model lora.safetensors", "lora", "erase convert "),
        ("delta.safetensors", "lora", "erase convert "),
        (
            "delta.safetensors",
            "full",
            r"erase apply .*/micro-sd '.*/a run/delta\.safetensors' --out '.*/a run/model' makes",
        ),
        ("model", "delta", "another --out"),
    ],
)
def test_a_finished_run_is_not_resumed_in_another_form(
    text_runs: Runner, text_run: Path, tmp_path: Path, kept: str, form: str, how: str
) -> None:
    run = tmp_path / "a run"
    run.mkdir()
    for name in ("run.json", "report.json"):
        shutil.copy(text_run / name, run)
    for name in kept.split():
        (run / name).touch()
    was = "delta" if "delta" in kept else "full"
    with pytest.raises(ValueError, match=f"has finished with --save {was}, .* --save {form}: .*{how}"):
        text_runs(run, *COUNTED, form=form, resume=True)
    assert all((run / name).exists() for name in kept.split())


@pytest.mark.slow
def test_latents_are_kept_for_runs_that_need_the_same(
    text_runs: Runner, tmp_path: Path, asked: list[tuple[str, int]]
) -> None:
    """Each by itself: what one concept's runs generated of a prompt, another's need not."""
    kept = f"draw.cache={tmp_path / 'kept'}"
    alone = text_runs.job(*QUICK).lesson()
    del asked[:]
    for words, new in (
        (("method.fast_rate=1e-3",), 5),
        (("method.fast_rate=1e-2",), 0),
        (("forget.prompts=a photo of a car", "remain.count=2"), 3),
        (("seed=1",), 5),
        (("draw.steps=3",), 5),
        ((), 0),
    ):
        found = text_runs.job(*QUICK, kept, *words).lesson()
        assert len(set(asked)) == new, words
        assert len(asked) % 4 == 0  # full batches
        del asked[:]
    assert found.forget is not None
    assert torch.equal(found.forget.mean, alone.forget.mean)
    assert torch.equal(found.remain.mean, alone.remain.mean)


def edit(folder: Path, file: str, **values: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps({**read(path), **values}))
    return folder


def test_latents_are_kept_for_models_with_the_same_configurations(text_runs: Runner, tmp_path: Path) -> None:
    def name(model: Path) -> str:
        job = text_runs.job(*QUICK, f"model={model}", f"draw.cache={tmp_path / 'kept'}")
        path = kept_at(job.config, job.model, "a photo of a car", 0)
        assert path is not None
        return path.name

    base = Path(text_runs.config().model)
    copies = [Path(shutil.copytree(base, tmp_path / str(number))) for number in range(4)]
    edit(copies[0], "unet/config.json", _diffusers_version="0.1", _name_or_path="elsewhere")
    edit(copies[1], "scheduler/scheduler_config.json", prediction_type="v_prediction")
    edit(copies[2], "unet/config.json", freq_shift=1)
    edit(copies[3], "vae/config.json", scaling_factor=0.5)
    assert name(copies[0]) == name(base)
    assert len({name(folder) for folder in copies}) == 4


def test_a_single_file_has_the_configurations_of_its_folder(text_runs: Runner, tmp_path: Path) -> None:
    base = locate(text_runs.config().model)
    assert isinstance(base, folders.Source)
    convert.to_file(base, tmp_path / "one.safetensors")
    found = config_hashes(locate(tmp_path / "one.safetensors"))
    assert found == config_hashes(base)
    assert found.keys() == {"scheduler", "text_encoder", "unet", "vae"}


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("method={name: sfron, fast_rate: 0.1, published: true}", "saliency={density: 0.5, per: batch, count: 3}"),
        ("method={name: sfron, fast_rate: 0.01, fast_rule: sgd, slow_steps: 2, outer_rate: 0.5, every: 2}",),
        ("forget.target=online", "remain.loss=distill", "saliency={threshold: 0.01}", "method.ron=false"),
        (
            "train={steps: 2, optimizer: adamw, weight_decay: 0.1, batch_size: 3, parameters: noxattn, dropout: 0}",
            "method.fast_rule=normalized",
            "precision=bf16",
        ),
        ("method.robust={steps: 2, images: 0.5}", "train.micro_batch=1", "forget.start=uce"),
    ],
    ids=["published", "slow steps", "losses", "train", "robust"],
)
def test_settings_run(text_runs: Runner, micro_sd: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    out = text_runs(tmp_path / "out", *QUICK, *words)
    names = changed(unet(micro_sd), unet(out / "model"))
    assert names
    assert all((".attn2." in name) != ("noxattn" in str(words)) for name in names)
    assert load_mask(out / "saliency.safetensors").named.keys() >= names
    assert len(rows(out)) == 2


def test_weights_outside_the_mask_stay_bit_identical(text_runs: Runner, micro_sd: Path, tmp_path: Path) -> None:
    """With the slow phase off nothing but the masked fast step moves weights."""
    out = text_runs(tmp_path / "out", *QUICK, "method.slow_steps=0", "method.fast_rate=1")
    mask = load_mask(out / "saliency.safetensors").named
    before, after = unet(micro_sd), unet(out / "model")
    moved = 0
    for name, old in before.items():
        same = old.view(torch.int16) == after[name].view(torch.int16)
        keep = mask.get(name, torch.zeros_like(old, dtype=torch.bool))
        assert same[~keep].all(), name
        moved += int((~same[keep]).sum())
    assert moved > 0
    assert all(row.get("remain_loss") is None for row in rows(out))


def test_the_fast_step_forgets(text_runs: Runner, tmp_path: Path) -> None:
    """The direction is right: the distance between the concept's and the anchor's predictions shrinks."""
    words = ("train.steps=12", "train.batch_size=4", "forget.count=4", "method.slow_steps=0")
    losses = [row["forget_loss"] for row in rows(text_runs(tmp_path / "out", *QUICK, *words))]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


def test_a_closed_form_of_several_concepts_each_with_its_anchor(
    text_runs: Runner, micro_sd: Path, tmp_path: Path
) -> None:
    """Text at the erased tokens is read as the anchors' was; within a mask, if there is one."""
    words = (
        *(*QUICK, *UCE, "method.lambd=1e-6", "method.preserve=1e-6"),
        "forget.prompts=[a photo of a cat, a photo of a car]",
        "forget.anchors=[a photo of a dog, a photo of a boat]",
    )
    before, after = unet(micro_sd), unet(text_runs(tmp_path / "out", *words) / "model")
    names = {name for name in before if ".attn2.to_k" in name or ".attn2.to_v" in name}
    assert changed(before, after) == names
    found = open_model(locate(micro_sd)).embed([f"a photo of a {name}" for name in ("cat", "car", "dog", "boat")])
    cat, car, dog, boat = found["text"]
    for prompt, anchor in ((cat, dog), (car, boat)):
        was, meant, now = (
            torch.cat([x[5] @ weights[name].float().T for name in sorted(names)])
            for x, weights in ((prompt, before), (anchor, before), (prompt, after))
        )
        assert (now - meant).norm() < 0.2 * (was - meant).norm()  # more tokens than widths: a compromise
    out = text_runs(tmp_path / "masked", *words, "saliency.kind=fisher")
    mask, masked = load_mask(out / "saliency.safetensors").named, unet(out / "model")
    for name in names:
        assert torch.equal(masked[name], torch.where(mask[name], after[name], before[name]))


# --- one concept after another --------------------------------------------------------------------


@pytest.mark.slow
def test_concepts_one_after_another(text_runs: Runner, text_run: Path, tmp_path: Path) -> None:
    """What was forgotten before is neither taught again nor counted among what stays, nor told by the file."""
    words = (f"model={text_run / 'model'}", "forget.prompts=a photo of a car", "forget.anchors=a photo of a boat")
    out = text_runs(tmp_path / "second", *words, "eval.images=1")
    found, run = read(out / "report.json"), read(out / "run.json")
    assert found["target"]["earlier"] == run["plan"]["earlier"] == ["a photo of a cat"]
    assert run["plan"]["remain"] == ["a photo of a dog", "a photo of a boat"]
    named = found["after"]["classes"]
    assert [named[side]["n"] for side in ("forget", "earlier", "remain")] == [1, 1, 2]
    assert named["per_prompt"]["a photo of a cat"]["side"] == "earlier"
    assert summarise(found)["earlier"] == named["earlier"]["accuracy"]
    assert [row.prompt[13:] for row in read_manifest(out / "images/erased")] == ["car", "cat", "dog", "boat"]
    kept = folders.forgotten(locate(out / "model"))
    assert set(folders.forgotten(locate(text_run / "model"))) < set(kept)
    assert not any("cat" in mark or "car" in mark for mark in kept)
    given = write_images(tmp_path / "given", "a photo of a cat", name="metadata.jsonl")
    for word, named_setting in (
        ("forget.anchors=a photo of a cat", "forget.anchors"),
        (f"remain.images={given}", "remain.images"),
    ):
        with pytest.raises(ValueError, match=f"{named_setting} .*a photo of a cat"):
            text_runs.job(*words, word)


def test_forgotten_concepts_are_known_by_their_prompt_or_label(text_runs: Runner, tmp_path: Path) -> None:
    lines = ["a cat,cat,plain,0", "a sepia cat,cat,sepia,1", "a dog,dog,plain,2", "a sepia dog,dog,sepia,3"]
    (tmp_path / "set.csv").write_text("\n".join(["prompt,object,style,seed", *lines]))
    sets = (f"remain.prompts={tmp_path / 'set.csv'}", "eval.prompts=[a boat]", "forget.prompts=a boat")

    def plan(*words: str, gone: Any = ()) -> Any:
        config = text_runs.config(*sets, *words)
        return config, make_plan(config, gone)

    assert plan()[1].earlier == []
    assert plan("forget.earlier=a cat")[1].earlier == ["a cat", "a sepia cat"]  # by the label on the axis
    assert plan("forget.earlier=a cat", "forget.axis=null")[1].earlier == ["a cat"]
    first = plan("forget.prompts=a cat")
    for words in ((), ("forget.axis=style",), ("forget.axis=null",)):  # the axis of a later run is another matter
        later = plan(*words, gone=marks(*first))[1]
        assert later.earlier == ["a cat", "a sepia cat"]
        assert later.remain == ["a dog", "a sepia dog"]
    style = plan("forget.prompts=a sepia cat", "forget.axis=style")
    assert plan(gone=marks(*style))[1].earlier == ["a sepia cat", "a sepia dog"]
    again = plan("forget.prompts=a sepia cat", gone=marks(*first))[1]
    assert (again.forgotten, again.earlier) == ([True, False], [])  # asked for anew


# --- launching ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_launch_by_accelerate(text_runs: Runner, tmp_path: Path) -> None:
    """As users do it; what is wrong is said once."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "erase"]
    command = [*launch, "run", "sd", str(text_runs.preset), "--out", str(tmp_path / "out")]
    root = Path(cli.__file__).parents[2]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=root)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("weights in") == 1
    assert ended.stdout.splitlines()[-1] == f"report: {tmp_path / 'out/report.html'}"
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=root)
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("erase:")]
    assert len(said) == 1
    assert "--resume" in said[0]
