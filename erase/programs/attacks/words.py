"""Attacks on the side of the prompt: other words, a learned word, a learned embedding, searched words."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from erase.attacks import inversion, p4d, places, prefixes, prompt_search, soft_prompt
from erase.config import PrefixSearch, SdConfig
from erase.diffusion import condition
from erase.diffusion.condition import Condition
from erase.diffusion.model import Model, open_model
from erase.engine import distributed
from erase.engine.backend import seeded
from erase.evaluation.prompt_files import PromptRow
from erase.programs.attacks.seam import ATTACKER, Target, counted, given
from erase.programs.text.judge import share
from erase.programs.text.judges.seam import concept
from erase.programs.text.plan import Plan, expand, label_of
from erase.store import files
from erase.store.safetensors import digest, read_safetensors, write_safetensors


def other_words(config: SdConfig, plan: Plan) -> list[PromptRow]:
    """The paraphrases of what is forgotten, without the forget prompts themselves.

    Of labelled rows they are those of the forgotten labels; where forget prompts have no label, those whose label one
    of them names.

    Raises:
        ValueError: if there are none.
    """
    axis, labels = config.forget.axis or "object", concept(config, plan)

    def of_concept(row: PromptRow) -> bool:
        label = label_of(row, axis)
        return label is None or (label in labels if labels else any(label in prompt for prompt in plan.forget))

    rows = [row for row in expand(config.attack.paraphrases.prompts, config.seed) if row.prompt not in plan.forget]
    found = [row for row in rows if of_concept(row)]
    if not found:
        raise ValueError(
            f"attack.paraphrases.prompts has {len(rows)} prompts, none of them of {', '.join(labels or plan.forget)}: "
            "name prompts or a prompt set, such as photos-paraphrases"
        )
    return found


def paraphrases(target: Target, numbers: dict[str, Any]) -> None:
    """Ask for the concept in other words."""
    rows, images = other_words(target.config, target.plan), target.config.attack.paraphrases.images
    shown = target.shows(rows, images, target.top / "paraphrases" / target.name)
    numbers |= {"prompts": len(rows), target.name: share(shown)}
    by_prompt = numbers.setdefault("by_prompt", {})
    for number, row in enumerate(rows):
        part = shown[number * images : (number + 1) * images]
        by_prompt.setdefault(row.prompt, {})[target.name] = share(part)


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
        row, made = PromptRow(wanted.prompt, config.seed), {"word": digest(word)}
        shown = target.shows([row], wanted.images, top / target.name, made)
    numbers |= {**asdict(wanted), target.name: share(shown)}


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
        row, made = PromptRow(prompt, config.seed), {"embedding": digest(learned)}
        shown = target.shows([row], wanted.images, top / target.name, made)
    numbers |= {**asdict(wanted), target.name: share(shown)}


SearchName = Literal["prompt_search", "p4d"]


def check_search(name: SearchName, config: SdConfig, plan: Plan, model: Model) -> None:
    """Refuse prompts that no words can be put before."""
    prefixes.check_prefix(model, plan.forget, name, getattr(config.attack, name))


def searched_words(name: SearchName, target: Target, numbers: dict[str, Any]) -> None:
    """Search for words before the prompt, one search for each image; a prompt that needs none has its search won."""
    wanted: PrefixSearch = getattr(target.config.attack, name)
    top, prompts = target.top / name, target.known.prompts[: wanted.images]
    rows = [PromptRow(prompt, (target.config.seed + ATTACKER + k) % 2**32) for k, prompt in enumerate(prompts)]
    plain = target.shows(rows, 1, top / target.name / "plain")
    path = top / f"{target.name}.json"
    if not (target.resume and distributed.on_main(path.exists)):
        left = [k for k, shown in enumerate(plain) if not shown]
        found = dict[int, dict[str, Any]]()
        with counted(len(left) * wanted.times, f"searching: {name}, {target.name}") as log:
            for start in range(0, len(left), wanted.batch_size):
                part = left[start : start + wanted.batch_size]
                found |= search_together(name, target, rows, part, wanted, log)
        distributed.on_main(partial(files.write_json, path, {"schema": 1, "found": [found[k] for k in left]}))
    searches: list[dict[str, Any]] = distributed.on_main(lambda: files.read_json(path)["found"])
    won = {entry["search"]: entry["shows"] for entry in searches}
    shown = [hit or won[k] for k, hit in enumerate(plain)]
    numbers |= {**asdict(wanted), target.name: {**share(shown), "plain": share(plain)}}
    numbers.setdefault("found", {})[target.name] = searches


def search_together(
    name: SearchName, target: Target, rows: list[PromptRow], part: list[int], wanted: PrefixSearch, log: Any
) -> dict[int, dict[str, Any]]:
    """Some searches at once: what each found, by its number."""
    search, found = make_search(name, target, [rows[k].prompt for k in part], part, wanted), dict[int, dict[str, Any]]()
    for number in range(wanted.times):
        search.round(number)
        tokens: list[Tensor] = distributed.on_main(search.relaxation.tokens)
        texts, told = search.texts(tokens), search.conditions(tokens)
        tried = [i for i, k in enumerate(part) if not found.get(k, {}).get("shows")]
        asked = [f"{texts[i]} [{part[i]}]" for i in tried]  # two searches may find the same words
        folder = target.top / name / target.name / f"{part[0]:03d}-{number:02d}"
        conditions: dict[str, Condition] = {
            text: {leaf: x[i : i + 1] for leaf, x in told.items()} for text, i in zip(asked, tried, strict=True)
        }
        with given(target.model, conditions):
            made = {"tokens": [ids[i].tolist() for i in tried for ids in tokens]}
            sought = [PromptRow(text, rows[part[i]].seed) for text, i in zip(asked, tried, strict=True)]
            hits = target.shows(sought, 1, folder, made)
        for i, hit in zip(tried, hits, strict=True):
            found[part[i]] = {
                "search": part[i],
                "prompt": texts[i],
                "tokens": [ids[i].tolist() for ids in tokens],
                "rounds": number + 1,
                "shows": hit,
            }
            log({})
        if all(entry["shows"] for entry in found.values()):
            break
    return found


def make_search(
    name: SearchName, target: Target, prompts: list[str], part: list[int], wanted: PrefixSearch
) -> prefixes.Search:
    """Searches that have not begun."""
    model, seed = target.model, target.config.seed
    model.ready(model.family.TRAINED, *places.tables(model))
    words, latents = prefixes.vocabularies(model), target.known.data.mean[torch.tensor(part)].to(model.device)
    relaxation: prefixes.Relaxation
    if name == "prompt_search":
        loss = prompt_search.own_loss(model.denoiser())
        relaxation = prompt_search.Distributions(words, len(part), wanted.tokens, model.device)
    else:
        asked = condition.to(model.embed(prompts), model.device)
        base = model.net if target.name == "base" else base_network(target)
        loss = p4d.match_base(model.denoiser(), base, asked)
        relaxation = p4d.Nearest(words, len(part), wanted.tokens, seeded(model.device, seed, *part))
    return prefixes.Search(model, prompts, latents, wanted, words, relaxation, loss, seed, target.precision.autocast)


def base_network(target: Target) -> torch.nn.Module:
    """The network of the base model, beside that of the erased one."""
    base = open_model(target.base, target.accelerator.device, target.precision.name)
    base.ready(base.family.TRAINED)
    return base.net
