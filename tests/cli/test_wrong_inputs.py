"""Wrong inputs of every command: one line that begins with `erase:`, exit status 2, and no file is written."""

import json
import os
import shlex
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from erase import cli

RUN = "run sd sd_photos_sfron"
OUT = "--out out"
CASES = f"""
nothing | nothing
--versoin | --versoin
demo --out taken.png | taken.png
demo --out full | full
demo --bogus | --bogus
run ddmp ddpm_fashion_sfron {OUT} | did you mean ddpm
run sd | PRESET
run sd sd_photo_sfron {OUT} | sd_photos_sfron
run sd ddpm_fashion_sfron {OUT} | erase run ddpm
run sd none.yaml {OUT} | none.yaml
run sd broken.yaml {OUT} | broken.yaml
run sd list.yaml {OUT} | list.yaml
run sd full {OUT} | full
run sd nothing.yaml {OUT} | pipeline: sd
{RUN} | --out
{RUN} --out | --out
{RUN} {OUT} --save half | half
{RUN} --out taken.png | taken.png
{RUN} --out full | full
{RUN} --out nowhere --resume | nowhere
{RUN} --out empty --resume | empty
{RUN} --out full --resume | full
{RUN} {OUT} train.steps | train.steps
{RUN} {OUT} =3 | =3
{RUN} {OUT} train.stpes=3 | train.steps
{RUN} {OUT} train.steps=0 | train.steps
{RUN} {OUT} train.steps=1.5 | train.steps
{RUN} {OUT} train.lr=nan | train.lr
{RUN} {OUT} train.steps.more=1 | train.steps.more
{RUN} {OUT} pipeline=ddpm | pipeline
{RUN} {OUT} train=3 | train.steps
{RUN} {OUT} method=null | method
{RUN} {OUT} until=5 | until.every
{RUN} {OUT} model= | model
{RUN} {OUT} model=broken-config | unet/config.json
{RUN} {OUT} model=photos-classifier | erase run classify
{RUN} --out img/0.png/x | img/0.png/x
{RUN} {OUT} precision=fp8 | precision
{RUN} {OUT} seed=-1 | seed
{RUN} {OUT} method=sfron | method
{RUN} {OUT} method.name=sfro | sfron
{RUN} {OUT} method.fast_rat=1 | method.fast_rate
{RUN} {OUT} method.fast_rate=fast | method.fast_rate
{RUN} {OUT} method.lambd=-1 | lambd
{RUN} {OUT} method.name=retrain | retrain
{RUN} {OUT} forget.prompts=[] | forget.prompts
{RUN} {OUT} remain.prompts=[] | remain.prompts
{RUN} {OUT} eval.prompts=[] | eval.prompts
{RUN} {OUT} 'forget.prompts=[a, b' | forget.prompts
{RUN} {OUT} forget.anchors=[a,b,c] | forget.anchors
{RUN} {OUT} eval.prompts=photo-plain | photos-plain
{RUN} {OUT} eval.prompts=unclosed.csv | unclosed.csv
{RUN} {OUT} eval.classifier=none | none
{RUN} {OUT} saliency.density=2 | saliency.density
{RUN} {OUT} saliency.threshold=1 | saliency.threshold
{RUN} {OUT} saliency.augment=true | saliency.augment
{RUN} {OUT} model=none | none
{RUN} {OUT} model=nobody/nothing | nobody/nothing
{RUN} {OUT} model=lora.safetensors | LoRA
{RUN} {OUT} model=lora-alone | LoRA
{RUN} {OUT} model=sd loras=lora.safetensors | incomplete
{RUN} {OUT} model=sd loras=[none.safetensors:0.5] | none.safetensors
{RUN} {OUT} model=sd loras=[lora.safetensors:x] | 'x'
{RUN} {OUT} model=sd-and-lora | pytorch_lora_weights.safetensors
{RUN} {OUT} model=run | model
{RUN} {OUT} model=several | cut.safetensors
{RUN} {OUT} model=one.txt | one.txt
{RUN} {OUT} model=cut.safetensors | cut.safetensors
{RUN} {OUT} model=unknown-pipeline | StableDiffusionImg2ImgPipeline
{RUN} {OUT} model=fashion-ddpm | erase run ddpm
run ddpm ddpm_fashion_sfron {OUT} forget.labels=[] | forget.labels
run ddpm ddpm_fashion_sfron {OUT} data.sorce=x | data.source
run ddpm ddpm_fashion_sfron {OUT} model=photos-sd | erase run sd
run classify classify_fashion_sfron {OUT} forget.fraction=2 | forget.fraction
run classify classify_fashion_sfron {OUT} data.source=nowhere | nowhere
attack nowhere {OUT} | nowhere
attack list-run {OUT} | list-run
attack run {OUT} | run
attack run --out nowhere --resume | nowhere
compare photos-object {OUT} | photos-objects
compare photos-objects {OUT} train.stpes=3 | train.steps
compare photos-objects {OUT} method.fast_rat=3 | method.fast_rat
compare photos-objects {OUT} seed=3 | seed
compare photos-objects --out full | full
compare photos-objects --out list-run | list-run
compare list.yaml {OUT} | list.yaml
generate sd {OUT} | prompts
generate sd photos-plan {OUT} | photos-plain
generate sd '' {OUT} | PROMPTS
generate sd none.csv {OUT} | none.csv
generate sd unclosed.csv {OUT} | line 3
generate sd stray.csv {OUT} | stray.csv
generate sd nocolumn.csv {OUT} | nocolumn.csv
generate sd twice.csv {OUT} | twice.csv
generate sd nul.txt {OUT} | nul.txt
generate '' 'a cat' {OUT} | model
generate sd 'a cat' {OUT} --guidance nan | --guidance
generate sd 'a cat' {OUT} --threads 0 | --threads
generate sd latin.csv {OUT} | latin.csv
generate sd seeds.csv {OUT} | row 1
generate sd img {OUT} | img
generate sd 'a cat' {OUT} --steps 0 | --steps
generate sd 'a cat' {OUT} --steps many | --steps
generate sd 'a cat' {OUT} --guidance -1 | --guidance
generate sd 'a cat' {OUT} --precision fp8 | --precision
generate sd 'a cat' {OUT} --seed -1 | --seed
generate sd 'a cat' --out taken.png | taken.png
generate sd 'a cat' --out full | full
generate sd 'a cat' --out nowhere --resume | nowhere
generate lora.safetensors 'a cat' {OUT} | LoRA
generate sd 'a cat' {OUT} --lora lora.safetensors | incomplete
generate sd 'a cat' {OUT} --lora lora.safetensors:x | --lora
generate nobody/nothing 'a cat' {OUT} | nobody/nothing
generate unknown-pipeline 'a cat' {OUT} | StableDiffusionImg2ImgPipeline
eval beauty img --out o.json | beauty
eval nudity nowhere --out o.json | nowhere
eval nudity img --preset x --out o.json | i2p
eval nudity img --class NOSE --out o.json | NOSE
eval nudity img --resolution 7 --out o.json | 7
eval nudity img --model one.txt --out o.json | one.txt
eval nudity split.json --out o.json | split.json
eval nudity img --out taken.png | taken.png
eval nudity img --out empty | empty
eval classes img --classifier none --out o.json | none
eval classes empty --classifier photos-classifier --out o.json | empty
eval fidelity img img --out o.json | --classifier
eval fidelity img img --inception none.pt --out o.json | none.pt
eval clip img --model sd --out o.json | manifest
eval change img img --classifier photos-classifier --out o.json | manifest
grid nowhere --out grid.png | nowhere
grid img --seed 3 --no-blur --out grid.png | seed
grid img --name a --name b --no-blur --out grid.png | name
grid img --tile 0 --no-blur --out grid.png | --tile
report nowhere | nowhere
report list-run | report.json
report run | report.json
ls modls | modls
ls --qqqq | --qqqq
show none | none
show one.txt | one.txt
settings sdd | did you mean sd
settings sd trian | train
inspect nowhere | nowhere
inspect empty | empty
inspect cut.safetensors | cut.safetensors
inspect split.json | split.json
inspect list-run | run.json
inspect mask.safetensors | mask.safetensors
inspect labels | labels
convert sd other-folder | sd
convert one.txt x.safetensors | one.txt
convert sd x.ckpt | x.ckpt
convert lora.safetensors x | LoRA
convert sd x.safetensors --prediction z | --prediction
convert sd x.safetensors --to lora | --base
convert sd x.safetensors --rank 4 | --to
convert sd x.safetensors --to lora --rank 4 --energy 0.9 --base sd | --energy
convert sd x.safetensors --to lora --rank 0 --base sd | --rank
convert sd x.safetensors --to comfy-diff --half --base sd | --half
convert sd x.safetensors --to lokr | lokr
apply sd nowhere --out out | nowhere
apply sd one.txt --out out | one.txt
apply sd delta.safetensors --out out | delta.safetensors
convert broken-config x.safetensors | unet/config.json
apply none one.txt --out out | one.txt
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, micro_sd: Path, micro_classifier: Path) -> Path:
    """What the commands are given; no test may change it."""
    work = tmp_path_factory.mktemp("wrong")
    for name in ("img", "empty", "full", "run", "list-run", "several", "lora-alone", "unknown-pipeline"):
        (work / name).mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(work / f"img/{number}.png")
    (work / "taken.png").write_bytes(b"mine")
    (work / "full/mine").touch()
    (work / "one.txt").write_text("a cat\n")
    (work / "broken.yaml").write_text("a: [\n")
    (work / "list.yaml").write_text("- a\n")
    (work / "unclosed.csv").write_text('prompt,seed\na dog,1\n"a cat,2\na boat,3\n')
    (work / "stray.csv").write_text('prompt,seed\n"a "black" cat",2\n')
    (work / "nocolumn.csv").write_text("text\na cat\n")
    (work / "latin.csv").write_bytes("prompt\nun café\n".encode("latin-1"))
    (work / "seeds.csv").write_text("prompt,seed\na cat,-3\n")
    (work / "split.json").write_text('{"kind": "erase split", "sha256": "x"}')
    (work / "run/run.json").write_text('{"command": "erase run sd x", "base": {}, "config": {"pipeline": "sd"}}')
    (work / "unknown-pipeline/model_index.json").write_text('{"_class_name": "StableDiffusionImg2ImgPipeline"}')
    (work / "nothing.yaml").write_text("model: x\n")
    (work / "twice.csv").write_text("prompt,prompt\na cat,a dog\n")
    (work / "nul.txt").write_text("a\0cat\n")
    for name in ("run.json", "report.json", "compare.json"):
        (work / "list-run" / name).write_text("[]")
    for kind in ("mask", "delta"):
        save_file({"w": torch.zeros(2)}, work / f"{kind}.safetensors", metadata={"format": f"erase-{kind}-1"})
    shutil.copytree(micro_sd, work / "broken-config")
    (work / "broken-config/unet/config.json").write_text("[]")
    shutil.copytree(micro_classifier, work / "labels")
    config = json.loads((work / "labels/config.json").read_text())
    (work / "labels/config.json").write_text(json.dumps({**config, "id2label": {"x": "a cat"}}))
    shutil.copytree(micro_sd, work / "sd")
    shutil.copytree(micro_sd, work / "sd-and-lora")
    lora = {"unet.mid_block.attentions.0.lora_A.weight": torch.zeros(2, 2)}
    for name in ("lora", "lora-alone/kept", "sd-and-lora/pytorch_lora_weights"):
        save_file(lora, work / f"{name}.safetensors")
    for name in ("cut", "several/cut", "several/other"):
        (work / f"{name}.safetensors").write_bytes(b"cut short")
    return work


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_a_wrong_input_is_one_line(
    case: str, work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words, _, named = case.rpartition(" | ")
    before = tree(work)
    monkeypatch.chdir(work)
    monkeypatch.setattr("sys.argv", ["erase", *shlex.split(words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capfd.readouterr()
    assert end.value.code == 2, err
    (line,) = err.splitlines()
    assert line.startswith("erase: ")
    assert named.casefold() in line.casefold()  # typer names an argument in capitals, or not
    assert out == ""
    assert tree(work) == before


def test_the_cases_are_many_and_of_every_command() -> None:
    cases = CASES.strip().splitlines()
    assert len(cases) >= 60
    assert {case.split()[0] for case in cases} >= {
        *("demo", "run", "compare", "attack", "generate", "eval", "grid", "report", "ls", "show", "settings"),
        *("inspect", "convert", "apply"),
    }


class FakeHub:
    """Counts what it is asked, and fails as it is told."""

    def __init__(self, error: Exception) -> None:
        self.error, self.asked = error, 0

    def model_info(self, name: str, timeout: float) -> None:
        assert timeout <= 10
        self.asked += 1
        raise self.error


@pytest.mark.parametrize(
    "words",
    [f"{RUN} {OUT} model=nobody/nothing", f"generate nobody/nothing 'a cat' {OUT}", "convert nobody/nothing x"],
)
@pytest.mark.parametrize("error", [ConnectionError("refused"), TimeoutError("timed out")], ids=["refused", "slow"])
def test_a_hub_that_cannot_be_reached_is_asked_once(
    words: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub = FakeHub(error)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["erase", *shlex.split(words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("erase: model 'nobody/nothing'")
    assert not any(word in line for word in ("stacktrace", "local_files_only", "http"))
    assert hub.asked == 1
    assert os.listdir(tmp_path) == []


def test_a_folder_with_a_run_that_stopped_can_be_resumed_only_with_its_run(tmp_path: Path) -> None:
    """`--resume` looks for the file that every run begins with."""
    from erase.cli.common import check_out

    (tmp_path / "out").mkdir()
    (tmp_path / "out/.lock").touch()
    check_out(tmp_path / "out", resume=False, holds="run.json")
    with pytest.raises(ValueError, match="--resume"):
        check_out(tmp_path / "out", resume=True, holds="run.json")
    (tmp_path / "out/run.json").write_text(json.dumps({}))
    check_out(tmp_path / "out", resume=True, holds="run.json")
