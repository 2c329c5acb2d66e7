"""Fixtures of the metrics and submission tests."""

import pytest
from servers import ANSWERS, LAYOUT, MEMBERS, all_of, run_rows, written

from extensions.evaluation.submission import make_archive


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    for name, text in LAYOUT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode("utf-8"))
    return root


@pytest.fixture(scope="module")
def rows(official):
    return {name: run_rows(official, name, answers) for name, answers in ANSWERS.items()}


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "sent.zip"


@pytest.fixture(scope="module")
def archives(official, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    made = {}
    for suite in MEMBERS:
        source = written(folder / f"{suite}.jsonl", all_of(rows, suite))
        entries = make_archive([source], suite, folder / f"{suite}.zip", str(official / suite))
        made[suite] = (folder / f"{suite}.zip", entries)
    return made
