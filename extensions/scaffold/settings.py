"""Settings that learn in minutes, from the size of the model and the number of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Regime:
    """What models of up to `parameters` are trained with."""

    parameters: float
    sft_lr: float
    ppo_lr: float
    dropout: float  # of LoRA
    epochs: float  # of SFT
    fewest_rows: int  # that SFT sees, small files over and over
    most_rows: int  # that SFT sees: minutes, not hours


REGIMES = (
    Regime(5e8, sft_lr=1e-3, ppo_lr=1e-4, dropout=0.0, epochs=4, fewest_rows=300, most_rows=2000),
    Regime(2e9, sft_lr=2e-4, ppo_lr=5e-5, dropout=0.0, epochs=3, fewest_rows=300, most_rows=3000),
    Regime(math.inf, sft_lr=1e-4, ppo_lr=1e-5, dropout=0.05, epochs=3, fewest_rows=300, most_rows=6000),
)
BATCH = 16  # rows of a step, of SFT and PPO
PPO_STEPS = 30
LONGEST_PROMPT = {"cpu": 512, "gpu": 1024}  # tokens
VALIDATIONS = 6  # while SFT trains
EVALUATED = 200  # rows of the before/after table on a CPU
RARE = 0.25  # of the even share: a label below it makes the classes unbalanced


@dataclass(frozen=True)
class Settings:
    """The numbers of a recipe that depend on model and data."""

    sft_lr: float
    ppo_lr: float
    dropout: float
    sft_steps: int
    ppo_steps: int
    batch: int
    epochs: float  # that SFT's steps are
    max_tokens: int
    response_budget: list[int]
    validate_every: int
    evaluated: int  # rows of the table
    validated: int  # rows of a validation


def choose(
    parameters: float,
    train_rows: int,
    prompt_tokens: int,
    fixed_tokens: int,
    context: int,
    longest_answer: int,
    on_gpu: bool,
) -> Settings:
    """The settings of a recipe.

    Args:
        parameters: of the model.
        train_rows: rows to learn from.
        prompt_tokens: of a long prompt, the 95th percentile of the training rows.
        context: most tokens of prompt and response that the model reads.
        fixed_tokens: of a prompt without its texts.
        longest_answer: its tokens, with the closing tag.
    """
    regime = next(one for one in REGIMES if parameters <= one.parameters)
    seen = min(max(regime.epochs * train_rows, regime.fewest_rows), regime.most_rows)
    steps = math.ceil(seen / BATCH)
    # A response needs room for the longest answer at either end of the budget; beyond it the model may ramble.
    low = longest_answer + 1
    high = low + max(4, min(8, low // 2))
    limit = min(max(LONGEST_PROMPT["gpu" if on_gpu else "cpu"], 2 * fixed_tokens), context - high)
    return Settings(
        sft_lr=regime.sft_lr,
        ppo_lr=regime.ppo_lr,
        dropout=regime.dropout,
        sft_steps=steps,
        ppo_steps=PPO_STEPS,
        batch=BATCH,
        epochs=steps * BATCH / max(1, train_rows),
        max_tokens=max(16, min(limit, 8 * math.ceil(prompt_tokens / 8))),
        response_budget=[low, high],
        validate_every=max(5, math.ceil(steps / VALIDATIONS)),
        evaluated=EVALUATED * (5 if on_gpu else 1),
        validated=EVALUATED // 2 * (5 if on_gpu else 1),
    )
