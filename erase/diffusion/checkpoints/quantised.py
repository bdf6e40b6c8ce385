"""Files of quantised weights, by names, dtypes and suffix: what they are, and why their weights cannot learn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from erase.diffusion.checkpoints.layout import sketch_of

EIGHT = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes of networks that do not learn: they are read, in the dtype that the others have."""
GGUF = ".gguf"
SIGNS = (
    (r".*\.quant_state\.bitsandbytes__(nf4|fp4)", "4 bits of bitsandbytes (NF4 or FP4)"),
    (r".*\.weight\.(absmax|quant_map|nested_absmax)", "4 bits of bitsandbytes (NF4 or FP4)"),
    (r".*\.SCB", "8 bits of bitsandbytes (int8)"),
    (r".*\.(qweight|qzeros|wscales|wtscale)", "4 or 8 bits of SVDQuant, AWQ or GPTQ"),
    (r".*\.weight\._(data|scale|shift)", "integers of quanto"),
    (r".*\b(scale_weight|weight_scale|weight_scale_2|scaled_fp8|comfy_quant)", "scaled fp8 or fp4"),
)
"""Names beside quantised weights, and what those are."""
ADVICE = "get the same model in F16, BF16 or F32"


class QuantisedError(ValueError):
    """Quantised weights, which cannot learn."""


def refuse(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file whose weights are packed integers or have scales beside them.

    Raises:
        QuantisedError: for one.
    """
    for sign, kind in SIGNS:
        if any(re.fullmatch(sign, name) for name in tensors):
            raise QuantisedError(
                f"{path} is quantised, {kind}: such weights cannot be trained, so nothing can be erased: {ADVICE}"
            )


def refuse_gguf(path: Path) -> None:
    """Refuse a GGUF file.

    Raises:
        QuantisedError: for one.
    """
    if path.suffix.lower() == GGUF:
        raise QuantisedError(
            f"{path} is GGUF: its packed integers cannot be trained, so nothing can be erased: {ADVICE}"
        )


def refuse_eight(path: Path, tensors: Mapping[str, Tensor], name: str) -> None:
    """Refuse a weight in 8 bits that learns.

    Raises:
        QuantisedError: for one.
    """
    dtype = sketch_of(tensors, name).dtype
    if dtype in EIGHT:
        raise QuantisedError(
            f"{path} is fp8 ({str(dtype).removeprefix('torch.')}), too coarse for what erasing changes: {ADVICE}"
        )
