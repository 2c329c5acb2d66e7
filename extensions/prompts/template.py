"""A task and a row as the text of a prompt (section 4.1 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from extensions.tasks import PLACEHOLDER, Task

OPEN, CLOSE = "<Judgement>", "</Judgement>"


def answer_format(task: Task) -> str:
    """What the model is told to insert between the tags."""
    if task.answer_format:
        return _literal(task.answer_format)
    if task.score_range is not None:
        return "Insert only a number between {:.15g} and {:.15g} here".format(*task.score_range)
    quoted = [f'"{words[0]}"' for words in task.labels.values()]
    if task.multi_label:
        listed = f"{', '.join(quoted[:-1])} and {quoted[-1]}"
        return f'Insert only those of {listed} that apply, separated by commas, or "{task.no_label}" here'
    return f"Insert only {', '.join(quoted[:-1])} or {quoted[-1]} here"


def render(task: Task, fields: Mapping[str, str]) -> tuple[str, str]:
    """The two halves of a prompt: what is the same for every example of the task, and the question.

    Braces inside the data stay as they are: placeholders are replaced once, in one pass.
    """
    system = (
        f"System_prompt:\n  {_literal(task.description)}\n"
        f"The result you give should have the following form:\n  {OPEN} {{{answer_format(task)}}} {CLOSE}\n"
    )
    question = PLACEHOLDER.sub(lambda match: fields[match[1]] if match[1] else match[0][0], task.question)
    return system, f"Prompt:\n  {question}\n"


def _literal(text: str) -> str:
    """A text without placeholders: {{ and }} are braces."""
    return text.replace("{{", "{").replace("}}", "}")


Demonstration = tuple[
    Mapping[str, str], str
]  # a demonstration: the fields of a training row, and its answer as it is written


def dedup_key(task: Task, fields: Mapping[str, str]) -> tuple[str, ...]:
    """What two rows must differ in, for one not to give away the other's answer: their texts, or the text that several
    rows of one question have in common."""
    return (fields[task.long_field],) if task.group_by else tuple(fields[name] for name in task.fields)


def prompt_text(task: Task, fields: Mapping[str, str], shown: Sequence[Demonstration] = ()) -> str:
    """The whole prompt as plain text (section 4.1); `shown` are answered queries before it (section 5.2, few-shot)."""
    system, question = render(task, fields)
    answered = [f"{render(task, other)[1]}Assistant:\n{OPEN}{answer}{CLOSE}\n" for other, answer in shown]
    return "".join((system, *answered, question, f"Assistant:\n{OPEN}"))


def chat_turns(task: Task, fields: Mapping[str, str], shown: Sequence[Demonstration] = ()) -> tuple[str, list[str]]:
    """The same parts as the messages of a conversation: the system's, and those of user and assistant in turn."""

    def query(fields: Mapping[str, str]) -> str:
        return render(task, fields)[1].removeprefix("Prompt:\n  ").strip()

    turns: list[str] = []
    for other, answer in shown:
        turns += [query(other), f"{OPEN}{answer}{CLOSE}"]
    return render(task, fields)[0].removeprefix("System_prompt:\n  ").strip(), [*turns, query(fields)]
