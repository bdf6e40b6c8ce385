"""The pages that are made from the code: commands, settings, presets, methods, packages, changelog."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import figures
import typer
import yaml

from erase.cli.common import app
from erase.config import PIPELINES
from erase.config.listing import Setting, listed, listed_method
from erase.methods import find_method, list_methods

BAR = re.compile(r"(?<!\\)[|]")
TITLES = {
    "sd": "Text-to-image models: `erase run sd`",
    "ddpm": "Class-conditional models: `erase run ddpm`",
    "classify": "Image classifiers: `erase run classify`",
}


def made(root: Path) -> dict[str, str]:
    """Every page that is made, by its place in the documentation."""
    return {
        "reference/cli.md": commands(),
        "reference/configuration.md": configuration(),
        "reference/presets.md": presets(root),
        "reference/methods.md": (root / "erase/methods/README.md").read_text(encoding="utf-8"),
        "reference/attacks.md": (root / "erase/attacks/README.md").read_text(encoding="utf-8"),
        "reference/embedded-models.md": (root / "pipelines/tiny/README.md").read_text(encoding="utf-8"),
        "reference/prompt-sets.md": (root / "prompts/README.md").read_text(encoding="utf-8"),
        "development/contributing.md": (root / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "development/changelog.md": (root / "CHANGELOG.md").read_text(encoding="utf-8"),
        "development/architecture.md": architecture(root),
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[BAR.sub(r"\|", cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def commands() -> str:
    """Every command with its arguments and options, as `-h` shows them."""
    parts = [
        "# Command line",
        "Made from the commands themselves. `erase COMMAND -h` shows the same in a terminal; "
        "`erase --install-completion` completes presets, settings and models. A wrong input gets one line that starts "
        "with `erase:`, and exit status 2; with `ERASE_DEBUG=1` the traceback is shown as well.",
    ]
    for name, command in _leaves(typer.main.get_command(app), "erase"):
        parts.append(f"## {name}")
        for text in re.split(r"\n\s*\n", (command.help or "").strip()):
            text = " ".join(text.split())
            example = text.startswith("Example: ")
            parts.append(f"```bash\n{text.removeprefix('Example: ')}\n```" if example else escape(text))
        rows = [[f"`{_words(p)}`", escape(getattr(p, "help", None) or "")] for p in command.params if p.name != "help"]
        if rows:
            parts.append(table(["argument or option", "meaning"], rows))
    return "\n\n".join(parts) + "\n"


def _leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The commands in the order of `erase -h`, those of groups in their place."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    order = command.list_commands(None)
    for each in order:
        yield from _leaves(inner[each], f"{name} {each}")


def _words(param: Any) -> str:
    if param.param_type_name == "argument":
        return param.metavar or param.name.upper()
    return ", ".join([*param.opts, *param.secondary_opts])


def escape(text: str) -> str:
    """Words as Markdown shows them: stars and angle brackets stand for themselves."""
    return text.replace("<", "&lt;").replace("*", "\\*")


def configuration() -> str:
    """Every setting, its values, default and meaning, from the dataclasses and the methods' builders."""
    parts = [
        "# Configuration",
        "Made from the code. Every setting can be given as `key=value` after the preset: "
        "`erase run sd sd_photos_sfron train.steps=20`. `erase settings sd` prints the same list, "
        "`erase show PRESET` the values that a preset sets.",
    ]
    for name, kind in PIPELINES.items():
        parts += [f"## {TITLES[name]}", settings(list(listed(kind)))]
    parts.append("## Settings of the methods")
    parts.append("What they do is explained on the page [Methods](methods.md).")
    for method in list_methods():
        found = list(listed_method(find_method(method)))
        parts += [f"### {method}", settings(found) if found else "No settings."]
    return "\n\n".join(parts) + "\n"


def settings(rows: list[Setting]) -> str:
    """A table of settings."""
    return table(
        ["setting", "values", "default", "meaning"],
        [[f"`{r.path}`", escape(r.values), escape(r.default.removeprefix("default ")), escape(r.text)] for r in rows],
    )


def presets(root: Path) -> str:
    """Every preset and comparison with its note."""
    parts = ["# Presets and comparisons", "Made from the files. `erase show NAME` prints one with all its values."]
    for title, folder in (("Presets", "presets"), ("Comparisons", "comparisons")):
        rows = []
        for path in sorted((root / "pipelines" / folder).glob("*.yaml")):
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            rows.append([f"`{path.stem}`", f"`{data['pipeline']}`", escape(" ".join(data.get("note", "").split()))])
        parts += [f"## {title}", table(["name", "for `erase run`", "note"], rows)]
    return "\n\n".join(parts) + "\n"


def architecture(root: Path) -> str:
    """The written page with a table of the packages below the figure."""
    names = [name for row in figures.layers(root) for name in row]
    uses = figures.imports(root, names)
    lines = []
    for name in names:
        file = root / "erase" / name
        source = (file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text(encoding="utf-8")
        first = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]
        lines.append([f"`{name}`", escape(" ".join(first.split())), ", ".join(sorted(uses[name])) or "–"])
    page = (root / "scripts/docs/architecture.md").read_text(encoding="utf-8")
    return page.replace("<!-- table: packages -->", table(["package", "what it is", "imports"], lines))
