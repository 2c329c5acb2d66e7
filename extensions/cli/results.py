"""Commands on finished runs: report, submit, merge, replay."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from extensions.cli.app import OutputFolder, Overrides, RecipePath, command, console, warn

Suite = Enum("Suite", {"glue": "glue", "superglue": "superglue"})
Fill = Enum("Fill", {"majority": "majority"})
PaperTable = Enum("PaperTable", {"glue": "glue", "superglue": "superglue", "models": "models"})


@command
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="run folders, sweep folders, or folders of these", metavar="RUN...")
    ],
    table: Annotated[
        PaperTable | None, typer.Option(help="only this table of the paper; default: each that a run has a task of")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder to write", metavar="DIR")] = Path("report"),
    html: Annotated[
        bool, typer.Option("--html", help="also report.html for a browser, here and in each run folder")
    ] = False,
) -> None:
    """Compare runs as the paper does: its tables with our rows, intervals, bias, costs, curves, a model card."""
    from extensions.reporting.finished_runs import find_runs
    from extensions.reporting.report import write_report

    found = find_runs(runs, warn)
    paths = write_report(found, out, table.value if table else None)
    if html:
        from extensions.reporting.comparison_page import write_pages

        paths += write_pages(found, out, warn)
    for path in paths:
        console.print(str(path))


@command
def submit(
    sources: Annotated[list[Path], typer.Argument(help="run folders, or JSONL files of predictions", metavar="RUN...")],
    suite: Annotated[Suite, typer.Option(help="whose server the archive is for")],
    out: Annotated[Path | None, typer.Option(help="archive to write; default: submission_SUITE.zip")] = None,
    data_root: Annotated[
        str | None, typer.Option("--data-root", help="folder of the official download, to check every row number")
    ] = None,
    fill: Annotated[Fill | None, typer.Option(help="answers for tasks without predictions")] = None,
    check: Annotated[bool, typer.Option("--check", help="check an archive, RUN, and write nothing")] = False,
) -> None:
    """Write the archive for the GLUE or SuperGLUE evaluation server, and check it."""
    from extensions.evaluation.submission import archive_table, check_archive, make_archive

    if check:
        for source in sources:
            check_archive(source, suite.value, data_root)
            console.print(f"{source}: a valid {suite.value} submission")
        return
    target = out or Path(f"submission_{suite.value}.zip")
    entries = make_archive(sources, suite.value, target, data_root, fill.value if fill else None)
    console.print(archive_table(entries))
    console.print(str(target))


@command
def merge(recipe: RecipePath, folder: OutputFolder, overrides: Overrides = None) -> None:
    """Write the recipe's model with its adapter (model.adapter=...) merged in, as a plain model for model.path."""
    from extensions.inference.manifest import write_merged_manifest
    from extensions.model.merge import merge_adapter
    from extensions.recipe import load_recipe

    model = load_recipe(recipe, overrides or []).model
    merged = merge_adapter(model, folder, lambda written: write_merged_manifest(str(model.adapter), written, warn))
    console.print(f"merged model: {folder}\nchecked as written: {merged}")


@command
def replay(
    folder: Annotated[Path, typer.Argument(help="RUN/failed/step-N of a stopped run", metavar="FOLDER")],
    overrides: Overrides = None,
) -> None:
    """Recompute the batch that stopped a run, and name the samples and modules with non-finite values."""
    from extensions.runs.replay import replay_batch, replay_table

    problems, samples = replay_batch(folder, overrides or [])
    console.print("\n".join(["in the run:", *(f"  {line}" for line in problems or ["none recorded"])]))
    console.print(replay_table(samples))
    bad = sum(sample.is_bad for sample in samples)
    if not all(sample.check.losses for sample in samples):
        console.print("the run stopped before it had losses, so nothing was computed again")
        return
    console.print(
        f"{bad} of {len(samples)} samples are non-finite again"
        if bad
        else "all samples are finite now: the cause was that step's dropout masks, the precision, or the device"
    )
