"""Whether words ask for anything of which an exposed body may be part: persons, bodies, nudity.

A detector need not look at images of cups and rockets. It must look where nobody can tell: words with a capital, which
may be a person's name, numbers in the place of names, and the empty prompt, whose images may be of anything. A word too
much costs a second; so all that end as persons' words do count, but for some that are known to be things.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PEOPLE = """
    actor actress adolescent adult angel artist athlete audience aunt babies baby ballerina barista beach bed bikini
    bloke blonde bodice bodies body boyfriend bra brassiere breast bride brunette butt buttock celebrity chef chest
    child children choir class clown coach cook couple cowboy cowgirl crew crowd dad dentist elf erotic erotica
    explicit exposed face family figure folk friend gentleman girlfriend goddess goth groom guest guy gymnast he her
    hero heroine him his human husband idol infant judge kid king kiss kissing knight lad lady lingerie maid maillot
    male mannequin masseuse mermaid miniskirt model mom monarch monk mum muse nipple nsfw nude nudity nun nurse
    nymph parent patient people person pilot police porn portrait pregnant priest prince punk queen saint sauna
    scout scuba self selfie sensual servant sexual sexy she shirtless skin somebody someone son spa sport spy
    student swimming swimsuit swimwear team teen tenant thief thong topless torso tourist trunks tuxedo twin uncle
    underwear undressed venus viking wedding who wife witch wizard yoga youth
"""
"""Words for persons and what is seen of them, without those that `ENDING` finds."""
THINGS = """
    after another beer border burger butter camera center charger charter cheer chowder cider clover color colour
    computer cooker copper corner corridor cover cucumber deer desktop dinner door drawer dresser either ever
    exterior fever fiber filter finger floor flower ginger glacier hammer hamster harbor harbour helicopter higher
    indoor interior jumper ladder lantern larger laser lavender layer leather letter lever liquor liver lobster
    locker lower meter mirror monitor motor near never newspaper number older other outdoor over oyster panther
    paper pepper pier poster powder power printer pullover quarter refrigerator retriever river rooster rover rubber
    saucer scooter sculpture setter shutter silver slipper smaller sneaker spider sticker summer sunflower super
    supper sweater taller terrier tiger timber timer toaster together tower tractor trailer transistor trouser
    trousers typewriter under upper vapor water watercolor watercolour weather whether winter younger
"""
"""Words that end as those for persons."""
ENDING = re.compile(r".*(man|men|girl|boy|nude|naked|er|or|i(?:st|an)|eur|ess|ette)")
_KNOWN, _OTHERS = frozenset(PEOPLE.split()), frozenset(THINGS.split())


def may_show_people(texts: Iterable[str]) -> bool:
    """Whether any of some prompts or names of classes may be of a person, as far as words tell."""
    return any(_may(text) for text in texts)


def _may(text: str) -> bool:
    words = re.findall(r"[^\W_]+", text)
    unknown = not words or words[0][0].isdigit() or any(word[0].isupper() for word in words[1:])
    return unknown or any(_person(word.lower()) for word in words)


def _person(word: str) -> bool:
    one = word.removesuffix("s")
    known = word in _KNOWN or one in _KNOWN
    return known or (one not in _OTHERS and any(ENDING.fullmatch(form) is not None for form in (word, one)))
