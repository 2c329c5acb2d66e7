"""When a run validates and may stop early: of every shipped recipe on every task it serves, and in small."""

import pytest
from support import BASE_RECIPE, ROOT, refused

from extensions.common.errors import UserError
from extensions.recipe import RunSchedule, load_recipe

# Training rows (GLUE and SuperGLUE papers; MultiRC per answer, ReCoRD per query).
ROWS = {
    "cola": 8551, "sst2": 67349, "mrpc": 3668, "stsb": 5749, "qqp": 363846, "mnli": 392702, "qnli": 104743,
    "rte": 2490, "wnli": 635,
    "boolq": 9427, "cb": 250, "copa": 400, "multirc": 27243, "record": 100730, "superglue_rte": 2490, "wic": 5428,
    "wsc": 554,
}  # fmt: skip
GLUE, SUPERGLUE = list(ROWS)[:9], list(ROWS)[9:]
SIZES = ROWS | {"glue": sum(ROWS[t] for t in GLUE), "superglue": sum(ROWS[t] for t in SUPERGLUE)}
LLM_RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if path.stem != "bert")
METHODS = [("ppo", f"ppo.batch_size={size}") for size in (4, 8, 12, 16)] + [("sft", "seed=0")]  # paper 5.1


def schedule(load, rows, *overrides):
    return RunSchedule(load(BASE_RECIPE, "ppo.batch_size=16", "max_epochs=5", *overrides), rows)


@pytest.mark.parametrize("path", LLM_RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize(("method", "override"), METHODS)
def test_shipped_recipes_validate_often_enough_and_stop_after_the_warmup(path, method, override):
    """By single-task and multi-task training; a run that early stopping cannot shorten would not be "converged"."""
    assert len(LLM_RECIPES) == 5
    recipe = load_recipe(path, [override], method)
    for task, rows in SIZES.items():
        found = RunSchedule(recipe, rows)
        if recipe.evaluation.every_steps:
            assert found.validations[-1] == found.steps and found.validates_after(found.steps), task
        if recipe.evaluation.patience:
            assert len(found.validations) >= 3, task
            assert found.first_stop is not None and found.warmup < found.first_stop < found.steps, task
            updates = recipe.num_updates(found.first_stop)
            assert updates >= recipe.schedule.warmup_updates(recipe.num_updates(found.steps)), task
        else:
            assert path.stem in ("quickstart", "smollm2") and found.first_stop is None


def test_a_fraction_is_of_the_run_that_takes_place(load):
    copa = schedule(load, 400, "evaluation.every_steps=0.05")
    assert (copa.steps, copa.validate_every, copa.validations[-2:]) == (125, 7, [119, 125])
    assert schedule(load, None, "evaluation.every_steps=0.07", "max_steps=100").validate_every == 7
    assert schedule(load, 400, "evaluation.every_steps=1e-9").validate_every == 1
    assert schedule(load, 400, "evaluation.every_steps=250").validations == [125]
    assert schedule(load, 400).validations == [] and not schedule(load, 400).validates_after(125)
    assert [step for step in range(126) if copa.validates_after(step)] == copa.validations


def test_patience_begins_after_the_warmup(load):
    """125 iterations; 13 of warmup: 125 x 4 updates, a tenth of which is 50, after 12.5 iterations."""
    found = schedule(load, 400, "evaluation.every_steps=5", "evaluation.patience=2")
    assert (found.warmup, found.first_stop) == (13, 20)
    assert [found.counts_for_patience(step) for step in (10, 13, 14, 15)] == [False, False, True, True]
    bare = schedule(load, 400, "evaluation.every_steps=5", "evaluation.patience=2", "schedule.warmup_ratio=0")
    assert (bare.warmup, bare.first_stop) == (0, 15), "the first validation always is a best one"


def test_the_schedule_in_words(load):
    def said(*overrides):
        texts = [], []
        schedule(load, 400, *overrides).describe(texts[0].append, texts[1].append)
        return texts

    assert said() == ([], [])
    assert said("evaluation.every_steps=500") == (["validations: after the last one"], [])
    (line,), none = said("evaluation.every_steps=0.04", "evaluation.patience=2")
    assert none == [] and line == (
        "validations: every 5 of 125 iterations, and after the last one; early stopping: 2 without a new best, at step "
        "20 at the earliest, since those up to the end of the warmup, step 13, do not count"
    )
    for off in ("evaluation.every_steps=250", "schedule.warmup_ratio=0.99"):
        (line,), (warning,) = said("evaluation.every_steps=5", "evaluation.patience=2", off)
        assert "early stopping" not in line and "evaluation.patience: 2 cannot stop this run of 125" in warning


def test_a_schedule_by_epochs_does_not_depend_on_the_bound_of_the_run(load):
    """400 rows by 16: 25 iterations per epoch, 100 updates, a tenth of which is warmup."""
    for bound in ("max_epochs=5", "max_epochs=null", "max_steps=60"):
        found = schedule(load, 400, "schedule.epochs=2", bound)
        assert (found.spanned, found.updates, found.warmup) == (50, 200, 5)
    whole = schedule(load, 400)
    assert (whole.spanned, whole.updates, whole.steps) == (125, 500, 125)
    assert schedule(load, 400, "schedule.epochs=0.01").spanned == 1
    sft = load(BASE_RECIPE, "method=sft", "schedule.epochs=3", "sft.max_steps=90")
    assert (RunSchedule(sft, 400).updates, RunSchedule(sft, 400).warmup) == (50, 5), "1200 rows by 24"


def test_a_schedule_by_epochs_in_words(load):
    said, warned = [], []
    schedule(load, 400, "schedule.epochs=2").describe(said.append, warned.append)
    assert said == [
        "learning rate: warmup until step 5, the end of its decay at step 50 (schedule.epochs: 2), of at most 125 steps"
    ]
    assert warned == []
    schedule(load, 400, "schedule.epochs=4", "max_steps=50").describe(said.append, warned.append)
    schedule(load, 400, "schedule.epochs=4", "max_steps=9").describe(said.append, warned.append)
    for text, missed in zip(warned, ("end", "peak"), strict=True):
        assert "schedule.epochs: 4 spans 100 iterations" in text and f"its {missed}: lower it" in text


def test_contradictions_of_a_schedule_by_epochs(load):
    assert "is more than max_epochs: 2" in refused(load, BASE_RECIPE, "schedule.epochs=3", "max_epochs=2")
    constant = ["schedule.name=constant", "schedule.warmup_ratio=0", "schedule.epochs=3"]
    assert "no effect on a constant learning rate" in refused(load, BASE_RECIPE, *constant)
    for shape in ("schedule.name=linear", "schedule.min_lr_ratio=0"):
        schedule(load, 400, "schedule.epochs=5", shape).check()
        with pytest.raises(UserError, match="ends at a learning rate of 0, and the run has up to 125 iterations"):
            schedule(load, 400, "schedule.epochs=3", shape).check()
    schedule(load, 400, "schedule.epochs=3", "schedule.name=constant").check()


@pytest.mark.parametrize("value", ["-1", "1.0", "1.5", "0.0", "-0.1", "true", "auto", ".nan"])
def test_intervals_that_are_refused(load, value):
    message = refused(load, BASE_RECIPE, f"evaluation.every_steps={value}")
    assert message.count("evaluation.every_steps") == 1 and "fraction of the run between 0 and 1" in message


@pytest.mark.parametrize("value", [0, 1, 250, 0.05, "1e-2"])
def test_intervals_load_back(load, value):
    assert load(BASE_RECIPE, f"evaluation.every_steps={value}").evaluation.every_steps == float(value)
