"""`nlu preview`: prompt and response tokens of a row, and the reward of gold, wrong and garbage answers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from extensions.common.console import visible
from extensions.data import Example
from extensions.prefix.tree import Sample, pack
from extensions.prompts import PromptEncoder, written
from extensions.rollout.reward_check import trial_answers, trial_response
from extensions.rollout.rewards import Reward


def preview_examples(
    examples: Sequence[Example],
    split: str,
    encoder: PromptEncoder,
    reward: Reward,
    budget: tuple[int, int],
    sft_loss: str,
    console: Console,
) -> None:
    """Print labelled rows of one task.

    Args:
        split: of the rows, for their titles.
        budget: low and high end of the task's response budget, in tokens.
        sft_loss: the recipe's `sft.loss`.
    """
    encoded = [encoder.encode(example.task, example.fields) for example in examples]
    answers = [trial_answers(example.task, str(example.label)) for example in examples]  # the first is gold
    responses = [encoder.answer_ids(*prompt, gold) for prompt, ((_, gold), *_) in zip(encoded, answers, strict=True)]
    packed = pack([Sample(ids, response) for (ids, _), response in zip(encoded, responses, strict=True)])
    for k, example in enumerate(examples):
        ids, text = encoded[k]
        console.rule(Text(visible(f"{example.task.display_name}, {split} row {example.index}")))
        console.print(Text.assemble((visible(text), "cyan"), (visible(written(answers[k][0][1])), "bold green")))
        shared = sum(span.length for span in packed.chains[k][:-1])
        console.print(
            f"\nprompt (blue): {len(ids)} tokens, no loss; the first {shared} are computed once for all rows shown "
            f"that begin with them. response (green): {len(responses[k])} tokens for gold, with policy and value loss; "
            f"PPO draws its budget from {budget[0]} to {budget[1]} tokens. "
            f"SFT: loss over {'both' if sft_loss == 'sequence' else 'the response'}",
            markup=False,
        )
        tokens = [encoder.tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in responses[k]]
        console.print(" ".join(map(repr, tokens)))
        table = Table("answer", "text", "reward")
        for kind, answer in answers[k]:
            response = trial_response(kind, answer)
            table.add_row(kind, repr(response), f"{reward([response], [text], [example])[0]:+.2f}")
        console.print(table)
