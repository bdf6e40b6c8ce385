"""What is asked of the hub, and what is said of its answers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from erase.store import hub


def answer(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    class Api:
        def model_info(self, name: str, timeout: float) -> None:
            if error is not None:
                raise error

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)


def status(code: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=code, headers={}, request=None, url="https://hub/x")
    return HfHubHTTPError("<html> See the stacktrace above", response=response)


def test_a_model_that_the_hub_has(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, None)
    assert hub.reachable("owner/name")


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_model_that_the_hub_does_not_have_or_show(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    answer(monkeypatch, status(code))
    with pytest.raises(ValueError, match=r"^model 'owner/name' is not a folder") as caught:
        hub.reachable("owner/name")
    assert "html" not in str(caught.value)


@pytest.mark.parametrize("file", ["model_index.json", "config.json"])
def test_a_model_in_the_cache_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """Such as one that was downloaded with another login, or has been taken down since."""
    snapshot = tmp_path / "models--owner--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / file).write_text("{}")
    (tmp_path / "models--owner--name/refs").mkdir()
    (tmp_path / "models--owner--name/refs/main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    answer(monkeypatch, status(404))
    assert not hub.reachable("owner/name")
    with pytest.raises(ValueError, match="is not a folder"):
        hub.reachable("owner/other")


@pytest.mark.parametrize("error", [status(503), OSError("no route to host"), TimeoutError(), ConnectionError()])
def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    answer(monkeypatch, error)
    assert not hub.reachable("owner/name")


class GatedRepoError(Exception):
    """Named as the client's."""


@pytest.mark.parametrize(
    ("error", "cached", "said"),
    [
        (OSError("local_files_only"), True, "HF_HUB_OFFLINE"),
        (GatedRepoError("x"), False, "gated"),
        (OSError(28, "No space left on device"), False, "No space left on device"),
        (RuntimeError("stacktrace above"), False, "RuntimeError"),
    ],
)
def test_a_download_that_failed(error: Exception, cached: bool, said: str) -> None:
    text = str(hub.refusal("owner/name", error, cached))
    assert said in text
    assert "owner/name" in text
    assert not any(word in text for word in ("local_files_only", "stacktrace"))


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("owner/name", True),
        ("stabilityai/stable-diffusion-2-1", True),
        ("name", False),
        ("a/b/c", False),
        ("./name", False),
        ("/name", False),
        ("a photo/of a cat", False),
    ],
)
def test_what_can_be_an_id(name: str, is_id: bool) -> None:
    assert hub.is_id(name) is is_id
