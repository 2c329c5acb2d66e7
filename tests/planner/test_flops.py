"""FLOPs of `nlu plan` against real modules, real packs and torch's own FLOP counter."""

from dataclasses import replace

import pytest
from support import ARCHITECTURES, make_policy, samples
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from extensions.planner.flops import (
    ModelShape,
    SampleTokens,
    Work,
    backward_flops,
    forward_flops,
    pack_work,
    packs,
    ppo_flops,
)
from extensions.prefix.tree import Sample, common_prefix, micro_batches, pack, with_sequence_targets
from extensions.recipe import Lora

LORA = Lora(rank=4, alpha=8, dropout=0.0)  # as in support.make_policy


def shape_of(folder, lora=LORA):
    return ModelShape.of(AutoConfig.from_pretrained(folder), lora)


def tokens_of(rows):
    """Token counts of real samples."""
    groups = {}
    for row in sorted(rows, key=lambda row: row.prompt):
        groups.setdefault(row.prompt[:9] == rows[0].prompt[:9], []).append(row)
    found = []
    for task, members in enumerate(groups.values()):
        prefix = common_prefix([row.prompt for row in members])
        found += [SampleTokens(task, prefix, len(row.prompt) - prefix, len(row.response)) for row in members]
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shape_equals_real_modules(tiny_model, architecture):
    folder = tiny_model(architecture)
    policy, base = make_policy(folder), AutoModelForCausalLM.from_pretrained(folder)
    shape = shape_of(folder)
    trunk = {n: m for n, m in base.base_model.named_modules() if isinstance(m, nn.Linear)}
    assert shape.linear == sum(module.weight.numel() for module in trunk.values())
    assert shape.parameters == sum(p.numel() for p in base.parameters())
    assert shape.head == base.get_output_embeddings().weight.numel()
    adapters = [p for name, p in policy.trainable.items() if "lora_" in name]
    assert (shape.lora, shape.lora_tensors) == (sum(p.numel() for p in adapters), len(adapters))
    biases = shape.hidden + 1
    assert shape.lora + shape.value_head + biases == sum(p.numel() for p in policy.trainable.values())
    assert (shape.layers, shape.hidden, shape.attention_width) == (2, 32, 32)
    assert shape.kv_width == (32 if architecture == "mpt" else 16)
    read_first = [n for n in trunk if n.startswith(("layers.0.self_attn", "blocks.0.attn")) and "o" not in n[-8:-5]]
    first = {n for n in read_first if n.endswith(("q_proj", "k_proj", "v_proj", "Wqkv"))}
    assert shape.linear_idle == sum(trunk[n].weight.numel() for n in first) > 0


def test_layers_before_the_first_adapter_need_no_gradient(tiny_model):
    """LoRA on the last layer of the MLPs only: all of the first decoder layer is idle."""
    late = shape_of(tiny_model("llama"), Lora(rank=4, target_modules=["down_proj"]))
    attention, mlp = 32 * (32 + 16 + 16 + 32), 3 * 32 * 64
    assert (late.linear_idle, late.linear) == (attention + mlp, 2 * (attention + mlp))
    assert (late.lora_idle, late.lora) == (4 * 64, 2 * 4 * (64 + 32))


@pytest.mark.parametrize("sequence", [False, True])
def test_work_equals_a_real_pack(sequence):
    rows = samples()
    packed = with_sequence_targets(pack(rows), rows) if sequence else pack(rows)
    work = pack_work(tokens_of(rows), sequence)
    assert work == Work(packed.input_ids.shape[1], int(packed.mask.sum()), len(packed.targets))
    assert pack_work(tokens_of(rows), sequence, dense=True).pairs == packed.mask.numel()


def test_packs_equal_training_micro_batches():
    rows = samples()
    real = micro_batches(rows, range(len(rows)), 2)
    ours = packs(tokens_of(rows), 2)
    assert [len(chunk) for chunk in real] == [len(chunk) for chunk in ours]
    lengths = [[len(rows[slot].response) for slot in chunk] for chunk in real]
    assert lengths == [[row.response for row in chunk] for chunk in ours]


@pytest.fixture(params=ARCHITECTURES)
def counted(request, tiny_model):
    """FLOPs by operation of one packed forward and backward with eager attention, and their inputs."""
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


def test_linear_flops_equal_torchs_counter(counted):
    _, shape, rows, ((forward, _), (backward, _)) = counted
    work = replace(pack_work(tokens_of(rows)), pairs=0)
    # The head's backward product is computed in the forward pass (`prefix.logprobs.FusedLinearLogprob`).
    ahead = 2 * shape.head * work.predicting
    assert forward_flops(shape, work, value=True) == forward - ahead
    assert backward_flops(shape, work, value=True) == backward + ahead


def test_dense_attention_flops_equal_torchs_counter(counted):
    """Exact except for rotary angles (forward), and keys of the first layer, which need no gradient."""
    architecture, shape, rows, ((_, forward), (_, backward)) = counted
    dense = pack_work(tokens_of(rows), dense=True)
    alone = Work(0, dense.pairs, 0)
    one_product = 2 * shape.attention_width * dense.pairs
    rotary = 0 if architecture == "mpt" else 2 * dense.tokens * (shape.attention_width // 4 // 2)
    spared = 0 if architecture == "mpt" else one_product
    assert forward == forward_flops(shape, alone) + rotary
    assert backward == backward_flops(shape, alone) - spared
    assert pack_work(tokens_of(rows)).pairs < dense.pairs


def test_responses_share_their_prompt():
    """Tokens, visible pairs and targets are those of the pack of all responses."""
    task, own, written = range(5, 45), [range(50, 75), range(80, 111)], 5
    prompts = [[*task, *question] for question in own]
    rows = [Sample(prompt, [k, *range(written - 1)]) for prompt in prompts for k in range(3)]
    packed = pack(rows)
    work = pack_work([SampleTokens(0, len(task), len(question), written, 3) for question in own])
    assert (work.tokens, work.predicting) == (packed.input_ids.shape[1], len(packed.targets))
    assert work.pairs == int(packed.mask.sum())


def test_ppo_phases_add_up(tiny_model):
    shape = shape_of(tiny_model("llama"))
    batch = [SampleTokens(0, 9, *own) for own in ((4, 3), (7, 1), (2, 6))]
    phases = ppo_flops(shape, batch, epochs=4, micro_batch_size=3)
    work = pack_work(batch)
    assert list(phases) == ["rollout", "reference", "update"]
    # A rollout processes each token once and attends over the same pairs as the pack of its samples.
    assert phases["rollout"] == forward_flops(shape, work, value=True)
    assert phases["reference"] == forward_flops(shape, work, adapter=False)
    both = forward_flops(shape, work, value=True) + backward_flops(shape, work, value=True)
    assert phases["update"] == 4 * both
    again = ppo_flops(shape, batch, 4, 3, checkpointing=True)["update"] - phases["update"]
    assert again == 4 * forward_flops(shape, replace(work, predicting=0))
    more = ppo_flops(shape, batch, 4, 3, critic="adapter", recompute=True, reference=False)
    assert list(more) == ["rollout", "old logprobs", "values", "update"]
    assert more["values"] == forward_flops(shape, work, head=False, value=True)
    assert more["update"] > 1.5 * phases["update"]
    assert ppo_flops(shape, batch, 4, 1)["reference"] > phases["reference"], "the prefix is computed once per pack"


def test_the_prefix_of_a_single_row_does_not_matter():
    """The prefix of one row is all but its last prompt token; counts do not depend on the end of the prefix."""
    row = Sample([5, 6, 7, 8], [9, 10])
    assert pack_work(tokens_of([row])) == pack_work([SampleTokens(0, 0, 4, 2)])
