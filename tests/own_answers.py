"""An own task, and reading an answer to it."""

from extensions.tasks import Task


def own(**keys):
    return Task.model_validate({"name": "own", "description": "Judge.", "question": "{text}"} | keys)


SIGNED = own(score_range=[-1, 1])


TOPICS = own(labels={"s": ["Sports"], "p": ["Politics", "policy"], "m": ["Money"]}, multi_label=True)
