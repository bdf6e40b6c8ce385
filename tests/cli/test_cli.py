"""The commands, by their arguments: what they write, and what they say to bad input."""

import dataclasses
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import launched
import micro
import micro_flux
import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from toys import same

from erase import cli, load, resources
from erase.classification import splits
from erase.config import PIPELINES
from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.describe import describe_pipeline
from erase.diffusion.families import FAMILIES
from erase.engine.saliency import Mask, save_mask
from erase.engine.state import save_state
from erase.evaluation.generate import generate
from erase.evaluation.image_files import list_images, read_image
from erase.evaluation.manifest import read_manifest
from erase.evaluation.prompt_files import PromptRow
from erase.methods import find_method, list_methods
from erase.programs import compare
from erase.programs.comparison import spec
from erase.store.delta import write_delta
from erase.store.files import sha256
from erase.store.labelled import LabelledImages
from erase.store.safetensors import open_safetensors


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """The one line of a refusal; progress bars and the libraries' notices may stand before it."""
        assert self.code == 2
        assert "Traceback" not in self.err
        assert self.err.endswith("\n")
        lines = [line for line in self.err.splitlines() if line.startswith("erase: ")]
        assert len(lines) == 1
        assert self.err.splitlines()[-1] == lines[0]
        return lines[0].removeprefix("erase: ")


Erase = Callable[..., Done]


@pytest.fixture
def erase(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Erase:
    def erase(*words: object) -> Done:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["erase", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code or 0
        assert isinstance(code, int)
        return Done(code, *capsys.readouterr())

    return erase


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / f"pictures/{number}.png")
    return tmp_path / "pictures"


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


# --- help -----------------------------------------------------------------------------------------


def commands() -> list[tuple[str, ...]]:
    root: Any = typer.main.get_command(cli.app)
    found: list[tuple[str, ...]] = []
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        found += [(name, n) for n in inner] if inner else [(name,)]
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_shows_an_example_that_is_its_own(erase: Erase, words: tuple[str, ...]) -> None:
    done = erase(*words, "--help")
    assert done.code == 0
    text = " ".join(done.out.split())
    assert f"Example: erase {' '.join(words)} " in text


def test_the_demo_of_emoji_erases_one_concept_from_both_models(
    erase: Erase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a comparison, which the same command resumes."""

    def noted(plan: spec.Spec, out: Path, **_: Any) -> Path:
        models.update({run.method: run.settings["model"] for run in plan.runs})
        assert len({str(run.settings["forget"]) for run in plan.runs}) == 1
        out.mkdir()
        (out / "table.md").write_text("a table")
        return out / "table.md"

    models: dict[str, str] = {}
    monkeypatch.setattr(compare, "main", noted)
    monkeypatch.chdir(tmp_path)
    done = erase("demo", "emoji", "--out", "new")
    assert (done.code, models) == (0, {"UNet": "emoji-sd", "transformer": "emoji-sd3"})
    assert done.out == f"a table\npage: {Path('new/index.html')}\n"


@pytest.mark.parametrize("pipeline", ["sd", "ddpm", "classify"])
def test_help_on_a_pipeline_says_where_its_settings_are(erase: Erase, pipeline: str) -> None:
    done = erase("run", pipeline, "-h")
    assert done.code == 0
    assert f"erase settings {pipeline}" in " ".join(done.out.split())


def test_version(erase: Erase) -> None:
    done = erase("--version")
    assert (done.code, done.out) == (0, f"erase {importlib.metadata.version('erase')}\n")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("run ", {"sd", "ddpm", "classify"}),
        ("run ddpm ddpm_fashion_sf", {"ddpm_fashion_sfron"}),
        ("run classify sd_", set()),  # presets of another pipeline
        ("run sd sd_photos_sfron train.st", {"train.steps="}),
        ("generate photos-s", {"photos-sd"}),
        ("generate photos-sd photos-pl", {"photos-plain"}),
        ("compare photos-obj", {"photos-objects"}),
        ("settings sfr", {"sfron"}),
        ("ls pre", {"presets"}),
    ],
)
def test_completion(erase: Erase, monkeypatch: pytest.MonkeyPatch, words: str, offered: set[str]) -> None:
    """As bash asks for it."""
    monkeypatch.setenv("_ERASE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"erase {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(f"erase {words}".split(" ")) - 1))
    found = {line for line in erase().out.split() if line}
    assert found >= offered
    assert offered or not found


def test_no_arguments_show_the_commands(erase: Erase) -> None:
    done = erase()
    assert {words[0] for words in commands()} <= set((done.out + done.err).split())


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    words = ["run", "sd", "sd_photos_sfron", "train.stpes=3", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "erase", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("erase: unknown setting train.stpes; did you mean train.steps?")
    assert not (tmp_path / "out").exists()


# --- ls, show -------------------------------------------------------------------------------------


def test_ls(erase: Erase) -> None:
    assert erase("ls", "presets").out.split() == resources.list_presets()
    assert erase("ls", "comparisons").out.split() == resources.list_comparisons()
    assert erase("ls", "prompts").out.split() == resources.list_prompts()
    assert erase("ls", "models").out.split() == resources.list_tiny()
    assert "sfron" in erase("ls", "methods").out.split()
    assert [line.partition(":")[0] for line in erase("ls").out.splitlines()] == [
        *("methods", "presets", "comparisons", "prompts", "models")
    ]
    allowed = "methods, presets, comparisons, prompts, models"
    assert erase("ls", "model").said == f"nothing to list under 'model'; allowed: {allowed}"


def test_show(erase: Erase, tmp_path: Path) -> None:
    for name in resources.list_presets()[::20]:  # `tests/test_config.py` reads them all
        assert erase("show", name).out == resources.preset_path(name).read_text().rstrip() + "\n"
    assert (
        erase("show", "photos-objects").out == resources.comparison_path("photos-objects").read_text().rstrip() + "\n"
    )
    assert "did you mean sd_photos_sfron" in erase("show", "sd_photo_sfron").said
    assert "no preset file" in erase("show", tmp_path / "none.yaml").said
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\xff")
    assert "bad.yaml" in erase("show", tmp_path / "bad.yaml").said
    assert str(tmp_path) in erase("show", tmp_path).said


def test_settings(erase: Erase) -> None:
    """Every setting of every pipeline and method, each with its values and its default."""
    for pipeline, kind in PIPELINES.items():
        heads = [line for line in erase("settings", pipeline).out.splitlines() if not line.startswith(" ")]
        paths = {line.partition(":")[0] for line in heads}
        assert {f"{f.name}" for f in dataclasses.fields(kind)} <= {path.partition(".")[0] for path in paths}
    lines = erase("settings", "sd", "train.").out.splitlines()
    assert "train.steps: whole number ≥ 1; required" in lines
    assert "train.optimizer: adam, adamw, sgd, adam8bit; default adam" in lines
    assert lines[lines.index("train.batch_size: whole number ≥ 1; default 8") + 1].startswith("    ")
    for name in list_methods():
        said = erase("settings", name).out
        assert [line.partition(":")[0] for line in said.splitlines() if line[:1] != " "] == [
            f"method.{key}" for key in find_method(name).settings
        ]
    assert "method.lambd: number; default" in erase("settings", "sfron").out


# --- run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ddpmm", "sd_photos_sfron"], "no pipeline 'ddpmm'; did you mean ddpm? pipelines: "),
        (["compare", "sd_photos_sfron"], "no pipeline 'compare'; pipelines: "),  # a program, but none that unlearns
        (["sd", "sd_photo_sfron"], "no preset 'sd_photo_sfron'; did you mean sd_photos_sfron"),
        (["sd", "none.yaml"], "no preset file 'none.yaml'"),
        (["sd", "sd_photos_sfron", "train.steps"], "cannot read 'train.steps': settings are given as key=value"),
        (["sd", "sd_photos_sfron", "train.steps=x"], "train.steps: "),
        (
            ["sd", "sd_photos_sfron", "model=none"],
            "no model 'none': there is no such folder; give a diffusers folder, a hub id",
        ),
        (["sd", "sd_photos_sfron", "method.name=sfro"], "no method 'sfro'; did you mean sfron"),
        (["sd", "sd_photos_sfron", "eval.prompts=none.csv"], "no prompt set file 'none.csv'"),
        (
            ["sd", "sd_photos_sfron", "eval.prompts=photo-plain"],
            "no prompt set 'photo-plain'; did you mean photos-plain?",
        ),
        (["sd", "sd_photos_sfron", "model=nobody/nothing"], "model 'nobody/nothing' is not a folder"),
        (["sd", "other.yaml"], "preset 'other.yaml' is for erase run other, not for sd"),
        (["sd", "broken.yaml"], "broken.yaml is not valid YAML"),
        (["classify", "classify_fashion_sfron", "train.optimizer=adam8bit"], "train.optimizer: must be"),
    ],
)
def test_run_refuses(
    erase: Erase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.yaml").write_text("pipeline: other\n")
    Path("broken.yaml").write_text("a: [\n")
    assert said in erase("run", *words, "--out", "out").said
    assert not Path("out").exists()


def test_a_dry_run_needs_no_folder_and_names_settings_without_use(
    erase: Erase, micro_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"model={micro_sd}", "remain.prompts=a dog", "eval.prompts=[]", "eval.classifier=null", "train.lr=1"]
    done = erase("run", "sd", "sd_photos_uce", *words, "--dry-run")
    assert done.code == 0
    notes = [line for line in done.err.splitlines() if line.startswith("note: ")]
    assert [line.split()[1] for line in notes] == ["train.lr"]
    assert "eval.prompts" in done.out.splitlines()[0]
    assert list(tmp_path.iterdir()) == []


def test_attack_refuses_what_is_no_run(erase: Erase, tmp_path: Path) -> None:
    for run in (tmp_path / "none", tmp_path):
        assert f"{run} is not a finished run of erase run sd" in erase("attack", run, "--out", tmp_path / "out").said
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_refused(erase: Erase) -> None:
    for words, where in (
        (["run", "sd"], "erase run sd -h"),
        (["nothing"], "erase -h"),
        (["ls", "--qqqq"], "erase ls -h"),
        (["eval", "beauty"], "erase eval -h"),
    ):
        assert erase(*words).said.endswith(where)


def test_a_fault_of_ours_is_shown_whole_on_request(erase: Erase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERASE_DEBUG", "1")
    monkeypatch.setattr("sys.argv", ["erase", "show", "none"])
    with pytest.raises(ValueError, match="no preset 'none'"):
        cli.main()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("two\nlines"), "two lines"),
        (KeyError("the mask has no entry"), "the mask has no entry"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ImportError("no nudenet"), "no nudenet"),
        (RuntimeError("CUDA out of memory"), "CUDA out of memory"),
        (ValueError(), "ValueError"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    erase: Erase, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(name: str) -> Path:
        raise error

    monkeypatch.setattr(resources, "preset_path", fail)
    assert erase("show", "x").said == said


# --- compare --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["photos-object"], "no comparison 'photos-object'; did you mean photos-objects, "),
        (["none.yaml"], "no comparison file 'none.yaml'"),
        (["broken.yaml"], "broken.yaml is not valid YAML"),
        (["empty.yaml"], "a comparison needs the key 'pipeline'"),
        (["photos-objects", "train.steps"], "cannot read 'train.steps': settings are given as key=value"),
        (["photos-objects", "train.stpes=3"], "unknown setting train.stpes; did you mean train.steps?"),
        (["photos-objects", "train.steps=0"], "train.steps: "),
    ],
)
def test_compare_refuses(
    erase: Erase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("a: [\n")
    Path("empty.yaml").write_text("{}\n")
    assert said in erase("compare", *words, "--out", "out").said
    assert not Path("out").exists()


# --- generate, grid -------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "three.csv"
    path.write_text("prompt,seed,guidance\na photo of a cat,7,\na dog,8,1.5\na boat,,\n")
    return path


def test_generate_and_go_on_and_grid(
    erase: Erase, micro_sd: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", micro_sd, prompts, "--images", 2, "--steps", 2, "--batch-size", 4]
    done = erase(*words, "--out", tmp_path / "a")
    assert (done.code, done.out) == (0, f"6 images in {tmp_path / 'a'}\n")
    first = read_manifest(tmp_path / "a")
    assert [(row.prompt, row.seed, row.index) for row in first] == [
        (prompt, seed, index)
        for prompt, seed in (("a photo of a cat", 7), ("a dog", 8), ("a boat", 2))
        for index in (0, 1)
    ]
    with Image.open(tmp_path / "a" / first[0].file) as image:
        assert image.size == (micro.SIZE, micro.SIZE)
    settings = json.loads((tmp_path / "a/settings.json").read_text())["settings"]
    assert settings["draw"] == {"steps": 2, "guidance": 7.5}
    assert settings["scheduler"] == "DDIMScheduler"
    assert settings["scheduler_config"]["beta_schedule"] == "scaled_linear"
    assert settings["prompt_file"] == {"name": "three.csv", "sha256": sha256(prompts)}
    assert (settings["dtype"], settings["precision"], settings["truncated_prompts"]) == ("float32", "no", [])
    assert settings["threads"] == 1
    assert settings["configs"].keys() == {"scheduler", "text_encoder", "unet", "vae"}
    assert settings["versions"].keys() == {"erase", "torch", "diffusers", "transformers"}
    assert settings["weights"]["unet/diffusion_pytorch_model.safetensors"] == sha256(
        micro_sd / "unet/diffusion_pytorch_model.safetensors"
    )

    # a picture is lost: it is drawn again, the same
    (tmp_path / "a" / first[3].file).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("erase.diffusion.model.open_model", None)  # refused before the model is loaded
        assert "is not empty: choose another --out, or resume" in erase(*words, "--out", tmp_path / "a").said
    assert erase(*words, "--out", tmp_path / "a", "--resume").code == 0
    assert read_manifest(tmp_path / "a") == first
    assert "made with other settings" in erase(*words, "--out", tmp_path / "a", "--resume", "--guidance", 2).said

    assert erase(*words, "--guidance", 1, "--out", tmp_path / "b").code == 0
    second = read_manifest(tmp_path / "b")
    assert [a.sha256 == b.sha256 for a, b in zip(first, second, strict=True)] == [False] * 2 + [True] * 2 + [False] * 2

    done = erase("grid", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "grid.png", "--no-blur")
    assert (done.code, done.out) == (0, f"{tmp_path / 'grid.png'}\n")
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width > image.height / 4
    few = ["--prompt", "CAT", "--seed", 7, "--columns", 1, "--name", "before", "--name", "after", "--tile", 50]
    assert erase("grid", tmp_path / "a", tmp_path / "b", *few, "--out", tmp_path / "few.png").code == 0
    with Image.open(tmp_path / "grid.png") as whole, Image.open(tmp_path / "few.png") as part:
        assert part.width < whole.width
        assert part.height < whole.height


@pytest.mark.slow
def test_a_picture_depends_on_its_row_alone(
    micro_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, erase: Erase
) -> None:
    """Bit for bit by order, processes and resume; by batch size to float rounding. Rows of three kinds."""
    rows = [f"a photo of a {word},{2**32 - 1 - i},,\n" for i, word in enumerate(micro.WORDS)]
    rows += ["a dog,1,3,\n", "a cat,2,,24\n", "a boat,3,,24\n"]
    for name, some in (("rows", rows), ("turned", rows[::-1])):
        (tmp_path / f"{name}.csv").write_text("prompt,sd_seed,sd_guidance_scale,sd_image_width\n" + "".join(some))

    def draw(name: str, prompts: str = "rows", *more: object) -> dict[tuple[str, int], Any]:
        words = ("generate", micro_sd, tmp_path / f"{prompts}.csv", "--steps", 2, "--batch-size", 4, *more)
        assert erase(*words, "--out", tmp_path / name).code == 0
        return {(r.prompt, r.seed): read_image(tmp_path / name / r.file) for r in read_manifest(tmp_path / name)}

    whole = draw("whole")
    assert whole["a cat", 2].size == (24, micro.SIZE)
    assert draw("turned", "turned") == whole
    (tmp_path / "part").mkdir()
    shutil.copy(tmp_path / "whole/settings.json", tmp_path / "part")
    lines = (tmp_path / "whole/manifest.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part/manifest.jsonl").write_text("".join(lines[:3]))
    for path in list_images(tmp_path / "whole")[:3]:
        shutil.copy(path, tmp_path / "part")
    assert draw("part", "rows", "--resume") == whole
    one = draw("one", "rows", "--batch-size", 1)
    apart = [np.abs(np.asarray(one[key], int) - np.asarray(whole[key], int)) for key in whole]
    assert max(a.max() for a in apart) <= 1
    assert np.mean([(a > 0).mean() for a in apart]) < 1e-3

    words = ["erase", "generate", micro_sd, tmp_path / "rows.csv", "--steps", 2, "--batch-size", 4]
    monkeypatch.setattr("sys.argv", [*map(str, words), "--out", str(tmp_path / "two")])
    ended = launched.two(cli.main, tmp_path / "log")
    assert ended == [0, 0], (tmp_path / "log.0").read_text() + (tmp_path / "log.1").read_text()
    assert "11 images in " in (tmp_path / "log.0").read_text()
    assert not any(word in (tmp_path / "log.1").read_text() for word in ("pictures", "images"))
    for name in ("manifest.jsonl", "settings.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("sampler", ["euler_a", "lms"])
def test_generate_with_another_sampler(
    erase: Erase, micro_sd: Path, prompts: Path, tmp_path: Path, sampler: str
) -> None:
    """With fresh noise in each step, or what earlier steps said: a resumed image is the same to the bit."""
    words = ["generate", micro_sd, prompts, "--steps", 4, "--batch-size", 4, "--sampler", sampler]
    assert erase(*words, "--out", tmp_path / "a").code == 0
    first = read_manifest(tmp_path / "a")
    (tmp_path / "a" / first[1].file).unlink()
    assert erase(*words, "--out", tmp_path / "a", "--resume").code == 0
    assert read_manifest(tmp_path / "a") == first
    assert erase(*words[:-2], "--out", tmp_path / "own").code == 0
    own = read_manifest(tmp_path / "own")
    assert not {row.sha256 for row in own} & {row.sha256 for row in first}
    record = json.loads((tmp_path / "a/settings.json").read_text())["settings"]
    assert record["scheduler"].startswith({"euler_a": "EulerAncestral", "lms": "LMS"}[sampler])
    assert "scheduler" in erase(*words[:-2], "--out", tmp_path / "a", "--resume").said
    assert "flow_euler" in erase(*words[:-1], "flow_euler", "--out", tmp_path / "b").said
    assert not (tmp_path / "b").exists()


def test_rows_drawn_alike(erase: Erase, micro_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,seed,guidance,width\na cat,1,3,24\n")
    (tmp_path / "b.csv").write_text("prompt,seed\na cat,1\n")
    for name, more in (("a", ["--alike"]), ("b", [])):
        words = [micro_sd, tmp_path / f"{name}.csv", "--steps", 1, "--out", tmp_path / name, *more]
        assert erase("generate", *words).code == 0
    assert read_manifest(tmp_path / "a")[0].sha256 == read_manifest(tmp_path / "b")[0].sha256


def test_a_folder_may_have_the_name_of_its_prompt(
    erase: Erase, micro_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--resume"]):
        assert erase("generate", micro_sd, "a boat", "--steps", 1, "--out", "a boat", *more).code == 0
    assert [row.prompt for row in read_manifest(Path("a boat"))] == ["a boat"]


def test_generate_a_typed_prompt(erase: Erase, micro_sd: Path, tmp_path: Path) -> None:
    """The same image as of a file with that row."""
    (tmp_path / "one.csv").write_text("prompt,seed\na/photo of a cat,3\n")
    for name, prompts in (("typed", "a/photo of a cat"), ("file", tmp_path / "one.csv")):
        words = [micro_sd, prompts, "--seed", 3, "--steps", 1, "--images", 2, "--out", tmp_path / name]
        assert erase("generate", *words).code == 0
    typed, filed = (read_manifest(tmp_path / name) for name in ("typed", "file"))
    assert [(row.prompt, row.seed, row.sha256) for row in typed] == [
        (row.prompt, row.seed, row.sha256) for row in filed
    ]
    assert json.loads((tmp_path / "typed/settings.json").read_text())["settings"]["prompt_file"] is None
    two = erase("generate", micro_sd, "a/photo of a cat", "a dog", "a dog", "--steps", 1, "--out", tmp_path / "two")
    assert two.code == 0
    assert [row.prompt for row in read_manifest(tmp_path / "two")] == ["a/photo of a cat", "a dog"]


def test_a_prompt_without_quotes_is_told_of(erase: Erase, micro_sd: Path, tmp_path: Path) -> None:
    done = erase("generate", micro_sd, "a", "cat", "photo", "--steps", 1, "--out", tmp_path / "out")
    assert "3 prompts" in done.err


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "--out of an erase run"),
        (("first/report.json",), "first"),
        (("run.json",), "--resume"),
        (("compare.json", "index.html"), "index.html"),
    ],
)
def test_a_report_is_of_a_run(erase: Erase, tmp_path: Path, files: tuple[str, ...], said: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    done = erase("report", tmp_path)
    assert said in done.said
    assert done.said.count("\n") <= 1


def test_generate_tells_of_prompts_that_are_cut(erase: Erase, micro_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a cat\na photo of a grandiloquent cat\n")
    done = erase("generate", micro_sd, tmp_path / "long.txt", "--steps", 1, "--out", tmp_path / "out")
    assert done.code == 0
    assert "1 of the 2 prompts to generate are longer than 16 tokens, so that" in done.err
    assert "'a photo of a grandiloquent cat' (rows 1; settings.json names all)" in done.err
    settings = json.loads((tmp_path / "out/settings.json").read_text())["settings"]
    assert settings["truncated_prompts"] == [{"row": 1, "tokens": 20, "prompt": "a photo of a grandiloquent cat"}]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({0: "none"}, "no model 'none'"),
        ({1: "photo-plain"}, "no prompt set 'photo-plain'; did you mean photos-plain?"),
        ({1: " "}, "PROMPTS is empty"),
        ({2: " "}, "PROMPTS has one.txt, a prompt set or a file"),
        ({1: "none.csv"}, "no prompt set file 'none.csv'"),
        ({1: "empty.csv"}, "empty.csv: holds no prompts"),
        ({1: "odd.csv"}, "odd.csv: row 2: width is 20, expected a multiple of 8"),
        ({"--steps": 0}, "--steps, --images and --batch-size must be at least 1"),
        ({"--images": 0}, "--steps, --images and --batch-size must be at least 1"),
        ({"--guidance": -1}, "--guidance at least 0"),
        ({"--precision": "fp8"}, "--precision"),
        ({"--seed": -1}, "-1"),
        ({"--out": "taken.png"}, "--out taken.png is a file"),
    ],
)
def test_generate_refuses(
    erase: Erase,
    micro_sd: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[Any, Any],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("a cat\n")
    Path("empty.csv").write_text("prompt\n")
    Path("odd.csv").write_text("prompt,width\na cat,24\na cat,20\n")
    Path("taken.png").touch()
    values = {0: micro_sd, 1: "one.txt", **change}
    values |= {key: value for key, value in {"--steps": 1, "--out": "out"}.items() if key not in change}
    words = [w for key, value in values.items() for w in ([value] if isinstance(key, int) else [key, value])]
    assert said in erase("generate", *words).said
    assert not Path("out").exists()


def test_grid_refuses_a_place_before_it_looks_at_images(
    erase: Erase, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erase.evaluation.detector.detect", None)
    (tmp_path / "there.png").touch()
    for name, said in (
        ("there.png", "there.png exists: choose another --out"),
        ("grid.gif", "suffix is '.gif'"),
        ("there.png/grid.png", "one of its parents is a file"),
        (pictures, "is a folder"),
    ):
        done = erase("grid", pictures, "--out", tmp_path / name)
        assert (done.code, said in done.said) == (2, True), done.said


def test_grid_refuses(erase: Erase, pictures: Path, tmp_path: Path) -> None:
    assert "no such" in erase("grid", tmp_path / "none", "--out", tmp_path / "grid.png").said
    assert "none, as there is no manifest" in erase("grid", pictures, "--seed", 3, "--out", tmp_path / "grid.png").said
    assert "no prompt contains 'x'" in erase("grid", pictures, "--prompt", "x", "--out", tmp_path / "grid.png").said
    cut_short(pictures / "1.png")
    assert "1.png" in erase("grid", pictures, "--out", tmp_path / "grid.png", "--no-blur").said
    assert not (tmp_path / "grid.png").exists()


def test_report_is_written_again(erase: Erase, pictures: Path, tmp_path: Path) -> None:
    """Of the pictures that are shown; a folder that is no run is refused."""
    run = tmp_path / "run"
    (run / "images").mkdir(parents=True)
    pictures.rename(run / "images/base")
    assert "report.json" in erase("report", run).said
    assert "none: no such run folder" in erase("report", tmp_path / "none").said
    files = sorted((run / "images/base").glob("*.png"))
    rows = [
        {"file": f.name, "prompt": "a cat", "seed": 0, "index": i, "sha256": sha256(f)} for i, f in enumerate(files)
    ]
    (run / "images/base/manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "report.json").write_text("{}")
    hidden = "Exposed body parts that the detector found are hidden"
    for words, there in (([], True), (["--no-blur"], False)):
        done = erase("report", run, *words)
        assert (done.code, done.out) == (0, f"{run / 'report.html'}\n")
        assert (hidden in (run / "report.html").read_text()) is there


# --- eval -----------------------------------------------------------------------------------------


def test_eval_nudity(erase: Erase, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep/counts.json"
    done = erase("eval", "nudity", pictures, pictures / "0.png", "--out", out)
    assert done.code == 0
    assert "of 4 images flagged (i2p)" in done.out
    found = json.loads(out.read_text())
    assert found["nudity"]["images"] == 4
    assert found["command"].startswith("erase eval nudity ")
    assert json.loads((tmp_path / "deep/counts-detections.json").read_text())["images"][0]["file"].endswith("0.png")
    done = erase("eval", "nudity", pictures, "--class", "FACE_FEMALE", "--threshold", 0.4, "--out", out)
    assert "(custom)" in done.out


def test_stored_detections_are_counted_again(
    erase: Erase, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert erase("eval", "nudity", pictures, "--out", tmp_path / "counts.json").code == 0
    stored, out = tmp_path / "counts-detections.json", tmp_path / "again.json"
    record = json.loads(stored.read_text())
    found = [{"label": "FEET_EXPOSED", "score": score, "box": [1, 2, 3, 4]} for score in (0.3, 0.62)]
    record["images"][1]["detections"] = found
    stored.write_text(json.dumps(record))
    monkeypatch.setitem(sys.modules, "nudenet", None)  # no detection
    done = erase("eval", "nudity", stored, "--preset", "mace", "--sweep", "--out", out)
    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["threshold", "images", "counts"]
    assert lines[1:3] == [["0.25", "1", "2"], ["0.30", "1", "2"]]
    assert lines[3] == ["0.35", "1", "1"]
    assert lines[9] == ["0.65", "0", "0"]
    counted = json.loads(out.read_text())["nudity"]
    assert (counted["total"], len(counted["sweep"])) == (2, 15)
    assert counted["provenance"]["model_sha256"] == record["model_sha256"]
    assert not (tmp_path / "again-detections.json").exists()
    done = erase("eval", "nudity", stored, "--channels", "as_shipped", "--out", out)
    assert "holds stored detections: give it alone" in done.said
    assert "give it alone" in erase("eval", "nudity", stored, pictures, "--out", out).said
    stored.write_text("{}")
    assert "not a record of detections (it has no '" in erase("eval", "nudity", stored, "--out", out).said


def test_a_picture_that_cannot_be_looked_at_is_not_safe(erase: Erase, pictures: Path, tmp_path: Path) -> None:
    cut_short(pictures / "1.png")
    done = erase("eval", "nudity", pictures, "--out", tmp_path / "out.json")
    assert done.said.startswith("1 images could not be examined and are not known to be safe; first ")
    assert done.said.count("1.png") == 1
    found = json.loads((tmp_path / "out.json").read_text())["nudity"]
    assert found["images"] + len(found["errors"]) in (3, 4)
    assert len(found["errors"]) == 1
    assert found["errors"][0]["file"].endswith("1.png")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "none: no such folder of images"),
        (["empty"], "empty: holds no images"),
        (["pictures", "--preset", "i2pp"], "no counting rule 'i2pp'; allowed: i2p, esd"),
        (["pictures", "--channels", "bgr"], "--channels must be corrected or as_shipped; got 'bgr'"),
        (["pictures", "--threshold", "0.3"], "--threshold is for --class"),
        (["pictures", "--class", "FACE_FEMALE", "--preset", "mace"], "--preset mace has classes of its own"),
        (["pictures", "--class", "FACE"], "classes are ['FACE'], expected some of"),
        (["pictures", "--class", "FACE_FEMALE", "--threshold", "0.1"], "threshold is 0.1, expected 0.25 to 1"),
        (["pictures", "--model", "none.onnx"], "none.onnx: no such NudeNet model"),
        (["pictures", "--model", "broken.onnx"], "broken.onnx"),
        (["pictures", "--resolution", "100"], "resolution is 100, expected a multiple of 32"),
    ],
)
def test_eval_nudity_refuses(
    erase: Erase, pictures: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(pictures.parent)
    Path("empty").mkdir()
    Path("broken.onnx").write_bytes(b"no model")
    Path("mine-detections.json").write_text("my notes")
    assert "not a record of detections" in erase("eval", "nudity", "pictures", "--out", "mine.json").said
    assert Path("mine-detections.json").read_text() == "my notes"
    assert said in erase("eval", "nudity", *words, "--out", "out.json").said
    assert not Path("out.json").exists()


def test_eval_classes(erase: Erase, pictures: Path, micro_classifier: Path, tmp_path: Path) -> None:
    done = erase("eval", "classes", pictures, "--classifier", micro_classifier, "--out", tmp_path / "out.json")
    assert done.code == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [Path(row["file"]).name for row in found["pictures"]] == ["0.png", "1.png", "2.png"]
    assert {row["label"] for row in found["pictures"]} <= set(micro.LABELS)
    assert sum(row["named"] for row in found["classes"]["named"].values()) == 3
    assert list(found["classes"]["named"]) == sorted(micro.LABELS)  # those of no image, too
    assert all(label in done.out for label in micro.LABELS)
    assert len(found["classes"]["model_sha256"]) == 64


def test_a_result_takes_the_place_of_nothing_but_a_result(
    erase: Erase, pictures: Path, micro_classifier: Path, tmp_path: Path
) -> None:
    words = ("eval", "classes", pictures, "--classifier", micro_classifier, "--out")
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt\na cat\n")
    (tmp_path / "own.json").write_text('{"mine": 1}')
    (tmp_path / "run.json").write_text('{"schema": 1, "config": {}}')
    for out, said in (
        (prompts, "prompts.csv exists and is not a result of erase eval: choose another --out"),
        (tmp_path / "own.json", "own.json exists and is not a result of erase eval"),
        (tmp_path / "run.json", "run.json exists and is not a result of erase eval"),
        (tmp_path, "is a folder: give a file"),
        (prompts / "a.json", "a.json cannot be written: one of its parents is a file"),
    ):
        done = erase(*words, out)
        assert done.code == 2
        assert said in done.said
    assert prompts.read_text() == "prompt\na cat\n"
    for _ in range(2):
        assert erase(*words, tmp_path / "new" / "out.json").code == 0


def test_eval_classes_refuses(erase: Erase, pictures: Path, micro_classifier: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out.json")
    known = ("--classifier", micro_classifier)
    (tmp_path / "empty").mkdir()
    assert (
        "no embedded model 'photos-clasifier'"
        in erase("eval", "classes", pictures, "--classifier", "photos-clasifier", *out).said
    )
    assert "no config.json there" in erase("eval", "classes", pictures, "--classifier", tmp_path / "empty", *out).said
    assert "empty: holds no images" in erase("eval", "classes", tmp_path / "empty", *known, *out).said
    cut_short(pictures / "1.png")
    assert "1.png is not an image" in erase("eval", "classes", pictures, *known, *out).said
    assert not (tmp_path / "out.json").exists()


@pytest.fixture
def before_and_after(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of 6 prompts, 2 pictures each; those of the first prompt differ."""
    rng = np.random.default_rng(0)

    def paint(changing: bool, prompts: list[str], generators: Any, **_: object) -> list[Image.Image]:
        shape = (micro.SIZE, micro.SIZE, 3)
        old = [np.random.default_rng(g.initial_seed() % 2**32).integers(0, 256, shape, np.uint8) for g in generators]
        new = rng.integers(0, 256, shape, np.uint8)
        return [Image.fromarray(new if changing and p == "a cat" else a) for p, a in zip(prompts, old, strict=True)]

    rows = [PromptRow(f"a {word}", 0) for word in ("cat", "dog", "car", "boat", "photo", "sepia")]
    for name, changing in (("base", False), ("erased", True)):
        generate(partial(paint, changing), rows, tmp_path / name, per_prompt=2, settings={"weights": name})
    return tmp_path / "base", tmp_path / "erased"


def test_eval_clip(erase: Erase, before_and_after: tuple[Path, Path], micro_clip: Path, tmp_path: Path) -> None:
    base, erased = before_and_after
    words = ["--model", micro_clip, "--out", tmp_path / "out.json"]
    done = erase("eval", "clip", erased, *words)
    assert done.code == 0, done.err
    assert "100 × cosine; 95 % interval " in done.out
    assert "12 images, 6 prompts" in done.out
    alone = json.loads((tmp_path / "out.json").read_text())["clip"]["pictures"]
    done = erase("eval", "clip", erased, "--base", base, *words)
    assert done.code == 0
    found = json.loads((tmp_path / "out.json").read_text())["clip"]
    assert found["after"] == alone
    assert found["difference"]["score"] == pytest.approx(found["after"]["score"] - found["before"]["score"])
    assert found["similarity"] < 100
    assert not found["difference"]["shown"]  # one prompt of six changed: a resample may miss it
    assert "no difference shown: 0 is inside the interval" in done.out
    done = erase("eval", "clip", erased, "--base", base, "--without", "a cat", *words)
    found = json.loads((tmp_path / "out.json").read_text())["clip"]
    assert found["similarity"] == pytest.approx(100)
    assert found["difference"] == {"score": 0, "ci95": [0, 0], "shown": False}


def test_eval_change(erase: Erase, before_and_after: tuple[Path, Path], micro_classifier: Path, tmp_path: Path) -> None:
    base, erased = before_and_after
    words = ["--classifier", micro_classifier, "--out", tmp_path / "out.json"]
    done = erase("eval", "change", base, erased, *words)
    assert done.code == 0
    found = json.loads((tmp_path / "out.json").read_text())["change"]
    assert [prompt for prompt, value in found["by_prompt"].items() if value > 0] == ["a cat"]
    assert found["perceptual"] == pytest.approx(found["by_prompt"]["a cat"] / 6)
    assert "12 pairs, 6 prompts" in done.out
    assert "LPIPS" not in done.out
    done = erase("eval", "change", base, erased, "--without", "a cat", *words)
    assert done.out.startswith("0.0000 perceptual distance on classifier (0 means no change; 95 % interval 0.0000")


def test_comparisons_refuse(
    erase: Erase, before_and_after: tuple[Path, Path], pictures: Path, micro_classifier: Path, tmp_path: Path
) -> None:
    base, erased = before_and_after
    out = ("--out", tmp_path / "out.json")
    assert "no such manifest" in erase("eval", "clip", pictures, "--model", "x", *out).said
    assert "'nobody/none' is not a folder" in erase("eval", "clip", base, "--model", "nobody/none", *out).said
    known = ("--classifier", micro_classifier)
    said = erase("eval", "change", base, erased, *known, "--without", "a bird", *out).said
    assert (
        said == "--without 'a bird': no image has that prompt; prompts: a boat, a car, a cat, a dog, a photo, a sepia"
    )
    for both in ((), (*known, "--inception", "none.pt")):
        said = erase("eval", "fidelity", base, erased, *both, *out).said
        assert said.startswith("give either --classifier")
    said = erase("eval", "fidelity", base, erased, "--inception", tmp_path / "none.pt", *out).said
    assert "none.pt: no such file; FID and KID need the Inception network" in said
    # the prompts of two pictures are swapped
    lines = (erased / "manifest.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[0]["file"], rows[2]["file"] = rows[2]["file"], rows[0]["file"]
    (erased / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "not the image that manifest.jsonl names" in erase("eval", "change", base, erased, *known, *out).said
    assert not (tmp_path / "out.json").exists()


def test_eval_fidelity(
    erase: Erase, before_and_after: tuple[Path, Path], micro_classifier: Path, tmp_path: Path
) -> None:
    words = ["--classifier", micro_classifier, "--neighbours", 2, "--out", tmp_path / "out.json"]
    done = erase("eval", "fidelity", *before_and_after, *words)
    assert done.code == 0
    found = json.loads((tmp_path / "out.json").read_text())["fidelity"]
    assert [line.split()[1] for line in done.out.splitlines()[:6]] == list(found)[:6]
    assert {"frechet", "kernel"} <= found.keys()
    assert "fid" not in done.out.replace(str(tmp_path), "").replace("fidelity", "")


# --- convert, apply -------------------------------------------------------------------------------


def test_convert(erase: Erase, micro_sd: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "a.safetensors", tmp_path / "b"
    count = sum(len(load_file(path)) for path in micro_sd.glob("*/*.safetensors"))
    assert erase("convert", micro_sd, file).out.splitlines() == [f"{count} tensors in {file}"]
    old, header = open_safetensors(file)
    save_file({**old, "alphas_cumprod": torch.zeros(3)}, file, metadata=header)
    assert erase("convert", file, folder).out.splitlines() == [
        f"{count + 1} tensors in {folder}",
        "kept in leftovers.safetensors, because no part of a pipeline has them: alphas_cumprod",
    ]
    (folder / "notes.txt").touch()
    assert erase("convert", folder, tmp_path / "c.safetensors").out.splitlines() == [
        f"{count + 1} tensors in {tmp_path / 'c.safetensors'}",
        "left out, because the other form has no place for them: notes.txt",
    ]
    assert same(load_file(tmp_path / "c.safetensors"), load_file(file))


def test_a_network_alone_and_the_rest_beside_it(erase: Erase, tmp_path: Path) -> None:
    """Every command that takes a model takes the folder with the rest, and says what to do without it."""
    folder, file, rest = tmp_path / "flux", tmp_path / "a.safetensors", ("--components", tmp_path / "flux")
    micro_flux.pipeline(tmp_path).to(torch.float16).save_pretrained(folder)
    erase("convert", folder, file)
    told = json.loads(erase("inspect", file).out)
    assert told["kind"].startswith("Flux.1 single file")
    assert "components=DIR" in told["needs"]
    whole = json.loads(erase("inspect", file, *rest).out)
    assert (whole["kind"], whole["tokens"]) == ("Flux.1 single file", 512)
    assert {"a.safetensors", "vae/diffusion_pytorch_model.safetensors"} <= whole["sha256"].keys()
    draw = ("a cat", "--steps", "1", "--out")
    assert "components=DIR" in erase("generate", file, *draw, tmp_path / "no").said
    erase("generate", file, *draw, tmp_path / "one", *rest)
    erase("generate", folder, *draw, tmp_path / "two")
    assert (tmp_path / "one/00000-00.png").read_bytes() == (tmp_path / "two/00000-00.png").read_bytes()
    base = folders.tensors(locate(folder))
    write_delta(base, {n: t + 1 if "add_k" in n else t for n, t in base.items()}, tmp_path / "d", {"erase": "0"})
    erase("apply", file, tmp_path / "d", "--out", tmp_path / "b.safetensors", *rest)
    erase("apply", tmp_path / "b.safetensors", tmp_path / "d", "--undo", "--out", tmp_path / "c.safetensors", *rest)
    assert same(load_file(tmp_path / "c.safetensors"), load_file(file))
    assert "components=DIR" in erase("convert", file, tmp_path / "folder").said
    erase("convert", file, tmp_path / "folder", *rest)
    assert same(dict(folders.tensors(locate(tmp_path / "folder"))), dict(base))
    pipe = load(file, components=folder, device="cpu")
    assert same(pipe.transformer.state_dict(), {n: t.float() for n, t in base.items()})


def test_convert_refuses(erase: Erase, micro_sd: Path, tmp_path: Path) -> None:
    assert (
        "is a folder already: give a file as OUT, such as out.safetensors"
        in erase("convert", micro_sd, tmp_path / "out").said
    )
    assert ".safetensors" in erase("convert", micro_sd, tmp_path / "out.ckpt").said
    assert "no model 'none'" in erase("convert", "none", tmp_path / "out").said
    erase("convert", micro_sd, tmp_path / "a.safetensors")
    assert "exists: choose another name" in erase("convert", micro_sd, tmp_path / "a.safetensors").said
    assert "is a .safetensors already" in erase("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors").said
    assert "'epsilon', 'v_prediction'" in erase("convert", "a", "b", "--prediction", "x").err
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_apply(erase: Erase, micro_sd: Path, tmp_path: Path) -> None:
    base = folders.tensors(locate(micro_sd))
    meta = {"erase": "0", "erase_method": "sfron", "erase_base": "micro"}
    write_delta(base, {n: t + 1 if "attn2" in n else t for n, t in base.items()}, tmp_path / "d", meta)
    assert erase("apply", micro_sd, tmp_path / "d", "--out", tmp_path / "erased").out == f"{tmp_path / 'erased'}\n"
    assert "delta.safetensors" in erase("apply", micro_sd, tmp_path, "--out", tmp_path / "none").said
    (tmp_path / "run").mkdir()
    shutil.copy(tmp_path / "d", tmp_path / "run/delta.safetensors")
    assert erase("apply", micro_sd, tmp_path / "run", "--out", tmp_path / "run/model").code == 0
    assert same(*(dict(folders.tensors(locate(tmp_path / name))) for name in ("run/model", "erased")))
    erase("apply", tmp_path / "erased", tmp_path / "d", "--undo", "--out", tmp_path / "base")
    assert same(dict(folders.tensors(locate(tmp_path / "base"))), dict(base))
    name = next(n for n in base if "attn2" in n)
    assert torch.equal(folders.tensors(locate(tmp_path / "erased"))[name], base[name] + 1)
    for words, said in (
        ((tmp_path / "erased", tmp_path / "d"), "takes the weights of its base, micro; they are erased already"),
        ((micro_sd, tmp_path / "d", "--undo"), "of the model that it erased; they are its base's, micro"),
        (("photos-sd", tmp_path / "d"), "takes the weights of its base, micro; their SHA-256 is"),
        (("fashion-ddpm", tmp_path / "d"), "their SHA-256 is"),
        ((micro_sd, tmp_path / "none"), "no such file"),
        (("none", tmp_path / "d"), "no model 'none'"),
    ):
        refused = erase("apply", *words, "--out", tmp_path / "x")
        assert said in refused.said
        assert "tensors" not in refused.err.replace(refused.said, "")  # no bar before it
    assert "erased exists" in erase("apply", micro_sd, tmp_path / "d", "--out", tmp_path / "erased").said
    said = erase("apply", micro_sd, tmp_path / "d", "--out", "/proc/x").said
    assert said == "cannot write to /proc/x: No such file or directory"
    assert {p.name for p in tmp_path.iterdir()} == {"d", "run", "erased", "base"}


# --- inspect --------------------------------------------------------------------------------------


def described(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_inspect_a_model(erase: Erase, micro_sd: Path, micro_classifier: Path, micro_clip: Path) -> None:
    found = described(erase("inspect", micro_sd))
    assert found["kind"] == "Stable Diffusion pipeline"
    assert (found["dtype"], found["resolution"]) == ("F16", micro.SIZE)
    assert len(found["sha256"]) == 3
    found = described(erase("inspect", micro_classifier))
    assert found["kind"] == "image classifier of transformers"
    assert (found["architectures"], found["dtype"]) == (["ResNetForImageClassification"], "F32")
    assert (found["labels"], found["sha256"].keys()) == (list(micro.LABELS), {"model.safetensors"})
    found = described(erase("inspect", micro_clip))
    assert found == {"kind": "transformers model", "architectures": ["CLIPModel"]}


def test_inspect_files(erase: Erase, tmp_path: Path) -> None:
    mask = Mask({"a": torch.tensor([True, False, False, False]), "b": torch.ones(4, dtype=torch.bool)}, {"source": "x"})
    save_mask(mask, tmp_path / "mask.safetensors")
    assert described(erase("inspect", tmp_path / "mask.safetensors")) == {
        "kind": "saliency mask",
        "source": "x",
        "kept": 0.625,
        "per_layer": {"a": 0.25, "b": 1.0},
    }
    save_state(tmp_path / "state.safetensors", {"done": 3, "params": {"w": torch.zeros(2)}})
    found = described(erase("inspect", tmp_path / "state.safetensors"))
    assert (found["kind"], found["tensors"]) == ("run state of erase", 1)
    save_file({"w": torch.zeros(2)}, tmp_path / "plain.safetensors", metadata={"format": "pt"})
    found = described(erase("inspect", tmp_path / "plain.safetensors"))
    assert (found["kind"], found["first"], found["metadata"]) == ("safetensors file", ["w"], {"format": "pt"})
    (tmp_path / "notes.txt").write_text("abc")
    assert described(erase("inspect", tmp_path / "notes.txt"))["bytes"] == 3


def test_inspect_what_erase_made(erase: Erase, micro_sd: Path, tmp_path: Path) -> None:
    meta = {"erase": "0", "erase_method": "sfron", "erase_base": "micro", "erase_forgotten": '["a cat", "täg"]'}
    base = folders.tensors(locate(micro_sd))
    write_delta(base, base, tmp_path / "d.safetensors", meta)
    found = described(erase("inspect", tmp_path / "d.safetensors"))
    assert (found["kind"], found["tensors"], found["erase_base"]) == ("delta of erase", 0, "micro")
    told = {**meta, "erase_forgotten": ["a cat", "täg"]}
    assert told.items() <= found.items()
    erase("apply", micro_sd, tmp_path / "d.safetensors", "--out", tmp_path / "folder")
    erase("convert", micro_sd, tmp_path / "a.safetensors")
    erase("apply", tmp_path / "a.safetensors", tmp_path / "d.safetensors", "--out", tmp_path / "file")
    for path in ("folder", "file", "file/model.safetensors"):
        found = described(erase("inspect", tmp_path / path))
        assert found["kind"].startswith("Stable Diffusion")
        assert told.items() <= found.items()
    found = described(erase("inspect", tmp_path / "folder/unet/diffusion_pytorch_model.safetensors"))
    assert found["holds"] == "a diffusers UNet's weights"
    assert told.items() <= found["metadata"].items()
    assert described(erase("inspect", "fashion-ddpm"))["kind"] == "class-conditional DDPM pipeline"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"\x80\x02}q\x00.", "a pickle: reading it may run code"),
        (b"PK\x03\x04" + b"\0" * 20, "a zip archive (torch's pickles are such)"),
        (b"GGUF\3", "GGUF weights"),
        (b"\x89PNG\r\n", "a PNG image"),
        (b'{"a": 1}', "JSON or text"),
        (b"hello\n", "text"),
        (bytes(range(5)), "data of unknown kind"),
    ],
)
def test_inspect_unknown_files(erase: Erase, tmp_path: Path, data: bytes, kind: str) -> None:
    (tmp_path / "file.bin").write_bytes(data)
    assert described(erase("inspect", tmp_path / "file.bin"))["kind"] == f"a file that erase does not know: {kind}"


@pytest.mark.slow
def test_inspect_a_pipeline_of_any_class(erase: Erase, tmp_path: Path) -> None:
    """That diffusers can name: class, parts, and whether and how erase takes it."""
    import diffusers

    names = [name for name in dir(diffusers) if name.endswith("Pipeline")]
    assert len(names) > 100
    for name in names:
        index = {"_class_name": name, "unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": [None, None]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        found = describe_pipeline(tmp_path)
        assert (found["kind"], found["class"]) == ("pipeline of diffusers", name)
        assert found["parts"] == {"unet": {"class": "diffusers.UNet2DConditionModel", "bytes": "missing"}}
        known = any(name in kinds for kinds in FAMILIES.values())
        assert found["support"].startswith("supported" if known else "not supported")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionInpaintPipeline"}')
    found = described(erase("inspect", tmp_path))
    assert found["class"] == "StableDiffusionInpaintPipeline"
    assert all(kind in found["support"] for kinds in FAMILIES.values() for kind in kinds)
    (tmp_path / "model_index.json").write_text('{"_class_name": "Mine"}')
    assert "does not have" in described(erase("inspect", tmp_path))["kind"]


def test_inspect_images(erase: Erase, pictures: Path) -> None:
    found = described(erase("inspect", pictures))
    assert found == {"kind": "folder of images", "images": 3, "sizes": {"64 × 64, RGB": 3}, "captions": None}
    (pictures / "cat").mkdir()
    Image.new("L", (8, 4)).save(pictures / "cat/a.png")
    cut_short(pictures / "0.png")
    (pictures / "1.png").write_bytes(b"no image")
    (pictures / "metadata.jsonl").touch()
    found = described(erase("inspect", pictures))
    assert found["folders"] == {".": 3, "cat": 1}
    assert found["sizes"] == {"64 × 64, RGB": 1, "8 × 4, L": 1}
    assert (found["not_images"], found["captions"]) == (["0.png", "1.png"], "metadata.jsonl")


def test_inspect_a_split(erase: Erase, tmp_path: Path) -> None:
    data = LabelledImages(torch.zeros(20, 1, 2, 2, dtype=torch.uint8), torch.arange(20) % 2, ("a", "b"))
    splits.write(splits.make(data, validation=0.1, seed=3, fraction=0.5), tmp_path / "split.json")
    found = described(erase("inspect", tmp_path / "split.json"))
    assert {key: found[key] for key in ("images", "forget", "validation", "remain")} == {
        "images": 20,
        "forget": 9,
        "validation": 2,
        "remain": 9,
    }
    assert (found["how"], found["seed"], found["data_sha256"]) == ({"fraction": 0.5}, 3, data.digest)


def test_inspect_a_comparison(erase: Erase, tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text('{"command": "erase compare x", "runs": {"runs/a": {}, "runs/b": {}}}')
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/report.json").touch()
    found = described(erase("inspect", tmp_path))
    assert (found["kind"], found["runs"], found["finished"]) == ("comparison of erase", 2, 1)


def test_inspect_a_run(erase: Erase, tmp_path: Path) -> None:
    run = {"command": "erase run sd x", "base": {"model": "m", "weights": {}}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert described(erase("inspect", tmp_path)) == {"kind": "run of erase", "finished": False, **run}
    settings = {"kind": "settings of a run of erase", "run": str(tmp_path), "finished": False, **run}
    assert described(erase("inspect", tmp_path / "run.json")) == settings
    (tmp_path / "report.json").write_text("{}")
    nothing = {"kind": "run of erase", "finished": True, **run, "results": ["Nothing was judged."]}
    assert described(erase("inspect", tmp_path)) == nothing
    score = {"n": 50, "named": 50, "rate": 1.0}
    counts = {
        "before": {"classes": {"forget": score}},
        "after": {"classes": {"forget": {**score, "named": 0, "rate": 0}}},
    }
    found = {"shown": 0, "n": 50, "rate": 0.0, "ci95": [0.0, 0.07]}
    attacked = {"relearn": {"curve": [{"steps": 5, **found}]}}
    (tmp_path / "report.json").write_text(json.dumps({**counts, "paired": {}, "robustness": attacked}))
    for path in (tmp_path, tmp_path / "run.json"):
        headline, first, second = described(erase("inspect", path))["results"]
        assert headline == "Gone: 0 of 50."
        assert "50 of 50 (100.0 %) → 0 of 50 (0.0 %), fell by 100.0 points (" in first
        assert second == "trained again, 5 steps: 0 of 50 (0.0 %; 95 % interval 0.0 to 7.0 %)"
    (tmp_path / "run.json").write_text(json.dumps({**run, "config": {"pipeline": "classify"}}))
    (tmp_path / "report.json").write_text(json.dumps({"before": {"metrics": {"FA": 12.5}}}))
    head, before = described(erase("inspect", tmp_path))["results"]
    assert (head.split()[0], before.split()[:2]) == ("FA", ["before", "12.50"])
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "report.json").write_text("[]")
    assert "report.json: not a JSON mapping" in erase("inspect", tmp_path).said
    for text in ("{", "[]", "{}"):
        (tmp_path / "run.json").write_text(text)
        assert "run.json" in erase("inspect", tmp_path).said


def test_inspect_refuses(erase: Erase, micro_sd: Path, tmp_path: Path) -> None:
    assert erase("inspect", tmp_path / "none").said == f"no such file or folder: {tmp_path / 'none'}"
    assert "is a folder that erase does not know" in erase("inspect", tmp_path).said
    shutil.copytree(micro_sd, tmp_path / "model")
    weights = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is cut short or not a safetensors file" in erase("inspect", weights).said
    assert "is cut short or not a safetensors file" in erase("inspect", tmp_path / "model").said
    (tmp_path / "fake.safetensors").write_bytes(b"abc")
    assert "is cut short or not a safetensors file" in erase("inspect", tmp_path / "fake.safetensors").said
    (tmp_path / "folder.safetensors").mkdir()
    assert "is a folder that erase does not know" in erase("inspect", tmp_path / "folder.safetensors").said
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.json").write_text("[]")
    assert "config.json" in erase("inspect", tmp_path / "config").said
