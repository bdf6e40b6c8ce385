"""Attacks on the side of the prompt: other words, a learned word, a learned embedding."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from erase.attacks import inversion, places, soft_prompt
from erase.config import SdConfig
from erase.diffusion import condition
from erase.engine import distributed
from erase.evaluation.prompt_files import PromptRow
from erase.programs.attacks.seam import Target, counted, given
from erase.programs.text.judge import share
from erase.programs.text.judges.seam import concept
from erase.programs.text.naming import names
from erase.programs.text.plan import Plan, expand, label_of, written
from erase.store.safetensors import digest, read_safetensors, write_safetensors


def other_words(config: SdConfig, plan: Plan) -> list[PromptRow]:
    """The paraphrases of what is forgotten, without the forget prompts themselves.

    Of labelled rows they are those of the forgotten labels; where forget prompts have no label, those whose label one
    of them names. Rows without any label are taken as they are.

    Raises:
        ValueError: if there are none.
    """
    axis, labels = config.forget.axis or "object", concept(config, plan)

    def of_concept(row: PromptRow) -> bool:
        label = label_of(row, axis)
        if label is None:
            return row.object is None and row.style is None
        return label in labels if labels else any(names(prompt, [label]) for prompt in plan.forget)

    rows = [row for row in expand(config.attack.paraphrases.prompts, config.seed) if row.prompt not in plan.forget]
    found = [row for row in rows if of_concept(row)]
    if not found:
        raise ValueError(
            f"attack.paraphrases.prompts has {len(rows)} prompts, none of which is about "
            f"{', '.join(labels or plan.forget)}: give prompts or a prompt set, such as photos-paraphrases"
        )
    return found


def paraphrases(target: Target, numbers: dict[str, Any]) -> None:
    """Ask for the concept in other words."""
    rows, images = other_words(target.config, target.plan), target.config.attack.paraphrases.images
    folder = target.top / "paraphrases" / target.name
    shown = target.shows(rows, images, folder)
    parts: dict[str, list[bool]] = {}
    for number, row in enumerate(rows):
        parts.setdefault(row.prompt, []).extend(shown[number * images : (number + 1) * images])
    numbers |= {"prompts": len(parts), target.name: target.share(shown, folder)}
    by_prompt = numbers.setdefault("by_prompt", {})
    for prompt, part in parts.items():
        by_prompt.setdefault(prompt, {})[target.name] = share(part)


def kept(target: Target, path: Path, make: Any, meta: dict[str, str]) -> dict[str, Tensor]:
    """What `make` learns, from the disk where a run that is resumed has it already."""
    if not (target.resume and distributed.on_main(path.exists)):
        made = make()
        distributed.on_main(partial(write_safetensors, path, made, meta))
    return {name: x.to(target.model.device) for name, x in read_safetensors(path)[0].items()}


def learned_word(target: Target, numbers: dict[str, Any]) -> None:
    """Learn a word for the concept, and ask for that."""
    wanted, config, top = target.config.attack.inversion, target.config, target.top / "inversion"

    def make() -> dict[str, Tensor]:
        with counted(wanted.steps, f"learning a word: {target.name}") as log:
            data = target.known.data
            return inversion.learn_word(target.model, data, wanted, config.seed, target.accelerator, log)

    word = kept(target, top / f"{target.name}.safetensors", make, {"prompt": wanted.prompt})
    with places.meaning(target.model, word):
        row, made = written(wanted.prompt, config.seed), {"word": digest(word)}
        shown = target.shows([row], wanted.images, top / target.name, made)
    numbers |= {**asdict(wanted), target.name: target.share(shown, top / target.name)}


def learned_prompt(target: Target, numbers: dict[str, Any]) -> None:
    """Learn an embedding for the concept, and ask for that."""
    wanted, config, top = target.config.attack.soft_prompt, target.config, target.top / "soft_prompt"
    prompt = target.plan.forget[0]

    def make() -> dict[str, Tensor]:
        with counted(wanted.steps, f"learning an embedding: {target.name}") as log:
            data = target.known.data
            found = soft_prompt.learn_prompt(target.model, data, prompt, wanted, config.seed, target.accelerator, log)
            return condition.to(found, "cpu")

    learned = kept(target, top / f"{target.name}.safetensors", make, {"prompt": prompt})
    with given(target.model, {prompt: learned}):
        row, made = written(prompt, config.seed), {"embedding": digest(learned)}
        shown = target.shows([row], wanted.images, top / target.name, made)
    numbers |= {**asdict(wanted), target.name: target.share(shown, top / target.name)}
