"""The arithmetic of `nlu plan` against real modules, torch's own FLOP counter, real optimizers and real packs."""

import json
import shutil
from copy import copy
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from support import ARCHITECTURES, ROOT, make_policy, run_command, samples, write_recipe
from tiny_models import causal_classes, shrunk
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from extensions.cli.main import app
from extensions.common.errors import UserError
from extensions.distributed.optim import make_optimizer
from extensions.planner.flops import (
    Batch,
    ModelShape,
    Work,
    backward_flops,
    forward_flops,
    pack_work,
    packs,
    ppo_flops,
    sft_flops,
)
from extensions.planner.plan import (
    GIB,
    LINKS,
    Memory,
    Planner,
    PlanOptions,
    Setting,
    kept_bytes,
    link_rate,
    tables,
    typical_batch,
)
from extensions.prefix.tree import Sample, common_prefix, micro_batches, pack, with_sequence_targets
from extensions.recipe import Lora, load_recipe

LORA = Lora(rank=4, alpha=8, dropout=0.0)  # as support.make_policy has it


def shape_of(folder, lora=LORA):
    return ModelShape.of(AutoConfig.from_pretrained(folder), lora)


def batches_of(rows):
    """Token numbers of real samples."""
    groups = {}
    for row in sorted(rows, key=lambda row: row.prompt):
        groups.setdefault(row.prompt[:9] == rows[0].prompt[:9], []).append(row)
    found = []
    for members in groups.values():
        prefix = common_prefix([row.prompt for row in members])
        found.append(
            Batch(prefix, [len(row.prompt) - prefix for row in members], [len(row.response) for row in members])
        )
    return found


# ------------------------------------------------------------------------------------------------- numbers of things


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_shape_is_that_of_real_modules(tiny_model, architecture):
    folder = tiny_model(architecture)
    policy, base = make_policy(folder), AutoModelForCausalLM.from_pretrained(folder)
    shape = shape_of(folder)
    trunk = {n: m for n, m in base.base_model.named_modules() if isinstance(m, nn.Linear)}
    assert shape.linear == sum(module.weight.numel() for module in trunk.values())
    assert shape.parameters == sum(p.numel() for p in base.parameters())
    assert shape.head == base.get_output_embeddings().weight.numel()
    adapters = [p for name, p in policy.trainable.items() if "lora_" in name]
    assert (shape.lora, shape.lora_tensors) == (sum(p.numel() for p in adapters), len(adapters))
    assert shape.trained == sum(p.numel() for p in policy.trainable.values())
    assert (shape.layers, shape.hidden, shape.attention_width) == (2, 32, 32)
    assert shape.kv_width == (32 if architecture == "mpt" else 16)
    read_first = [n for n in trunk if n.startswith(("layers.0.self_attn", "blocks.0.attn")) and "o" not in n[-8:-5]]
    first = {n for n in read_first if n.endswith(("q_proj", "k_proj", "v_proj", "Wqkv"))}
    assert shape.linear_idle == sum(trunk[n].weight.numel() for n in first) > 0


def test_layers_before_the_first_adapter_need_no_gradient(tiny_model):
    """LoRA on the last layer of the MLPs alone: all of the first decoder layer is idle."""
    late = shape_of(tiny_model("llama"), Lora(rank=4, target_modules=["down_proj"]))
    attention, mlp = 32 * (32 + 16 + 16 + 32), 3 * 32 * 64
    assert (late.linear_idle, late.linear) == (attention + mlp, 2 * (attention + mlp))
    assert (late.lora_idle, late.lora) == (4 * 64, 2 * 4 * (64 + 32))


@pytest.mark.parametrize("sequence", [False, True])
def test_work_is_that_of_a_real_pack(sequence):
    rows = samples()
    packed = with_sequence_targets(pack(rows), rows) if sequence else pack(rows)
    work = pack_work(batches_of(rows), sequence)
    assert work == Work(packed.input_ids.shape[1], int(packed.mask.sum()), len(packed.targets))
    assert pack_work(batches_of(rows), sequence, dense=True).pairs == packed.mask.numel()


def test_packs_are_those_of_the_training():
    rows = samples()
    real = micro_batches(rows, range(len(rows)), 2)
    ours = packs(batches_of(rows), 2)
    assert [len(chunk) for chunk in real] == [sum(batch.rows for batch in chunk) for chunk in ours]
    lengths = [[len(rows[slot].response) for slot in chunk] for chunk in real]
    assert lengths == [[n for batch in chunk for n in batch.responses] for chunk in ours]


# ------------------------------------------------------------------------------------------------------------ FLOPs


@pytest.fixture(params=ARCHITECTURES)
def counted(request, tiny_model):
    """FLOPs by operation of one packed forward and backward with eager attention, and what they should be for."""
    folder = tiny_model(request.param)
    policy = make_policy(folder, dtype="float32").train()
    policy.causal_lm.set_attn_implementation("eager")
    rows = samples()
    packed = pack(rows)
    moments = []
    with policy.role("actor"):
        with FlopCounterMode(display=False) as forward:
            out = policy(packed)
        with FlopCounterMode(display=False) as backward:
            (out["logprobs"].sum() + out["values"].sum()).backward()
    for counter in (forward, backward):
        by_name = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
        attention = sum(flops for name, flops in by_name.items() if "bmm" in name)
        moments.append((sum(by_name.values()) - attention, attention))
    return request.param, shape_of(folder), rows, moments


def test_linear_flops_are_exactly_what_torch_counts(counted):
    _, shape, rows, ((forward, _), (backward, _)) = counted
    work = replace(pack_work(batches_of(rows)), pairs=0)
    # The head's backward product is taken in the forward pass already (`numerics.FusedLinearLogprob`).
    ahead = 2 * shape.head * work.predicting
    assert forward_flops(shape, work, value=True) == forward - ahead
    assert backward_flops(shape, work, value=True) == backward + ahead


def test_attention_flops_are_what_torch_counts_of_all_pairs(counted):
    """Exact but for what is known: rotary angles (forward), and keys of the first layer, which need no gradient."""
    architecture, shape, rows, ((_, forward), (_, backward)) = counted
    dense = pack_work(batches_of(rows), dense=True)
    alone = Work(0, dense.pairs, 0)
    one_product = 2 * shape.attention_width * dense.pairs
    rotary = 0 if architecture == "mpt" else 2 * dense.tokens * (shape.attention_width // 4 // 2)
    spared = 0 if architecture == "mpt" else one_product
    assert forward == forward_flops(shape, alone) + rotary
    assert backward == backward_flops(shape, alone) - spared
    assert pack_work(batches_of(rows)).pairs < dense.pairs


def test_ppo_phases_add_up(tiny_model):
    shape, batch = shape_of(tiny_model("llama")), Batch(9, [4, 7, 2], [3, 1, 6])
    phases = ppo_flops(shape, [batch], epochs=4, micro_batch_size=3)
    work = pack_work([batch])
    assert list(phases) == ["rollout", "reference", "update"]
    # A rollout passes each token once and sees the same pairs as the pack of what it wrote.
    assert phases["rollout"] == forward_flops(shape, work, value=True)
    assert phases["reference"] == forward_flops(shape, work, adapter=False)
    both = forward_flops(shape, work, value=True) + backward_flops(shape, work, value=True)
    assert phases["update"] == 4 * both
    again = ppo_flops(shape, [batch], 4, 3, checkpointing=True)["update"] - phases["update"]
    assert again == 4 * forward_flops(shape, replace(work, predicting=0))
    more = ppo_flops(shape, [batch], 4, 3, critic="adapter", recompute=True, reference=False)
    assert list(more) == ["rollout", "old logprobs", "values", "update"]
    assert more["values"] == forward_flops(shape, work, head=False, value=True)
    assert more["update"] > 1.5 * phases["update"]
    assert ppo_flops(shape, [batch], 4, 1)["reference"] > phases["reference"], "the prefix once in each pack"


def test_sft_is_one_pass(tiny_model):
    shape, batch = shape_of(tiny_model("llama")), Batch(9, [4, 7, 2], [3, 1, 6])
    answer, sequence = (sft_flops(shape, [batch], 3, sequence=s)["update"] for s in (False, True))
    work = pack_work([batch])
    assert answer == forward_flops(shape, work) + backward_flops(shape, work)
    assert sequence - answer == 2 * 2 * shape.head * (pack_work([batch], True).predicting - work.predicting)


# ----------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("method", ["ppo", "sft"])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimizer_state_is_that_of_real_optimizers(tiny_model, tmp_path, name, method):
    folder = tiny_model("llama")
    path = write_recipe(tmp_path, folder, optimizer={"name": name}, sft={"optimizer": name}, method=method)
    recipe = load_recipe(path)
    policy = make_policy(folder)
    if method == "sft":
        policy.value_head = None
    optimizer = make_optimizer(policy.parameter_groups(), recipe.trained_with, offload=False)
    for parameter in policy.trainable.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    real = sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.dim() > 0)
    planner = Planner(recipe, PlanOptions())
    assert planner.state_bytes == real
    assert planner.trained == sum(p.numel() for p in policy.trainable.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_are_what_autograd_keeps(tiny_model, architecture):
    """Fake tensors of one and two layers, against a real forward of the whole model at another length."""
    folder, tokens = tiny_model(architecture), 90
    attention = "eager" if architecture == "mpt" else "sdpa"
    trace = Memory(AutoConfig.from_pretrained(folder), LORA, attention, torch.float32, False).at(tokens)
    policy = make_policy(folder).train()
    inputs = {
        "input_ids": torch.zeros(1, tokens, dtype=torch.long),
        "position_ids": torch.arange(tokens)[None],
        "attention_mask": torch.zeros(1, 1, tokens, tokens),
    }
    with policy.role("actor"):
        real = kept_bytes(policy.causal_lm.base_model, inputs)
    assert 2 * trace.layer_bytes + trace.other_bytes == pytest.approx(real, rel=1e-3)
    assert 15 < trace.layer_kernels < 100


# ----------------------------------------------------------------------------------------------------- Llama-2's size


@pytest.fixture(scope="module")
def llama(tiny_model, tmp_path_factory):
    """Folder with the configuration of Llama-2-7B, no weights, and a small tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    shutil.copytree(tiny_model("llama"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaConfig(vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def planner(llama):
    """`planner(*overrides, **options)` for the shipped recipe of Llama-2; the same one for the same arguments."""

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
    assert made.epoch_s == pytest.approx(made.rows / made.batch_size * made.chosen.step_s)


def test_the_choice_follows_the_memory(planner):
    """All is plain where there is room; then packs are smaller or activations computed again; then the base sharded."""
    adamw = ("optimizer.name=adamw", "data.tasks=[record]", "evaluation.batch_size=4")
    stages, settings = [], []
    ample = planner(*adamw, prefix_tokens=100, suffix_tokens=400)
    device = ample.device
    for memory in (80, 40, 30, 24, 20, 18, 17, 16, 15.5):
        ample.device = replace(device, memory=memory)
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
    ample.device = replace(device, memory=12)
    with pytest.raises(UserError, match=r"--gpu-memory: 12 GiB.*hold no setting.*load_in_4bit=true"):
        ample.plan(4)


def test_adafactor_stays_at_stage_0(planner):
    made = planner().plan(8)
    assert made.settings[0] == "deepspeed.zero_stage=0" and "Adafactor" in made.why[0]
    assert {e.setting.zero_stage for e in planner().candidates(2, 8)} == {0}
    small = copy(planner())
    small.device = replace(small.device, memory=13)
    with pytest.raises(UserError, match=r"optimizer\.name=adamw, which allows ZeRO 3"):
        small.plan(8)


def test_a_batch_that_is_too_small_for_the_gpus(planner):
    made = planner().plan(64)
    assert (made.gpus, made.ranks) == (64, 16)
    assert "ppo.batch_size=16 gives 64 GPUs less than a row each; ppo.batch_size=64 could use" in made.why[0]
    assert [line.gpus for line in made.scaling] == [2**k for k in range(11)]
    assert [line.enough for line in made.scaling] == [True] * 5 + [False] * 6
    assert all(line.batch_size == line.gpus for line in made.scaling[5:])
    speeds = [line.samples_per_s for line in made.scaling]
    assert all(later > 0.98 * earlier for earlier, later in pairwise(speeds))
    assert speeds[0] < speeds[4] <= 16 * speeds[0]
    assert speeds[10] == pytest.approx(64 * speeds[4], rel=0.05), "a row a rank, as at 16"
    odd = planner().plan(12)
    assert planner("ppo.mini_batch_size=4").plan(16).ranks == 4, "minibatches are shared too"
    assert odd.ranks == 8 and "cannot be shared evenly by 12 GPUs; ppo.batch_size=24" in odd.why[0]


def test_4_bit_weights_are_a_quarter(planner):
    whole, small = planner().plan(1), planner("model.load_in_4bit=true").plan(1)
    assert 0.25 < small.chosen.memory["base weights"] / whole.chosen.memory["base weights"] < 0.3


def test_other_engines_hold_more_than_one_base(planner):
    """On Ray three groups and vLLM share a GPU; a sleeping engine is there when the update is not."""
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


# -------------------------------------------------------------------------------------------------- tokens and texts


def test_tokens_are_counted_where_data_are(tiny_model, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, tiny_model("llama")))
    counted = Planner(recipe, PlanOptions())
    assert counted.source == "tokens counted on 64 training rows with the model's tokenizer"
    (task,) = counted.tokens
    assert task.rows == 64 and task.prefix > 20 and len(task.suffixes) == 64 == len(task.answers)
    assert [b.prefix for b in counted.batches(4)] == [task.prefix]
    stated = Planner(recipe, PlanOptions(prefix_tokens=5, suffix_tokens=7, response_tokens=2))
    assert "5 + 7 prompt tokens as stated" in stated.source
    assert stated.batches(2) == [Batch(5, [7, 7], [2, 2])]


def test_a_typical_batch_is_spread_over_tasks_and_lengths(planner):
    tokens = planner().tokens
    assert len(tokens) == 9 and sum(task.rows for task in tokens) > 900_000
    one, many = (typical_batch(tokens, rows, (12, 32), worst=False) for rows in (1, 400))
    assert len(one) == 1 and one[0].responses == [22]
    assert sum(batch.rows for batch in many) == 400 and len(many) >= 5
    written = sorted(n for batch in many for n in batch.responses)
    assert written[0] == 12 and written[-1] == 32 and sum(written) / 400 == pytest.approx(22, abs=0.5)
    worst = typical_batch(tokens, 4, (12, 32), worst=True)
    assert {n for batch in worst for n in batch.responses} == {32}


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
def test_wrong_options_are_explained(tiny_model, tmp_path, arguments, parts):
    recipe = write_recipe(tmp_path, tiny_model("llama"))
    result = CliRunner().invoke(app, ["plan", str(recipe), *arguments])
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


def test_the_command_prints_what_to_set(tiny_model, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model("qwen2"))
    text = CliRunner().invoke(app, ["plan", str(recipe), "--gpus", "2", "method=sft", "sft.batch_size=4"]).stdout
    assert "deepspeed.zero_stage=0 model.gradient_checkpointing=false sft.micro_batch_size=2" in text
    for part in ("memory of a rank", "activations", "update", "samples/s", "1024", "Not modelled"):
        assert part in text
    load_recipe(recipe, next(line for line in text.splitlines() if line.startswith("set: "))[5:].split())


def test_a_cpu_is_measured(tiny_model, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, tiny_model("llama")))
    made = Planner(recipe, PlanOptions(cpu=True, measure=True)).plan(1)
    assert made.dtype == "float32" and made.device.name == "cpu" and made.scaling == []
    assert 1e-3 < made.device.tflops < 100 and 0.1 < made.device.bandwidth < 1000
    assert any("on the CPU" in part for part in tables(made) if isinstance(part, str))


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


def test_samples_of_one_row_are_whole():
    """One row shares all but its last prompt token; token numbers do not depend on where the prefix is said to end."""
    row = Sample([5, 6, 7, 8], [9, 10])
    assert pack_work(batches_of([row])) == pack_work([Batch(0, [4], [2])])


@pytest.mark.parametrize("model_type", ["bloom", "mixtral", "mamba"])
def test_a_family_that_cannot_be_counted_is_refused(model_type, tmp_path):
    """Rather than planned without its experts, say."""
    config = shrunk(causal_classes()[model_type][0])
    config.save_pretrained(tmp_path / "model")
    recipe = load_recipe(write_recipe(tmp_path, tmp_path / "model"))
    with pytest.raises(UserError, match=f"cannot count models of the family '{model_type}'"):
        Planner(recipe, PlanOptions(prefix_tokens=10, suffix_tokens=10))
