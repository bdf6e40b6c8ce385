"""What the keys of reports, metrics and comparisons are called on pages: words, unit, and which way is better.

The one place for words: a new metric, setting or section gets its row here, and the pages of single runs and of
comparisons show it. A key that means different things in different places has a row for each, under as much of its path
as tells them apart (``fidelity.remain``); the longest that fits is taken. Digits at the end of a key are a number of
its own: ``relearned_20`` is the row ``relearned_#``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from erase.evaluation.page.words import as_percent, as_seconds, as_text, is_number

Unit = Literal[
    "",
    "share",
    "%",
    "points",
    "s",
    "bytes",
    "nats",
    "of the base's",
    "of the retrained model's",
    "% of the retrained model's",
]


@dataclass(frozen=True)
class Name:
    """A key in words."""

    words: str
    unit: Unit = ""
    """Of the value: a `share` is a fraction of 1, and shown in per cent."""
    better: Literal[-1, 0, 1] = 0
    """Whether less (-1) or more (1) is better; 0 where neither is, or it depends on the run."""

    @property
    def least(self) -> float | None:
        """The least that a value can be."""
        return None if self.unit in ("", "points") else 0.0

    @property
    def most(self) -> float | None:
        """The most that a value can be."""
        return {"share": 1.0, "%": 100.0}.get(self.unit)

    @property
    def scale(self) -> float:
        """What a value is multiplied by where it is shown."""
        return 100.0 if self.unit == "share" else 1.0

    @property
    def heading(self) -> str:
        """The words with the unit."""
        unit = {"share": "%", "bytes": ""}.get(self.unit, self.unit)
        return f"{self.words}, {unit}" if unit else self.words

    def show(self, value: Any, *, bare: bool = False) -> str:
        """A value with its unit; without it where `bare`, for a table whose heading has it."""
        if not is_number(value):
            return as_text(value)
        if self.unit in ("share", "%"):
            return as_percent(value if self.unit == "share" else value / 100) + ("" if bare else " %")
        if self.unit == "s":
            return as_seconds(value)
        if self.unit == "bytes":
            return f"{value / 1e6:.1f} MB" if value < 1e8 else f"{value / 1e9:.2f} GB"
        text = f"{value:.1f}".replace("-", "−") if self.unit == "points" else as_text(value)
        return text if bare or not self.unit else f"{text} {self.unit}"


NAMES: dict[str, Name] = {
    # sides and models
    "before": Name("before"),
    "after": Name("after"),
    "base": Name("base"),
    "erased": Name("erased"),
    "retrained": Name("retrained"),
    "lora": Name("LoRA"),
    # the LoRA's file
    "file": Name("LoRA file"),
    "file.bytes": Name("size", "bytes", -1),
    "file.kept": Name("kept of the change", "share"),
    "file.layers": Name("layers"),
    "file.left_out": Name("tensors left out"),
    "file.rank": Name("rank, least and most"),
    "side": Name("side"),
    # methods
    "method.bad_teacher": Name("Bad Teacher"),
    "method.esd": Name("ESD"),
    "method.finetune": Name("Fine-tuning"),
    "method.gradient_ascent": Name("Gradient ascent"),
    "method.random_label": Name("Random labels"),
    "method.retrain": Name("Retraining"),
    "method.salun": Name("SalUn"),
    "method.scrub": Name("SCRUB"),
    "method.selective_amnesia": Name("Selective Amnesia"),
    "method.sfron": Name("SFR-on"),
    "method.speed": Name("SPEED"),
    "method.uce": Name("UCE"),
    # settings of methods
    "alpha": Name("α"),
    "augment": Name("variations of a kept token"),
    "average": Name("average of the weights"),
    "clip_forget": Name("gradient norm limit, forget"),
    "clip_remain": Name("gradient norm limit, remain"),
    "eta": Name("η"),
    "every": Name("every n-th step"),
    "fast_rate": Name("fast learning rate"),
    "fast_rule": Name("fast optimizer"),
    "floor": Name("least loss in weights"),
    "invariants": Name("directions of the empty prompt held"),
    "lambd": Name("λ"),
    "order": Name("order of the sides"),
    "outer_rate": Name("outer rate α"),
    "per_bin": Name("losses by timestep bin"),
    "preserve": Name("weight of what is preserved"),
    "prior_filter": Name("filter of kept tokens"),
    "published": Name("authors' loop"),
    "pull": Name("pull to the old weights"),
    "reduction": Name("reduction of the loss"),
    "ron": Name("fast and slow steps"),
    "robust": Name("robust redirect"),
    "schedule": Name("fast schedule"),
    "slow_schedule": Name("slow schedule"),
    "slow_steps": Name("slow steps"),
    "strength": Name("strength λ"),
    "tokens": Name("tokens"),
    # the run
    "anchors": Name("instead"),
    "earlier": Name("forgotten earlier"),
    "gpu_bytes": Name("GPU memory of tensors, at most", "bytes", -1),
    "labels": Name("labels"),
    "model": Name("model"),
    "preset": Name("preset"),
    "ram_bytes": Name("RAM, at most", "bytes", -1),
    "seed": Name("seed"),
    "steps": Name("steps"),
    "data_s": Name("Generating and encoding the data", "s", -1),
    "erase_s": Name("Unlearning", "s", -1),
    "rte_s": Name("Run time of mask and steps", "s", -1),
    "rte_share": Name("Run time", "of the retrained model's", -1),
    "saliency_s": Name("Making the mask", "s", -1),
    "step_s": Name("A step", "s", -1),
    # training metrics
    "edit_norm": Name("Norm of the edit"),
    "forget_loss": Name("Forget loss"),
    "forget_norm": Name("Gradient norm, forget"),
    "look_seconds": Name("Seconds of a probe", "s"),
    "null_space": Name("Dimensions of the null space"),
    "null_space_least": Name("Dimensions of the smallest null space"),
    "prompts_dropped": Name("Kept prompts that the filter dropped"),
    "prompts_kept": Name("Kept prompts"),
    "remain_loss": Name("Remain loss"),
    "remain_norm": Name("Gradient norm, remain"),
    "residual": Name("Erased words still read as before", "share", -1),
    "seconds": Name("Seconds", "s"),
    "skipped_fast": Name("Skipped fast steps"),
    "skipped_slow": Name("Skipped slow steps"),
    "step": Name("Step"),
    "until_forget": Name("Probe: concept still shown", "share", -1),
    "until_remain": Name("Probe: others right", "share", 1),
    "weight_max": Name("Largest weight of a forget sample"),
    # who judged
    "judge.classes": Name("the classifier"),
    "judge.clip": Name("zero-shot"),
    "judge.flagged": Name("the flagging classifier"),
    "judge.nudity": Name("the detector"),
    # zero-shot predictions
    "alternatives": Name("Alternatives"),
    "calibration": Name("On the base's images"),
    "clip": Name("Zero-shot judge"),
    "clip.clip": Name("Model"),
    "clip.earlier": Name("Forgotten earlier: still recognised", "share", -1),
    "clip.forget": Name("Forgotten concept still recognised", "share", -1),
    "clip.remain": Name("Other prompts recognised", "share", 1),
    "mistaken": Name("Other images taken for the concept", "", -1),
    "no_verdict": Name("No verdict"),
    "scale": Name("Scale"),
    "score": Name("CLIP score"),
    "shown": Name("Recognised"),
    "truncated": Name("Prompts that were cut"),
    "unjudged": Name("Not judged"),
    # predictions of a classifier on generated images
    "accuracy": Name("Accuracy", "share"),
    "axis": Name("What is judged"),
    "classes": Name("Predictions of the classifier"),
    "classes.earlier": Name("Forgotten earlier: still recognised", "share", -1),
    "classes.earlier_pairs": Name("Forgotten earlier: object and style still recognised", "share", -1),
    "classes.forget": Name("Forgotten concept still recognised", "share", -1),
    "classes.forget_pairs": Name("Forgotten: object and style still recognised", "share", -1),
    "classes.remain": Name("Other concepts recognised", "share", 1),
    "classes.remain_pairs": Name("Others: object and style recognised", "share", 1),
    "classifier": Name("Classifier"),
    "entropy": Name("Mean entropy", "nats"),
    "forget_anchor": Name("Forgotten concept's images that show the anchor", "share", 1),
    "forget_confidence": Name("Forgotten labels' images"),
    "forget_shows": Name("Forgotten concept's images predicted as", "share"),
    "label": Name("Label"),
    "model_sha256": Name("Weights, SHA-256"),
    "n": Name("Images"),
    "object": Name("Object"),
    "other_accuracy": Name("Other half of the label right", "share", 1),
    "pair_accuracy": Name("Object and style right", "share", 1),
    "pairs": Name("Object and style judged"),
    "part": Name("Near, far, or beside it"),
    "per_label": Name("By label"),
    "per_prompt": Name("By prompt"),
    "probability": Name("Mean probability of the label", "share"),
    "sha256": Name("SHA-256"),
    "style": Name("Style"),
    # predictions of a classifier that unlearned
    "classify.classes": Name("Predictions"),
    "classify.classes.forget": Name("Forgotten training images predicted right", "share"),
    "classify.classes.remain": Name("Other training images predicted right", "share", 1),
    "classify.classes.test": Name("Test images predicted right", "share", 1),
    "classify.classes.validation": Name("Validation images predicted right", "share", 1),
    "avg_d": Name("Mean gap to the retrained model", "points", -1),
    "avg_d_v": Name("Mean gap to the retrained model, validation images", "points", -1),
    "FA": Name("Forget accuracy", "%"),
    "kl": Name("KL divergence to the retrained model", "nats", -1),
    "metrics": Name("Accuracy and membership inference"),
    "MIA": Name("Membership inference: called members", "%"),
    "MIA_SVC": Name("Membership inference by SalUn's SVC: called non-members", "%"),
    "MIA_V": Name("Membership inference, validation images: called members", "%"),
    "RA": Name("Remain accuracy", "%", 1),
    "TA": Name("Test accuracy", "%", 1),
    "VA": Name("Validation accuracy", "%", 1),
    "gap": Name("Gap to the retrained model"),
    "gap.FA": Name("Forget accuracy", "points", -1),
    "gap.MIA": Name("Membership inference", "points", -1),
    "gap.RA": Name("Remain accuracy", "points", -1),
    "gap.TA": Name("Test accuracy", "points", -1),
    # detections
    "by_prompt": Name("Flagged, by prompt"),
    "channels": Name("Colour channels"),
    "counts": Name("Detections"),
    "errors": Name("Images that failed"),
    "flagged": Name("Forgotten concept's images flagged", "share", -1),
    "flagged_before": Name("Flagged before", "share"),
    "images": Name("Images"),
    "nms_floor": Name("Least score after suppression"),
    "nudenet": Name("NudeNet"),
    "nudity": Name("Images flagged by the detector", "share", -1),
    "nudity.classes": Name("Counted classes"),
    "nudity.preset": Name("Protocol"),
    "provenance": Name("Detector"),
    "resolution": Name("Resolution, pixels"),
    "score_floor": Name("Least score"),
    "strict": Name("Only above the threshold"),
    "threshold": Name("Threshold"),
    "total": Name("Detections in all"),
    "unit": Name("Counted"),
    # distances to real images
    "coverage": Name("Coverage of the real images", "share", 1),
    "density": Name("Density"),
    "dimensions": Name("Dimensions"),
    "features": Name("Features"),
    "fid": Name("FID", "", -1),
    "fidelity": Name("Distance to real images"),
    "fidelity.coverage": Name("Coverage by label", "share", 1),
    "fidelity.forget_to_remain": Name("Forgotten labels' images to real images of the others"),
    "fidelity.remain": Name("Other labels' images"),
    "frechet": Name("Fréchet distance", "", -1),
    "k": Name("k of neighbours"),
    "kernel": Name("Kernel distance", "", -1),
    "kid": Name("KID", "", -1),
    "layer": Name("Layer"),
    "n_fake": Name("Generated images"),
    "n_real": Name("Real images"),
    "precision": Name("Precision", "share", 1),
    "recall": Name("Recall", "share", 1),
    "warnings": Name("Mind"),
    "gap.fa": Name("Forget accuracy", "points", -1),
    "gap.forget_frechet_ratio": Name("Forgotten labels' Fréchet distance", "of the retrained model's"),
    "gap.frechet": Name("Fréchet distance", "% of the retrained model's", -1),
    "gap.kl": Name("KL divergence", "nats", -1),
    "gap.mean": Name("Mean of the gaps", "points", -1),
    "gap.ra": Name("Remain accuracy", "points", -1),
    # early stopping
    "ended": Name("Stopped after step"),
    "looks": Name("Probes, after step"),
    "until": Name("Early stopping"),
    "until.every": Name("Probe every n steps"),
    "until.forget": Name("Stop at: concept shown", "share"),
    "until.images": Name("Images of each side"),
    "until.remain": Name("Stop at: others right", "share"),
    "why": Name("Why"),
    "looks.forget": Name("concept shown", "share", -1),
    "looks.remain": Name("others right", "share", 1),
    # attacks
    "benign": Name("Trained on other images"),
    "half_noised": Name("Half-noised images"),
    "inpaint": Name("Inpainted images"),
    "latent_seed": Name("Inverted noise"),
    "ring_a_bell": Name("Searched prompts (Ring-A-Bell)"),
    "inversion": Name("Learned word"),
    "p4d": Name("Searched words (P4D)"),
    "paraphrases": Name("Paraphrases"),
    "prompt_search": Name("Searched words (UnlearnDiffAtk)"),
    "relearn": Name("Trained again"),
    "relearn_lora": Name("Trained again as a LoRA"),
    "robustness": Name("Robustness"),
    "soft_prompt": Name("Learned embedding"),
    # the numbers of a comparison
    "summary.asr_half_noised": Name("Shown in half-noised images", "share", -1),
    "summary.asr_inpaint": Name("Shown in inpainted images", "share", -1),
    "summary.asr_latent_seed": Name("Brought back by inverted noise", "share", -1),
    "summary.asr_p4d": Name("Brought back by searched words (P4D)", "share", -1),
    "summary.asr_prompt_search": Name("Brought back by searched words (UnlearnDiffAtk)", "share", -1),
    "summary.asr_ring_a_bell": Name("Brought back by searched prompts (Ring-A-Bell)", "share", -1),
    "summary.asr_soft_prompt": Name("Brought back by a learned embedding", "share", -1),
    "summary.attacked": Name("Brought back by the worst attack", "share", -1),
    "summary.benign_#": Name("Brought back by # steps on other images", "share", -1),
    "summary.coverage": Name("Coverage, worst label", "share", 1),
    "summary.cra": Name("Cross-domain retain accuracy", "share", 1),
    "summary.drop": Name("Mean drop of the others", "points", -1),
    "summary.earlier": Name("Forgotten earlier: still recognised", "share", -1),
    "summary.far": Name("Other groups recognised", "share", 1),
    "summary.far_kept": Name("Other groups still recognised", "of the base's", 1),
    "summary.forget": Name("Forgotten concept still recognised", "share", -1),
    "summary.forms": Name("Its other forms still recognised", "share", -1),
    "summary.frechet": Name("Fréchet distance of the others", "of the base's", -1),
    "summary.front": Name("Pareto front"),
    "summary.front_attacked": Name("Pareto front with attacks"),
    "summary.gap_fa": Name("Gap to the retrained model: forget accuracy", "points", -1),
    "summary.gap_forget_frechet_ratio": Name("Forgotten labels' Fréchet distance", "of the retrained model's"),
    "summary.gap_frechet": Name("Gap in Fréchet distance", "% of the retrained model's", -1),
    "summary.gap_kl": Name("Gap to the retrained model: KL divergence", "nats", -1),
    "summary.gap_mean": Name("Gap to the retrained model: mean", "points", -1),
    "summary.gap_ra": Name("Gap to the retrained model: remain accuracy", "points", -1),
    "summary.inverted": Name("Brought back by a learned word", "share", -1),
    "summary.ira": Name("In-domain retain accuracy", "share", 1),
    "summary.kept": Name("Other half of the label kept", "share", 1),
    "summary.near": Name("Same group recognised", "share", 1),
    "summary.near_kept": Name("Same group still recognised", "of the base's", 1),
    "summary.pairs_drop": Name("Mean drop of all other pairs", "points", -1),
    "summary.paraphrased": Name("Brought back by paraphrases", "share", -1),
    "summary.partner": Name("Objects beside it recognised", "share", 1),
    "summary.partner_kept": Name("Objects beside it still recognised", "of the base's", 1),
    "summary.relearned_#": Name("Brought back by # steps of training", "share", -1),
    "summary.relearned_lora_#": Name("Brought back by # steps of training a LoRA", "share", -1),
    "summary.remain": Name("Others recognised", "share", 1),
    "summary.shows": Name("Shown instead"),
    "summary.anchor": Name("Anchor shown", "share", 1),
    "summary.ua": Name("Unlearning accuracy", "share", 1),
    "summary.worst": Name("Largest drop of one of the others", "points", -1),
}
DATA = (
    "per_label",
    "per_prompt",
    "by_prompt",
    "forget_shows",
    "forget_confidence",
    "counts",
    "looks",
    "per_layer",
    "coverage",
)
"""Keys whose own keys are data: labels, prompts, steps."""


def find_name(*path: str) -> Name | None:
    """The row of a key by as much of its path as tells it apart; `None` where it has none."""
    keys = [key for end, key in enumerate(path, 1) if not is_data(*path[:end])]
    for start in range(len(keys)):
        key = ".".join(keys[start:])
        if key in NAMES:
            return NAMES[key]
        numbered = re.fullmatch(r"(.+?)(\d+)", key)
        if numbered and f"{numbered[1]}#" in NAMES:
            found = NAMES[f"{numbered[1]}#"]
            return replace(found, words=found.words.replace("#", numbered[2]))
    return None


def is_data(*path: str) -> bool:
    """Whether a key is data of the run, a label say, and not a key that has words."""
    return len(path) > 1 and path[-2] in DATA


def name_of(*path: str) -> Name:
    """The row of a key; data as they are, and a key without a row in its own words."""
    found = find_name(*path)
    if is_data(*path):
        return Name(_plain(path[-1]), "" if found is None else found.unit)
    return found or Name(_plain(path[-1]))


def path_words(path: tuple[str, ...], above: tuple[str, ...] = ()) -> str:
    """A path in words: those of each of its parts, which lie below `above`."""
    return " · ".join(name_of(*above, *path[: end + 1]).words for end in range(len(path)))


def _plain(key: str) -> str:
    """``FACE_FEMALE`` or ``own_key`` without the underscores; a prompt or a label as it is."""
    if not re.fullmatch(r"\w+", key) or "_" not in key:
        return key
    return (key.lower() if key.isupper() else key).replace("_", " ")
