"""The README's text, code blocks and commands, for the tests that run them."""

import re

from support import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def own_data() -> str:
    """The section on one's own data."""
    start = README.index("## Your own data\n")
    return README[start : README.index("\n## ", start)]


def own_data_commands() -> list[str]:
    [block] = blocks("bash", own_data())
    return [line.partition("#")[0].strip() for line in block.splitlines()]
