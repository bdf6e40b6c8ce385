"""`erase generate`, as a program: what it does to its folder."""

from pathlib import Path

import launched
import micro_ddpm

from erase.diffusion import class_conditional
from erase.evaluation.prompt_files import PromptRow
from erase.programs.folder import LOCK, working_in
from erase.programs.generating import Wanted, generate


def test_a_folder_is_filled_by_one_launch_at_a_time(tmp_path: Path) -> None:
    """A lock of a process holds against others alone: the second one is a process of its own."""
    class_conditional.save_new(micro_ddpm.model(), tmp_path / "model")
    out = tmp_path / "out"

    def work() -> None:
        try:
            generate(str(tmp_path / "model"), None, [PromptRow("cow", 0)], out, Wanted(steps=1), say=lambda line: None)
            print("done")
        except ValueError as error:
            print(error)

    def ask() -> str:
        assert launched.two(work, tmp_path / "log", 1) == [0]
        return (tmp_path / "log.0").read_text()

    with working_in(out):
        assert f"{out} is in use by another process" in ask()
        assert {p.name for p in out.iterdir()} == {LOCK}
    assert ask().endswith("done\n")
    assert {p.name for p in out.iterdir()} == {"00000-00.png", "manifest.jsonl", "settings.json"}
