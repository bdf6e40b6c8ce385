"""Attacks that search for words: before the prompt by gradients, or in its place without asking the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from erase.attacks import p4d, places, prefixes, prompt_search, ring_a_bell
from erase.config import PrefixSearch, SdConfig
from erase.diffusion import condition
from erase.diffusion.condition import Condition
from erase.diffusion.model import Model, open_model
from erase.engine import distributed
from erase.engine.backend import seeded
from erase.evaluation.manifest import images_of
from erase.evaluation.prompt_files import PromptRow
from erase.programs.attacks.seam import ATTACKER, EXAMPLES, Target, counted, given
from erase.programs.text.judge import share
from erase.programs.text.plan import Plan
from erase.programs.text.targets import concepts_and_anchors
from erase.store import files

SearchName = Literal["prompt_search", "p4d"]


def check_search(name: SearchName, config: SdConfig, plan: Plan, model: Model) -> None:
    """Refuse prompts that no words can be put before."""
    prefixes.check_prefix(model, plan.forget, name, getattr(config.attack, name))


def searched_words(name: SearchName, target: Target, numbers: dict[str, Any]) -> None:
    """Search for words before the prompt, one search for each image; a prompt that needs none has its search won."""
    wanted: PrefixSearch = getattr(target.config.attack, name)
    top, prompts = target.top / name, target.known.prompts[: wanted.images]
    rows = [PromptRow(prompt, (target.config.seed + ATTACKER + k) % 2**32) for k, prompt in enumerate(prompts)]
    before = top / target.name / "plain"
    plain = target.shows(rows, 1, before)

    def search_all() -> list[dict[str, Any]]:
        left = [k for k, shown in enumerate(plain) if not shown]
        found = dict[int, dict[str, Any]]()
        with counted(len(left) * wanted.times, f"searching: {name}, {target.name}") as log:
            base = base_network(target) if name == "p4d" and left else None
            for start in range(0, len(left), wanted.batch_size):
                part = left[start : start + wanted.batch_size]
                search = make_search(target, [rows[k].prompt for k in part], part, wanted, base)
                found |= search_together(name, target, rows, part, search, log)
        return [found[k] for k in left]

    searches: list[dict[str, Any]] = kept(target, top / f"{target.name}.json", "found", search_all)
    won = {entry["search"]: entry["shows"] for entry in searches}
    shown = [hit or won[k] for k, hit in enumerate(plain)]
    through = [entry["image"] for entry in searches if entry["shows"]]
    side = {**share(shown), "plain": target.share(plain, before), "through": through[:EXAMPLES]}
    numbers |= {**asdict(wanted), target.name: side}
    numbers.setdefault("found", {})[target.name] = searches


def search_together(
    name: SearchName, target: Target, rows: list[PromptRow], part: list[int], search: prefixes.Search, log: Any
) -> dict[int, dict[str, Any]]:
    """Some searches at once, `part` of all: what each found, by its number."""
    found = dict[int, dict[str, Any]]()
    for number in range(search.wanted.times):
        search.round(number)
        folder = target.top / name / target.name / f"{part[0]:03d}-{number:02d}"

        def found_tokens() -> list[list[list[int]]]:  # found again they may differ: devices add in any order
            return [ids.tolist() for ids in distributed.on_main(search.relaxation.tokens)]

        read = kept(target, folder.with_name(f"{folder.name}.json"), "tokens", found_tokens)
        tokens = [torch.tensor(ids) for ids in read]
        texts, told = search.texts(tokens), search.conditions(tokens)
        tried = [i for i, k in enumerate(part) if not found.get(k, {}).get("shows")]
        asked = [f"{texts[i]} [{part[i]}]" for i in tried]  # two searches may find the same words
        conditions: dict[str, Condition] = {
            text: {leaf: x[i : i + 1] for leaf, x in told.items()} for text, i in zip(asked, tried, strict=True)
        }
        with given(target.model, conditions):
            made = {"tokens": [ids[i].tolist() for i in tried for ids in tokens]}
            sought = [PromptRow(text, rows[part[i]].seed) for text, i in zip(asked, tried, strict=True)]
            hits = target.shows(sought, 1, folder, made)
        for i, hit, path in zip(tried, hits, images_of(folder), strict=True):
            found[part[i]] = {
                "search": part[i],
                "prompt": texts[i],
                "tokens": [ids[i].tolist() for ids in tokens],
                "rounds": number + 1,
                "shows": hit,
                "image": path.relative_to(target.top.parent).as_posix(),
            }
            log({})
        if all(entry["shows"] for entry in found.values()):
            break
    return found


def kept(target: Target, path: Path, key: str, make: Callable[[], Any]) -> Any:
    """What `make` finds, under a key of a JSON file; where a search is resumed, what is in the file already."""
    if not (target.resume and distributed.on_main(path.exists)):
        distributed.on_main(partial(files.write_json, path, {"schema": 1, key: make()}))
    return distributed.on_main(lambda: files.read_json(path)[key])


def make_search(
    target: Target, prompts: list[str], part: list[int], wanted: PrefixSearch, base: nn.Module | None
) -> prefixes.Search:
    """Searches that have not begun: with a base network P4D's, without one UnlearnDiffAtk's."""
    model, seed = target.model, target.config.seed
    model.ready(model.family.TRAINED, *places.tables(model))
    words, latents = prefixes.vocabularies(model), target.known.data.mean[torch.tensor(part)].to(model.device)
    relaxation: prefixes.Relaxation
    if base is None:
        loss = prompt_search.own_loss(model.denoiser())
        relaxation = prompt_search.Distributions(words, len(part), wanted.tokens, model.device)
    else:
        asked = condition.to(model.embed(prompts), model.device)
        loss = p4d.match_base(model.denoiser(), base, asked)
        relaxation = p4d.Nearest(words, len(part), wanted.tokens, seeded(model.device, seed, *part))
    return prefixes.Search(model, prompts, latents, wanted, words, relaxation, loss, seed, target.precision.autocast)


def base_network(target: Target) -> nn.Module:
    """The network of the base model: beside that of the erased one, a second one."""
    if target.name == "base":
        target.model.ready(target.model.family.TRAINED)
        return target.model.net
    base = open_model(target.base, target.accelerator.device, target.precision.name)
    base.ready(base.family.TRAINED)
    return base.net


def check_ring(config: SdConfig, plan: Plan, model: Model) -> None:
    """Refuse a model without words, and anchors that do not match.

    Raises:
        ValueError: for these.
    """
    concepts_and_anchors(config.forget)
    if not places.tables(model):
        raise ValueError(f"attack.ring_a_bell searches for words, and {model.family.NAME} reads none: leave it out")


def rung_words(target: Target, numbers: dict[str, Any]) -> None:
    """Search for prompts without asking the network; base and erased model are asked for the same ones."""
    wanted, top, seed = target.config.attack.ring_a_bell, target.top / "ring_a_bell", target.config.seed
    path = top / "found.json"
    if not distributed.on_main(path.exists):
        prompts = search_prompts(target)
        distributed.on_main(partial(files.write_json, path, {"schema": 1, "found": prompts}))
    found: list[dict[str, Any]] = distributed.on_main(lambda: files.read_json(path)["found"])
    rows = [PromptRow(entry["prompt"], (seed + ATTACKER + k) % 2**32) for k, entry in enumerate(found)]
    folder = top / target.name
    numbers |= {**asdict(wanted), target.name: target.share(target.shows(rows, wanted.images, folder), folder)}
    numbers["found"] = found


def search_prompts(target: Target) -> list[dict[str, Any]]:
    """Ring-A-Bell's prompts: `of`, `prompt` and `distance` of each."""
    wanted, plan, model = target.config.attack.ring_a_bell, target.plan, target.model
    model.ready(*model.family.ENCODERS)
    vocabulary = prefixes.vocabularies(model)[0]

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        parts = [model.family.embed(model.pipe, texts[k : k + 64])["text"] for k in range(0, len(texts), 64)]
        return torch.cat(parts).float()

    pairs = concepts_and_anchors(target.config.forget)
    found = []
    with counted(len(plan.forget) * wanted.searches * wanted.generations, "searching: ring_a_bell") as log:
        for prompt in plan.forget:
            goal = ring_a_bell.target_of(embed, prompt, pairs, wanted.strength)
            for k in range(wanted.searches):
                seed = target.config.seed + k
                text, distance = ring_a_bell.search(embed, goal, vocabulary, wanted, seed, lambda _: log({}))
                found.append({"of": prompt, "prompt": text, "distance": distance})
    if model.lean:
        model.release(*model.family.ENCODERS)
    return found
