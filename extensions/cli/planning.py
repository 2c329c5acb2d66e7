"""Commands around a training run: `plan` estimates its cost, `sweep` runs a grid of recipe keys."""

from __future__ import annotations

import json
import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from extensions.cli.app import Overrides, RecipePath, command, console, warn

Method = Enum("Method", {"ppo": "ppo", "sft": "sft", "eval": "eval", "encoder": "encoder"})


@command
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="ranks, 1 to 1024")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="plan for a CPU, one rank")] = False,
    gpu: Annotated[str, typer.Option(help="t4, a10, rtx4090, l40s, a100-40, a100-80, h100 or h200")] = "h100",
    gpu_memory: Annotated[float | None, typer.Option(metavar="GIB", help="memory of a device, if different")] = None,
    link: Annotated[
        str, typer.Option(metavar="LINK", help="between ranks: nvlink, infiniband, ethernet, or GB/s")
    ] = "nvlink",
    rate: Annotated[float | None, typer.Option(metavar="TFLOPS", help="peak rate at the model's dtype")] = None,
    bandwidth: Annotated[float | None, typer.Option(metavar="GB/S", help="memory bandwidth of a device")] = None,
    utilisation: Annotated[
        float | None, typer.Option(metavar="SHARE", help="share of the peak rate that a large pass reaches")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="measure this machine's CPU; takes a second or two")
    ] = False,
    prefix_tokens: Annotated[int | None, typer.Option(help="tokens that all prompts of a task begin with")] = None,
    suffix_tokens: Annotated[int | None, typer.Option(help="tokens of a prompt after the prefix")] = None,
    response_tokens: Annotated[int | None, typer.Option(help="tokens of a response, instead of the budget")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """Memory, FLOPs, step and epoch time of a training, and the ZeRO stage, micro-batch and checkpointing to use."""
    from extensions.planner import Planner, PlanOptions, plan_tables
    from extensions.recipe import load_recipe

    options = PlanOptions(
        cpu or gpus == 0,
        gpu,
        gpu_memory,
        link,
        rate,
        bandwidth,
        utilisation,
        measure,
        prefix_tokens,
        suffix_tokens,
        response_tokens,
    )
    planned = Planner(load_recipe(recipe, overrides or []), options, warn).plan(1 if options.cpu else gpus)
    if as_json:
        print(json.dumps(planned.as_json(), indent=2))
        return
    for part in plan_tables(planned):
        console.print(part)


@command
def sweep(
    recipe: RecipePath,
    overrides: Overrides = None,
    method: Annotated[Method, typer.Option(help="what each run does: launch/METHOD.sh")] = Method.ppo,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="values to try; may be repeated; ppo has ppo.batch_size=4,8,12,16"),
    ] = None,
    together: Annotated[bool, typer.Option("--together", help="one run of all tasks, not one per task")] = False,
    commands: Annotated[
        bool, typer.Option("--print", help="print the commands of unfinished runs; run nothing")
    ] = False,
    collected: Annotated[bool, typer.Option("--collect", help="write the table of finished runs; run nothing")] = False,
    launcher: Annotated[str, typer.Option(help="program that starts launch/METHOD.sh, with its options")] = "deepspeed",
    out: Annotated[Path | None, typer.Option(help="folder to write; default: runs/NAME-METHOD-sweep")] = None,
) -> None:
    """Run tasks x a grid of recipe keys, each as its own run, and choose the best of each task by validation."""
    from extensions.sweeps.grid import parse_launcher, plan
    from extensions.sweeps.runner import collect, run, unfinished

    program = parse_launcher(launcher)
    planned = plan(recipe, overrides or [], method.value, grid or [], together, out, warn)
    if collected:
        collect(planned)
    elif commands:
        for cell in unfinished(planned):
            print(shlex.join(planned.command(cell, program)))
    else:
        raise typer.Exit(run(planned, program))
