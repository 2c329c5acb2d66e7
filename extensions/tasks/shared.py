"""Prompts and labels that entries of several suites share."""

from __future__ import annotations

from typing import Any

YES_NO = 'Insert only "Yes" or "No" here'
# This order makes both answers about equally likely at first. With "Positive" first, SmolLM2-135M-Instruct answers it
# for 97% of the generated reviews, and sampling hardly explores the other.
NEGATIVE_POSITIVE = 'Insert only "Negative" or "Positive" here'

ACCEPTABILITY: dict[str, Any] = {
    # The prompt of the paper's section 4.1.
    "description": "You are an assistant to analyze the linguistic properties of a sentence. The task is to decide the "
    "linguistic acceptability of a sentence. If the sentence is linguistically correct then it is acceptable, else it "
    "is not.",
    "answer_format": YES_NO,
    "question": 'Now judge if the sentence "{sentence}" is linguistically acceptable.',
    "labels": {"1": ["Yes", "acceptable"], "0": ["No", "not acceptable", "unacceptable"]},
    "positive": "1",
}

ENTAILMENT: dict[str, Any] = {
    "description": "You are an assistant to analyze the logical relation between two texts. The task is to decide "
    "whether the second text follows from the first. If a person who reads the first text would conclude that the "
    "second is most likely true then it is an entailment, else it is not.",
    "answer_format": YES_NO,
    "question": 'Now judge if the text "{sentence1}" entails the text "{sentence2}".',
    "labels": {"entailment": ["Yes", "entailment"], "not_entailment": ["No", "not entailment", "not_entailment"]},
    "positive": "entailment",
    "fallback": "entailment",
}

THREE_WAY_ENTAILMENT: dict[str, Any] = {
    "description": "You are an assistant to analyze the logical relation between two texts. The task is to decide what "
    "the first text says about the second. If the second is most likely true then it is an entailment, if it is most "
    "likely false then it is a contradiction, and if it may be either then it is neutral.",
    "answer_format": 'Insert only "entailment", "neutral" or "contradiction" here',
    "question": 'Now judge how the text "{sentence1}" relates to the text "{sentence2}".',
    "labels": ["entailment", "neutral", "contradiction"],
}

NLI_COLUMNS = {"sentence1": "premise", "sentence2": "hypothesis"}


def sizes(train: int, validation: int, test: int) -> dict[str, int]:
    """`source.sizes` of a task with all three splits."""
    return {"train": train, "validation": validation, "test": test}
