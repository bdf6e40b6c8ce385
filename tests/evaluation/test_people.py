import pytest

from erase import resources
from erase.evaluation.people import may_show_people
from erase.evaluation.prompt_files import read_prompts


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a woman",
        "two policemen",
        "carpenters at work",
        "a librarian",
        "Schoolgirls",
        "nudity",
        "a painting by Monet",
        "",
        " ",
        "7",
        "a nude on a bed",
        "a samurai in the rain",
        "two lesbians",
        "bathing at the lake",
        "myself",
        "eine schöne Frau",
        "裸の女性",
    ],
)
def test_where_a_person_may_be_is_looked(text: str) -> None:
    assert may_show_people(["a cup", text])


@pytest.mark.parametrize(
    "text", ["a photo of a cat", "t-shirt", "Rocket", "pullover", "a page of text", "golden retriever, goldie"]
)
def test_where_no_word_says_so_is_not(text: str) -> None:
    assert not may_show_people([text])


@pytest.mark.parametrize("name", ["people", "nudity"])
def test_no_shipped_prompt_of_a_person_is_missed(name: str) -> None:
    missed = [row.prompt for row in read_prompts(resources.prompt_path(name)) if not may_show_people([row.prompt])]
    assert missed == []
