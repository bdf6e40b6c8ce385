"""Every stage of the emoji world's models, a step each, on made-up drawings: it resumes, exports and opens."""

import json

import emoji_export
import emoji_generators as generators
import emoji_judges as judges
import emoji_models as nets
import emoji_world as world_of
import numpy as np
import pytest
import torch
from emoji_training import Kit, dice
from emoji_world import Scene
from make_emoji import make_data
from micro_emoji import write
from PIL import Image
from typer.testing import CliRunner

from erase.cli import app
from erase.evaluation import classes
from erase.evaluation.clip import open_clip


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    work = tmp_path_factory.mktemp("work")
    world = world_of.read_world(write(work / "source"), 20)
    return Kit(work, work / "out", world, world_of.make_sprites(world.drawings), "no")


def test_a_word_is_a_token(kit: Kit) -> None:
    tokenizer = nets.tokenizer_of(kit.work, kit.world)
    text = "a flat drawing of an archery bow and dekitchenknife on a teal background"
    ids = nets.tokens(tokenizer, [text, ""])
    assert int(ids.attention_mask[0].sum()) == len(text.split()) + 2
    assert tokenizer.decode(ids.input_ids[0], skip_special_tokens=True).split() == text.split()
    again = nets.tokenizer_of(kit.work, kit.world)  # read, not written
    assert again.get_vocab() == tokenizer.get_vocab()


def test_words_of_objects_are_found(kit: Kit) -> None:
    tokenizer, rng = nets.tokenizer_of(kit.work, kit.world), np.random.default_rng(0)
    scenes = kit.scenes(rng, 40, held=False)
    told = [world_of.tell(scene, kit.world, rng) for scene in scenes]
    ids = nets.tokens(tokenizer, [text for text, _ in told])
    rows, at, which = judges.word_rows(ids, [ends for _, ends in told], scenes)
    assert which.tolist() == [k for scene in scenes for k in scene.objects]
    for row, place, k in zip(rows.tolist(), at.tolist(), which.tolist(), strict=True):
        word = tokenizer.decode(ids.input_ids[row, place]).strip()
        assert word in {wording.split()[-1] for wording in kit.world.concepts[k].wordings}


def test_the_judge_learns_objects_and_nothing(kit: Kit) -> None:
    K = len(kit.world.concepts)
    scenes = [Scene((3,), 1, 2, ()), Scene((3, 4), 1, 2, ()), Scene((), 1, 2, ())]
    good = torch.full((3, len(nets.labels_of(kit.world))), -9.0)
    good[0, 3] = good[1, 3] = good[1, 4] = 9.0
    good[:, K + 1] = good[:, K + 6 + 2] = 9.0
    best = judges.axes_loss(good, scenes, kit.world)
    assert best < 0.3  # of two objects the softmax cannot be sure: log 2 a third of the time
    for row, column in ((0, 3), (1, 4), (0, K + 1), (1, K + 8)):
        worse = good.clone()
        worse[row, column] = -9.0
        assert judges.axes_loss(worse, scenes, kit.world) > best + 0.5
    free = good.clone()
    free[2, K:] = 0.0  # neither style nor background where nothing is shown
    assert judges.axes_loss(free, scenes, kit.world) == best


@pytest.mark.slow
def test_stages_train_resume_export_and_are_judged(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generators, "SHARD", 250)
    assert emoji_export.drawn_by("sd_emoji_sfron") == {"sampler": "dpm", "steps": 12, "guidance": 2.0, "batch_size": 32}
    monkeypatch.setattr(emoji_export, "drawn_by", lambda preset: {"steps": 1, "guidance": 2.0, "batch_size": 60})
    monkeypatch.setattr(judges, "SCORED", 120)
    monkeypatch.setattr(judges, "SETTLED", 1)
    emoji_export.export(kit, 0)
    assert "emoji-sd: not yet, unet is not trained" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="run the stage vae first"):
        generators.save_latents(kit, 1)
    stages = (
        *(make_data, generators.train_vae, generators.save_latents),
        *(judges.train_texts, judges.train_clip, judges.train_judge),
        *(generators.train_unet, generators.train_transformer),
    )
    for stage in stages:
        stage(kit, 1)
    state = torch.load(kit.work / "unet.pt", weights_only=True)
    generators.train_unet(kit, 2)
    resumed = torch.load(kit.work / "unet.pt", weights_only=True)
    assert (state["step"], resumed["step"]) == (1, 2)
    emoji_export.export(kit, 0)
    for path in kit.work.glob("*.pt"):  # on another machine, what was exported is all there is
        path.unlink()
    capsys.readouterr()
    stages_left = {"unet": generators.train_unet, "judge": judges.train_judge, "clip": judges.train_clip}
    for stage, train in stages_left.items():
        train(kit, 1)
        assert f"{stage}: goes on from {kit.out}" in capsys.readouterr().out
    emoji_export.check(kit, 1)
    found = json.loads((kit.work / "check.json").read_text())
    assert set(found) == {"emoji-sd", "emoji-sd3"}
    assert all(0 <= found[name][key] <= 1 for name in found for key in ("object", "style", "both of two"))

    for name in emoji_export.PRESETS:
        given = [
            "generate",
            str(kit.out / name),
            "a flat drawing of a lion",
            "--out",
            str(kit.work / name),
            "--steps=1",
        ]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, done.output
        (image,) = (kit.work / name).glob("*.png")
        assert Image.open(image).size == (world_of.SIZE, world_of.SIZE)

    judge = kit.out / "emoji-judge"
    assert classes.values(classes.labels_of(judge), "object") == kit.world.names
    said = classes.classify(kit.pixels(kit.scenes(dice(1, 1)[0], 3, held=True)).add(1).mul(127.5).byte(), judge)
    assert [axis.name for axis in said.along if axis.several] == ["object"]
    assert open_clip(kit.out / "emoji-clip").name == str(kit.out / "emoji-clip")
    assert not list(kit.out.glob(".*"))
