"""The rollout by OpenRLHF's agent contract (`--train.agent_func_path`): one response to one prompt, and its reward.

OpenRLHF's single-turn executor (0.11.2) tokenizes without special tokens, has no stop strings and no budget per row,
and logs errors of a reward and continues. Here an error stops the run and names its cause.
"""

from __future__ import annotations

import json
from typing import Any

from openrlhf.utils.agent import AgentExecutorBase

from extensions.prompts import CLOSE
from extensions.rollout import vllm_engine


class AgentExecutor(AgentExecutorBase):
    """OpenRLHF creates one in each vLLM engine's process."""

    async def execute(
        self,
        prompt: str,
        label: str,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:
        """Respond to one request, and compute its reward.

        Args:
            label: the `extensions.ray_backend.groups.RolloutRequest`, as JSON.
            llm_engine: `extensions.ray_backend.workers.RolloutActor`.
        """
        request = json.loads(label)
        temperature = llm_engine.recipe.rollout.temperature
        params = vllm_engine.sampling_params(
            request["budget"], request["seed"], temperature, request["greedy"], CLOSE, llm_engine.eos
        )
        output = await llm_engine.generate(request["prompt_ids"], params)
        tokens, logprobs = vllm_engine.sampled_tokens(output)
        text = llm_engine.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        reward = 0.0
        if request["label"] is not None:
            reward = llm_engine.reward.of_labels([text], [prompt], [request["label"]])[0]
        begin, end = len(request["prompt_ids"]), len(request["prompt_ids"]) + len(tokens)
        return {
            "prompt": prompt,
            "label": label,
            "images": None,
            "mm_train_inputs": None,
            "observation_tokens": [*request["prompt_ids"], *tokens],
            "action_ranges": [(begin, end)],
            "rollout_log_probs": [0.0] * begin + logprobs,
            "truncated": output.outputs[0].finish_reason == "length",
            "reward": reward,
            "scores": reward,
            "extra_logs": {"adapter_version": float(llm_engine.lora.version)},
            "text": text,
        }
