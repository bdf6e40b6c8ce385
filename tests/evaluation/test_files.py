import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from erase.store import files


def test_write_then_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    files.write_json(path, {"a": [1, 2.5, None, "é"]})
    assert files.read_json(path) == {"a": [1, 2.5, None, "é"]}
    files.write_json(path, [1])
    assert files.read_json(path) == [1]
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    assert files.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


READ_ONLY = """
import os, sys
from pathlib import Path
from erase.store import files

def no_writing(top):
    for place in (*top.rglob("*/"), top):
        place.chmod(0o555)

os.chdir(sys.argv[1])
if os.getuid() == 0:  # whom modes do not bind
    os.chown(".", 65534, 65534)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
Path("from/in").mkdir(parents=True)
Path("from/in/a").write_text("a")
no_writing(Path("from"))
files.copy_folder(Path("from"), Path(".killed.tmp/copy"))
Path(".killed.tmp/copy/in/b").write_text("b")
no_writing(Path(".killed.tmp"))
files.sweep(Path())
print(*sorted(os.listdir(".")))
"""


def test_copies_of_read_only_folders_can_be_written_to_and_removed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", READ_ONLY, tmp_path], capture_output=True, text=True)
    assert done.stdout == "from\n", done.stderr
    assert stat.S_IMODE((tmp_path / "from/in").stat().st_mode) == 0o555


@pytest.mark.parametrize(("path", "named"), [("/proc/x/a.txt", "/proc/x"), ("/proc/x", "/proc/x")])
def test_what_cannot_be_written_is_named(path: str, named: str) -> None:
    with pytest.raises(OSError, match=f"^cannot write to {named}: No such file or directory$"):
        files.write_text(Path(path), "")


def test_what_is_not_json_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.json: not written, JSON has no NaN"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_permissions_are_those_of_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    files.write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "not JSON, or cut short"),
        (json.dumps({"a": 1}).encode()[:-1], "cut short"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_read_json_says_what_is_wrong(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        files.read_json(path)


def test_sha256_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        files.sha256(tmp_path / "absent")
