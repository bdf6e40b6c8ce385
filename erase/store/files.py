"""Files that are either whole or absent: atomic writes, clear reads, content hashes.

The lowest layer: the standard library only, so every module may import it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

AS_JSON = json.JSONEncoder(indent=2, ensure_ascii=False, allow_nan=False)
"""How all JSON of this package is written."""


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Name what was to be written where its place cannot be made: systems name another file, or say it was not found.

    Raises:
        OSError: in the place of the system's.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write to {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a hidden temporary path beside ``path``; on success it is flushed to disk and moved into place.

    A reader sees the old file or the new one, never a part. The folder is created where it is missing; the
    temporary file is removed where anything fails.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path = Path(path)
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with writing_to(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:64]}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, _mode(path))
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def sweep(folder: Path) -> None:
    """Remove what killed writes left under ``folder``: hidden temporary files and folders, named as `replacing` does.

    Not to be called while another process writes there.
    """
    for path in sorted(Path(folder).rglob(".*.tmp")):
        if path.is_dir():
            let_write(path)
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def copy_folder(source: Path, target: Path, ignore: Callable[[str, list[str]], Iterable[str]] | None = None) -> None:
    """Copy a folder as `shutil.copytree` does, but what is copied of a read-only one can be written to and removed.

    Raises:
        OSError: the folder cannot be read, or the copy not be written.
    """
    try:
        shutil.copytree(source, target, ignore=ignore)
    finally:
        let_write(target)


def let_write(folder: Path) -> None:
    """Let the owner write to a folder and to those in it."""
    for here, names, _ in os.walk(folder):
        for place in (here, *(os.path.join(here, name) for name in names)):
            mode = os.lstat(place).st_mode
            if stat.S_ISDIR(mode) and mode & stat.S_IRWXU != stat.S_IRWXU:
                os.chmod(place, stat.S_IMODE(mode) | stat.S_IRWXU)


def in_use(folder: Path) -> bool:
    """Whether a folder holds something; what killed writes left, all of it hidden, is no sign of use."""
    return folder.is_dir() and any(not name.startswith(".") for name in os.listdir(folder))


@contextlib.contextmanager
def claim(file: Path, name: str) -> Iterator[bool]:
    """Whether this process alone has the right to `name` until the context ends; it loses it when it dies.

    Args:
        file: what the processes share; made where it is missing, and left empty.
        name: what is claimed.

    Raises:
        OSError: the file cannot be made.
    """
    with writing_to(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    place = zlib.crc32(name.encode())  # of the one byte that is locked
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except BlockingIOError:
            yield False
        else:  # unless the file was removed, by who had the right, since it was opened
            yield file.exists() and os.path.samestat(os.fstat(handle), file.stat())
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically (see `replacing`).

    Raises:
        OSError: the folder cannot be made or written to.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _mode(path: Path) -> int:
    """The permissions ``path`` has, or those a plain ``open`` would give it (mkstemp gives 0o600)."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, atomically (see `write_bytes`)."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, obj: Any) -> None:
    """Write ``obj`` to ``path`` as indented JSON, atomically (see `replacing`); its text is never all in memory.

    Raises:
        ValueError: ``obj`` holds a NaN or an infinity, which JSON cannot.
        TypeError: ``obj`` holds something that is not JSON.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        try:
            file.writelines(AS_JSON.iterencode(obj))
        except UnicodeEncodeError:
            raise
        except ValueError as error:
            raise ValueError(f"{path}: not written, JSON has no NaN, infinity or cycle ({error})") from error
        file.write("\n")


def json_text(obj: Any) -> str:
    """``obj`` as `write_json` writes it."""
    return AS_JSON.encode(obj) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is missing, is not UTF-8, or is not whole JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path}: a folder, expected a JSON file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text, expected JSON") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON, or cut short (line {error.lineno}: {error.msg})") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 lowercase hex digits.

    Raises:
        ValueError: the file is missing.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{path}: no such file") from error


def guess_kind(path: Path) -> str:
    """What a file is, by its first bytes alone: nothing in it is run or unpacked."""
    with path.open("rb") as file:
        head = file.read(512)
    signs = (
        (b"\x89PNG", "a PNG image"),
        (b"\xff\xd8\xff", "a JPEG image"),
        (b"PK\x03\x04", "a zip archive (torch's pickles are such)"),
        (b"\x80", "a pickle: reading it may run code"),
        (b"GGUF", "GGUF weights"),
        (b"\x1f\x8b", "gzipped data"),
        (b"\x93NUMPY", "a NumPy array"),
        (b"\x89HDF", "an HDF5 file"),
        (b"%PDF", "a PDF document"),
        (b"<", "a page or XML"),
        (b"{", "JSON or text"),
        (b"[", "JSON or text"),
    )
    if not head:
        return "empty"
    found = next((kind for sign, kind in signs if head.startswith(sign)), None)
    return found or ("text" if all(b >= 32 or b in b"\t\n\r" for b in head) else "data of unknown kind")


def paths(data: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested values by their paths: `{"train.steps": 30}`."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        inner = isinstance(value, Mapping) and value
        found |= paths(inner, f"{before}{key}.") if inner else {f"{before}{key}": value}
    return found


def differences(old: Any, new: Any) -> list[str]:
    """Where two records differ, such as `train.steps was 30, now 50`, in their order; long values are cut short."""
    a, b = (paths(x if isinstance(x, Mapping) else {"": x}) for x in (old, new))
    found = []
    for path in {**a, **b}:
        was, now = (json.dumps(x[path], default=str) if path in x else "not set" for x in (a, b))
        if was != now:
            found.append(f"{path} was {was[:80]}, now {now[:80]}")
    return found
