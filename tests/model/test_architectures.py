"""Model families: computed exactly or refused; trained; their adapters read by plain peft and transformers."""

import pytest
import torch
from architectures import TABLE, check, load, quiet, save, table, verdict
from conftest import save_tiny_model
from peft import PeftModel
from support import adapter_of, launch, write_recipe
from tiny_models import causal_classes, shrunk
from transformers import AutoModelForCausalLM, AutoTokenizer

from extensions.common.errors import UserError
from extensions.common.files import read_json, read_jsonl
from extensions.prompts import CLOSE
from extensions.runs.main import main

# One model type per feature, and the path that is exact for it.
KINDS = {
    "gemma3_text": "packed",  # a sliding window in most layers
    "mistral": "packed",  # a window in all
    "llama4_text": "packed",  # chunked attention
    "mixtral": "packed",  # experts
    "granite": "packed",  # scaled logits
    "cohere": "packed",
    "nanochat": "packed",  # capped logits
    "hyperclovax": "packed",
    "gpt2": "packed",  # Conv1D, learned positions
    "phi3": "packed",  # fused projections
    "phimoe": "packed",  # a router that draws in training mode
    "deepseek_v3": "packed",  # values of another size than keys
    "gemma2": "packed",  # capped attention scores
    "gpt_oss": "packed",  # attention sinks
    "doge": "masked",  # not causal in transformers' sdpa
    "stablelm": "masked",
    "bloom": "plain",  # ALiBi from the mask
    "lfm2": "plain",  # convolutions
    "qwen3_5_text": "plain",  # linear attention
    "rwkv": "plain",  # a state that is not exact for two rows at once, so no cache
    "recurrent_gemma": "plain",  # a state within its modules, so no cache
    "bart": "plain",  # a cache per length
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KINDS)
def test_a_model_type_is_exact(model_type, tmp_path):
    """Logprobs, gradients and greedy answers are those of plain transformers and peft."""
    with quiet():
        assert verdict(model_type, tmp_path).kind == KINDS[model_type]


@pytest.mark.parametrize("model_type", ["bert", "xlnet"])
def test_a_model_that_is_not_causal_is_refused(model_type, tmp_path):
    with quiet(), pytest.raises(UserError, match="is not causal"):
        save(model_type, tmp_path)
        load(tmp_path)


def test_an_unknown_logit_transform_uses_the_models_own_forward(tmp_path):
    """XMOD's head has a layer of its own before the vocabulary."""
    with quiet():
        save("xmod", tmp_path)
        policy = load(tmp_path)
        assert policy.anatomy.transform is None
        check(policy, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_table_of_families_is_up_to_date():
    """Every architecture is exact or refused."""
    with quiet():
        assert table() == TABLE.read_text(encoding="utf-8"), "outdated; run: python tests/architectures.py"


TRAINED = "phi3 gpt2 gemma2 gemma3_text mistral mixtral granite cohere olmo3 starcoder2 bloom llama4_text gpt_oss lfm2"
TRAINED += " qwen3_5_text mamba rwkv recurrent_gemma"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TRAINED.split())
def test_a_family_trains_and_plain_peft_loads_its_adapter(model_type, tmp_path, monkeypatch):
    """PPO, SFT, and an evaluation that plain peft and transformers reproduce."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    config_class, _ = causal_classes()[model_type]
    with quiet():
        save_tiny_model(model, lambda vocabulary: shrunk(config_class, vocab_size=vocabulary))
        command = [str(write_recipe(tmp_path, model)), "evaluation.before=false", "evaluation.max_samples=6"]
        small = ["sft.batch_size=4", "sft.max_steps=2", "evaluation.decoding=likelihood"]
        for method in ("ppo", "sft"):
            assert main([*command, f"output_dir={method}", *small], method) == 0
            again = [f"output_dir={method}-again", f"model.adapter={method}/adapter"]
            assert main([*command, *again, *small], "eval") == 0
    prompts = {row["index"]: row["prompt"] for row in _prompts(tmp_path, model)}
    for method in ("ppo", "sft"):
        assert read_json(tmp_path / method / "model.json")["forward"]["largest"] < 5e-5
        base = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager", dtype=torch.float32)
        alone = PeftModel.from_pretrained(base, f"{method}/adapter").eval()
        tokenizer = AutoTokenizer.from_pretrained(f"{method}/adapter")
        answers = read_jsonl(tmp_path / f"{method}-again" / "predictions_after.jsonl")
        assert answers == read_jsonl(tmp_path / method / "predictions_after.jsonl")
        for row in answers:
            scores = {word: _logprob(alone, tokenizer, prompts[row["index"]], word) for word in ("Yes", "No")}
            assert row["response"] == f" {max(scores, key=lambda word: scores[word])} {CLOSE}"


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "stage"), [("gemma3_text", 3), ("rwkv", 3)])
def test_two_ranks_equal_one(model_type, stage, tmp_path):
    """On each path and ZeRO stage: samples, rewards and trained weights do not depend on the number of ranks."""
    config_class, _ = causal_classes()[model_type]
    with quiet():
        save_tiny_model(tmp_path / "model", lambda vocabulary: shrunk(config_class, vocab_size=vocabulary))
    recipe = write_recipe(tmp_path, tmp_path / "model", evaluation={"before": False, "max_samples": 4})
    for ranks in (1, 2):
        options = [f"output_dir={tmp_path / str(ranks)}", f"deepspeed.zero_stage={stage if ranks == 2 else 0}"]
        done = launch(recipe, *options, ranks=ranks)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    one, two = adapter_of(tmp_path / "1"), adapter_of(tmp_path / "2")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=2e-3, msg=name)
    for a, b in zip(*(read_jsonl(tmp_path / ranks / "metrics.jsonl") for ranks in "12"), strict=True):
        assert a["reward_mean"] == b["reward_mean"] and a["response_tokens"] == b["response_tokens"]
        assert a["sampling_mismatch"] < 1e-5 and b["sampling_mismatch"] < 1e-5


def _prompts(folder, model):
    """The prompts of an evaluation, as text."""
    from extensions.data.splits import RunData
    from extensions.prompts import prompt_text
    from extensions.recipe import load_recipe

    recipe = load_recipe(folder / "recipe.yaml", ["evaluation.max_samples=6"], "eval")
    rows = RunData.load(recipe, print).table
    return [{"index": row.index, "prompt": prompt_text(row.task, row.fields)} for row in rows]


@torch.no_grad()
def _logprob(model, tokenizer, prompt, word):
    """Log-probability of a word with the closing tag, summed over the spaces around it."""
    forms = [f" {word} {CLOSE}", f" {word}{CLOSE}", f"{word} {CLOSE}", f"{word}{CLOSE}"]
    ids, *rows = (tuple(tokenizer(text)["input_ids"]) for text in (prompt, *(f"{prompt}{form}" for form in forms)))
    found = []
    for whole in set(rows):
        assert whole[: len(ids)] == ids
        logprobs = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0, :-1].log_softmax(-1)
        found.append(logprobs.gather(-1, torch.tensor(whole[1:])[:, None])[len(ids) - 1 :].sum())
    return float(torch.stack(found).logsumexp(0))
