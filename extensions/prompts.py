"""Prompt text, truncation, and the one answer parser that rewards and evaluation share.

A prompt has the four parts of the paper's section 4.1 and ends with the opening tag; the model writes the answer and
the closing tag.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from extensions.chat_template import ChatTemplate, ControlTokens
from extensions.errors import UserError
from extensions.tasks import PLACEHOLDER, TASKS, Task, fold, nfc

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "<Judgement>", "</Judgement>"

# ---------------------------------------------------------------------------------------------------- rendering


def answer_format(task: Task) -> str:
    """What the model is told to insert between the tags."""
    if task.answer_format:
        return task.answer_format
    if task.score_range is not None:
        return "Insert only a number between {:g} and {:g} here".format(*task.score_range)
    quoted = [f'"{words[0]}"' for words in task.labels.values()]
    return f"Insert only {', '.join(quoted[:-1])} or {quoted[-1]} here"


def render(task: Task, fields: Mapping[str, str]) -> tuple[str, str]:
    """The two halves of a prompt: what is the same for every example of the task, and the question.

    Braces inside the data stay as they are: placeholders are replaced once, in one pass.
    """
    system = (
        f"System_prompt:\n  {task.description}\n"
        f"The result you give should have the following form:\n  {OPEN} {{{answer_format(task)}}} {CLOSE}\n"
    )
    question = PLACEHOLDER.sub(lambda match: fields[match[1]], task.question)
    return system, f"Prompt:\n  {question}\n"


Shown = tuple[Mapping[str, str], str]  # a demonstration: the fields of a training row, and its answer as it is written


def told_apart(task: Task, fields: Mapping[str, str]) -> tuple[str, ...]:
    """What two rows must differ in, for one not to give away the other's answer: their texts, or the text that several
    rows of one question have in common."""
    return (fields[task.long_field],) if task.unit else tuple(fields[name] for name in task.fields)


def prompt_text(task: Task, fields: Mapping[str, str], shown: Sequence[Shown] = ()) -> str:
    """The whole prompt as plain text (section 4.1); `shown` are answered queries before it (section 5.2, few-shot)."""
    system, question = render(task, fields)
    answered = [f"{render(task, other)[1]}Assistant:\n{OPEN}{answer}{CLOSE}\n" for other, answer in shown]
    return "".join((system, *answered, question, f"Assistant:\n{OPEN}"))


def chat_turns(task: Task, fields: Mapping[str, str], shown: Sequence[Shown] = ()) -> tuple[str, list[str]]:
    """The same parts as the messages of a conversation: the system's, and those of user and assistant in turn."""

    def query(fields: Mapping[str, str]) -> str:
        return render(task, fields)[1].removeprefix("Prompt:\n  ").strip()

    turns: list[str] = []
    for other, answer in shown:
        turns += [query(other), f"{OPEN}{answer}{CLOSE}"]
    return render(task, fields)[0].removeprefix("System_prompt:\n  ").strip(), [*turns, query(fields)]


class PromptEncoder:
    """Turns the fields of an example into token ids that fit.

    Args:
        tokenizer: of the model.
        max_tokens: longest prompt in tokens. A longer one loses its last demonstrations, as many as it takes, then the
            end of its task's `truncate` field; never the question or the format.
        chat_template: use the tokenizer's chat template instead of the paper's plain form.
        shots: demonstrations of a prompt.
        demonstrations: task name -> its demonstrations, distinct, one more than `shots` where there are as many: a row
            is never shown to itself, and the next one takes its place.
        template_options: variables for the chat template; see `ChatTemplate`.

    What a tokenizer takes for control tokens in a text (`<|im_end|>`) are characters in a prompt, but for those that
    its chat template writes.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        chat_template: bool,
        shots: int = 0,
        demonstrations: Mapping[str, Sequence[Shown]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        if chat_template and not tokenizer.chat_template:
            raise UserError(
                "prompt.chat_template: true, but this model's tokenizer has no chat template; set it to false"
            )
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.template = ChatTemplate(tokenizer, template_options or {}) if chat_template else None
        self.control = self.template.control if self.template else ControlTokens(tokenizer)
        self.shots, self.demonstrations = shots, demonstrations or {}
        self.dropped: Counter[str] = Counter()  # task name -> prompts that lost demonstrations
        self._ends = self._num_ends()

    def text(self, task: Task, fields: Mapping[str, str], shown: Sequence[Shown] = ()) -> str:
        """The whole prompt; in the chat form the assistant's turn begins with the opening tag."""
        if self.template is None:
            return prompt_text(task, fields, shown)
        return f"{self.template.render(*chat_turns(task, fields, shown))}{OPEN}"

    def encode(self, task: Task, fields: Mapping[str, str]) -> tuple[list[int], str]:
        """Token ids and text of a prompt of at most `max_tokens` tokens.

        Raises:
            UserError: the question and the format alone are longer than that.
        """
        own = told_apart(task, fields)
        others = [one for one in self.demonstrations.get(task.name, ()) if told_apart(task, one[0]) != own]
        shown = others[: self.shots]
        wanted = len(shown)
        while True:
            ids, text = self._encoded(task, fields, shown)
            if len(ids) <= self.max_tokens:
                return ids, text
            if not shown:
                return self._truncated(task, fields, text, ids)
            self.dropped[task.name] += len(shown) == wanted
            shown = shown[:-1]

    def _truncated(self, task: Task, fields: Mapping[str, str], text: str, ids: list[int]) -> tuple[list[int], str]:
        name = task.long_field
        value = fields[name]
        keep = len(value)
        while len(ids) > self.max_tokens:
            # Drop about as many characters as the excess tokens hold, then look again; always at least one.
            share = len(value) / max(1, len(self._ids(value, data=True)))
            fewer = keep - max(1, int((len(ids) - self.max_tokens) * share))
            if keep == 0:
                raise UserError(
                    f"task {task.name}: a prompt needs more than the {self.max_tokens} tokens that it may have even "
                    f"without its field {name!r}; raise prompt.max_tokens, lower rollout.max_new_tokens, or take a "
                    "model with a longer context"
                )
            keep = fewer if fewer > 0 else keep // 2  # the estimate may ask for more than there is
            ids, text = self._encoded(task, {**fields, name: value[:keep].rstrip()})
        return ids, text

    def check(self, task: Task, fields: Mapping[str, str]) -> None:
        """Raises what `encode` would, without the cost of it.

        What may not fit is all but the field that can be shortened; a token holds at least a byte, so short texts fit.
        """
        special_tokens = 16
        if len(self.text(task, {**fields, task.long_field: ""}).encode()) + special_tokens > self.max_tokens:
            ids, text = self._encoded(task, fields)
            self._truncated(task, fields, text, ids)

    def answer_ids(self, ids: list[int], text: str, answer: str) -> list[int]:
        """Token ids of `answer` and the closing tag after a prompt that `encode` gave.

        As they are in the whole text, where the prompt's tokens are the beginning of the whole text's. Where they are
        not (a tokenizer merges the answer's first letters into the prompt's last token; control tokens are characters
        in the prompt), as they are after another text, never with the space that some put before a text of its own.
        """
        whole = self._ids(f"{text}{answer}{CLOSE}")
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        for before in (OPEN, "\n", "|", "0"):
            start, whole = self._ids(before), self._ids(f"{before}{answer}{CLOSE}")
            if whole[: len(start)] == start:
                return whole[len(start) :]
        return self.tokenizer(f"{answer}{CLOSE}", add_special_tokens=False)["input_ids"]

    def label_ids(self, task: Task) -> dict[str, list[int]]:
        """Label -> token ids of its answer and the closing tag after a prompt; of a regression task, the ends of its
        range stand for the labels."""
        labels = list(task.labels) or [f"{score:g}" for score in task.score_range or ()]
        ids, text = self._encoded(task, dict.fromkeys(task.fields, ""))
        return {label: self.answer_ids(ids, text, task.answer(label)) for label in labels}

    def check_answers(self, task: Task) -> None:
        """Whether the model can write every answer of a task.

        Raises:
            UserError: decoding the tokens of an answer and the closing tag gives another text (a tokenizer that
                lower-cases, or does not know a character), so the parser would never see it.
        """
        for label, ids in self.label_ids(task).items():
            wanted = f"{task.answer(label)}{CLOSE}"
            written = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if nfc(written.strip()) != nfc(wanted.strip()):
                raise UserError(
                    f"task {task.name}: this model's tokenizer cannot write the answer {wanted!r}, of which its tokens "
                    f"make {written!r}; give the label a word that it can write, or take another model.path"
                )

    def _encoded(self, task: Task, fields: Mapping[str, str], shown: Sequence[Shown] = ()) -> tuple[list[int], str]:
        """Token ids and text of a prompt of any length."""
        if self.template is not None:
            ids, text = self.template.encode(*chat_turns(task, fields, shown), OPEN)
            return ids[: len(ids) - self._ends], text
        text = prompt_text(task, fields, shown)
        return self._ids(text), text

    def _ids(self, text: str, data: bool = False) -> list[int]:
        """Token ids of a text that goes on: without what some tokenizers put after every text (EOS).

        Args:
            data: nothing in the text is a control token; in the plain form nothing ever is.
        """
        ids = self._tokenized(text, data)
        return ids[: len(ids) - self._ends]

    def _tokenized(self, text: str, data: bool = False) -> list[int]:
        # A chat template writes its own special tokens; the plain form takes the tokenizer's (BOS for Llama).
        plain = self.template is None
        literal = {"split_special_tokens": True} if (plain or data) and self.control.occur_in(text) else {}
        return self.tokenizer(text, add_special_tokens=plain, **literal)["input_ids"]

    def _num_ends(self) -> int:
        """Tokens that the tokenizer puts after any text."""
        last = zip(reversed(self._tokenized("<")), reversed(self._tokenized(">")), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], last))


# ------------------------------------------------------------------------------------------------------ parsing

# A letter or digit beside a keyword makes it another word; so does a hyphen or an apostrophe that joins it to one
# ("yes-man", "no's"). Marks and invisible characters, which Unicode has many of, are looked up by category.
_NOT_AFTER_WORD = r"(?<!\w)(?<!\w[-'\u2019])"
_NOT_BEFORE_WORD = r"(?!\w|[-'\u2019]\w)"
_MARKS = {"Mn", "Mc", "Me", "Cf"}
_AUXILIARY = "is|are|was|were|do|does|did|ca|could|wo|would|sha|should|must|might|need|ought|ai|has|have|had"
_NEGATION = rf"(?:not|never|neither|nor|non|hardly|cannot|(?:{_AUXILIARY})n['\u2019]?t)"
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_AROUND_NUMBER = "\"'`*()[]{}:;!?=~"
_LONE_SIGNS = {"-", "\u2212", "\u2013", "/", ".", ",", "%"}
_PART_OF_NUMBER = re.compile(
    r"\b(?:half|halves|thirds?|quarters?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundred(?:s|ths?)?"
    r"|thousand(?:s|ths?)?|(?:[mb]|tr)illions?|dozens?|per ?cent|point|minus|negative)\b",
    re.IGNORECASE,
)


@lru_cache(maxsize=256)
def _keywords(labels: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """What finds a keyword (group 1), longest first, or a negation that is no part of one (group 1 empty); its label.

    Cached, for a reward asks for the same few labels again and again.
    """
    labels = tuple((label, tuple(map(nfc, words))) for label, words in labels)
    label_of = {fold(word): label for label, words in labels for word in words}

    def one(word: str) -> str:
        spelled = r"\s+".join(re.escape(part) for part in word.split())
        # Case folding stays within ASCII where it can: U+017F would otherwise match an "s", U+212A a "k".
        return f"(?{'ai' if word.isascii() else 'i'}:{spelled})"

    any_word = "|".join(one(word) for word in sorted((w for _, words in labels for w in words), key=len, reverse=True))
    # "no" has the bounds of a keyword, for it may be one; "no-one" is another word.
    alone = rf"{_NOT_AFTER_WORD}(?:({any_word})|(?ai:no)){_NOT_BEFORE_WORD}"
    return re.compile(rf"{alone}|(?<!\w)(?ai:{_NEGATION})(?!\w)"), label_of


def parse_answer(text: str, task: Task) -> str | float | None:
    """The answer in a model's response: a label of the task, a score, or None for a wrong format.

    Rules (section 4.3): only the text before the first closing tag counts, and it may hold no other tag. A label needs
    one of its keywords as a whole word in any case, compared in NFC; words of two labels, a negation that belongs to no
    keyword, or none are a wrong format. A score is the only number in the text, a plain decimal in the task's range.
    Never raises; linear in the length of `text`.
    """
    head, closed, _ = text.partition(CLOSE)
    if not closed or "<" in head or "judgement" in head.lower():  # unclosed, nested, repeated or look-alike tags
        return None
    return _parse_score(head, *task.score_range) if task.score_range else _parse_label(head, task.labels)


def _parse_label(head: str, labels: Mapping[str, list[str]]) -> str | None:
    head = nfc(head)
    pattern, label_of = _keywords(tuple((label, tuple(words)) for label, words in labels.items()))
    found: set[str] = set()
    for match in pattern.finditer(head):
        beside = head[max(0, match.start() - 1) : match.start()] + head[match.end() : match.end() + 1]
        if match[1] is None or any(unicodedata.category(character) in _MARKS for character in beside):
            return None
        label = label_of.get(fold(match[1]))
        if label is None:  # matched by a case folding that lower() does not share
            return None
        found.add(label)
        if len(found) > 1:
            return None
    return found.pop() if found else None


def _parse_score(head: str, low: float, high: float) -> float | None:
    numbers: list[float] = []
    for word in head.split():
        if len(word) == 1 and unicodedata.normalize("NFKC", word) in _LONE_SIGNS:
            return None
        if not any(map(str.isnumeric, word)):
            continue
        number = word.lstrip(_AROUND_NUMBER).rstrip(_AROUND_NUMBER + ".,")
        if numbers or not _NUMBER.fullmatch(number):  # 3/5, 2,5, .5, 1e400, -0, full-width digits, 4-5, 5 out of 5 ...
            return None
        numbers.append(float(number))
    if not numbers or _PART_OF_NUMBER.search(head):
        return None
    return numbers[0] if low <= numbers[0] <= high else None


def is_label(label: str, task: Task) -> bool:
    """Whether a label of the data is one that an answer can be equal to: a label of the task, or a plain decimal in
    its range."""
    if task.score_range is None:
        return label in task.labels
    low, high = task.score_range
    return _NUMBER.fullmatch(label) is not None and low <= float(label) <= high


# ------------------------------------------------------------------------------------- labels of the reward files


def pack_label(task: Task, gold: str) -> str:
    """Task and gold label in one string: the `label` of OpenRLHF's prompt format, read back by the built-in reward."""
    packed: dict[str, Any] = {"task": task.name, "gold": gold}
    if TASKS.get(task.name) != task:  # the user's own: the string must carry what the reward needs to know
        packed |= {"labels": task.labels} if task.labels else {"score_range": task.score_range}
    return json.dumps(packed, ensure_ascii=False)


@lru_cache(maxsize=4096)
def unpack_label(packed: str) -> tuple[Task, str]:
    """The task and the gold label of `pack_label`'s string; ValueError if it is not one."""
    try:
        record = json.loads(packed)
        task, gold = record["task"], record["gold"]
        if "labels" in record or "score_range" in record:
            kind = {key: record[key] for key in ("labels", "score_range") if key in record}
            metrics = ["accuracy"] if "labels" in kind else ["spearman"]
            known = Task(name=task, description="-", question="{text}", metrics=metrics, **kind)  # type: ignore[arg-type]
        else:
            known = TASKS[task]
        if not isinstance(gold, str) or not is_label(gold, known):
            raise ValueError(f"{gold!r} is no label of the task")
        return known, gold
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"label {packed!r} is not of the form that extensions.prompts.pack_label writes "
            '({"task": ..., "gold": ...})'
        ) from error


def response_text(query: str, prompt: str) -> str:
    """The response in OpenRLHF's `query`, the decoded prompt and response with special tokens.

    Decoding may add a BOS or change spaces before the prompt's end, so where the prompt is not found verbatim the
    opening tags are counted: the response begins after as many as the prompt holds.
    """
    start = query.find(prompt)
    if start >= 0:
        return query[start + len(prompt) :]
    parts = query.split(OPEN, prompt.count(OPEN))
    return parts[-1] if len(parts) > prompt.count(OPEN) else query
