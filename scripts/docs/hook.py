"""What mkdocs asks of this project: pages that are made from the code, and figures in the pages that name them."""

import re
from pathlib import Path
from typing import Any

import figures
import pages
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
FIGURE = re.compile(r"^<!-- figure: (\w+) -->$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from the code."""
    for uri, text in pages.made(ROOT).items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put each figure where a page names it; it takes the colours of the page, light or dark."""
    return FIGURE.sub(lambda found: figures.FIGURES[found[1]](ROOT), markdown)
