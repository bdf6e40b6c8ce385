import pytest

from erase import resources
from erase.nearest import FEW, either, meant, nearest, some

MANY = [f"class {i}" for i in range(FEW)] + ["golden retriever"]


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("Golden Retrieve", MANY, "golden retriever"),
        ("retriever", MANY, "golden retriever"),
        ("sd_photo_sfron", ("sd_photos_sfron", "sd_nudity_esd"), "sd_photos_sfron"),
        ("fashion sfron", ("sd_sfron", "ddpm_fashion_sfron", "fashion"), "ddpm_fashion_sfron"),  # most words in common
        ("sfron", ("ddpm_fashion_sfron", "sd_sfron"), "sd_sfron"),  # fewest others
    ],
)
def test_the_nearest_name_is_first(text: str, names: tuple[str, ...], expected: str) -> None:
    assert nearest(text, names)[0] == expected


def test_what_is_like_nothing_is_near_nothing() -> None:
    assert nearest("qqqq", MANY) == nearest("", MANY) == []


def test_few_names_are_listed_and_of_many_the_nearest() -> None:
    assert meant("a", ["ab", "cd"], "all", "more") == "; did you mean ab? all: ab, cd"
    assert meant("q", ["ab", "cd"], "all", "more") == "; all: ab, cd"
    assert meant("clas 7", MANY, "all", "more", "x.").startswith("; did you mean x.class 7, x.class ")
    assert meant("q", MANY, "all", "more") == "; more"
    assert either(["a", "b", "c"]) == "a, b or c"


def test_few_names_are_given_whole_and_many_cut_short() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some(MANY) == f"{', '.join(MANY[:5])}, … ({len(MANY)} in all)"


def test_a_misspelt_preset_does_not_list_all() -> None:
    with pytest.raises(ValueError, match="ddpm_fashion_sfron") as caught:
        resources.preset_path("ddpm_fashon_sfron")
    assert sum(name in str(caught.value) for name in resources.list_presets()) <= 6  # some are part of others
