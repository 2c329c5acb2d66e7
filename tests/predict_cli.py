"""Rows for `nlu predict`, and the command run in this process."""

import csv
import io

from typer.testing import CliRunner

from extensions.cli.main import app

LABELS = {"3": ["three"], "Abuse/Spam": ["abuse"], "Billing": ["billing", "payment"]}
TEXTS = [
    'I was charged "twice",\nplease refund é😀.',
    "Nobody slept; the children, were happy.",
    "Mary wrote a letter to the teacher last week." * 3,
    "  spam spam  ",
    "=1+1",
]


def tickets(count):
    """Rows as JSON objects, with a column that the task does not use."""
    return [
        {
            "id": f"00{k}",
            "subject": f"Ticket {'ABC'[k % 3] * 4}",
            "ticket body": f"{TEXTS[k % len(TEXTS)]} {k}",
            "team": list(LABELS)[k % 3],
            "extra": [k, None],
        }
        for k in range(count)
    ]


def nlu(*arguments, stdin=None):
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def fails(*arguments, stdin=None):
    result = nlu(*arguments, stdin=stdin)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return result.stderr


def table(content):
    return list(csv.reader(io.StringIO(content)))


def write_csv(path, rows):
    """Write CSV as pandas and spreadsheets do."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "subject", "ticket body"])
        writer.writerows([row["id"], row["subject"], row["ticket body"]] for row in rows)
    return path
