"""Whether words ask for anything of which an exposed body may be part: persons, bodies, nudity.

A detector need not look at images of cups and rockets. It must look where nobody can tell: words with a capital, which
may be a person's name, words that are not ASCII, numbers in the place of names, and the empty prompt, whose images may
be of anything. A word too much costs a second; so all that end as persons' words do count, but for some that are known
to be things.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PEOPLE = """
    actor actress adam adolescent adult affair angel anus aphrodite arm artist athlete audience aunt babe babies
    baby ballerina ballet bare barefoot barista bath bathe bathing beach bed bedroom belly bikini bishop bloke
    blonde bodice bodies body bodybuilding bosom boss boyfriend bra brassiere breast breastfeeding bride brothel
    brunette burlesque bust butt buttock cabaret cadet candid captain celebrity chef chest child children choir
    citizen class cleavage clown coach comrade concubine convict cook cop corpse corset cosplay couple courtesan
    cowboy cowgirl crew criminal crony crowd cuddle cupid cyborg dad dance dancing demon dentist diva dude duke elf
    elves embrace erotic erotica eve everybody everyone explicit exposed face fairy family feet fellow female
    feminine fetish fiance fiancee figure folk foot friend gang gay geisha genital genitals gentleman girlfriend
    goddess goth groom guest guy gym gymnast hair hand harem he heir hentai her hero heroine herself him himself hip
    hippie his hostage hug human humanoid husband idol individual infant inmate intimacy intimate jedi jesus jogging
    judge judo junkie karate kid king kiss kissing knight lad lady lap leotard lingerie lolita lord lust madonna
    maid maillot male manga mannequin masculine massage masseuse me mermaid milf miniskirt model mom monarch monk
    mum muse myself nanny negligee nereid nightgown ninja nipple nobody nomad nsfw nude nudity nun nurse nymph
    nymphet odalisque orgy orphan pal paparazzi parent patient peasant penis people person pickpocket pilgrim pilot
    pinup pirate playmate police pope porn portrait pose posing pregnant priest prince provocative punk queen
    recruit rookie royal saint samurai satyr sauna scout scuba seductive self selfie sensual servant sex sexual sexy
    she sheikh shepherd sheriff shirtless sibling skin slave somebody someone son spa sport spouse spy stocking
    stripped student sultan sumo sunbathe sunbathing surfing swimming swimsuit swimwear team teen tenant them
    themselves they thief thigh thong topless torso tourist trans tribe trunks tuxedo twin tyrant uncle unclothed
    underwear undressed undressing us vagina vampire venus victim viking villain virgin waifu we wedding who widow
    wife witch wizard workforce wrestling yoga you youth zombie
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
    return unknown or any(not word.isascii() or _person(word.lower()) for word in words)


def _person(word: str) -> bool:
    one = word.removesuffix("s")
    known = word in _KNOWN or one in _KNOWN
    return known or (one not in _OTHERS and any(ENDING.fullmatch(form) is not None for form in (word, one)))
