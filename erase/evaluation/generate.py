"""Prompts in, a folder of images and their manifest out.

Seeding: one CPU generator an image, from (row seed, sample index) and nothing else. With the last batch
padded to full size, an image does not depend on the order of the rows, on how many there are, or on a resume.

The folder: ``settings.json`` (written first: what the pixels depend on), ``00003-01.png`` (row 3, sample 1), and
``manifest.jsonl``, which grows by a batch at a time, so a killed run can be resumed, and is put in row order at the
end; each of its rows names the settings by their hash.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from erase.evaluation.manifest import (
    MANIFEST,
    OF_ROWS,
    SETTINGS,
    ManifestRow,
    append_rows,
    read_manifest,
    read_rows,
    write_rows,
)
from erase.evaluation.prompt_files import MAX_SEED, PromptRow
from erase.store.files import differences, in_use, json_text, read_json, sha256, write_bytes, write_json

if TYPE_CHECKING:
    import torch


class Sampler(Protocol):
    """Draws one image a prompt; image i depends on prompt i, generator i and the settings alone."""

    def __call__(
        self,
        prompts: list[str],
        generators: list[torch.Generator],
        *,
        guidance: float | None,
        width: int | None,
        height: int | None,
    ) -> list[Image.Image]:
        """Draw; ``None`` is the sampler's own choice. Guidance is the scale, width and height are pixels."""
        ...


def image_generator(seed: int, index: int) -> torch.Generator:
    """A CPU generator for sample ``index`` of a row with ``seed``.

    Its seed is the first 8 bytes, big-endian, of SHA-256 of the ASCII text ``erase:{seed}:{index}``; torch's
    CPU engine uses the lower 32 bits of it.

    Raises:
        ValueError: ``seed`` outside 0..2**32 - 1, or a negative ``index``.
    """
    import torch

    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed}, expected 0 to {MAX_SEED}")
    if index < 0:
        raise ValueError(f"index is {index}, expected 0 or more")
    digest = hashlib.sha256(f"erase:{seed}:{index}".encode("ascii")).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big"))


@dataclass(frozen=True)
class _Job:
    file: str
    row: PromptRow
    index: int


def generate(
    sampler: Sampler,
    rows: Sequence[PromptRow],
    out: Path,
    *,
    per_prompt: int = 1,
    batch_size: int = 8,
    resume: bool = False,
    reuse: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    settings: Mapping[str, Any] = {},
) -> list[ManifestRow]:
    """Draw ``per_prompt`` images of each row into ``out``.

    A batch holds rows of one (guidance, width, height), and the last of each is padded to ``batch_size`` with
    repeats that are thrown away, so that the same kernels run whatever is left to draw. ``batch_size`` may
    change on resume (it changes pixels by float rounding only); all else must be as it was.

    Args:
        sampler: see `Sampler`.
        rows: the prompts.
        out: a folder; it must be empty or absent, but for ``resume``.
        per_prompt: images a row; sample i of a row is seeded by (row seed, i).
        batch_size: images a call of ``sampler``.
        resume: keep the images that are in the manifest and whose bytes are as they were written; draw the
            rest.
        reuse: another folder made with the same ``settings``, whatever its rows: images that it has are copied, not
            drawn.
        progress: called with (images there, images in all) at the start and after each batch.
        settings: what else the pixels depend on (model hash, steps, scheduler, ...), as JSON; kept in
            ``settings.json`` and compared on resume.

    Returns:
        The manifest, in row order.

    Raises:
        ValueError: no rows, a count below 1, an ``out`` in use, settings that are not JSON or differ on
            resume or from ``reuse``, or a sampler that returns another number of images than prompts.
    """
    out = Path(out)
    if not rows:
        raise ValueError("got no prompts, expected at least 1")
    for name, value in (("per_prompt", per_prompt), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    jobs = [
        _Job(f"{number:05d}-{index:02d}.png", row, index)
        for number, row in enumerate(rows)
        for index in range(per_prompt)
    ]
    record = _record(rows, per_prompt, settings)
    digest = hashlib.sha256(json_text(record).encode("utf-8")).hexdigest()
    done = _on_hand(out, jobs, record, digest, resume, reuse)
    if progress:
        progress(len(done), len(jobs))
    for batch in _batches([job for job in jobs if job.file not in done], batch_size):
        images = _generate_batch(sampler, batch, batch_size)
        new = [_save(out, job, image, digest) for job, image in zip(batch, images, strict=True)]
        append_rows(out / MANIFEST, new)
        done.update((row.file, row) for row in new)
        if progress:
            progress(len(done), len(jobs))
    manifest = [done[job.file] for job in jobs]
    write_rows(out / MANIFEST, manifest)
    return manifest


def _on_hand(
    out: Path, jobs: Sequence[_Job], record: Mapping[str, Any], digest: str, resume: bool, reuse: Path | None
) -> dict[str, ManifestRow]:
    """The images that need not be drawn, by file: kept from the run that is resumed, or copied from ``reuse``."""
    spare = {} if reuse is None else _spare(Path(reuse), record)
    done = {name: replace(row, settings=digest) for name, row in _prepare(out, record, jobs, resume).items()}
    taken = [_copy(out, job, path, digest) for job in jobs if job.file not in done and (path := spare.get(_key(job)))]
    if taken:
        append_rows(out / MANIFEST, taken)
    done.update((row.file, row) for row in taken)
    return done


def _generate_batch(sampler: Sampler, batch: list[_Job], batch_size: int) -> list[Image.Image]:
    """The images of a batch, which is padded to ``batch_size`` with repeats that are thrown away."""
    padded = batch + [batch[-1]] * (batch_size - len(batch))
    images = sampler(
        [job.row.prompt for job in padded],
        [image_generator(job.row.seed, job.index) for job in padded],
        guidance=batch[0].row.guidance,
        width=batch[0].row.width,
        height=batch[0].row.height,
    )
    if len(images) != len(padded):
        raise ValueError(f"the sampler returned {len(images)} images for {len(padded)} prompts")
    return images[: len(batch)]


def begun(out: Path, resume: bool) -> bool:
    """Whether a folder holds images to go on with.

    Raises:
        ValueError: for a file, or a folder that holds something else, or is not to be gone on with.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file, expected a folder")
    if not in_use(out):
        return False
    if not resume:
        raise ValueError(f"{out}: not empty; resume, or give another folder")
    if not (out / SETTINGS).is_file():
        raise ValueError(f"{out}: has no {SETTINGS}, so it cannot be resumed; give another folder")
    return True


def check_reuse(folder: Path) -> None:
    """Refuse a folder that tells nothing of how its images were made.

    Raises:
        ValueError: it has no ``settings.json``.
    """
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"{folder}: has no {SETTINGS}, so its images cannot be used again")


def _record(rows: Sequence[PromptRow], per_prompt: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    record = {
        "schema": 1,
        "rows": len(rows),
        "per_prompt": per_prompt,
        "prompts_sha256": _hash_of(rows),
        "settings": dict(settings),
    }
    if own := [i for i, row in enumerate(rows) if (row.guidance, row.width, row.height) != (None, None, None)]:
        record["own"] = own  # rows with settings of their own, which the manifest does not tell
    try:
        return dict(json.loads(json.dumps(record, allow_nan=False)))  # as it will be read back: tuples are lists
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings are not JSON ({error}); give strings, numbers, lists and mappings") from error


def _hash_of(rows: Sequence[PromptRow]) -> str:
    """SHA-256 of the rows as a JSON list, a row at a time."""
    digest = hashlib.sha256(b"[")
    for number, row in enumerate(rows):
        text = json.dumps(asdict(row), ensure_ascii=True, sort_keys=True)
        digest.update(f"{', ' if number else ''}{text}".encode("ascii"))
    digest.update(b"]")
    return digest.hexdigest()


def _prepare(out: Path, record: Mapping[str, Any], jobs: Sequence[_Job], resume: bool) -> dict[str, ManifestRow]:
    """Check ``out`` against ``record``, write ``settings.json`` if it is new, and find the images to keep."""
    if not begun(out, resume):
        write_json(out / SETTINGS, record)
        return {}
    stored = read_json(out / SETTINGS)
    if changed := differences(stored, record):
        raise ValueError(f"{out}: made with other settings, so it cannot be resumed: {'; '.join(changed)}")
    expected = {job.file: (job.row.prompt, job.row.seed, job.index) for job in jobs}
    kept = {}
    for row in read_rows(out / MANIFEST, cut_short=True) if (out / MANIFEST).is_file() else []:
        path = out / row.file
        same = expected.get(row.file) == (row.prompt, row.seed, row.index)
        if same and path.is_file() and sha256(path) == row.sha256:
            kept[row.file] = row
    # Drop what is not kept, and the half line a killed run may have left, before more is appended.
    write_rows(out / MANIFEST, kept.values())
    return kept


def _spare(folder: Path, record: Mapping[str, Any]) -> dict[tuple[Any, ...], Path]:
    """The images of a folder that can serve again: those of rows that leave everything to the sampler."""
    check_reuse(folder)
    stored = read_json(folder / SETTINGS)
    theirs = stored.get("settings") if isinstance(stored, dict) else None
    if changed := differences({"settings": _of_images(theirs)}, {"settings": _of_images(record["settings"])}):
        raise ValueError(
            f"{folder}: made with other settings, so its images cannot be used again: {'; '.join(changed)}"
        )
    own = {f"{number:05d}" for number in stored.get("own", [])}
    return {
        (row.prompt, row.seed, row.index, None, None, None): path
        for row in read_manifest(folder)
        if row.file.partition("-")[0] not in own
        and (path := folder / row.file).is_file()
        and sha256(path) == row.sha256
    }


def _of_images(settings: Any) -> Any:
    """What images depend on, without what the record says of their folder's rows."""
    return {k: v for k, v in settings.items() if k not in OF_ROWS} if isinstance(settings, Mapping) else settings


def _key(job: _Job) -> tuple[Any, ...]:
    row = job.row
    return (row.prompt, row.seed, job.index, row.guidance, row.width, row.height)


def _copy(out: Path, job: _Job, path: Path, settings: str) -> ManifestRow:
    return _write(out, job, path.read_bytes(), settings)


def _batches(jobs: Sequence[_Job], size: int) -> Iterator[list[_Job]]:
    groups: dict[tuple[float | None, int | None, int | None], list[_Job]] = {}
    for job in jobs:
        groups.setdefault((job.row.guidance, job.row.width, job.row.height), []).append(job)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _save(out: Path, job: _Job, image: Image.Image, settings: str) -> ManifestRow:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return _write(out, job, buffer.getvalue(), settings)


def _write(out: Path, job: _Job, data: bytes, settings: str) -> ManifestRow:
    write_bytes(out / job.file, data)
    return ManifestRow(job.file, job.row.prompt, job.row.seed, job.index, hashlib.sha256(data).hexdigest(), settings)
