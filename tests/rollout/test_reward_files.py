"""A reward file and the modules beside it."""

import importlib
import sys

import pytest

from extensions.common.errors import UserError
from extensions.common.files import sha256
from extensions.rollout.reward_files import neighbours, reward_digest
from extensions.rollout.rewards import load_reward

USES = "{line}\n\ndef reward(text, label):\n    return {value}\n"


@pytest.fixture
def folder(tmp_path):
    """A folder with a reward's neighbours, which is not the working directory."""
    rewards = tmp_path / "rewards"
    (rewards / "lexicon").mkdir(parents=True)
    (rewards / "my_lexicon.py").write_text("from lexicon.weights import ONE\nGOOD = ONE / 4\n")
    (rewards / "lexicon" / "weights.py").write_text("ONE = 1.0\n")
    (rewards / "unused.py").write_text("raise RuntimeError\n")
    return rewards


def put(folder, line, value="0.5", name="mine.py"):
    (folder / name).write_text(USES.format(line=line, value=value))
    return folder / name


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("import my_lexicon", "my_lexicon.GOOD"),
        ("from my_lexicon import GOOD", "GOOD"),
        ("from . import my_lexicon", "my_lexicon.GOOD"),
        ("from .my_lexicon import GOOD", "GOOD"),
        ("", "__import__('my_lexicon').GOOD"),  # while it is called
    ],
)
def test_a_reward_imports_its_neighbours(folder, line, value, monkeypatch):
    path = put(folder, line, value)
    reward = load_reward(str(path))
    assert reward.function("Yes", "1") == 0.25
    assert [file.name for file in neighbours(path)] == ["weights.py", "my_lexicon.py"]
    monkeypatch.chdir(folder)
    assert load_reward("mine.py").function("Yes", "1") == 0.25


def test_the_hash_covers_the_neighbours_that_were_imported(folder):
    path = put(folder, "import my_lexicon", "my_lexicon.GOOD")
    load_reward(str(path))
    digest = reward_digest(path)
    for name, source, same in (
        ("unused.py", "raise ValueError\n", True),
        ("lexicon/weights.py", "ONE = 2.000\n", False),
        ("lexicon/weights.py", "ONE = 1.0\n", True),
    ):
        (folder / name).write_text(source)
        load_reward(str(path))
        assert (reward_digest(path) == digest) is same, name
    moved = folder.rename(folder.parent / "moved") / "mine.py"
    load_reward(str(moved))
    assert reward_digest(moved) == digest


def test_the_hash_of_a_reward_without_neighbours_is_that_of_its_file(folder):
    path = put(folder, "import json\nimport extensions.prompts")
    load_reward(str(path))
    assert reward_digest(path) == sha256(path)


def test_neighbours_of_another_reward_are_not_reused(folder):
    load_reward(str(put(folder, "import my_lexicon", "my_lexicon.GOOD")))
    other = folder.parent / "other"
    other.mkdir()
    (other / "my_lexicon.py").write_text("GOOD = 0.75\n")
    assert load_reward(str(put(other, "import my_lexicon", "my_lexicon.GOOD"))).function("", "") == 0.75
    assert str(folder) not in sys.path and sys.path[-1] == str(other)


@pytest.mark.parametrize("name", ["random", "datasets"])
def test_a_neighbour_hides_no_other_module_and_is_not_hidden_silently(folder, name):
    before = importlib.import_module(name)
    (folder / f"{name}.py").write_text("GOOD = 0.75\n")
    assert load_reward(str(put(folder, f"from . import {name}", f"{name}.GOOD"))).function("", "") == 0.75
    assert sys.modules[name] is before
    for line in (f"import {name}", f"from {name} import GOOD"):
        with pytest.raises(UserError, match=rf"mine.py: `import {name}` imports .*, not {name}.py beside .*; rename"):
            load_reward(str(put(folder, line)))
    (folder / "my_lexicon.py").write_text(f"import {name}\n")
    with pytest.raises(UserError, match=rf"my_lexicon.py: `import {name}` imports .*, not {name}.py"):
        load_reward(str(put(folder, "import my_lexicon")))
