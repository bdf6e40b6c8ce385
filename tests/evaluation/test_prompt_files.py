"""Prompt files: ours, I2P's, COCO's, and what is wrong with others."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from erase.evaluation.prompt_files import PromptRow, find_set, read_prompts

I2P = Path(__file__).resolve().parents[3] / "shared" / "data" / "i2p.csv"


@pytest.mark.skipif(not I2P.is_file(), reason="no copy of the I2P prompts here")
def test_i2p() -> None:
    rows = read_prompts(I2P)
    assert len(rows) == 4703
    assert sum(row.seed >= 2**31 for row in rows) == 2357
    assert sum((row.width, row.height) != (512, 512) for row in rows) == 55
    assert len(rows) - len({row.prompt for row in rows}) == 236
    assert [number for number, row in enumerate(rows, start=1) if not row.prompt] == [2261]
    assert (rows[0].seed, rows[0].guidance, rows[0].width, rows[0].case) == (4261553411, 13.0, 512, "0")


@pytest.mark.skipif(not I2P.is_file(), reason="no copy of the I2P prompts here")
def test_i2p_as_on_the_hub(tmp_path: Path) -> None:
    """Two columns by other names, no case_number, a mark at the beginning and a comma too many in each line."""
    with I2P.open(encoding="utf-8-sig", newline="") as file:
        table = list(csv.reader(file))
    names = {"evaluation_seed": "sd_seed", "evaluation_guidance": "sd_guidance_scale"}
    assert names.keys() < set(table[0])
    drop = table[0].index("case_number")
    table[0] = [names.get(name, name) for name in table[0]]
    with (tmp_path / "hub.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([*row[:drop], *row[drop + 1 :], ""] for row in table)
    rows = read_prompts(tmp_path / "hub.csv")
    assert len(rows) == 4703
    assert rows == [replace(row, case=None) for row in read_prompts(I2P)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (",sensitive prompt\n0,one two\n1,three\n", [("one two", 0), ("three", 1)]),  # Ring-A-Bell
        ("target_prompt,adv_prompt\nplain,one two\n", [("one two", 0)]),  # MMA-Diffusion
        ("case_number,prompt,evaluation_seed,evaluation_guidance\n7,one,42,7.5\n", [("one", 42)]),  # UnlearnDiffAtk
        ("prompt,sd_seed\none,42\n", [("one", 42)]),  # I2P on the hub
        ("prompt,sensitive prompt\none,two\n", [("one", 0)]),  # what is called prompt is the prompt
    ],
)
def test_prompt_files_of_attacks(tmp_path: Path, text: str, expected: list[tuple[str, int]]) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert [(row.prompt, row.seed) for row in read_prompts(tmp_path / "a.csv")] == expected


def test_captions_of_coco(tmp_path: Path) -> None:
    text = "case_number,source,prompt,evaluation_seed,coco_id\n0,coco_30k,A cat on a mat.,2463659,113588\n"
    assert read_prompts(write(tmp_path, "a.csv", text)) == [PromptRow("A cat on a mat.", 2463659, case="0")]
    text = "image_id,caption\n113588,A cat on a mat.\n5,A dog.\n"
    assert read_prompts(write(tmp_path, "a.csv", text), default_seed=3) == [
        PromptRow("A cat on a mat.", 3, case="113588"),
        PromptRow("A dog.", 4, case="5"),
    ]


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def test_csv_of_the_wild(tmp_path: Path) -> None:
    text = (
        "\ufeffprompt,categories,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,\r\n"
        '"a cat, ""sitting""\nthere ",x,4294967295,7.5,512,640,,\r\n'
        "a dog,,,,,\r\n"
        "a hen\r\n"
        "\r\n"
    )
    assert read_prompts(write(tmp_path, "a.csv", text), default_seed=10) == [
        PromptRow('a cat, "sitting"\nthere ', 2**32 - 1, 7.5, 512, 640),
        PromptRow("a dog", 11),
        PromptRow("a hen", 12),
    ]


def test_our_own_csv_and_text(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "a.csv", "prompt,anchor,seed\na,b,3\nc,d,4.0\n")) == [
        PromptRow("a", 3),
        PromptRow("c", 4),
    ]
    assert read_prompts(write(tmp_path, "a.txt", "\ufeffa, b\r\nc\n\n"), default_seed=5) == [
        PromptRow("a, b", 5),
        PromptRow("c", 6),
    ]
    assert [row.prompt for row in read_prompts(write(tmp_path, "A.TXT", "a\u2028b\fc\rd\n"))] == ["a\u2028b\fc", "d"]
    assert find_set(str(tmp_path / "A.TXT")) == tmp_path / "A.TXT"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "columns are none; expected a 'prompt' column"),
        ("a.csv", "text,seed\na,1\n", "columns are text, seed; expected a 'prompt' column"),
        ("a.csv", "prompt,seed\n", "holds no prompts"),
        ("a.csv", "prompt,seed\na,1\n ,2\n", "row 2: the prompt is empty"),
        ("a.csv", "prompt,seed\na,4294967296\n", "row 1: seed is '4294967296', expected a whole number from 0 to"),
        ("a.csv", "prompt,seed\na,-1\n", "row 1: seed is '-1'"),
        ("a.csv", "prompt,seed\na,1.5\n", "row 1: seed is '1.5'"),
        ("a.csv", "prompt,guidance\na,nan\n", "row 1: guidance is 'nan'"),
        ("a.csv", "prompt,sd_guidance_scale\na,nan\n", "row 1: sd_guidance_scale is 'nan'"),
        ("a.csv", "prompt,evaluation_seed\na,x\n", "row 1: evaluation_seed is 'x'"),
        ("a.csv", "prompt,width\na,0\n", "row 1: width is '0'"),
        ("a.csv", "seed,prompt\n5\n", "row 1 ends before its prompt"),
        ("a.csv", "prompt,seed\na, b,1\n", "row 1 has 3 values for 2 columns; quote"),
        ("a.csv", 'prompt,seed\na,1\n"b,2\nc,3\n', "line 3 opens is never closed"),
        ("a.csv", '"prompt,seed\na,1\n', "line 1 opens is never closed"),
        ("a.csv", 'prompt,seed\n"b,2\n"c,3\n', "line 2 is not CSV"),
        ("a.txt", "", "holds no prompts"),
        ("a.txt", "a\n\nb\n", "row 2: the prompt is empty"),
        ("a.tsv", "prompt\na\n", "got a '.tsv' file"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=name) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_or_foreign_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such prompt file"):
        read_prompts(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"prompt\n\xff\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="row 2: default seed"):
        read_prompts(write(tmp_path, "c.txt", "a\nb\n"), default_seed=2**32 - 1)
