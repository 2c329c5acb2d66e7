"""System under test: TRL 0.11.4's PPOTrainer, the paper's own trainer, in its own environment (`trl.txt`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from worker import serve


def load(job: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(job["model"]) / "tokenizer.json"), eos_token=job["eos"], pad_token=job["eos"]
    )
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, use_rslora=True, target_modules=["q_proj", "v_proj"])
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        job["model"], peft_config=lora, torch_dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"
    )
    rows = len(job["batches"][0])
    config = PPOConfig(
        learning_rate=3e-4,
        batch_size=rows,
        mini_batch_size=rows,
        ppo_epochs=4,
        init_kl_coef=0.05,
        remove_unused_columns=False,
    )
    trainer = PPOTrainer(config, model, ref_model=None, tokenizer=tokenizer)  # no reference: the adapters switched off
    base = [p for name, p in model.named_parameters() if "lora_" not in name and not name.startswith("v_head")]
    weights = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in base}.values())
    budget = job["budget"]

    def iterate(step: int) -> dict[str, Any]:
        prompts = [torch.tensor(ids) for ids in job["batches"][step]]
        start = time.perf_counter()
        responses = trainer.generate(
            prompts,
            batch_size=rows,
            return_prompt=False,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            min_new_tokens=budget,
            max_new_tokens=budget,
            pad_token_id=tokenizer.pad_token_id,
        )
        written = time.perf_counter()
        assert all(len(response) == budget for response in responses)
        scores = [torch.tensor(float(k % 3 - 1)) for k in range(rows)]
        stats = trainer.step(prompts, responses, scores)
        end = time.perf_counter()
        update = float(stats["time/ppo/optimize_step"])
        return {
            "seconds": end - start,
            "phases": {"rollout": written - start, "reference": end - written - update, "update": update},
            "weights_gb": weights / 2**30,
        }

    return iterate


if __name__ == "__main__":
    serve(load)
