"""The attacks by name."""

from __future__ import annotations

from functools import partial

from erase.attacks import inversion
from erase.config import AttackName, SdConfig
from erase.diffusion.model import Model
from erase.programs.attacks.seam import Kind
from erase.programs.attacks.training import check_parameters, relearn
from erase.programs.attacks.words import (
    check_search,
    learned_prompt,
    learned_word,
    other_words,
    paraphrases,
    searched_words,
)
from erase.programs.text.plan import Plan


def check_word(config: SdConfig, plan: Plan, model: Model) -> None:
    """Refuse a prompt without the learned word."""
    inversion.check_word(model, config.attack.inversion.prompt)


def check_words(config: SdConfig, plan: Plan, model: Model) -> None:
    """Refuse prompt sets without other words for the concept."""
    other_words(config, plan)


KINDS: dict[AttackName, Kind] = {
    "paraphrases": Kind(paraphrases, check_words, learns=False),
    "inversion": Kind(learned_word, check_word),
    "soft_prompt": Kind(learned_prompt),
    "prompt_search": Kind(partial(searched_words, "prompt_search"), partial(check_search, "prompt_search")),
    "p4d": Kind(partial(searched_words, "p4d"), partial(check_search, "p4d")),
    "relearn": Kind(relearn, check_parameters, trains=True),
}
"""In the order in which they are made; those that train come last."""
BATCHED: tuple[AttackName, ...] = ("inversion", "soft_prompt", "relearn")
"""Those whose batches are spread over processes."""
