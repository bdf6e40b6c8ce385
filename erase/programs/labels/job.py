"""What a class-conditional model adds to the one program: see `erase.programs.run`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from erase.config import NEW, DdpmConfig, dump
from erase.diffusion import class_conditional, condition
from erase.diffusion.checkpoints import folders
from erase.diffusion.checkpoints.locate import locate
from erase.diffusion.model import Model
from erase.engine import distributed
from erase.evaluation import detections, detector, grid, manifest, report
from erase.evaluation.people import may_show_people
from erase.programs import saving
from erase.programs.folder import first_line
from erase.programs.images import generate_images, sampler_of
from erase.programs.inputs import check_guidance, denoising, learning_of, sides_read, with_dropout
from erase.programs.labels.data import gather
from erase.programs.labels.lesson import make_lesson
from erase.programs.labels.plan import check, find, make_plan, open_base, open_retrained, read_data
from erase.programs.labels.report import AXES, FOLDERS, GOALS, image_rows, make_report, summarise, why_unjudged
from erase.programs.rehearsal import Work, rehearse
from erase.programs.run import Learned, Lesson, Setting, check_method

COLUMNS = 12
"""Of a grid."""


class Job:
    """A run on a class-conditional model. The same program trains one: `method.name=retrain`."""

    AXES: ClassVar[tuple[str, str]] = AXES
    GOALS: ClassVar[tuple[str, ...]] = GOALS

    def __init__(self, setting: Setting) -> None:
        config: DdpmConfig = setting.config
        check_method(setting, ("new_net", "denoiser"))
        self.setting, self.config, self.fresh = setting, config, setting.entry.fresh
        self.source = None if config.model == NEW else find(config, config.model)
        if self.source is None and setting.form == "delta":
            raise ValueError("--save delta needs a base model, and model=new has none: leave out --save delta")
        data = read_data(config, self.source, setting.say)
        self.model = open_base(config, self.source, data, setting.device, setting.dry_run)
        self.config = config = with_dropout(config, self.model.has_null)
        gone = [] if self.source is None else folders.forgotten(self.source)
        self.plan = make_plan(config, self.model, data, self.fresh, gone)
        self.chosen = self.model.choose(learning_of(config))
        check(config, self.plan, self.model, setting.method)
        check_guidance(config.saliency, setting.entry, self.model.has_null)
        self.weights: dict[str, dict[str, str]] = {}
        """Hashes of the models whose images are judged, by the images' folder."""

    def rehearse(self) -> list[str]:
        """In lines; nothing is computed."""
        config, plan, model, setting = self.config, self.plan, self.model, self.setting
        latents, label = model.family.example(model.configs)
        label = condition.to(label, model.device)
        sample = {"mean": latents.to(model.device), "cond": label}
        if config.forget.loss == "redirect" and not self.fresh:
            sample["anchor"] = label
        objectives = partial(denoising, config)
        backend = model.denoiser(model.null())
        work = Work(config, backend, setting.entry, objectives, sample, self.sides(), setting.precision)
        more = [f"images: {len(plan.rows) * config.eval.images} of each model, {config.draw.steps} sampler steps each"]
        return rehearse(work, len(plan.labels), more, setting.command)

    def sides(self) -> tuple[int, int]:
        """How many forget and remain samples are cached."""
        config, plan = self.config, self.plan

        def side(which: Sequence[int], count: int | None) -> int:
            there = [count if plan.data is None else len(plan.data.of([i])) for i in which]
            return sum(x if count is None else min(count, x) for x in there if x is not None)

        if self.fresh:
            return 0, side(plan.remain, config.remain.count)
        balanced = -(-config.forget.count * len(plan.forget) // len(plan.remain))
        forget = side(plan.forget, config.forget.count) * (2 if config.forget.pictures == "both" else 1)
        read = sides_read(config, self.setting.entry)
        remain = side(plan.remain, config.remain.count or balanced)
        both = read[1] or (read[0] and config.forget.among == "far")  # which the remain images tell
        return forget if read[0] else 0, remain if both else 0

    def record(self) -> dict[str, Any]:
        """Classes as they are resolved, hashes of weights and data."""
        plan = self.plan
        self.weights["base"] = {} if self.source is None else folders.fingerprint(self.source)
        return {
            "plan": {"forget": plan.forget, "anchors": plan.anchors, "earlier": plan.earlier, "labels": plan.labels},
            "base": {"model": self.config.model, "weights": self.weights["base"]},
            "data": {} if plan.data is None else {"images": len(plan.data), "sha256": plan.data.digest},
        }

    def announcement(self) -> str:
        """How much learns, and what is forgotten."""
        count = sum(p.numel() for p in self.model.net.parameters() if p.requires_grad)
        names = ", ".join(self.plan.labels[i] for i in self.plan.forget)
        return first_line(why_unjudged(self.config)) + (
            f"{self.config.model}: {count:,} weights in {len(self.chosen)} tensors learn; "
            f"{'training without' if self.fresh else 'forgetting'} {names or 'nothing'}"
        )

    def measure_base(self) -> None:
        """Images of the base; a new model has none."""
        if self.source is not None:
            self.generate_images("base", self.model, self.config.eval.base)

    def generate_images(self, name: str, model: Model, reuse: Path | None = None) -> None:
        """The evaluation's images of one model: the same classes, seeds and settings for all."""
        config, setting = self.config, self.setting
        if not config.eval.images:
            return
        scale = model.guidance if config.draw.guidance is None else config.draw.guidance
        drawn = asdict(config.draw) | {"guidance": scale}
        drawn.pop("cache")  # of data, which these are not
        settings = {
            "weights": self.weights[name],
            "configs": model.config_hashes,
            "draw": drawn,
            "precision": config.precision,
            "scheduler": type(model.scheduler(config.draw.sampler)).__name__,
        }
        generate_images(
            sampler_of(model, config.draw, setting.precision),
            image_rows(config, self.plan),
            setting.images(name),
            images=config.eval.images,
            batch_size=config.draw.batch_size,
            resume=setting.resume,
            settings=settings,
            reuse=reuse,
        )

    def lesson(self) -> Lesson:
        """Images of both sides, as the network sees them."""
        config, model, setting = self.config, self.model, self.setting
        model.ready(model.family.TRAINED)
        read = sides_read(config, setting.entry)
        forget, remain = gather(config, self.plan, model, setting.precision, self.fresh, setting.say, read)
        if self.fresh and self.source is not None:
            setattr(model.pipe, model.family.TRAINED, class_conditional.renew(model.net, config.seed))
            model.choose(learning_of(config))
        if config.train.checkpointing:
            model.checkpoint_activations()
        return make_lesson(config, model, forget, remain, "training" if self.fresh else "unlearning")

    def save(self, learned: Learned) -> None:
        """In the form the model came in; a new one as a pipeline."""
        distributed.on_main(partial(self._write, learned))
        self.model.free()

    def _write(self, learned: Learned) -> None:
        setting, plan = self.setting, self.plan
        if self.source is not None:
            target = saving.hidden({"forget": plan.forget, "anchors": plan.anchors})
            meta = saving.provenance(self.config, setting.preset, self.source, target, learned.mask)
            meta |= {folders.FORGOTTEN: json.dumps(plan.gone)}
            if self.source.labels:
                meta |= {folders.LABELS: json.dumps(self.source.labels)}
            saving.save(self.source, learned.values, setting.out, meta, setting.form)
        elif not (setting.out / saving.MODEL).exists():
            with torch.no_grad():
                for name, p in self.model.net.named_parameters():
                    p.copy_(learned.values[name])
            class_conditional.save_new(self.model.pipe, setting.out / saving.MODEL)

    def measure_erased(self) -> None:
        """Images of the saved model, and of one that was trained without the forgotten classes."""
        config = self.config
        if not config.eval.images:
            return
        for name, where, reuse in (
            ("erased", str(self.setting.out / saving.MODEL), None),
            ("retrained", config.eval.retrained, config.eval.retrained_base),
        ):
            if where is not None:
                other = open_retrained(where, config, self.plan, self.setting.device)
                self.weights[name] = folders.fingerprint(locate(where, "label"))
                self.generate_images(name, other, reuse)

    def report(self, learned: Learned) -> dict[str, Any]:
        """Counts, and distances to real images."""
        setting = self.setting
        return make_report(
            self.config, self.plan, setting.out, learned.mask, learned.timing, setting.command, self.weights
        )

    def verdict(self, result: Mapping[str, Any]) -> list[str]:
        """Counts."""
        return report.verdict(result, {"config": dump(self.config)})

    def page(self) -> Path:
        """`grid.png`, classes in blocks with the same seeds for base, erased and retrained, and `report.html`.

        Exposed parts are hidden unless the preset says all images are harmless.
        """
        return distributed.on_main(self._write_page)

    def _write_page(self) -> Path:
        blur: grid.Blur | None = None
        if self.config.eval.images:
            names = [name for name in FOLDERS.values() if self.setting.images(name).is_dir()]
            there = [self.setting.images(name) for name in names]
            if self.config.eval.blur and may_show_people(self.plan.labels):
                rows = [(folder, row) for folder in there for row in manifest.read_manifest(folder)]
                blur = detections.exposed_boxes(
                    detector.detect([folder / row.file for folder, row in rows if row.index < COLUMNS])
                )
            most = len(self.plan.rows)
            shown = grid.grid_from_folders(there, names=names, max_columns=COLUMNS, max_prompts=most, blur=blur)
            grid.save_image(shown, self.setting.out / "grid.png")
        return report.write_html(self.setting.out, blur=blur)

    @staticmethod
    def summary(report: dict[str, Any]) -> dict[str, float | str | None]:
        """See `erase.programs.labels.report.summarise`."""
        return summarise(report)
