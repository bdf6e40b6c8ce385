"""The vocabulary that Stable Diffusion 1.x and 2.x share, which a single file does not hold."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from erase import resources

VOCABULARY = ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer.json")
"""Where a diffusers folder has it: the first two, or the last."""


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


def files() -> dict[str, str]:
    """The vocabulary as files of a diffusers folder."""
    table = json.dumps(vocabulary(), ensure_ascii=False, separators=(",", ":"))
    return dict(zip(VOCABULARY, (table, "\n".join(["#version: 0.2", *merges(), ""])), strict=False))


def is_clip(texts: Mapping[str, str]) -> bool:
    """Whether a folder's vocabulary is this one, in each form it has. Tokens are numbered in the order of merges."""
    found: list[dict[str, int]] = []
    if VOCABULARY[0] in texts:
        found.append(json.loads(texts[VOCABULARY[0]]))
    if VOCABULARY[2] in texts:
        whole: Any = json.loads(texts[VOCABULARY[2]])
        added = {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
        found.append({**whole["model"]["vocab"], **added})
    return bool(found) and all(numbers == vocabulary() for numbers in found)
