"""Settings for a training of minutes, by the size of the model and the number of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Regime:
    """Hyperparameters for models of up to `parameters` parameters."""

    parameters: float
    sft_lr: float
    ppo_lr: float
    dropout: float  # of LoRA
    epochs: float  # of SFT
    min_rows: int  # that SFT sees, over several epochs of a small file
    max_rows: int  # that SFT sees: minutes, not hours


REGIMES = (
    Regime(5e8, sft_lr=1e-3, ppo_lr=1e-4, dropout=0.0, epochs=4, min_rows=300, max_rows=2000),
    Regime(2e9, sft_lr=2e-4, ppo_lr=5e-5, dropout=0.0, epochs=3, min_rows=300, max_rows=3000),
    Regime(math.inf, sft_lr=1e-4, ppo_lr=1e-5, dropout=0.05, epochs=3, min_rows=300, max_rows=6000),
)
# Of SFT on scores, whose loss computes every score of the grid for a row; SmolLM2 learns STS-B in 30 to 45 steps.
MAX_SCORE_LR, MAX_SCORE_ROWS = 3e-4, 960
BATCH_SIZE = 16  # rows per step, of SFT and PPO
PPO_STEPS = 30
MAX_PROMPT_TOKENS = {"cpu": 512, "gpu": 1024}
VALIDATE_EVERY = 0.15  # of the run
NUM_CHECKPOINTS = 6  # during SFT
EVALUATION_ROWS = 200  # of the before/after table on a CPU
RARE = 0.25  # of the even share: classes are unbalanced if a label has less


@dataclass(frozen=True)
class Settings:
    """The numbers of a recipe that depend on model and data."""

    regime: Regime
    sft_steps: int
    ppo_steps: int
    batch_size: int
    epochs: float  # of the SFT steps
    max_tokens: int
    response_budget: list[int]
    validate_every: float
    checkpoint_every: int
    evaluation_rows: int  # of the before/after table
    validation_rows: int

    def sft_lr(self, kind: str) -> float:
        """Peak learning rate of SFT for a kind of task."""
        return min(self.regime.sft_lr, MAX_SCORE_LR) if kind == "regression" else self.regime.sft_lr


def choose_settings(
    parameters: float,
    train_rows: int,
    prompt_tokens: int,
    fixed_tokens: int,
    context: int,
    longest_answer: int,
    on_gpu: bool,
    scores: bool = False,
) -> Settings:
    """The settings of a recipe.

    Args:
        parameters: of the model.
        prompt_tokens: of a long prompt, the 95th percentile of the training rows.
        fixed_tokens: of a prompt without its texts.
        context: tokens of prompt and response that the model reads.
        longest_answer: tokens, with the closing tag.
        scores: the task is a regression.
    """
    regime = next(one for one in REGIMES if parameters <= one.parameters)
    seen = min(max(regime.epochs * train_rows, regime.min_rows), regime.max_rows)
    steps = math.ceil((min(seen, MAX_SCORE_ROWS) if scores else seen) / BATCH_SIZE)
    # Both ends of the budget have room for the longest answer; more room only allows more text around it.
    low = longest_answer + 1
    high = low + max(4, min(8, low // 2))
    limit = min(max(MAX_PROMPT_TOKENS["gpu" if on_gpu else "cpu"], 2 * fixed_tokens), context - high)
    return Settings(
        regime=regime,
        sft_steps=steps,
        ppo_steps=PPO_STEPS,
        batch_size=BATCH_SIZE,
        epochs=steps * BATCH_SIZE / max(1, train_rows),
        max_tokens=max(16, min(limit, 8 * math.ceil(prompt_tokens / 8))),
        response_budget=[low, high],
        validate_every=VALIDATE_EVERY,
        checkpoint_every=max(5, math.ceil(steps / NUM_CHECKPOINTS)),
        evaluation_rows=EVALUATION_ROWS * (5 if on_gpu else 1),
        validation_rows=EVALUATION_ROWS // 2 * (5 if on_gpu else 1),
    )
