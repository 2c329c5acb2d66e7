"""The fuzzer: a short run over every target, and faults that it must find."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from extensions.common.errors import UserError

_spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).parent / "faults" / "fuzz.py")
fuzz = sys.modules["fuzz"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz)

every_target = pytest.mark.parametrize("name", fuzz.TARGETS)
guided = pytest.mark.skipif(not fuzz.atheris_is_there(), reason="atheris is not installed (Linux on x86-64 alone)")


def errors(counts):
    return [(crash.file_name, crash.error) for crash in counts.uncaught]


@every_target
def test_the_seeds_are_valid(name):
    target, counts = fuzz.TARGETS[name], fuzz.Counts()
    for data in target.seeds():
        fuzz.feed(target, data, counts)
    assert errors(counts) == []
    assert counts.accepted == counts.cases == len(target.seeds()) > 0


@every_target
def test_some_mutated_inputs(name):
    counts = fuzz.run(fuzz.TARGETS[name], 25, seed=1)
    assert errors(counts) == []
    assert counts.accepted + counts.refused == counts.cases == 25


@pytest.mark.slow
@every_target
def test_many_mutated_inputs(name):
    counts = fuzz.run(fuzz.TARGETS[name], 250, seed=2)
    assert errors(counts) == []
    assert counts.accepted > 0 and (counts.refused > 0 or name == "parser"), "both outcomes of the reader occur"


@pytest.mark.slow
@guided
@pytest.mark.parametrize("name", ["recipe", "labels"])
def test_inputs_that_coverage_guides_to(name):
    counts = fuzz.run_atheris(fuzz.TARGETS[name], seconds=6, seed=1)
    assert errors(counts) == []
    assert counts.accepted + counts.refused == counts.cases > len(fuzz.TARGETS[name].seeds())


def faulty(data):
    """Accepts text that begins with "a", refuses other text, fails on what is no text, and hangs on nothing."""
    if not data:
        while True:
            pass
    if not data.decode().startswith("a"):
        raise UserError("b")


FAULTY = fuzz.Target("faulty", faulty, lambda: [b"a word of text"])


def test_raised_errors_are_counted(monkeypatch):
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 0.05)
    counts = fuzz.Counts()
    for data in (b"a", b"b", b"\xff", b""):
        fuzz.feed(FAULTY, data, counts)
    assert (counts.cases, counts.accepted, counts.refused) == (4, 1, 1)
    assert [crash.data for crash in counts.uncaught] == [b"\xff", b""]
    decoding, hang = (crash.error for crash in counts.uncaught)
    assert decoding.startswith("UnicodeDecodeError at test_fuzz.py:") and hang.startswith("Hang at test_fuzz.py:")


def test_the_same_seed_gives_the_same_cases():
    corpus = [
        b'{"a": [1, "b"]}\n{"c": null}\n',
        b"name: x\ndata: {tasks: [cola]}\n",
        *fuzz.archives(),
        *fuzz.hub_files(),
    ]

    def cases(seed):
        rng = fuzz.random.Random(seed)
        return [fuzz.mutated(corpus[n % len(corpus)], rng, corpus) for n in range(60)]

    assert cases(1) == cases(1) != cases(2)
    assert len(set(cases(1))) > 50
    assert max(map(len, cases(1))) <= fuzz.LONGEST


def test_the_command_saves_what_it_finds(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fuzz, "TARGETS", {"faulty": FAULTY})
    monkeypatch.setattr(fuzz, "limit_memory", lambda: None)
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 0.05)
    assert fuzz.main(["--cases", "60", "--crashes", str(tmp_path / "found")]) == 1
    printed = capsys.readouterr().out
    saved = sorted((tmp_path / "found").iterdir())
    assert saved and any(path.name in printed for path in saved)
    assert "UnicodeDecodeError at test_fuzz.py" in printed
    for path in saved:
        counts = fuzz.Counts()
        fuzz.feed(FAULTY, path.read_bytes(), counts)
        assert len(counts.uncaught) == 1
    assert fuzz.main(["--cases", "0", "--crashes", str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none").exists()


def test_an_unknown_target(capsys):
    with pytest.raises(SystemExit) as caught:
        fuzz.main(["recipes"])
    assert caught.value.code == 2 and "unknown target 'recipes'; allowed: recipe, " in capsys.readouterr().err


def test_mutated_json_is_valid_json():
    rng = fuzz.random.Random(0)
    text = b'{"a": [1, {"b": "c"}], "d": null}'
    changed = [fuzz._changed_json(text, rng) for _ in range(50)]
    assert all(json.loads(one) is not None for one in changed) and len(set(changed)) > 20
