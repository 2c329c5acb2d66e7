"""The project's pages: their text, code blocks and commands, for the tests that run them."""

import re

from support import ROOT

# Without the pages of tests/: their scripts have tests of their own.
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(ROOT.glob("extensions/**/*.md")), *sorted(ROOT.glob("launch/*.md")))
}
README = PAGES["README.md"]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands_of(text: str) -> list[str]:
    """The commands of a page's bash blocks, without comments."""
    lines = [line.partition("#")[0].strip() for block in blocks("bash", text) for line in block.splitlines()]
    return [line for line in lines if line]


def own_data() -> str:
    """The README's section on one's own data."""
    start = README.index("## Your own data\n")
    return README[start : README.index("\n## ", start)]


def own_data_commands() -> list[str]:
    """Run by tests/test_tickets.py, in a folder of their own."""
    return commands_of(own_data())
