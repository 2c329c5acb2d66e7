"""Commands that answer rows, check a model, draft a recipe, and print the environment: predict, check, init, env."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from extensions.cli.app import Overrides, RecipePath, command, console, prompt_encoder, warn
from extensions.scaffold.command import init

Decode = Enum("Decode", {"likelihood": "likelihood", "sample": "sample", "greedy": "greedy"})
Form = Enum("Form", {"csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "parquet": "parquet"})

command(init)


@command
def predict(
    run: Annotated[str, typer.Argument(help="run folder, adapter folder or merged model", metavar="RUN")],
    source: Annotated[
        str | None,
        typer.Argument(help="rows: .csv, .tsv, .jsonl or .parquet; - or a pipe: standard input", metavar="[INPUT]"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="file to write, by its suffix; default: CSV to standard output")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", metavar="KEY=VALUE", help="answer this row; once for each column")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="also a column p(LABEL) for each label")
    ] = False,
    decoding: Annotated[
        Decode, typer.Option(help="likelihood: the most probable answer; sample, greedy: the model writes one")
    ] = Decode.likelihood,
    task: Annotated[str | None, typer.Option(help="name, if the model has several")] = None,
    temperature: Annotated[
        str | None,
        typer.Option(
            metavar="auto|NUMBER",
            help="of the probabilities; auto: fit it on the run's validation rows and keep it with the model",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="base model, if moved since training")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="rows answered together")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if available")] = None,
    form: Annotated[
        Form | None, typer.Option("--format", help="of standard input and output; overrides a file's suffix")
    ] = None,
    prefix: Annotated[str, typer.Option(help="of the names of added columns")] = "",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that comes with the base model")
    ] = False,
) -> None:
    """Answer rows: write the input with answer and confidence per row, and print scores if it has labels."""
    from extensions.inference.command import PredictOptions, run_predict

    run_predict(
        PredictOptions(
            run,
            source,
            out,
            text or [],
            probabilities,
            decoding.value,
            task,
            temperature,
            model,
            batch_size,
            device,
            form.value if form else None,
            prefix,
            trust_remote_code,
        )
    )


@command
def check(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Load a recipe's model, compare the project's computation with the model's own forward, and print the result."""
    from extensions.cli.preflight import needs_root
    from extensions.model.loading import load_config
    from extensions.recipe import load_recipe
    from extensions.runs.model_check import check_model

    resolved = load_recipe(recipe, overrides or [])
    encoder, config = prompt_encoder(resolved), load_config(resolved.model)
    lines = check_model(resolved, encoder, config, not needs_root(resolved), warn)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for what, found in lines:
        table.add_row(what, found)
    console.print(table)


@command
def env() -> None:
    """Print versions and devices, for bug reports."""
    import torch

    from extensions.common.versions import versions

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    print(json.dumps(versions() | {"devices": devices, "threads": torch.get_num_threads()}, indent=2))
