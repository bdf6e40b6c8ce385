from pathlib import Path

import pytest

from erase import resources

FINDERS = {
    "preset": (resources.preset_path, resources.list_presets),
    "prompt set": (resources.prompt_path, resources.list_prompts),
    "comparison": (resources.comparison_path, resources.list_comparisons),
    "embedded model": (resources.tiny_path, resources.list_tiny),
}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Resources of our own making, so that these tests do not depend on what is shipped."""
    for name in (
        "pipelines/presets/sfron-nudity.yaml",
        "pipelines/presets/sfron-style.yaml",
        "pipelines/presets/README.md",
        "pipelines/comparisons/objects.yaml",
        "pipelines/comparisons/README.md",
        "pipelines/tiny/photos-sd/model_index.json",
        "pipelines/tiny/photos-classifier/config.json",
        "pipelines/tiny/README.md",
        "prompts/people.csv",
        "prompts/README.md",
    ):
        path = tmp_path / "shipped" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(resources, "_ROOT", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shipped"


def test_lists_names_only(shipped: Path) -> None:
    assert resources.list_presets() == ["sfron-nudity", "sfron-style"]
    assert resources.list_comparisons() == ["objects"]
    assert resources.list_prompts() == ["people"]
    assert resources.list_tiny() == ["photos-classifier", "photos-sd"]


def test_finds_by_name(shipped: Path) -> None:
    assert resources.preset_path("sfron-style") == shipped / "pipelines/presets/sfron-style.yaml"
    assert resources.comparison_path("objects") == shipped / "pipelines/comparisons/objects.yaml"
    assert resources.prompt_path("people") == shipped / "prompts/people.csv"
    assert resources.tiny_path("photos-sd") == shipped / "pipelines/tiny/photos-sd"


@pytest.mark.parametrize("kind", FINDERS)
def test_finds_by_path(kind: str, shipped: Path, tmp_path: Path) -> None:
    find, _ = FINDERS[kind]
    mine = tmp_path / "mine"
    mine.mkdir()
    assert find(mine) == mine
    assert find(str(mine)) == mine
    assert find("mine") == Path("mine")


@pytest.mark.usefixtures("shipped")
def test_a_file_in_the_working_folder_shadows_no_name(tmp_path: Path) -> None:
    (tmp_path / "people").touch()
    assert resources.prompt_path("people").suffix == ".csv"
    assert resources.prompt_path("./people") == Path("people")


@pytest.mark.parametrize("kind", FINDERS)
def test_unknown_name_says_what_there_is(kind: str, shipped: Path) -> None:
    find, names = FINDERS[kind]
    with pytest.raises(ValueError, match=f"^no {kind} 'qqqq'; {kind}s: {', '.join(names())}$"):
        find("qqqq")


@pytest.mark.usefixtures("shipped")
def test_unknown_name_suggests_a_close_one() -> None:
    with pytest.raises(ValueError, match="did you mean sfron-nudity"):
        resources.preset_path("sfron_nudity")


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("name", ["mine.csv", "mine.txt", "folder/mine"])
def test_missing_file_is_named_as_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"no prompt set file '{name}'"):
        resources.prompt_path(name)


@pytest.mark.usefixtures("shipped")
def test_empty_name_is_unknown() -> None:
    with pytest.raises(ValueError, match="no preset ''"):
        resources.preset_path("")


def test_what_is_shipped_is_found() -> None:
    assert {"nudity", "people", "objects", "styles", "everyday", "photos"} <= set(resources.list_prompts())
    for find, names in FINDERS.values():
        for name in names():
            assert find(name).exists()
