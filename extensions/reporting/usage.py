"""Code that answers a row with an adapter, for its card: plain transformers and peft, and a client of a vLLM server."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence

from extensions.evaluation.likelihood import candidates
from extensions.prompts import CLOSE, PromptEncoder, prompt_text
from extensions.recipe import Recipe
from extensions.tasks import Task

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of vLLM's --max-lora-rank
_FIRST_MARK = 0xE000  # private use: characters that stand for fields, which no prompt holds


def usage(recipe: Recipe, encoder: PromptEncoder | None, seen: Mapping[str, Sequence[str]]) -> str:
    """The card's section on use, in Markdown.

    Args:
        encoder: of the run; None: a prompt that needs the tokenizer (chat template, demonstrations) is not shown.
        seen: multi-label task -> label sets of its training rows.
    """
    task = recipe.data.tasks[0]
    form = _form_of(recipe, encoder, task)
    parts = [
        "This folder answers rows of a file by itself (labels, probabilities, scores; long texts are cut):",
        _fenced("bash", "nlu predict . new.csv --out answers.csv --probabilities"),
    ]
    if form is None:
        parts += [
            "Base and adapter in plain transformers and peft:",
            _fenced("python", loading_code(recipe.model.path)),
        ]
    else:
        budget = f" It has room for {encoder.max_tokens} tokens: cut longer texts." if encoder else ""
        parts += [
            f"Without this project, from this folder: the prompt of a row of {task.display_name}, and what may be "
            f"answered.{budget}",
            _fenced("python", prompt_code(task, form, seen.get(task.name, ()))),
            "With transformers and peft, the probability of each answer:",
            _fenced("python", f"import torch\n{loading_code(recipe.model.path)}\n\n\n{scoring_code(recipe, task)}"),
            "With a [vLLM](https://docs.vllm.ai) server, which keeps to the answers:",
            _fenced("bash", serving_command(recipe)),
            _fenced("python", client_code(recipe, _longest(recipe, encoder, task, seen.get(task.name, ())))),
        ]
    name = shlex.quote(recipe.name)
    parts += [
        "As one plain model without adapter, from the run folder; and to the hub:",
        _fenced(
            "bash", f"nlu merge recipe.yaml merged model.adapter=adapter\nhf upload YOUR_NAME/{name} adapter --private"
        ),
    ]
    return "\n\n".join(parts)


def _fenced(language: str, code: str) -> str:
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _form_of(recipe: Recipe, encoder: PromptEncoder | None, task: Task) -> Callable[[Mapping[str, str]], str] | None:
    """What makes a prompt of fields."""
    if encoder is not None:
        shown = list(encoder.demonstrations.get(task.name, ()))[: encoder.shots]
        return lambda fields: encoder.text(task, fields, shown)
    if recipe.prompt.chat_template or recipe.prompt.shots:
        return None
    return lambda fields: prompt_text(task, fields)


def prompt_code(task: Task, form: Callable[[Mapping[str, str]], str], seen: Sequence[str] = ()) -> str:
    """Python that defines `prompt(row)` and `ANSWERS`: answer -> the texts that mean it."""
    marks = {field: chr(_FIRST_MARK + k) for k, field in enumerate(task.fields)}
    field_of = {mark: field for field, mark in marks.items()}
    pieces = re.split(f"([{''.join(field_of)}])", form(marks))
    columns = task.text_columns
    used = [columns[field_of[mark]] for mark in pieces[1::2]]
    example = {column: f"your {column}" for column in columns.values()}
    answers = candidates(task, seen).forms
    return "\n".join(
        [
            "PARTS = [",
            *(f"{_literal(piece)}," for piece in pieces[::2]),
            "]",
            f"COLUMNS = {used!r}",
            "ANSWERS = {",
            *(f"    {key!r}: {forms!r}," for key, forms in answers.items()),
            "}",
            "",
            "",
            "def prompt(row):",
            '    return "".join(part + row[column].strip() for part, column in zip(PARTS, COLUMNS)) + PARTS[-1]',
            "",
            "",
            f"row = {example!r}",
        ]
    )


def _literal(text: str) -> str:
    """A text as Python literals, one line for each of its lines."""
    lines = text.splitlines(keepends=True) or [""]
    return "\n".join(f"    {line!r}" for line in lines)


def loading_code(path: str) -> str:
    """Plain transformers and peft code that loads the base model, and from this folder adapter and tokenizer."""
    lines = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if path.startswith("pip:"):
        package = path.removeprefix("pip:")
        lines = [
            "import importlib.metadata",
            *lines,
            f'file = next(f for f in importlib.metadata.files("{package}") if f.suffix == ".gguf").locate()',
            "source = {'pretrained_model_name_or_path': str(file.parent), 'gguf_file': file.name}",
        ]
    else:
        lines.append(f"source = {{'pretrained_model_name_or_path': {path!r}}}")
    lines += [
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(**source), ".").eval()',
    ]
    return "\n".join(lines)


def scoring_code(recipe: Recipe, task: Task) -> str:
    """Python that prints the answer to `row` with its probability, after `prompt_code` and `loading_code`."""
    special = "" if not recipe.prompt.chat_template else ", add_special_tokens=False"
    temperature = recipe.rollout.temperature
    divided = "" if temperature == 1 else f" / {temperature}"
    shown = (
        "print(sum(p * float(number) for number, p in zip(ANSWERS, chances.tolist())))"
        if task.is_regression and task.suite == "own"
        else "print(list(ANSWERS)[int(chances.argmax())], float(chances.max()))"
    )
    return "\n".join(
        [
            "def logprob(text, answer):",
            f"    start = len(tokenizer(text{special})['input_ids'])",
            f"    ids = torch.tensor([tokenizer(text + answer{special})['input_ids']])",
            f"    logprobs = (model(input_ids=ids).logits[0].float(){divided}).log_softmax(-1)",
            "    return sum(logprobs[k - 1, ids[0, k]] for k in range(start, ids.shape[1]))",
            "",
            "",
            "with torch.no_grad():",
            "    scores = torch.stack([",
            f"        torch.stack([logprob(prompt(row), form + {CLOSE!r}) for form in forms]).logsumexp(0)",
            "        for forms in ANSWERS.values()",
            "    ])",
            "chances = scores.softmax(0)",
            shown,
        ]
    )


def serving_command(recipe: Recipe) -> str:
    """The command that serves base and adapter; a base inside a package is merged first, since vLLM reads folders."""
    name, path = shlex.quote(recipe.name), recipe.model.path
    if path.startswith("pip:"):
        return f"vllm serve ../merged --served-model-name {name}  # after nlu merge, see below"
    rank = next((one for one in RANKS if one >= recipe.lora.rank), recipe.lora.rank)
    return f"vllm serve {shlex.quote(path)} --enable-lora --max-lora-rank {rank} --lora-modules {name}=."


def _longest(recipe: Recipe, encoder: PromptEncoder | None, task: Task, seen: Sequence[str]) -> int:
    """Tokens that the longest answer with its tag needs, at least those of the recipe's budget."""
    budget = recipe.rollout.max_new_tokens
    if encoder is None:
        return budget
    ids, text = encoder.encode(task, dict.fromkeys(task.fields, "a"))
    forms = [form for forms in candidates(task, seen).forms.values() for form in forms]
    return max(budget, *(len(encoder.answer_ids(ids, text, form)) for form in forms))


def client_code(recipe: Recipe, max_tokens: int) -> str:
    """Python that asks the server for the answer to `row`, after `prompt_code`."""
    special = ["    'add_special_tokens': False,"] if recipe.prompt.chat_template else []
    return "\n".join(
        [
            "import json",
            "import urllib.request",
            "",
            "answer_of = {form: answer for answer, forms in ANSWERS.items() for form in forms}",
            "body = {",
            f"    'model': {recipe.name!r},",
            "    'prompt': prompt(row),",
            *special,
            "    'temperature': 0,",
            f"    'max_tokens': {max_tokens},",
            f"    'structured_outputs': {{'choice': [form + {CLOSE!r} for form in answer_of]}},",
            f"    'stop': [{CLOSE!r}],",
            "}",
            "request = urllib.request.Request(",
            "    'http://localhost:8000/v1/completions',",
            "    json.dumps(body).encode(),",
            "    {'Content-Type': 'application/json'},",
            ")",
            "with urllib.request.urlopen(request) as response:",
            "    text = json.load(response)['choices'][0]['text']",
            f"print(answer_of[text.removesuffix({CLOSE!r})])",
        ]
    )
