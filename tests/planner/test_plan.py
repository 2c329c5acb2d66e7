"""`nlu plan`: its choices, its token counts and its output."""

import json
import shutil
from copy import copy
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
from support import ROOT, run_command, write_recipe
from tiny_models import causal_classes, shrunk
from transformers import LlamaConfig
from typer.testing import CliRunner

from extensions.cli.main import app
from extensions.common.errors import UserError
from extensions.planner import Planner, PlanOptions, plan_tables
from extensions.planner.devices import GIB, LINKS, link_rate
from extensions.planner.flops import (
    SampleTokens,
    backward_flops,
    forward_flops,
    pack_work,
)
from extensions.planner.job import Setting
from extensions.planner.tokens import typical_batch
from extensions.recipe import load_recipe


@pytest.fixture(scope="module")
def llama(tiny_model, tmp_path_factory):
    """Folder with the configuration of Llama-2-7B, no weights, and a small tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    shutil.copytree(tiny_model("llama"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaConfig(vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def planner(llama):
    """`planner(*overrides, **options)` for the shipped recipe of Llama-2; cached by its arguments."""

    @cache
    def make(*overrides, **options):
        recipe = load_recipe(ROOT / "recipes/llama2_glue_mt.yaml", [f"model.path={llama}", *overrides])
        return Planner(recipe, PlanOptions(**options))

    return make


def test_known_numbers_of_llama(planner):
    """The model's card says 6.74e9 parameters; r 16 on q and v is 2 x 32 layers x 2 matrices x 16 x 4096."""
    made = planner().plan(8)
    assert made.shape.parameters == 6_738_415_616
    assert made.shape.lora == 2 * 32 * 2 * 16 * 4096 == 8_388_608
    assert made.shape.linear == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert made.chosen.memory["base weights"] == pytest.approx(2 * 6_738_415_616 / GIB)
    assert list(made.flops) == list(made.chosen.seconds) == ["rollout", "old logprobs", "reference", "update"]
    assert 0 < made.utilisation < made.device.utilisation
    (line,) = made.schedule
    assert line.startswith("validations: every 1200 of 60000 iterations") and line in plan_tables(made)
    assert made.epoch_s == pytest.approx(made.rows / made.batch_size * made.chosen.step_s)


def test_the_choice_follows_the_memory(planner):
    """With ample memory no feature is on; with less, packs shrink or activations are recomputed; then ZeRO 3."""
    adamw = ("optimizer.name=adamw", "data.tasks=[record]", "evaluation.batch_size=4")
    stages, settings = [], []
    ample = planner(*adamw, prefix_tokens=100, suffix_tokens=400)
    device = ample.job.device
    for memory in (80, 40, 30, 24, 20, 18, 17, 16, 15.5):
        ample.job.device = replace(device, memory=memory)
        chosen = ample.choose(4, 4)
        if chosen is None:
            break
        assert chosen.total <= memory
        settings.append(chosen.setting)
        stages.append(chosen.setting.zero_stage)
    assert settings[0] == Setting(0, False, 4)
    tight = [setting for setting in settings if setting.zero_stage == 0 and setting.gradient_checkpointing]
    assert tight and stages == sorted(stages) and stages[-1] == 3
    assert settings.index(tight[0]) < stages.index(3)
    ample.job.device = replace(device, memory=12)
    with pytest.raises(UserError, match=r"--gpu-memory: no setting fits in 92% of 12 GiB.*load_in_4bit=true"):
        ample.plan(4)


def test_adafactor_stays_at_stage_0(planner):
    made = planner().plan(8)
    assert made.settings[0] == "deepspeed.zero_stage=0" and "Adafactor" in made.why[0]
    assert {e.setting.zero_stage for e in planner().candidates(2, 8)} == {0}
    small = copy(planner())
    small.job = copy(small.job)
    small.job.device = replace(small.job.device, memory=13)
    with pytest.raises(UserError, match=r"optimizer\.name=adamw, which allows ZeRO 3"):
        small.plan(8)


@pytest.mark.slow
def test_batches_that_gpus_cannot_divide(planner):
    made = planner().plan(64)
    assert (made.gpus, made.ranks) == (64, 16)
    assert "ppo.batch_size=16 is less than one row per GPU on 64 GPUs; ppo.batch_size=64 could use" in made.why[0]
    assert [line.gpus for line in made.scaling] == [2**k for k in range(11)]
    assert [line.enough for line in made.scaling] == [True] * 5 + [False] * 6
    assert all(line.batch_size == line.gpus for line in made.scaling[5:])
    speeds = [line.samples_per_s for line in made.scaling]
    assert all(later > 0.98 * earlier for earlier, later in pairwise(speeds))
    assert speeds[0] < speeds[4] <= 16 * speeds[0]
    assert speeds[10] == pytest.approx(64 * speeds[4], rel=0.05), "one row per rank, as with 16"
    odd = planner().plan(12)
    assert planner("ppo.mini_batch_size=4").plan(16).ranks == 4, "minibatches are divided too"
    assert odd.ranks == 8 and "cannot be divided evenly among 12 GPUs; ppo.batch_size=24" in odd.why[0]


@pytest.mark.slow
def test_4_bit_weights_are_a_quarter(planner):
    whole, small = planner().plan(1), planner("model.load_in_4bit=true").plan(1)
    assert 0.25 < small.chosen.memory["base weights"] / whole.chosen.memory["base weights"] < 0.3


@pytest.mark.slow
def test_other_backends_hold_more_than_one_base(planner):
    """On Ray, three groups and vLLM share a GPU; a sleeping engine and the update alternate."""
    gib = 2 * 6_738_415_616 / GIB
    memory = {
        name: planner(*overrides).plan(8).chosen.memory
        for name, overrides in {
            "deepspeed": (),
            "vllm": ("rollout.backend=vllm",),
            "ray": ("backend=ray",),
            "awake": ("backend=ray", "vllm.sleep=false"),
            "apart": ("backend=ray", "ray.colocate=false"),
            "no reference": ("backend=ray", "ppo.kl.init=0"),
        }.items()
    }
    bases = {name: round(parts["base weights"] / gib, 3) for name, parts in memory.items()}
    assert bases == {"deepspeed": 1, "vllm": 1, "ray": 3, "awake": 3, "apart": 1, "no reference": 2}
    engines = {name: parts.get("vLLM engine") for name, parts in memory.items()}
    assert engines["deepspeed"] is None and engines["apart"] is None
    assert engines["vllm"] == engines["ray"] == engines["awake"] == pytest.approx(0.3 * 80)
    assert "activations" not in memory["ray"] and memory["awake"]["activations"] > 0 < memory["apart"]["activations"]
    assert "cache of rollout or evaluation" not in memory["ray"]


def test_slow_links_cost_time(planner):
    assert planner(link="0.1").choose(1, 16).step_s > 1.1 * planner().choose(1, 16).step_s
    assert link_rate("nvlink", 8) > link_rate("nvlink", 16) == link_rate("infiniband", 16) == LINKS["infiniband"] * 1e9


def test_tokens_are_counted_if_data_are_present(tiny_model, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, tiny_model("llama")))
    counted = Planner(recipe, PlanOptions()).job
    assert counted.tokens_source == "tokens counted on 64 training rows with the model's tokenizer"
    (task,) = counted.tokens
    assert task.rows == 64 and task.prefix > 20 and len(task.suffixes) == 64 == len(task.answers)
    assert {row.prefix for row in counted.batch(4)} == {task.prefix}
    stated = Planner(recipe, PlanOptions(prefix_tokens=5, suffix_tokens=7, response_tokens=2)).job
    assert "5 + 7 prompt tokens as stated" in stated.tokens_source
    assert stated.batch(2) == 2 * [SampleTokens(0, 5, 7, 2)]


def test_a_typical_batch_is_spread_over_tasks_and_lengths(planner):
    tokens = planner().job.tokens
    assert len(tokens) == 9 and sum(task.rows for task in tokens) > 900_000
    one, many = (typical_batch(tokens, rows, (12, 32)) for rows in (1, 400))
    assert [row.response for row in one] == [22]
    assert len(many) == 400 and len({row.task for row in many}) >= 5
    written = sorted(row.response for row in many)
    assert written[0] == 12 and written[-1] == 32 and sum(written) / 400 == pytest.approx(22, abs=0.5)
    longest = typical_batch(tokens, 4, (12, 32), longest=True)
    assert {row.response for row in longest} == {32}


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--gpus", "2000"], ["--gpus: 2000", "to 1024"]),
        (["--gpu", "h1000"], ["--gpu: 'h1000'", "h100", "--rate"]),
        (["--gpu-memory", "0"], ["--gpu-memory: 0", "above 0"]),
        (["--link", "wire"], ["--link: 'wire'", "nvlink, infiniband, ethernet", "GB/s"]),
        (["--link", "-3"], ["--link: '-3'"]),
        (["--utilisation", "1.5"], ["--utilisation: 1.5", "at most 1"]),
        (["--suffix-tokens", "0"], ["--suffix-tokens: 0"]),
        (["--cpu"], ["--cpu", "--measure", "--rate TFLOPS --bandwidth"]),
        (["--measure"], ["--measure", "--cpu"]),
        (["--cpu", "--measure", "model.load_in_4bit=true"], ["load_in_4bit: true needs a GPU"]),
        (["method=eval"], ["method: 'eval'", "ppo or sft"]),
    ],
)
def test_invalid_options_are_refused(tiny_model, tmp_path, arguments, parts):
    recipe = write_recipe(tmp_path, tiny_model("llama"))
    result = CliRunner().invoke(app, ["plan", str(recipe), *arguments])
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


def test_the_command_prints_the_settings(tiny_model, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model("qwen2"))
    text = CliRunner().invoke(app, ["plan", str(recipe), "--gpus", "2", "method=sft", "sft.batch_size=4"]).stdout
    assert "deepspeed.zero_stage=0 model.gradient_checkpointing=false sft.micro_batch_size=2" in text
    for part in ("memory per rank", "activations", "update", "samples/s", "1024", "Not modelled"):
        assert part in text
    load_recipe(recipe, next(line for line in text.splitlines() if line.startswith("set: "))[5:].split())


@pytest.mark.slow
def test_a_cpu_is_measured(tiny_model, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, tiny_model("llama")))
    made = Planner(recipe, PlanOptions(cpu=True, measure=True)).plan(1)
    assert made.dtype == "float32" and made.device.name == "cpu" and made.scaling == []
    assert 1e-3 < made.device.tflops < 100 and 0.1 < made.device.bandwidth < 1000
    assert any("on the CPU" in part for part in plan_tables(made) if isinstance(part, str))


@pytest.mark.slow
def test_the_command_runs_without_weights(llama):
    options = ["--gpus", "8", "--gpu", "a100-80", "--json"]
    done = run_command(["nlu", "plan", "recipes/llama2_glue_mt.yaml", f"model.path={llama}", *options])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["shape"]["parameters"] == 6_738_415_616 and found["shape"]["lora"] == 8_388_608
    assert found["settings"] == [
        "deepspeed.zero_stage=0",
        "model.gradient_checkpointing=false",
        "ppo.micro_batch_size=2",
    ]
    assert found["step_s"] == pytest.approx(sum(found["chosen"]["seconds"].values()))


@pytest.mark.parametrize("model_type", ["bloom", "mixtral", "mamba"])
def test_a_family_that_cannot_be_counted_is_refused(model_type, tmp_path):
    """Otherwise the plan might omit its experts, for example."""
    config = shrunk(causal_classes()[model_type][0])
    config.save_pretrained(tmp_path / "model")
    recipe = load_recipe(write_recipe(tmp_path, tmp_path / "model"))
    with pytest.raises(UserError, match=f"cannot count models of the family '{model_type}'"):
        Planner(recipe, PlanOptions(prefix_tokens=10, suffix_tokens=10))


def test_sft_is_one_pass(planner):
    updates = {}
    for loss in ("answer", "sequence"):
        job = planner("method=sft", f"sft.loss={loss}").job
        work = pack_work(job.batch(3), sequence=loss == "sequence")
        updates[loss] = job.flops(3, Setting(0, False, 3))
        assert updates[loss] == {"update": forward_flops(job.shape, work) + backward_flops(job.shape, work)}
    more = pack_work(job.batch(3), True).predicting - pack_work(job.batch(3)).predicting
    assert updates["sequence"]["update"] - updates["answer"]["update"] == 2 * 2 * job.shape.head * more > 0
