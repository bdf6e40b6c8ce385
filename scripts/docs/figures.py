"""The figures of the documentation, as SVG: the method's step, and the packages with their real imports."""

import ast
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

ARROW = (
    '<defs><marker id="{id}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path class="head" d="M0,0L8,4L0,8z"/></marker></defs>'
)


def _svg(name: str, width: int, height: int, parts: Iterable[str], label: str) -> str:
    body = "".join([ARROW.format(id=f"{name}-arrow"), *parts])
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    return f'<div class="figure" markdown="0">{head}{body}</svg></div>'


def _box(x: float, y: float, width: float, height: float, lines: Sequence[str], mark: bool = False) -> str:
    """A box with its name and, below it in small letters, what it does."""
    out = [f'<rect class="box{" mark" if mark else ""}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>']
    top = y + height / 2 + 5 - 8 * (len(lines) - 1)
    for i, line in enumerate(lines):
        small = ' class="small"' if i else ""
        out.append(f'<text{small} x="{x + width / 2}" y="{top + 16 * i}" text-anchor="middle">{escape(line)}</text>')
    return "".join(out)


def _arrow(name: str, path: str) -> str:
    return f'<path class="line" d="{path}" marker-end="url(#{name}-arrow)"/>'


def method(root: Path) -> str:
    """A step of SFR-on: what goes into it, and in which order."""
    name, rows = "method", []
    rows += [
        _box(10, 20, 150, 56, ["forget data", "images of the concept"]),
        _box(10, 170, 150, 56, ["remain data", "everything that must stay"]),
        _box(200, 95, 130, 56, ["S: mask", "once, before step 1"]),
        _box(380, 20, 150, 56, ["fast step", "masked, weighted by F"]),
        _box(380, 170, 150, 56, ["K slow steps", "on the remain loss"]),
        _box(580, 95, 130, 56, ["R-on: outer step", "φ ← φ + α (θ - φ)"]),
    ]
    rows += [
        _arrow(name, path)
        for path in (
            "M160,60C180,70 180,110 198,115",
            "M160,186C180,176 180,136 198,131",
            "M330,115C350,105 360,75 378,62",
            "M160,40L378,40",
            "M160,206L378,206",
            "M455,76L455,168",
            "M530,190C550,180 560,155 578,142",
            "M645,95C640,40 590,30 532,40",
        )
    ]
    rows.append('<text class="small" x="655" y="50">next step</text>')
    return _svg(name, 730, 240, rows, "A step of SFR-on: a masked fast step, K slow steps, an outer step")


def layers(root: Path) -> list[list[str]]:
    """The packages of `erase`, top row first, as `pyproject.toml` has them checked."""
    config = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(c for c in config["tool"]["importlinter"]["contracts"] if c["id"] == "layers")
    return [[name.strip(" ()") for name in row.replace(":", "|").split("|")] for row in contract["layers"]]


def imports(root: Path, names: Iterable[str]) -> dict[str, set[str]]:
    """Which packages of `erase` each of them imports, read from their source."""
    known, found = set(names), {}
    for name in known:
        place = root / "erase" / name
        files = place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]
        used = {part for file in files for part in _imported(ast.parse(file.read_text(encoding="utf-8")))}
        found[name] = (used & known) - {name}
    return found


def _imported(tree: ast.AST) -> Iterable[str]:
    for node in ast.walk(tree):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            lone = node.module == "erase"
            modules = [f"erase.{a.name}" for a in node.names] if lone else [node.module]
        yield from (module.split(".")[1] for module in modules if module.startswith("erase."))


def direct(uses: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The imports that no chain of other imports implies: few enough to be drawn."""

    def below(name: str) -> set[str]:
        return set().union(*({other, *below(other)} for other in uses[name])) if uses[name] else set()

    return {name: {o for o in used if not any(o in below(via) for via in used - {o})} for name, used in uses.items()}


def house(root: Path) -> str:
    """The packages of `erase`, a row for each layer; arrows are imports, without those that others imply."""
    rows, high, wide = [row for row in layers(root) if "fisher" not in row], 62, 760  # other names of engine modules
    uses = imports(root, [name for row in rows for name in row])
    place: dict[str, tuple[float, float]] = {}
    boxes = []
    for i, row in enumerate(rows):
        for k, name in enumerate(row):
            x = wide * (k + 1) / (len(row) + 1)
            place[name] = (x, 10 + high * i)
            boxes.append(_box(x - 65, 10 + high * i, 130, 32, [name]))
    lines = []
    for name, used in direct(uses).items():
        x, y = place[name]
        for other in sorted(used):
            to_x, to_y = place[other]
            if to_y == y:
                lines.append(_arrow("house", f"M{x + 65:.0f},{y + 16:.0f}L{to_x - 67:.0f},{to_y + 16:.0f}"))
                continue
            bend = (to_y - y) / 2
            curve = f"C{x:.0f},{y + bend:.0f} {to_x:.0f},{to_y - bend / 2:.0f} {to_x:.0f},{to_y - 2:.0f}"
            lines.append(_arrow("house", f"M{x:.0f},{y + 32:.0f}{curve}"))
    return _svg("house", wide, 10 + high * len(rows), [*lines, *boxes], "The packages of erase and their imports")


FIGURES: dict[str, Callable[[Path], str]] = {"method": method, "house": house}
