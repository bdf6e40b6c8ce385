"""An erasure as a LoRA: of runs, deltas and models; exact for closed forms."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from jobs import Runner
from safetensors.torch import load_file

from erase import cli
from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.lora.read import with_loras
from erase.diffusion.lora.svd import Ranks
from erase.engine.saliency import load_mask
from erase.evaluation import manifest
from erase.programs import lora
from erase.store.safetensors import open_safetensors

QUICK = ("eval.images=0", "eval.classifier=null")


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["erase", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.slow
def test_a_run_a_delta_and_a_model_give_the_same_lora(
    text_runs: Runner,
    micro_sd: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = text_runs(tmp_path / "full", *QUICK, form="full")
    text_runs(tmp_path / "small", *QUICK, form="delta")
    delta = tmp_path / "small/delta.safetensors"
    assert call(monkeypatch, "convert", run, tmp_path / "a.safetensors", "--to", "lora", "--energy", 1) == 0
    said = capsys.readouterr().out
    assert "layers, rank" in said
    assert "of the change" in said
    for number, words in enumerate(
        ((tmp_path / "small",), (delta, "--base", micro_sd), (run / "model", "--base", micro_sd))
    ):
        out = tmp_path / f"{number}.safetensors"
        assert call(monkeypatch, "convert", words[0], out, "--to", "lora", "--energy", 1, *words[1:]) == 0
        first, found = load_file(tmp_path / "a.safetensors"), load_file(out)
        assert first.keys() == found.keys()
        assert all(torch.equal(first[name], t) for name, t in found.items())
    header = open_safetensors(tmp_path / "a.safetensors")[1]
    assert header["erase_base"] == "micro-sd"
    assert json.loads(header["erase_lora"])["kept"] == pytest.approx(1, abs=0.05)  # biases are left out
    source, erased = locate(micro_sd), locate(run / "model")
    again = folders.tensors(with_loras(source, [str(tmp_path / "a.safetensors")]))
    for name, wanted in ((name, t) for name, t in folders.tensors(erased).items() if t.ndim > 1):
        torch.testing.assert_close(again[name], wanted, rtol=0, atol=1e-3, msg=name)  # one unit of fp16 at 1


def test_comfy_diff_holds_all(text_run: Path, micro_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "diff.safetensors"
    assert call(monkeypatch, "convert", text_run, out, "--to", "comfy-diff") == 0
    before, after = (folders.tensors(locate(where)) for where in (micro_sd, text_run / "model"))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
    found = load_file(out)
    for end, suffix in ((".weight", ".diff"), (".bias", ".diff_b")):
        key = f"lora_unet_{name.replace('.', '_')}{suffix}"
        assert torch.equal(found[key], after[name + end].float() - before[name + end].float())


def test_refusals_name_what_to_do(
    text_runs: Runner, text_run: Path, label_run: Path, micro_sd: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(micro_sd, tmp_path / "other"))
    folders.save(locate(micro_sd), {"conv_in.bias": torch.ones(8)}, tmp_path / "changed", {})
    out = tmp_path / "lora.safetensors"
    for path, base, said in (
        (text_run / "model", None, "--base"),
        (text_run / "model", str(tmp_path / "changed"), "another --base"),
        (text_run, "nowhere", "--base"),
        (label_run, None, "erase run sd"),
        (other, str(micro_sd), "would be empty"),
    ):
        with pytest.raises(ValueError, match=said):
            lora.convert(lora.find_change(path, base), out, "lora", Ranks())
    with pytest.raises(ValueError, match=r"\.safetensors"):
        lora.convert(lora.find_change(text_run), tmp_path / "lora.bin", "lora", Ranks())
    assert not out.exists()


def test_a_run_on_a_model_with_loras(text_runs: Runner, text_run: Path, micro_sd: Path, tmp_path: Path) -> None:
    """Its base has them, its LoRA has not, its delta is to the model without, and attacks know them."""
    first = tmp_path / "first.safetensors"
    lora.convert(lora.find_change(text_run), first, "lora", Ranks())
    words = (*QUICK, f"loras=[{first}:0.5]", "forget.prompts=a photo of a car")
    run = text_runs(tmp_path / "run", *words, form="delta")
    record = json.loads((run / "run.json").read_text())
    assert "lora first.safetensors:0.5" in record["base"]["weights"]
    header = open_safetensors(run / "delta.safetensors")[1]
    assert json.loads(header["erase_loras"]).keys() == {"first.safetensors:0.5"}
    change = lora.find_change(run)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    with_first = folders.tensors(with_loras(locate(micro_sd), [f"{first}:0.5"]))
    assert torch.equal(folders.tensors(change.base)[layer], with_first[layer])
    assert not torch.equal(change.erased[layer], with_first[layer])


@pytest.mark.slow
def test_a_run_that_keeps_a_lora_counts_it(text_runs: Runner, text_run: Path, tmp_path: Path) -> None:
    """Beside base and full form, which are those of the run that keeps all; the model itself is then removed."""
    said: list[str] = []
    run = text_runs(tmp_path / "run", "lora.energy=1", form="lora", say=said.append)
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["images"]
    report, full = (json.loads((where / "report.json").read_text()) for where in (run, text_run))
    for when in ("before", "after"):
        assert report[when]["classes"] == full[when]["classes"]
    assert report["lora"]["classes"].keys() == report["after"]["classes"].keys()
    assert report["lora"]["file"]["kept"] == pytest.approx(1, abs=0.05)  # biases are left out
    assert report["lora"]["file"]["bytes"] == (run / "lora.safetensors").stat().st_size
    assert any("LoRA" in line for line in said)
    page = (run / "report.html").read_text()
    assert 'alt="lora: ' in page
    assert manifest.origin(run / "images/lora") == report["lora"]["pictures"]
    weights = report["lora"]["pictures"]["weights"]
    assert "lora lora.safetensors:1" in weights
    again = text_runs(run, "lora.energy=1", form="lora", resume=True, say=said.append)
    assert said[-1].startswith("finished before")
    assert again == run


def test_closed_forms_are_lossless_at_the_rank_of_their_concepts(
    text_runs: Runner, micro_sd: Path, tmp_path: Path
) -> None:
    """Of two concepts, each with one anchor, whose embeddings are of sixteen tokens."""
    words = ("method={name: uce}", "saliency.kind=none", "train={steps: 1, parameters: kv}")
    tokens = ("method.tokens=last", "forget.prompts=[a photo of a cat, a photo of a car]")
    run = text_runs(tmp_path / "run", *words, *tokens, *QUICK, form="lora")
    told = json.loads(open_safetensors(run / "lora.safetensors")[1]["erase_lora"])
    assert told["rank"] == [2, 2]
    assert told["kept"] == pytest.approx(1, abs=1e-6)


def test_what_has_no_lora_form_is_refused_before_it_runs(text_runs: Runner, label_runs: Runner, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.parameters"):
        text_runs(tmp_path / "a", r"train.parameters=norm\d?\.bias$", form="lora")
    with pytest.raises(ValueError, match="erase run sd"):
        label_runs(tmp_path / "b", form="lora")
    assert not list(tmp_path.iterdir())


def test_a_run_in_lora_form(text_runs: Runner, micro_sd: Path, tmp_path: Path) -> None:
    """A and B alone learn; the model is saved in full, or as a LoRA of the rank that was trained."""
    words = ("train.form=lora", "lora.rank=3", *QUICK)
    run = text_runs(tmp_path / "full", *words)
    mask = load_mask(run / "saliency.safetensors")
    assert all(".lora_B." in name for name in mask.named)  # A has no gradient at B = 0, and is not masked
    assert mask.meta["free"] in ".lora_A.erased.weight"
    assert mask.density == pytest.approx(0.3, abs=0.01)  # of B, as asked for
    old, new = (folders.tensors(locate(where)) for where in (micro_sd, run / "model"))
    moved = [name for name in old if not torch.equal(old[name], new[name])]
    assert moved
    assert all("attn2" in name and name.endswith(".weight") for name in moved)
    assert open_safetensors(run / "model/unet/diffusion_pytorch_model.safetensors")[1]["erase_train"].startswith(
        "xattn as a LoRA"
    )
    text_runs(tmp_path / "small", *words, form="lora")
    told = json.loads(open_safetensors(tmp_path / "small/lora.safetensors")[1]["erase_lora"])
    assert told["rank"][1] <= 3
    assert told["kept"] == pytest.approx(1, abs=1e-6)
    again = folders.tensors(with_loras(locate(micro_sd), [str(tmp_path / "small/lora.safetensors")]))
    for name in moved:
        torch.testing.assert_close(again[name], new[name], rtol=0, atol=1e-3)  # one unit of fp16 at 1


@pytest.mark.slow
def test_a_dry_run_in_lora_form_holds_less(text_runs: Runner, micro_sd: Path, tmp_path: Path) -> None:
    said: list[str] = []
    words = ("train.form=lora", "lora.rank=1", "saliency.kind=none", "forget.loss=ascent", "forget.anchors=[]")
    text_runs(tmp_path / "run", *words, dry_run=True, say=said.append)
    (line,) = (line for line in "\n".join(said).splitlines() if line.startswith("learns"))
    weights = [t for name, t in folders.tensors(locate(micro_sd)).items() if "attn2" in name and t.ndim == 2]
    assert int(line.split()[1].replace(",", "")) == sum(sum(t.shape) for t in weights)
    assert any(line.startswith("memory for the steps") for line in "\n".join(said).splitlines())


def test_closed_forms_are_not_trained_as_loras(text_runs: Runner, tmp_path: Path) -> None:
    words = ("method={name: uce}", "saliency.kind=none", "train={steps: 1, parameters: kv, form: lora}")
    with pytest.raises(ValueError, match=r"train\.form=lora"):
        text_runs(tmp_path / "run", *words, *QUICK)
