"""Atomic, durable files: after a failed write, on a full disk, with damaged lines."""

import os

import pytest
from resumable import no_space

from extensions.common import files
from extensions.common.errors import UserError
from extensions.common.files import JsonlAppender, filter_jsonl, read_json, read_jsonl, write_json


def test_lines_survive_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    lines, write = JsonlAppender(path), os.write
    lines.append([{"a": 1}])

    def half(handle, data):
        if len(data) < 4:
            no_space()
        return write(handle, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", half)
        with pytest.raises(OSError, match="No space"):
            lines.append([{"b": 2}])
        assert path.read_text() == '{"a": 1}\n', "the incomplete line is removed"
    lines.append([{"c": "ü"}])
    lines.close()
    assert read_jsonl(path) == [{"a": 1}, {"b": 2}, {"c": "ü"}], "nothing is lost"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_damaged_lines_are_an_error_or_dropped(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 2}\n[3]\n{"step": 4}\n{"step": 5')
    with pytest.raises(UserError, match="line 2: damaged"):
        read_jsonl(path)
    assert [r["step"] for r in read_jsonl(path, skip_damaged=True)] == [1, 2, 4]
    filter_jsonl(path, lambda record: record["step"] < 4)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    (tmp_path / "y.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"y\.json: damaged"):
        read_json(tmp_path / "y.json")
