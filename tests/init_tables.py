"""Tables for `nlu init`, the recipe that it writes for them, and the command run in this process."""

import csv
import json
import random

from typer.testing import CliRunner

from extensions.cli.main import app
from extensions.cli.preflight import problems
from extensions.data.splits import RunData
from extensions.prompts import parse_answer
from extensions.recipe import load_recipe
from extensions.scaffold.draft import draft, write
from extensions.scaffold.entry import InitRequest, make_entry

TEAMS = {"billing": 50, "technical_support": 30, "sales": 15, "legal": 5}
WORDS = ["invoice", "app", "licence", "contract", "again", "since Monday", "please", 'a "quoted" word', "x, y; z", "😀"]


def tickets(count=100):
    rng = random.Random(0)
    teams = [team for team, share in TEAMS.items() for _ in range(share * count // 100)]
    rng.shuffle(teams)
    return [
        {
            "id": str(1000 + 7 * k),
            "subject": f"{team[:3]} {rng.choice(WORDS)}",
            "ticket body": f"{k}: {rng.choice(WORDS)}\n{rng.choice(WORDS)}",
            "team": team,
        }
        for k, team in enumerate(teams)
    ]


def write_csv(path, rows, encoding="utf-8", separator=",", quoting=csv.QUOTE_MINIMAL):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, names, delimiter=separator, quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def make_recipe(model, data, label, **options):
    """The recipe that init writes, loaded as every command loads it, with its rows."""
    request = InitRequest(str(data), label, model=str(model), force=True, **options)
    draft_of = draft(make_entry(request), request, on_gpu=False)
    write(draft_of)
    recipe = load_recipe(draft_of.entry.path)
    warnings = []
    assert problems(recipe, warnings.append) == []  # as in `nlu validate`
    return draft_of, recipe.data.tasks[0], RunData.load(recipe, warnings.append)


def nlu(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def check(task, data):
    """Invariants of every recipe of init: every row has its text, each label's word is parsed as the label."""
    rows = data.train + data.validation + data.table
    assert data.train and data.table and data.validation
    for label in task.labels if not task.multi_label else ():
        assert parse_answer(f"{task.answer(label)}</Judgement>", task) == label
    for row in rows:
        assert row.label is not None
        answer = parse_answer(f"{task.answer(row.label)}</Judgement>", task)
        assert answer == row.label if not task.is_regression else answer is not None


def fails(*arguments):
    result = nlu("init", *arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == "" and "Traceback" not in result.stderr
    return result.stderr
