"""System under test: supervised fine-tuning as transformers and PEFT have it: padded rows, `labels`, AdamW."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from worker import serve


def load(job: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, use_rslora=True, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-4)
    weights = sum(p.nbytes for name, p in model.named_parameters() if "lora_" not in name)

    def iterate(step: int) -> dict[str, Any]:
        start = time.perf_counter()
        rows = [torch.tensor([*prompt, *[7] * job["budget"]]) for prompt in job["batches"][step]]
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "phases": {"update": seconds}, "weights_gb": weights / 2**30}

    return iterate


if __name__ == "__main__":
    serve(load)
