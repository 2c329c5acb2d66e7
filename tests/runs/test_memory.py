"""Memory is known before it is needed: the longest rows and the bounds of a run, on devices of stubbed memory."""

import json
from itertools import pairwise

import pytest
from support import toy, write_recipe
from typer.testing import CliRunner

from extensions.cli import preflight
from extensions.cli.main import app
from extensions.model.loading import load_config
from extensions.planner import limits as planner_limits
from extensions.planner.devices import host_memory
from extensions.planner.limits import may_be_large, rank_memory_of, static_rows, with_training
from extensions.prefix.limits import Cost, PackLimit
from extensions.recipe import load_recipe
from extensions.runs import memory as run_memory
from extensions.runs.main import main
from extensions.training.experience import Experience

LONG = 300  # words of one training row


@pytest.fixture
def recipe(tiny_model, tmp_path):
    """A recipe of a task with one long training row, row 5."""
    for split, count in (("train", 12), ("validation", 4)):
        rows = [{"text": f"a {'good' if k % 2 else 'bad'} film", "label": ("bad", "good")[k % 2]} for k in range(count)]
        if split == "train":
            rows[5]["text"] = " ".join(["good"] * LONG)
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sections = {"data": {"tasks": [toy("toy")], "root": str(tmp_path), "max_train_samples": None}}
    settings = {"evaluation": {"before": False, "yardsticks": False}, "ppo": {"batch_size": 12, "micro_batch_size": 12}}
    return write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"), **sections, **settings)


@pytest.fixture
def device(monkeypatch, recipe):
    """`device(tokens, usable)`: a device that holds the model, and what training needs for a row of so many tokens."""
    loaded = load_recipe(recipe)
    config = load_config(loaded.model)
    made = with_training(rank_memory_of(loaded.model, loaded.lora, config, True, 1.0), loaded, 1)

    def stub(tokens, usable=1.0):
        total = (made.fixed + made.training(tokens, tokens**2)) / usable
        monkeypatch.setattr(run_memory, "total_memory", lambda device: total)
        return total

    return stub


def test_a_row_that_cannot_fit_is_refused_before_the_model_is_loaded(recipe, device, capsys, monkeypatch):
    total = device(0)
    monkeypatch.setattr(run_memory, "CERTAIN", 1.0)
    monkeypatch.setattr("extensions.runs.build.load_policy", None)
    assert main([str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "out of memory before it begins: task toy, training row 5: " in error
    assert f"this machine gives a rank {total / 2**30:.1f} GiB" in error
    for key in ("prompt.max_tokens=N", "model.gradient_checkpointing=true", "model.dtype=bfloat16"):
        assert key in error
    monkeypatch.setattr(run_memory, "CERTAIN", 0.75)
    warnings = []
    preflight.problems(load_recipe(recipe), warnings.append)
    (line,) = [line for line in warnings if line.startswith("memory may not suffice")]
    assert "task toy, training row 5: " in line, "nlu validate says it too; without a GPU as a warning"


@pytest.mark.slow
def test_micro_batches_are_bounded_and_the_bound_is_stated(recipe, device, capsys, monkeypatch):
    packs = []
    micro_batches = Experience.micro_batches

    def spy(self, slots, limit):
        found = micro_batches(self, slots, limit)
        packs.append((limit, [(len(part.slots), part.pack.input_ids.shape[1]) for part in found]))
        return found

    monkeypatch.setattr(Experience, "micro_batches", spy)
    device(300, planner_limits.USABLE)
    assert main([str(recipe), "max_steps=1"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("micro-batches, by")]
    assert "training at most 12 rows and" in line and "(task toy, training row 5)" in line
    limit, parts = packs[0]
    assert sum(rows for rows, _ in parts) == 12 and 1 < len(parts) < 12
    assert all(rows == 1 or tokens <= limit.tokens for rows, tokens in parts)
    assert {found for found, _ in packs} == {limit}, "the same for the reference and every epoch"


def test_the_key_bounds_training_and_evaluation(recipe, capsys):
    assert main([str(recipe), "max_steps=1", "model.micro_batch_tokens=200"]) == 0
    out = capsys.readouterr().out
    assert "micro-batches, by model.micro_batch_tokens: training at most 12 rows and 200 tokens; its longest" in out


def test_short_rows_on_a_large_device_need_no_estimate(recipe, monkeypatch, capsys):
    monkeypatch.setattr(run_memory, "rank_memory_of", None)
    monkeypatch.setattr(run_memory, "total_memory", lambda device: 2**40)
    assert main([str(recipe), "max_steps=1"]) == 0
    assert "micro-batches" not in capsys.readouterr().out


@pytest.mark.slow
def test_bounds_follow_memory_and_checkpointing(recipe):
    loaded = load_recipe(recipe)
    config = load_config(loaded.model)
    saving = loaded.model.model_copy(update={"gradient_checkpointing": True})
    totals = [2.0**31, 2.0**32, 2.0**33]
    for model in (loaded.model, saving):
        made = [rank_memory_of(model, loaded.lora, config, False, total) for total in totals]
        longest = [one.limit(8, True).longest for one in made]
        assert all(small < large for small, large in pairwise(longest))
        for one, tokens in zip(made, longest, strict=True):
            assert one.of_row(tokens, True) <= planner_limits.USABLE * one.total < one.of_row(tokens + 2, True)
            assert one.limit(8, False).longest > tokens / 2 and one.cache_tokens > 0
    plain, checkpointed = (rank_memory_of(m, loaded.lora, config, False, 2.0**32) for m in (loaded.model, saving))
    assert checkpointed.limit(8, True).longest > plain.limit(8, True).longest
    assert may_be_large(config, 64, 10**5, 2**34, "packed") and not may_be_large(config, 8, 100, 2**34, "packed")
    assert may_be_large(config, 64, 700, 2**34, "sdpa") and not may_be_large(config, 64, 700, 2**34, "packed")


def test_ranks_that_must_run_equally_many_forwards_get_a_number_of_rows():
    assert static_rows(PackLimit(16), 6000) == 16
    assert static_rows(PackLimit(16, 1000), 240) == 4 and static_rows(PackLimit(16, 1000), 2000) == 1
    limit = PackLimit(16, 1000, 0.001, "masked")
    rows = static_rows(limit, 100)
    assert limit.admits(Cost(100 * rows, (100 * rows) ** 2)) and rows == 4


def test_the_memory_of_a_host_is_that_of_its_control_group(monkeypatch, tmp_path):
    from extensions.planner import devices

    whole = host_memory()
    (tmp_path / "memory.max").write_text("1073741824\n")
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    assert host_memory() == 2**30 < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory() >= whole


def test_the_plan_states_the_bound(recipe):
    text = CliRunner().invoke(app, ["plan", str(recipe)]).stdout
    assert "model.micro_batch_tokens: " in text
