"""What a text-to-image model adds to the one program: see `erase.programs.run`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from erase.config import SdConfig, dump
from erase.diffusion import condition, text
from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.checkpoints.single_file import SingleFile
from erase.diffusion.loading import networks
from erase.diffusion.lora.read import with_loras
from erase.diffusion.model import Model, open_model
from erase.engine import distributed
from erase.engine.sharding import asked
from erase.engine.updates import ClosedForm
from erase.evaluation import detections, generate, grid, manifest, report
from erase.programs import lora, saving
from erase.programs.attack import attack, boxes_of_attacks, check_attacks
from erase.programs.folder import first_line
from erase.programs.inputs import check_dense, check_guidance, denoising, learning_of, sides_read, with_dropout
from erase.programs.launching import shard_network
from erase.programs.rehearsal import Work, in_bytes, rehearse
from erase.programs.run import Learned, Lesson, Setting, check_method
from erase.programs.settings import near_images
from erase.programs.text.data import remain_samples
from erase.programs.text.images import generate_rows
from erase.programs.text.judge import calibrate, check_evaluators, judges_of, why_unjudged
from erase.programs.text.judges.nudity import hides, look_for_nudity
from erase.programs.text.lesson import make_lesson, read_sides, readable
from erase.programs.text.plan import make_plan, marks, recorded
from erase.programs.text.report import AXES, GOALS, make_report, summarise
from erase.programs.text.until import look_between_steps, looked
from erase.store import files

NEAR = "near.json"
"""The remain prompts that `remain.near` is about, nearest first, and how near each is."""


class Job:
    """A run on a text-to-image model."""

    AXES: ClassVar[tuple[str, str]] = AXES
    GOALS: ClassVar[tuple[str, ...]] = GOALS

    def __init__(self, setting: Setting) -> None:
        config: SdConfig = setting.config
        check_method(setting, ("concepts", "denoiser"))
        self.setting, self.config = setting, config
        found = locate(config.model, "text", components=config.components)
        self.source = with_loras(found, config.loras)
        saving.check_form(self.source, setting.form)
        self.gone = folders.forgotten(self.source)
        self.plan = plan = make_plan(config, self.gone, setting.say)
        self.model = open_model(self.source, setting.device, setting.precision.name, hollow=setting.dry_run)
        self.model.scheduler(config.draw.sampler)  # refuses one that does not fit
        self.plan = plan = readable(config, plan, self.model, setting.say)
        self.config = config = with_dropout(config, self.model.has_null)
        self.model.check_prompts(plan.words)
        if config.eval.attacks:
            check_attacks(config, plan, self.model)
        self.chosen = self.model.choose(learning_of(config))
        if setting.form == "lora" and config.train.form == "dense":
            lora.check_chosen(self.source, {name: self.model.net.get_parameter(name).ndim for name in self.chosen})
        if isinstance(setting.method.update, ClosedForm) or config.forget.start == "uce":
            check_dense(config)
            text.check_edited(self.model, self.chosen)
        self.judges = judges_of(config, plan)
        check_evaluators(config, plan, self.judges)
        check_guidance(config.saliency, setting.entry, self.model.has_null)
        if config.eval.images and config.eval.base is not None:
            generate.check_reuse(config.eval.base)
        if cut := text.cut_prompts(self.model, [row.prompt for row in plan.rows]):
            setting.say(text.say_cut(self.model, cut, len(plan.rows)))
        self.weights: dict[str, dict[str, str]] = {}
        """Hashes of the models whose images are judged, by the images' folder."""

    def rehearse(self) -> list[str]:
        """In lines; nothing is computed."""
        config, plan, model = self.config, self.plan, self.model
        latents, asked = model.family.example(model.configs)
        latents, asked = latents.to(model.device), condition.to(asked, model.device)
        sample = {"mean": latents, "std": latents, "cond": asked}
        if plan.anchors:
            sample["anchor"] = asked
        if plan.attributes:
            sample["attribute"] = asked
        helpers = [name for name in networks(model.pipe) if name != model.family.TRAINED]
        stay = sum(p.nbytes for name in helpers for p in getattr(model.pipe, name).parameters())
        more = [f"images: {len(plan.rows) * config.eval.images} of each model, {config.draw.steps} sampler steps each"]
        if config.until is None:
            model.free(*helpers)  # as they will be
        else:
            more.append(
                f"early stopping: {2 * config.until.images} images every {config.until.every} steps; the VAE and the "
                f"text encoder stay in memory for them, {in_bytes(stay)}"
            )
        objectives = partial(denoising, config)
        entry, precision, command = self.setting.entry, self.setting.precision, self.setting.command
        work = Work(config, model.denoiser(asked), entry, objectives, sample, self.sides(), precision)
        return rehearse(work, len(plan.words) + 1, more, command)

    def sides(self) -> tuple[int, int]:
        """How many forget and remain samples are cached."""
        config, plan = self.config, self.plan
        own, drawn = plan.forget_images, len(plan.forget) * config.forget.count
        parts = {"own": drawn if own is None else len(own), "anchor": drawn}
        forget = sum(parts.values()) if config.forget.pictures == "both" else parts[config.forget.pictures]
        kept = plan.remain_images
        remain = len(remain_samples(config, plan.remain) if kept is None else kept)
        used = sides_read(config, self.setting.entry)
        return forget if used[0] else 0, remain if used[1] else 0

    def record(self) -> dict[str, Any]:
        """Prompts as they are resolved, hashes of weights and of the user's images."""
        self.weights["base"] = self.model.weights
        return {**recorded(self.plan), "base": {"model": self.config.model, "weights": self.weights["base"]}}

    def announcement(self) -> str:
        """How much learns, and what is forgotten; first that nothing judges it, if nothing does."""
        count = sum(p.numel() for p in self.model.net.parameters() if p.requires_grad)
        return first_line(why_unjudged(self.config)) + (
            f"{self.config.model}: {count:,} weights in {len(self.chosen)} tensors learn; "
            f"forgetting {', '.join(self.plan.titles)}"
        )

    def measure_base(self) -> None:
        """Images of the base; a zero-shot judge is calibrated on them."""
        self.generate_images("base", self.model, self.config.eval.base)
        if (found := calibrate(self.config, self.plan, self.judges, self.setting.images("base"))) is not None:
            self.setting.say("\n".join([f"{self.config.eval.clip}: {found}", *found.doubts.values()]))

    def generate_images(self, name: str, model: Model, reuse: Path | None = None) -> None:
        """The evaluation's images of one model: the same rows, seeds and settings for base and erased."""
        config, setting = self.config, self.setting
        if config.eval.images:
            model.remember([*self.plan.words, *(row.prompt for row in self.plan.rows), ""])
            made = {"weights": self.weights[name]}
            where, resume = setting.images(name), setting.resume
            generate_rows(
                config, self.plan.rows, config.eval.images, model, setting.precision, where, resume, made, reuse
            )

    def lesson(self) -> Lesson:
        """Latents and conditions of both sides; encoders and VAE are then given up."""
        config, plan, model, setting = self.config, self.plan, self.model, self.setting
        model.pipe.vae.enable_slicing()  # an image at a time
        sides = read_sides(config, plan, model, setting.entry, setting.method, setting.precision)
        self.tell_near(sides.near)
        if config.until is None:
            model.free("vae", *model.family.ENCODERS)
        spread = asked(setting.accelerator) is not None
        if spread and model.lean:  # it may be on a GPU whole, for images
            model.release(model.family.TRAINED)
        # A network that is spread over GPUs goes there block by block.
        model.ready(model.family.TRAINED, device="cpu" if spread else None)
        if config.train.checkpointing:
            model.checkpoint_activations()
        shard_network(model.net, setting.accelerator, setting.precision)
        until = None
        if config.until is not None:
            until = look_between_steps(config, plan, self.judges[0], model, setting.precision, setting.out)
        return make_lesson(config, model, sides, until)

    def tell_near(self, near: Mapping[str, float]) -> None:
        """Say which remain prompts are near, and keep all of them in the run's folder."""
        if near:
            first = ", ".join(list(near)[:5]) + (", …" if len(near) > 5 else "")
            self.setting.say(f"remain.near: {near_images(self.config.remain)} images of {len(near)} prompts: {first}")
            distributed.on_main(partial(files.write_json, self.setting.out / NEAR, dict(near)))

    def save(self, learned: Learned) -> None:
        """In the form the model came in; what is forgotten is marked in its header."""
        setting, plan = self.setting, self.plan
        target = saving.hidden(plan.target)
        steps = learned.timing["steps"]
        describe = partial(saving.provenance, self.config, setting.preset, self.source, target, learned.mask, steps)
        meta = distributed.on_main(describe)
        forgotten = dict.fromkeys([*self.gone, *marks(self.config, plan)])
        meta |= {folders.FORGOTTEN: json.dumps(list(forgotten))}
        distributed.on_main(partial(saving.save, self.source, learned.values, setting.out, meta, setting.form))
        if setting.form == "lora":
            change, wanted = lora.Change(self.source, learned.values, meta), self.config.lora
            rank = self.model.learning.rank if self.model.learning is not None else None
            # What was trained at a rank is kept whole.
            ranks = lora.ranks_of(setting.entry.name, rank or wanted.rank, wanted.energy)
            distributed.on_main(partial(lora.save, change, setting.out, ranks))
        self.model.free(*networks(self.model.pipe))

    def erased(self) -> folders.Source | SingleFile:
        """The saved model, in the form that the base has."""
        return locate(self.setting.out / saving.MODEL, components=self.config.components)

    def measure_erased(self) -> None:
        """Images of the saved model, and of the base with the LoRA in it."""
        if not self.config.eval.images:
            return
        self._measure("erased", self.erased())
        if self.setting.form == "lora":
            self._measure("lora", with_loras(self.source, [str(self.setting.out / saving.LORA)]))

    def _measure(self, name: str, source: saving.TextSource) -> None:
        self.weights[name] = folders.fingerprint(source)
        self.generate_images(name, open_model(source, self.setting.device, self.setting.precision.name))

    def report(self, learned: Learned) -> dict[str, Any]:
        """Counts before and after, early stopping, attacks."""
        config, plan, setting, out = self.config, self.plan, self.setting, self.setting.out
        result = make_report(
            config, plan, self.judges, out, learned.mask, learned.timing, setting.command, self.weights
        )
        if setting.form == "lora":
            result["lora"] = {"file": lora.about(out / saving.LORA), **result.get("lora", {})}
        if config.until is not None:
            result["until"] = looked(config, out)
        if config.eval.attacks:
            result["robustness"] = attack(
                config,
                plan,
                self.judges[0],
                self.erased(),
                out,
                setting.accelerator,
                setting.precision,
                setting.resume,
            )
        return result

    def verdict(self, result: Mapping[str, Any]) -> list[str]:
        """Counts, then attacks."""
        return [
            *report.verdict(result, {"config": dump(self.config)}),
            *report.lora_lines(result.get("lora", {})),
            *report.robustness_lines(result.get("robustness", {})),
        ]

    def page(self) -> Path:
        """`grid.png` and `report.html`; exposed parts are hidden unless the preset says all images are harmless."""
        config, out = self.config, self.setting.out
        blur: Any = None
        names = ("base", "erased", *(["lora"] if self.setting.form == "lora" else []))
        shown = [self.setting.images(name) for name in names]
        if hides(config, self.plan) and (config.eval.images or config.eval.attacks):
            blur = boxes_of_attacks(out)
            for folder in shown if config.eval.images else []:
                paths = [folder / row.file for row in manifest.read_manifest(folder)]
                blur |= detections.exposed_boxes(look_for_nudity(config, paths, folder, strict=False))
        distributed.on_main(partial(self._write_page, shown, blur))
        return out / "report.html"

    def _write_page(self, shown: Sequence[Path], blur: Any) -> None:
        if self.config.eval.images:
            names = [folder.name for folder in shown]
            image = grid.grid_from_folders(shown, names=names, max_columns=8, blur=blur)
            grid.save_image(image, self.setting.out / "grid.png")
        report.write_html(self.setting.out, blur=blur)

    @staticmethod
    def summary(report: dict[str, Any]) -> dict[str, float | str | None]:
        """See `erase.programs.text.report.summarise`."""
        return summarise(report)
