"""The attacks by name."""

from __future__ import annotations

from functools import partial

from erase.attacks import inversion
from erase.config import AttackName, SdConfig
from erase.diffusion.model import Model
from erase.programs.attacks.images import ProbeName, probed
from erase.programs.attacks.seam import Kind
from erase.programs.attacks.searches import check_ring, check_search, rung_words, searched_words
from erase.programs.attacks.training import check_parameters, trained_again
from erase.programs.attacks.words import learned_prompt, learned_word, other_words, paraphrases
from erase.programs.text.plan import Plan


def check_word(config: SdConfig, plan: Plan, model: Model) -> None:
    """Refuse a prompt without the learned word."""
    inversion.check_word(model, config.attack.inversion.prompt)


def check_words(config: SdConfig, plan: Plan, model: Model) -> None:
    """Refuse prompt sets without other words for the concept."""
    other_words(config, plan)


def check_asked(name: ProbeName, config: SdConfig, plan: Plan, model: Model) -> None:
    """Refuse a prompt that the model would cut."""
    model.check_prompts([getattr(config.attack, name).prompt or ""])


KINDS: dict[AttackName, Kind] = {
    "paraphrases": Kind(paraphrases, check_words, learns=False),
    "inversion": Kind(learned_word, check_word),
    "soft_prompt": Kind(learned_prompt),
    "prompt_search": Kind(partial(searched_words, "prompt_search"), partial(check_search, "prompt_search")),
    "p4d": Kind(partial(searched_words, "p4d"), partial(check_search, "p4d")),
    "ring_a_bell": Kind(rung_words, check_ring, learns=False),
    "half_noised": Kind(partial(probed, "half_noised"), partial(check_asked, "half_noised")),
    "inpaint": Kind(partial(probed, "inpaint"), partial(check_asked, "inpaint")),
    "latent_seed": Kind(partial(probed, "latent_seed"), partial(check_asked, "latent_seed")),
    "relearn": Kind(partial(trained_again, "relearn"), partial(check_parameters, "relearn"), trains=True),
    "relearn_lora": Kind(
        partial(trained_again, "relearn_lora"), partial(check_parameters, "relearn_lora"), trains=True
    ),
    "benign": Kind(partial(trained_again, "benign"), partial(check_parameters, "benign"), learns=False, trains=True),
}
"""In the order in which they are made; those that train come last."""
BATCHED: tuple[AttackName, ...] = ("inversion", "soft_prompt", "relearn", "relearn_lora", "benign")
"""Those whose batches are spread over processes."""
