"""What a classifier adds to the one program: see `erase.programs.run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from erase.classification import folders, metrics, models, splits
from erase.classification.backend import RELABEL, Augment, Classifier, without_statistics
from erase.config import NEW, ClassifyConfig
from erase.engine import distributed
from erase.engine.losses import ASCENT, DESCENT, Objective
from erase.engine.method import Method
from erase.evaluation import report
from erase.programs import saving
from erase.programs.classify.plan import check, make_plan, new_model, num_remain, open_model
from erase.programs.classify.predictions import predict
from erase.programs.classify.report import AXES, GOALS, make_report, summarise, table
from erase.programs.classify.trained import Comparison, Place, classifier, copy, kept, loop_of, num_steps
from erase.programs.inputs import check_guidance
from erase.programs.rehearsal import Work, rehearse
from erase.programs.run import Learned, Lesson, Setting, check_method


class Job:
    """A run on a classifier."""

    AXES: ClassVar[tuple[str, str]] = AXES
    GOALS: ClassVar[tuple[str, ...]] = GOALS

    def __init__(self, setting: Setting) -> None:
        config: ClassifyConfig = setting.config
        metrics.check_sklearn()
        check_method(setting, ("new_net",))
        self.setting, self.config, self.fresh = setting, config, setting.entry.fresh
        if self.fresh and setting.form == "delta":
            raise ValueError(
                f"--save delta stores what changed, but {setting.method.name} makes new weights: leave out --save delta"
            )
        given = open_model(config, setting.device)
        self.plan = make_plan(config, self.fresh, given, setting.say)
        self.model = new_model(config, self.plan, setting.device) if given is None else given
        check(config, self.plan, self.model, self.fresh)
        check_guidance(config.saliency, setting.entry, False)
        self.compared = Comparison(config, self.plan, self.model, setting.accelerator, setting.say)
        self.places: dict[str, Place] = {}
        """Models that are compared, by the report's keys."""

    def rehearse(self) -> list[str]:
        """In lines; nothing is computed."""
        config, plan, model, setting = self.config, self.plan, self.model, self.setting
        remain = len(plan.split.remain)
        sides = (0, remain) if self.fresh else (len(plan.split.forget), num_remain(config, plan))
        if self.fresh:
            assert config.recipe is not None
            config = replace(config, train=loop_of(config.recipe, num_steps(config.recipe, remain)))
        more = []
        for what, index in self.compared.training().values():
            assert config.recipe is not None
            cache, made_of = self.compared.entry(index)
            there = f"done, in {cache}" if kept(cache, made_of) else "to be done"
            more.append(f"{what}: {len(index)} images, {config.recipe.epochs} epochs; {there}")
        net = model.net.train()
        backend = Classifier(net, len(model.labels), model.prepare, Augment(config.data.shift, config.data.flip))
        device = setting.precision.device
        sample = {"x": plan.data.pixels[:1].to(device), "y": plan.data.labels[:1].to(device)}
        objectives = (self.objective(), DESCENT)
        work = Work(config, backend, setting.entry, lambda net: objectives, sample, sides, setting.precision)
        return rehearse(work, 0, more, setting.command)

    def objective(self) -> Objective:
        """What is done on forget data. Fitting another target needs one: without a teacher that is another label."""
        own = self.setting.method.forget
        return RELABEL if own is not None and own.sense > 0 else ASCENT

    def record(self) -> dict[str, Any]:
        """The split, hashes of data and weights."""
        config, plan = self.config, self.plan
        there = config.model != NEW
        return {
            "plan": {"split": plan.split.digest, "target": plan.target},
            "base": {
                "model": config.model,
                "weights": folders.fingerprint(folders.locate(config.model)) if there else {},
            },
            "data": {"images": len(plan.data), "sha256": plan.split.data, "test_sha256": plan.test.digest},
        }

    def announcement(self) -> str:
        """What is forgotten."""
        what = f"{self.config.method['name']} forgets {self.plan.target} of {len(self.plan.split.train)}"
        return f"{self.config.model}: {'training' if self.fresh else what}"

    def measure_base(self) -> None:
        """The model before, and the retrained one: trained now, or in an earlier run."""
        distributed.on_main(lambda: splits.write(self.plan.split, self.setting.out / "split.json"))
        self.places["before"] = self.compared.base()
        retrained = self.compared.retrained()
        if self.fresh:
            assert retrained is not None
            distributed.on_main(partial(copy, retrained, self.setting.out))
        if retrained is not None:
            self.places["retrained"] = retrained

    def lesson(self) -> Lesson:
        """Images of both sides, and the model to start from."""
        config, plan = self.config, self.plan
        assert config.train is not None
        model = models.open_model(self.places["before"].source.folder, self.setting.device)
        backend = replace(classifier(config, model), relabel=config.forget.relabel)
        remain = plan.data.take(plan.split.remain)
        if config.remain.count != "all":
            remain = remain.subset(num_remain(config, plan), config.seed)

        def before_steps(method: Method) -> Method:
            model.net.train()
            how = config.forget.statistics
            return method if how == "update" else without_statistics(method, running=how == "running")

        return Lesson(
            backend=backend,
            forget=plan.data.take(plan.split.forget),
            remain=remain,
            forget_objective=self.objective(),
            remain_objective=DESCENT,
            measured=backend if config.saliency.augment else replace(backend, augment=Augment()),
            resources={"renew": lambda: models.renew(model, config.seed + 1)},  # not as the model began
            before_steps=before_steps,
            values=lambda: models.stored(model.net),
        )

    def save(self, learned: Learned) -> None:
        """In the form its base came in; a retrained model is in the run's folder already."""
        setting, before = self.setting, self.places["before"]
        target = {"erase_split_sha256": self.plan.split.digest}
        if not self.fresh:
            meta = saving.provenance(self.config, setting.preset, before.source, target, learned.mask)
            distributed.on_main(partial(saving.save, before.source, learned.values, setting.out, meta, setting.form))
        retrained = self.places.get("retrained")
        cache = retrained.cache if self.fresh and retrained is not None else None
        self.places["after"] = Place(folders.locate(setting.out / saving.MODEL), cache=cache)

    def measure_erased(self) -> None:
        """Nothing: the models are asked together."""

    def report(self, learned: Learned) -> dict[str, Any]:
        """The three models side by side."""
        setting, order = self.setting, ("before", "after", "retrained")
        places = {key: self.places[key] for key in order if key in self.places}
        seen = {key: predict(self.config, self.plan, place, setting.device) for key, place in places.items()}
        make = partial(
            make_report, self.config, self.plan, places, seen, learned.mask, dict(learned.timing), setting.command
        )
        result = distributed.on_main(make)
        return result | ({"preset": setting.preset} if setting.preset else {})

    def verdict(self, result: Mapping[str, Any]) -> list[str]:
        """The field's table."""
        return table(dict(result))

    def page(self) -> Path:
        """`report.html`."""
        return distributed.on_main(lambda: report.write_html(self.setting.out))

    @staticmethod
    def summary(report: dict[str, Any]) -> dict[str, float | str | None]:
        """See `erase.programs.classify.report.summarise`."""
        return summarise(report)
