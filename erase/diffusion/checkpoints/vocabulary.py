"""The vocabulary that all CLIP text encoders share, which a single file does not hold."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from erase import resources

VOCABULARY = ("vocab.json", "merges.txt", "tokenizer.json")
"""Where a tokenizer's folder has it: the first two, or the last."""


@cache
def merges() -> tuple[str, ...]:
    """The merges of the byte-pair encoding, most frequent first."""
    return tuple(gzip.decompress(resources.clip_merges_path().read_bytes()).decode("utf-8").splitlines())


@cache
def vocabulary() -> dict[str, int]:
    """Numbers of all tokens: a letter for each byte, the same at a word's end, what is merged, begin and end."""
    # Bytes that are no printable letter get one above 255.
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    joined = [pair.replace(" ", "") for pair in merges()]
    tokens = [*letters, *(c + "</w>" for c in letters), *joined, "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


def files(tokenizer: str = "tokenizer") -> dict[str, str]:
    """The vocabulary as files of a diffusers folder."""
    table = json.dumps(vocabulary(), ensure_ascii=False, separators=(",", ":"))
    texts = (table, "\n".join(["#version: 0.2", *merges(), ""]))
    return {f"{tokenizer}/{name}": text for name, text in zip(VOCABULARY, texts, strict=False)}


def missing(texts: Mapping[str, str]) -> dict[str, str]:
    """The vocabulary for those tokenizers of a folder's files that have none."""
    found: dict[str, str] = {}
    for name in texts:
        tokenizer, _, file = name.partition("/")
        if file == "tokenizer_config.json" and not any(f"{tokenizer}/{held}" in texts for held in VOCABULARY):
            found |= files(tokenizer)
    return found


def without(texts: Mapping[str, str]) -> dict[str, str]:
    """A folder's files without the vocabularies that are this one."""
    clips = {t for t in {name.partition("/")[0] for name in texts} if is_clip(texts, t)}
    return {k: v for k, v in texts.items() if k.partition("/")[0] not in clips or k.partition("/")[2] not in VOCABULARY}


def is_clip(texts: Mapping[str, str], tokenizer: str = "tokenizer") -> bool:
    """Whether a tokenizer's vocabulary is this one, in each form it has. Tokens are numbered in the order of merges."""
    found: list[dict[str, int]] = []
    table, _, whole = (f"{tokenizer}/{name}" for name in VOCABULARY)
    if table in texts:
        found.append(json.loads(texts[table]))
    if whole in texts:
        held: Any = json.loads(texts[whole])
        if not isinstance(held["model"]["vocab"], dict):  # of another kind, such as T5's
            return False
        added = {token["content"]: token["id"] for token in held.get("added_tokens", [])}
        found.append({**held["model"]["vocab"], **added})
    return bool(found) and all(numbers == vocabulary() for numbers in found)
