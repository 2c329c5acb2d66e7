"""The rollouts, by OpenRLHF's agent contract (`--train.agent_func_path`): one response to one prompt, and its reward.

OpenRLHF's single-turn executor (0.11.2) tokenizes without special tokens, knows no stop string and no budget of a row,
and logs what a reward raises, so a run goes on without rewards. Here an error ends the run and names its cause.
"""

from __future__ import annotations

import json
from typing import Any

from openrlhf.utils.agent import AgentExecutorBase

from extensions.rollout.vllm_engine import sampled_tokens
from extensions.rollout.vllm_engine import sampling_params as sampling_params_of


class AgentExecutor(AgentExecutorBase):
    """OpenRLHF makes one in each engine."""

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
        """
        Args:
            label: the request as JSON (`extensions.ray_backend.trainer.RolloutRequest`): token ids of the prompt,
                which its text alone does not fix; budget, seed; and the label for the reward, or null for no reward.
            llm_engine: `extensions.ray_backend.workers.RolloutWorker`.
        """
        ask = json.loads(label)
        temperature = llm_engine.recipe.rollout.temperature
        params = sampling_params_of(ask["budget"], ask["seed"], temperature, ask["greedy"], llm_engine.eos)
        output = await llm_engine.generate(ask["prompt_ids"], params)
        tokens, logprobs = sampled_tokens(output)
        text = llm_engine.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        reward = 0.0
        if ask["label"] is not None:
            reward = llm_engine.reward.of_labels([text], [prompt], [ask["label"]])[0]
        begin, end = len(ask["prompt_ids"]), len(ask["prompt_ids"]) + len(tokens)
        return {
            "prompt": prompt,
            "label": label,
            "images": None,
            "mm_train_inputs": None,
            "observation_tokens": [*ask["prompt_ids"], *tokens],
            "action_ranges": [(begin, end)],
            "rollout_log_probs": [0.0] * begin + logprobs,
            "truncated": output.outputs[0].finish_reason == "length",
            "reward": reward,
            "scores": reward,
            "extra_logs": {"adapter_version": float(llm_engine.lora.version)},
            "text": text,
        }
