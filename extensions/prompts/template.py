"""The text of a prompt from a task and a row (section 4.1 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from extensions.tasks import PLACEHOLDER, Task

OPEN, CLOSE = "<Judgement>", "</Judgement>"


def written(answer: str) -> str:
    """An answer as the prompt instructs it, from the opening tag on: `<Judgement> {...} </Judgement>`."""
    return f" {answer} {CLOSE}"


def surface_forms(answer: str) -> tuple[str, ...]:
    """An answer with and without each space of `written`, which is the first form."""
    return tuple(f"{before}{answer}{after}{CLOSE}" for before in (" ", "") for after in (" ", ""))


def answer_format(task: Task) -> str:
    """Part 2 of the prompt: what to insert between the tags."""
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
    """The two parts of a prompt: the same for every row of the task, and the question.

    Placeholders are replaced in one pass, so braces in the data are kept.
    """
    system = (
        f"System_prompt:\n  {_literal(task.description)}\n"
        f"The result you give should have the following form:\n  {OPEN}{written(f'{{{answer_format(task)}}}')}\n"
    )
    question = PLACEHOLDER.sub(lambda match: fields[match[1]] if match[1] else match[0][0], task.question)
    return system, f"Prompt:\n  {question}\n"


def _literal(text: str) -> str:
    """Unescape a text without placeholders."""
    return text.replace("{{", "{").replace("}}", "}")


Demonstration = tuple[Mapping[str, str], str]  # fields of a training row, and its answer


def dedup_key(task: Task, fields: Mapping[str, str]) -> tuple[str, ...]:
    """The texts of a row, or the text that the rows of a question share. Rows with equal keys leak answers."""
    return (fields[task.long_field],) if task.group_by else tuple(fields[name] for name in task.fields)


def prompt_text(task: Task, fields: Mapping[str, str], demonstrations: Sequence[Demonstration] = ()) -> str:
    """The prompt in the plain form (section 4.1), after the demonstrations (few-shot, section 5.2)."""
    system, question = render(task, fields)
    answered = [f"{render(task, other)[1]}Assistant:\n{OPEN}{written(answer)}\n" for other, answer in demonstrations]
    return "".join((system, *answered, question, f"Assistant:\n{OPEN}"))


def chat_turns(
    task: Task, fields: Mapping[str, str], demonstrations: Sequence[Demonstration] = ()
) -> tuple[str, list[str]]:
    """The same parts as messages: the system's, and those of user and assistant alternately."""

    def query(fields: Mapping[str, str]) -> str:
        return render(task, fields)[1].removeprefix("Prompt:\n  ").strip()

    turns: list[str] = []
    for other, answer in demonstrations:
        turns += [query(other), f"{OPEN}{written(answer)}"]
    return render(task, fields)[0].removeprefix("System_prompt:\n  ").strip(), [*turns, query(fields)]
