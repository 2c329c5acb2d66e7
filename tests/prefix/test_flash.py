"""The flash path: its index algebra against the tree's dense mask, whole models, and where it cannot be used.

Without a GPU, stand-ins with the signatures of `varlen_attn` and of flash-attn's `flash_attn_varlen_func` (for ALiBi)
compute what the kernels would; the kernel's own call is tested where there is one.
"""

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from architectures import load
from support import CPU, nested_prompts, samples, write_recipe
from torch import nn
from torch.nn.attention import varlen
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from extensions.common.errors import UserError
from extensions.model.loading import load_policy
from extensions.model.policy import ForwardPath
from extensions.prefix import flash
from extensions.prefix.attention import NAME, CannotPack
from extensions.prefix.flash import (
    EVERYTHING,
    flash_attention,
    missing,
    package_kernel,
    reference_kernel,
    torch_kernel,
    window_of,
)
from extensions.prefix.limits import PackLimit
from extensions.prefix.tree import Sample, pack
from extensions.recipe import Lora, Model
from extensions.runs.main import main

HEADS, KEY_HEADS, SIZE = 6, 2, 8


def trees():
    generator = torch.Generator().manual_seed(1)

    def ids(count):
        return torch.randint(5, 200, (count,), generator=generator).tolist()

    prompt, other = ids(40), ids(7)
    return {
        "two groups": samples(),
        "one sample": [Sample(ids(5), ids(3))],
        "depth 3": [Sample(p, ids(1 + k % 4)) for k, p in enumerate(nested_prompts())],
        "k responses": [Sample(p, ids(1 + k % 5)) for p in (prompt, prompt + other) for k in range(8)],
        "single tokens": [Sample([*prompt, *ids(1)], ids(1)) for _ in range(4)] + [Sample(prompt[:1], ids(1))],
    }


def dense(query, key, value, mask, scaling, bias=0.0):
    """Attention under a dense (L, L) mask, with biases (heads, L, L); query heads share key heads."""
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (
        x.transpose(0, 1) for x in (query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1))
    )
    scores = (q @ k.transpose(1, 2)) * scaling + bias
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def stand_in(calls, slopes=None):
    """`varlen_attn` as its documentation has it, by the reference, with the kernel's own conditions checked."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        assert type(max_q) is int and type(max_k) is int, "else each layer waits for the device"
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q[0] == cu_seq_k[0] == 0
        assert int(cu_seq_q[-1]) == len(query) and int(cu_seq_k[-1]) == len(key) == len(value)
        assert (cu_seq_q.diff() > 0).all() and (cu_seq_k.diff() >= cu_seq_q.diff()).all()
        assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
        assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size[1] == 0
        calls.append(window_size)
        segments = SimpleNamespace(cu_queries=cu_seq_q, cu_keys=cu_seq_k)
        window = EVERYTHING if window_size[0] == -1 else window_size[0] + 1
        return reference_kernel(query, key, value, segments, scale, window, slopes)

    return varlen_attn


def package_stand_in():
    """The package flash-attn with `flash_attn_varlen_func` as its documentation has it (2.8), by the reference."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
    ):
        assert causal and deterministic and type(max_seqlen_q) is int and type(max_seqlen_k) is int
        assert alibi_slopes.dtype == torch.float32 and alibi_slopes.shape == (q.shape[1],)
        return stand_in([], alibi_slopes)(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            scale=softmax_scale,
            window_size=window_size,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    return package


@pytest.fixture(params=["reference", "stand-ins"])
def kernel(request, monkeypatch):
    """The kernels that `flash_attention` may get: the reference, or the others through their stand-ins."""
    if request.param == "stand-ins":
        monkeypatch.setattr(varlen, "varlen_attn", stand_in([]))
        monkeypatch.setitem(sys.modules, "flash_attn", package_stand_in())
        monkeypatch.setattr(
            flash, "kernel_for", lambda query, slopes=None: torch_kernel if slopes is None else package_kernel
        )


@pytest.mark.parametrize("window", [EVERYTHING, 5, 1], ids=["causal", "window 5", "window 1"])
@pytest.mark.parametrize("tree", trees())
@pytest.mark.parametrize("min_saved", [1, 32])
@pytest.mark.parametrize("alibi", [False, True], ids=["", "ALiBi"])
def test_values_and_gradients_equal_the_dense_mask(kernel, tree, min_saved, window, alibi):
    packed = pack(trees()[tree], min_saved=min_saved)
    length, position = packed.input_ids.shape[1], packed.position_ids[0]
    mask = packed.mask[0, 0]
    if window != EVERYTHING:
        mask = mask & (position[None] > position[:, None] - window)
    generator = torch.Generator().manual_seed(0)

    def tensor(heads):
        return torch.randn(length, heads, SIZE, dtype=torch.float64, generator=generator)

    inputs = [tensor(heads).requires_grad_() for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    grad = tensor(HEADS)
    slopes = 0.5 ** torch.arange(1.0, HEADS + 1) if alibi else None
    bias = slopes[:, None, None] * position if alibi else 0.0  # MPT's form: by the key alone
    found = flash_attention(*inputs, packed.segments, 0.3, window, slopes)
    found_grads = torch.autograd.grad(found, inputs, grad)
    wanted = dense(*inputs, mask, 0.3, bias)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(found_grads, torch.autograd.grad(wanted, inputs, grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # the copies of a key are summed in float32


def test_the_gradients_of_a_keys_copies_are_summed_in_float32():
    """In bfloat16, 1 + 64 times 2^-8 is 1 if the terms are added one by one."""
    shared = list(range(5, 45))
    packed = pack([Sample([*shared, 50 + k], [1, 2]) for k in range(64)])
    segments = packed.segments
    copies = torch.zeros(len(segments.source), 1, 1, dtype=torch.bfloat16)
    of_first = segments.order[: int(segments.counts[0])]
    assert len(of_first) == 65, "the prefix itself, and its 64 leaves"
    copies[of_first] = 2.0**-8
    copies[of_first[0]] = 1.0
    assert flash._summed(copies, segments)[0].item() == 1.25


def test_segments_are_made_once_per_pack():
    packed = pack(samples())
    assert packed.segments is packed.segments


# --------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("function", "window"),
    [
        (causal_mask_function, EVERYTHING),
        (sliding_window_causal_mask_function(4), 4),
        (sliding_window_causal_mask_function(20), EVERYTHING),
        (sliding_window_causal_mask_function(12), EVERYTHING),
        (sliding_window_causal_mask_function(11), 11),
        (lambda b, h, q, k: (k <= q) & (q // 4 == k // 4), None),  # chunks, as in Llama 4
        (lambda b, h, q, k: (q < 100) & (k < 100), None),  # not causal
    ],
    ids=["causal", "4 of 12", "longer than the pack", "as long", "one less", "chunks", "all"],
)
def test_a_layers_mask_becomes_a_window_or_nothing(function, window):
    assert window_of(partial(function, 0, 0), 12, CPU) == window


# ----------------------------------------------------------------------------------------------------- whole models


def logprobs_and_gradients(policy, path, rows):
    policy.use(path)
    with policy.role("actor"):
        found = policy(pack(rows, CPU, min_saved=1), values=False)["logprobs"]
        found.square().sum().backward()
    gradients = {name: p.grad for name, p in policy.trainable.items() if p.grad is not None}
    policy.zero_grad()
    return found.detach(), gradients


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "qwen3", "gpt2", "phi3", "mpt"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_model_computes_the_same_as_by_the_packed_path(kernel, family, model_type, checkpointing):
    policy = load(family(model_type))
    if checkpointing:
        policy.causal_lm.gradient_checkpointing_enable()
        policy.train()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    rows = [Sample(row.prompt, row.response) for row in trees()["depth 3"]]
    wanted, wanted_grads = logprobs_and_gradients(policy, ForwardPath("packed", NAME), rows)
    found, found_grads = logprobs_and_gradients(policy, ForwardPath("packed", NAME, flash=True), rows)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert found_grads.keys() == wanted_grads.keys() and len(found_grads) > 0
    for name, gradient in wanted_grads.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found_grads[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7)


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("gemma2", "capped scores"), ("gpt_oss", "no sinks"), ("llama4_text", "a causal one and a window")],
)
def test_layers_that_the_kernel_lacks_are_refused(family, model_type, why):
    policy = load(family(model_type))
    policy.use(ForwardPath("packed", NAME, flash=True))
    row = list(range(5, 60))
    with policy.role("actor"), pytest.raises(CannotPack, match=why):
        policy(pack([Sample(row, [7, 8, 9])], CPU), values=False)


@pytest.mark.parametrize("model_type", ["llama", "mpt"])
def test_prefill_uses_the_kernel_and_decodes_the_same(kernel, family, monkeypatch, model_type):
    policy, prompts = load(family(model_type)), [row.prompt for row in samples()]
    used = []
    attend = flash._TreeAttention.apply
    monkeypatch.setattr(flash._TreeAttention, "apply", lambda *args: used.append(1) or attend(*args))
    states = []
    for path in (ForwardPath("packed", NAME), ForwardPath("packed", NAME, flash=True)):
        policy.use(path)
        with policy.role("actor"), torch.no_grad():
            decoder = policy.prefill(prompts, PackLimit(8), 2)
            states.append((decoder.states, decoder.step(torch.tensor([7] * len(prompts)))))
        assert bool(used) == path.flash
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------- where it is used


def test_what_a_device_lacks_is_named(monkeypatch):
    gpu = torch.device("cuda")
    assert missing(CPU, torch.bfloat16) == "it needs a CUDA device"
    capability = [(7, 5)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    assert missing(gpu, torch.bfloat16) == "it needs compute capability 8.0 or higher; this device has 7.5"
    capability[0] = (9, 0)
    assert missing(gpu, torch.float32) == "it needs bfloat16 or float16, not float32"
    monkeypatch.setattr(flash, "wrong_by", lambda device, dtype, alibi: 0.01)
    assert missing(gpu, torch.bfloat16) is None and missing(gpu, torch.float16) is None
    assert "needs the package flash-attn, which is not installed" in missing(gpu, torch.bfloat16, alibi=True)
    package = package_stand_in()
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    assert missing(gpu, torch.bfloat16, alibi=True) is None
    monkeypatch.setattr(package, "flash_attn_varlen_func", lambda q, k, v: None)
    assert "flash-attn 2.4 or later" in missing(gpu, torch.bfloat16, alibi=True)
    monkeypatch.setattr(flash, "wrong_by", lambda device, dtype, alibi: 0.7)
    assert "wrong by 70% on this device" in missing(gpu, torch.bfloat16)
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value: None)
    assert "it needs torch 2.13" in missing(gpu, torch.bfloat16)


@pytest.mark.parametrize("alibi", [False, True], ids=["", "ALiBi"])
def test_a_kernel_with_another_alignment_or_wrong_gradients_is_found(monkeypatch, alibi):
    def top_left(query, key, value, segments, scaling, window, slopes):
        own = SimpleNamespace(cu_queries=segments.cu_queries, cu_keys=segments.cu_queries)
        first = torch.cat(
            [torch.arange(k, k + n) for k, n in zip(segments.cu_keys, segments.cu_queries.diff(), strict=False)]
        )
        return reference_kernel(query, key[first], value[first], own, scaling, window, slopes)

    def without_gradient(query, key, value, *rest):
        return reference_kernel(query, key.detach() + 0 * key, value, *rest)

    def without_biases(*arguments):
        return reference_kernel(*arguments[:-1])

    for wrong in (top_left, without_gradient, *([without_biases] if alibi else [])):
        kernels = iter([wrong, wrong, reference_kernel, reference_kernel])  # forward and backward of each dtype
        monkeypatch.setattr(flash, "kernel_for", lambda query, slopes, kernels=kernels: next(kernels))
        assert flash.wrong_by(CPU, torch.bfloat16, alibi) > 0.5
    monkeypatch.setattr(flash, "kernel_for", lambda query, slopes: reference_kernel)
    assert flash.wrong_by(CPU, torch.bfloat16, alibi) < flash.ROUNDING / 2


def test_auto_takes_it_where_nothing_is_missing(family, monkeypatch):
    path = family("qwen2")
    assert not load(path).path.flash
    monkeypatch.setattr("extensions.model.proof.missing", lambda device, dtype, alibi: None)
    policy = load(path)
    assert load(family("mpt")).path.flash
    assert policy.path.flash and str(policy.proof).startswith("Qwen2ForCausalLM: flash (shared prefixes")
    assert load(family("gemma2")).path == ForwardPath("packed", NAME), "the next exact path"


def test_flash_on_a_cpu_is_an_error_before_training(tiny_model, tmp_path, capsys):
    command = [str(write_recipe(tmp_path, tiny_model("llama"))), "model.attn_implementation=flash"]
    assert main([*command, f"output_dir={tmp_path / 'run'}"]) == 2
    message = "model.attn_implementation: flash cannot be used: it needs a CUDA device; set it to auto"
    assert message in " ".join(capsys.readouterr().err.split())


def test_flash_without_the_attention_interface_is_an_error(family):
    model = Model(path=str(family("bloom")), attn_implementation="flash")
    with pytest.raises(UserError, match="flash needs a model with transformers' attention interface"):
        load_policy(model, Lora(), "shared", 1.0, CPU, 0, "base")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU with a flash kernel")
@pytest.mark.parametrize("window", [EVERYTHING, 5])
@pytest.mark.parametrize("tree", trees())
@pytest.mark.parametrize("alibi", [False, True], ids=["", "ALiBi"])
def test_the_kernel_equals_the_reference_on_a_gpu(tree, window, alibi):
    """Also that lengths that differ are aligned bottom-right: a later torch may choose a kernel that is not."""
    if why := missing(torch.device("cuda"), torch.bfloat16, alibi):
        assert "wrong by" not in why, why  # skipped where there is no kernel, not where it is wrong
        pytest.skip(why)
    packed = pack(trees()[tree], "cuda", min_saved=1)
    slopes = torch.linspace(0.5, 0.05, HEADS, device="cuda") if alibi else None
    length, segments = packed.input_ids.shape[1], packed.segments
    torch.manual_seed(0)
    inputs = [
        torch.randn(length, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    inputs = [x.requires_grad_() for x in inputs]
    found = flash_attention(*inputs, segments, 0.125, window, slopes)
    grads = torch.autograd.grad(found.float().square().sum(), inputs)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    wanted = flash_attention(*exact, segments, 0.125, window, slopes)
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)
    for one, other in zip(grads, torch.autograd.grad(wanted.square().sum(), exact), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=5e-2, atol=5e-2)
