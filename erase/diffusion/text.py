"""Prompts as a text model reads them: what it cuts off, and which tokens of a prompt mean the concept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from erase.diffusion.model import Model

Tokens = Literal["all", "last", "padding"]
"""Which tokens of a prompt closed forms edit: from the first that differs from the anchor on, the last token of the
last word, or those from the end of text on."""
OWN_ANCHOR = "a forget prompt is its own anchor: choose another anchor"


@dataclass(frozen=True)
class Concepts:
    """What words should mean, token by token, in text embeddings: the data of closed forms."""

    erased: Tensor
    """`[E, D]`, tokens of forget prompts."""
    targets: Tensor
    """`[E, D]`, what they should become."""
    kept: Tensor
    """`[N, D]`, tokens of prompts that stay."""
    kept_of: Tensor
    """`[N]`, int64: the prompt that each of them is of, from 1 in their order; 0 is the empty prompt."""
    begin: Tensor
    """The beginning of text, `[0, D]` to `[tokenizers, D]`: not every tokenizer has one."""
    empty: Tensor
    """`[M, D]`, all tokens of the empty prompt, as encoders read it; not zeros in SDXL."""
    weights: str
    """The matrices that read them, as an expression over names."""


@runtime_checkable
class TokenEdit(Protocol):
    """A closed form that chooses which tokens its concepts are of."""

    @property
    def tokens(self) -> Tokens:
        """The choice."""


def check_tokens(tokens: str) -> None:
    """Refuse a word that is none of `Tokens`.

    Raises:
        ValueError: if so.
    """
    if tokens not in get_args(Tokens):
        raise ValueError(f"unknown tokens {tokens!r}; allowed: {', '.join(get_args(Tokens))}")


def cut_prompts(model: Model, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The prompts that this model reads the beginning of only: ``row`` (from 0), ``tokens`` and ``prompt`` of each."""
    _, allowed = model.family.tokenizer(model.pipe)
    counts = [model.count_tokens(prompt) for prompt in prompts]
    return [
        {"row": row, "tokens": count, "prompt": prompts[row]} for row, count in enumerate(counts) if count > allowed
    ]


def say_cut(model: Model, cut: Sequence[dict[str, Any]], total: int) -> str:
    """A line on what `cut_prompts` found, for a terminal; files are named by the rows."""
    rows = ", ".join(str(row["row"]) for row in cut[:10]) + (", …" if len(cut) > 10 else "")
    _, allowed = model.family.tokenizer(model.pipe)
    return (
        f"{len(cut)} of the {total} prompts to generate are longer than {allowed} tokens, so that the model reads only "
        f"their beginning; the first is {cut[0]['prompt'][:60]!r} (rows {rows}; settings.json names all)"
    )


def check_size(width: int | None, height: int | None, where: str, stride: int = 8) -> None:
    """Refuse a size that no latent image has.

    Raises:
        ValueError: for a side that is no multiple of `stride` pixels.
    """
    for name, side in (("width", width), ("height", height)):
        if side is not None and side % stride:
            raise ValueError(f"{where}: {name} is {side}, expected a multiple of {stride}")


def readers(model: Model) -> list[tuple[Any, int]]:
    """The tokenizers whose tokens are the rows of the condition `text`, in order, and how many rows each has."""
    several = getattr(model.family, "readers", None)
    return several(model.pipe) if several is not None else [model.family.tokenizer(model.pipe)]


def text_weights(model: Model) -> str:
    """The matrices that read the text embeddings themselves, as an expression over names.

    Raises:
        ValueError: for a family that has none.
    """
    found = model.family.TEXT_KV
    if found is None:
        raise ValueError(
            f"closed forms edit linear maps of the text embeddings, and {model.family.NAME} has none: choose a method "
            "that trains"
        )
    return found


def check_edited(model: Model, chosen: Sequence[str]) -> None:
    """Find out before anything is computed that a closed form has something to edit.

    Raises:
        ValueError: if none of the chosen parameters reads text embeddings.
    """
    edited_names(text_weights(model), chosen)


def edited_names(weights: str, chosen: Iterable[str]) -> list[str]:
    """Which of the chosen parameters a closed form edits: those whose names `weights` matches.

    Raises:
        ValueError: if none does.
    """
    found = [name for name in chosen if re.search(weights, name)]
    if not found:
        raise ValueError(
            "closed forms edit the weights that read text, and none of them learns: set train.parameters to full or "
            f"{weights}"
        )
    return found


def concepts(
    model: Model,
    forget: Sequence[str],
    anchors: Sequence[str],
    kept: Sequence[str],
    tokens: Tokens = "all",
    shares: Sequence[float] | None = None,
) -> Concepts:
    """Text embeddings, token by token: of forget prompts from where they leave their anchors, and of whole others.

    The beginning that a forget prompt shares with one that stays means the same in both, and stays. Padding that the
    network does not read (the condition's `mask`) is left out.

    With `tokens` of `last` or `padding` these alone are erased, and these alone of the prompts that stay are kept. The
    last token of the empty prompt is that of the beginning, where there is one.

    Args:
        model: the model, with its text encoder.
        forget: prompts whose words are to mean something else.
        anchors: what they are to mean, one for each.
        kept: prompts that stay.
        tokens: which of them.
        shares: of the forget prompts in sums over erased tokens, one for each; by default 1.

    Raises:
        ValueError: for a prompt that is its own anchor, or too long, tokens that the network does not read, and a
            family that has no such matrix.
    """
    weights = text_weights(model)
    words = [*forget, *anchors, *kept, *([] if "" in kept else [""])]
    blank = blank_of(model)
    embedded = model.embed([blank if word == "" else word for word in words])
    rows = embedded["text"].shape[1]
    counts = embedded["mask"].sum(1).tolist() if "mask" in embedded else [rows] * len(words)
    table = {word: x[:count] for word, x, count in zip(words, embedded["text"], counts, strict=True)}
    numbers = {"": 0} | {text: number for number, text in enumerate(filter(None, kept), 1)}
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    stay: list[tuple[str, Tensor]] = []
    begin = table[""][:0]
    start, told_apart = 0, set()
    for tokenizer, length in readers(model):
        ids = {text: list(tokenizer(text, truncation=True, max_length=length).input_ids) for text in table}
        if ids[""][0] == ids[forget[0]][0]:
            begin = torch.cat([begin, table[forget[0]][start : start + 1]])
        shared = {tuple(ids[text][:end]) for text in kept for end in range(1, len(ids[text]))}
        for prompt, anchor, share in zip(forget, anchors, shares or [1.0] * len(forget), strict=True):
            if ids[prompt] == ids[anchor]:
                continue  # where they differ is beyond what this tokenizer reads, and another may read it
            told_apart.add((prompt, anchor))
            if tokens == "last":
                pairs = [(last_token(ids[prompt]), last_token(ids[anchor]))]
            else:
                pairs = paired_tokens(ids[prompt], ids[anchor], length)
                least = len(ids[prompt]) - 1 if tokens == "padding" else 0
                pairs = [(i, j) for i, j in pairs if i >= least and tuple(ids[prompt][: i + 1]) not in shared]
            for at, other in pairs:
                if start + at < len(table[prompt]) and start + other < len(table[anchor]):
                    sides[0].append(table[prompt][start + at] * share**0.5)  # squared in the sum
                    sides[1].append(table[anchor][start + other] * share**0.5)
        for text in kept:
            end, last = len(ids[text]) - 1, last_token(ids[text])
            own = slice(last, last + 1) if tokens == "last" else slice(end, length)
            stay.append((text, table[text][start : start + length][own]))
        start += length
    if told_apart != set(zip(forget, anchors, strict=True)):
        raise ValueError(OWN_ANCHOR)
    if not sides[0]:
        raise ValueError(
            f"method.tokens={tokens}: the forget prompts have no such token that the network reads: set "
            "method.tokens=all"
        )
    if tokens == "all":
        stay = [(text, table[text]) for text in kept]
    kept_of = torch.tensor([numbers[text] for text, x in stay for _ in x], dtype=torch.int64)
    kept_tokens = torch.cat([x for _, x in stay])
    return Concepts(torch.stack(sides[0]), torch.stack(sides[1]), kept_tokens, kept_of, begin, table[""], weights)


def blank_of(model: Model) -> str:
    """A prompt with the tokens of the empty one, as encoders read it: SDXL's pipeline takes the empty one for zeros."""
    same = all(tokenizer(" ").input_ids == tokenizer("").input_ids for tokenizer, _ in readers(model))
    return " " if same else ""


def last_token(ids: Sequence[int]) -> int:
    """The place of the last token before the end, from ids with begin and end; the first where there is none."""
    return max(0, len(ids) - 2)


def paired_tokens(prompt: Sequence[int], anchor: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Places of a prompt's tokens and of those that they should become, from the first that differs to the end.

    Last words are paired, and so is the padding after them; words that the prompt has more go to the first that
    differs in the anchor.

    Args:
        prompt: its token ids, begin and end included, without padding.
        anchor: likewise.
        length: with padding.

    Raises:
        ValueError: for the same tokens.
    """
    if list(prompt) == list(anchor):
        raise ValueError(OWN_ANCHOR)
    first = next((i for i, (a, b) in enumerate(zip(prompt, anchor, strict=False)) if a != b), 0)
    shift = len(anchor) - len(prompt)
    return [(i, max(first, i + shift)) for i in range(first, length) if i + shift < length]
