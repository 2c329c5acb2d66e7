"""Prompts and answers as token ids that fit the context."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from extensions.common.errors import UserError
from extensions.prompts.chat_template import ChatTemplate, ControlTokens
from extensions.prompts.template import (
    CLOSE,
    OPEN,
    Demonstration,
    chat_turns,
    dedup_key,
    prompt_text,
    surface_forms,
    written,
)
from extensions.tasks import Task, nfc

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_LABEL_SETS = 500  # label sets of a multi-label task, the longest ones, whose tokens are counted
SPECIAL_TOKENS = 16  # upper bound on what a tokenizer adds around a prompt


def _shorter(lengths: Sequence[int], keep: int, fewer: int) -> int:
    """The largest cap on the lengths that removes at least `fewer` characters, compared with a cap of `keep`.

    Half of `keep` if there are not that many characters.
    """
    target = sum(min(length, keep) for length in lengths) - fewer
    if target <= 0:
        return keep // 2
    return bisect_right(range(keep), target, key=lambda cap: sum(min(length, cap) for length in lengths)) - 1


class PromptEncoder:
    """Turns the fields of an example into token ids that fit.

    Args:
        tokenizer: of the model.
        max_tokens: longest prompt in tokens. A longer one first loses demonstrations, the last ones first. Then the
            longest of the row's `truncate` fields (default: all fields) is cut at its end, and the others once they
            are the longest; never the question or the format.
        chat_template: use the tokenizer's chat template instead of the paper's plain form.
        shots: demonstrations per prompt.
        demonstrations: task name -> distinct demonstrations, one more than `shots` if available: the row itself is
            skipped, and the next one takes its place.
        template_options: variables for the chat template; see `ChatTemplate`.

    Control tokens in the text of a row (`<|im_end|>`) are encoded as characters; only those that the chat template
    writes are control tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        chat_template: bool,
        shots: int = 0,
        demonstrations: Mapping[str, Sequence[Demonstration]] | None = None,
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
        self.dropped: Counter[str] = Counter()  # task name -> prompts with demonstrations left out
        self.truncated: Counter[str] = Counter()  # task name -> prompts with a truncated text
        self._fitting: set[tuple[Any, ...]] = set()  # (limit, task name, texts that are never cut) of prompts that fit
        self._ends = self._num_ends()

    def text(self, task: Task, fields: Mapping[str, str], demonstrations: Sequence[Demonstration] = ()) -> str:
        """The prompt of any length; in the chat form the assistant's turn begins with the opening tag."""
        if self.template is None:
            return prompt_text(task, fields, demonstrations)
        return f"{self.template.render(*chat_turns(task, fields, demonstrations))}{OPEN}"

    def encode(self, task: Task, fields: Mapping[str, str]) -> tuple[list[int], str]:
        """Token ids and text of a prompt of at most `max_tokens` tokens.

        Raises:
            UserError: the question and the format alone are longer.
        """
        own = dedup_key(task, fields)
        others = [one for one in self.demonstrations.get(task.name, ()) if dedup_key(task, one[0]) != own]
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
        texts = {name: fields[name] for name in task.truncate or task.fields}
        lengths = [len(value) for value in texts.values()]
        longest = max(texts.values(), key=len)
        share = len(longest) / max(1, len(self._ids(longest, data=True)))
        keep = len(longest)  # characters of each text at most
        while len(ids) > self.max_tokens:
            # Cut about as many characters as the excess tokens hold, at least one, then encode again.
            if keep == 0:
                named = ", ".join(map(repr, texts))
                raise UserError(
                    f"task {task.name}: a prompt needs more than the {self.max_tokens} tokens of its limit, even "
                    f"without the texts that can be cut ({named}); raise prompt.max_tokens, lower "
                    "rollout.response_budget, or use a model with a longer context"
                )
            keep = _shorter(lengths, keep, max(1, int((len(ids) - self.max_tokens) * share)))
            cut = {name: value[:keep].rstrip() if len(value) > keep else value for name, value in texts.items()}
            ids, text = self._encoded(task, {**fields, **cut})
        self.truncated[task.name] += 1
        return ids, text

    def check(self, task: Task, fields: Mapping[str, str]) -> None:
        """Raise the error that `encode` would raise, at a lower cost.

        Whether a prompt fits depends only on the texts that are never cut, mostly the same for all rows of a task.
        """
        frame = {**fields, **dict.fromkeys(task.truncate or task.fields, "")}
        key = self.max_tokens, task.name, *frame.values()
        if key in self._fitting:
            return
        if self.is_cut(task, frame):
            ids, text = self._encoded(task, fields)
            self._truncated(task, fields, text, ids)
        else:
            self._fitting.add(key)

    def is_cut(self, task: Task, fields: Mapping[str, str]) -> bool:
        """Whether the end of a text is cut from the prompt of a row."""
        return not self._surely_fits(task, fields) and self.length(task, fields) > self.max_tokens

    def length(self, task: Task, fields: Mapping[str, str]) -> int:
        """Tokens of a row's whole prompt, without demonstrations."""
        return len(self._encoded(task, fields)[0])

    def _surely_fits(self, task: Task, fields: Mapping[str, str]) -> bool:
        return len(self.text(task, fields).encode()) + SPECIAL_TOKENS <= self.max_tokens

    def answer_ids(self, ids: list[int], text: str, answer: str) -> list[int]:
        """Token ids of `answer` as instructed (`written`), with the closing tag, after a prompt from `encode`."""
        return self._following(ids, text, written(answer))

    def surface_ids(self, ids: list[int], text: str, answer: str) -> list[list[int]]:
        """Token ids of each of an answer's `surface_forms` after a prompt from `encode`; some may be equal."""
        return [self._following(ids, text, form) for form in surface_forms(answer)]

    def _following(self, ids: list[int], text: str, response: str) -> list[int]:
        """Token ids of a response after a prompt from `encode`.

        They are the rest of the encoded whole text, if that begins with the prompt's ids. Otherwise (the tokenizer
        merges the response's first letters into the prompt's last token, or the prompt holds control tokens as
        characters) they are taken after another text, without the space that some tokenizers add before a text.
        """
        whole = self._ids(f"{text}{response}")
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        for before in (OPEN, "\n", "|", "0"):
            start, whole = self._ids(before), self._ids(f"{before}{response}")
            if whole[: len(start)] == start:
                return whole[len(start) :]
        return self.tokenizer(response, add_special_tokens=False)["input_ids"]

    def label_ids(self, task: Task, labels: Iterable[str] | None = None) -> dict[str, list[int]]:
        """Label -> token ids of its answer and the closing tag after a prompt; by default of `Task.sample_labels`."""
        ids, text = self._encoded(task, dict.fromkeys(task.fields, ""))
        labels = task.sample_labels if labels is None else labels
        return {label: self.answer_ids(ids, text, task.answer(label)) for label in labels}

    def answer_tokens(self, task: Task, label_sets: Iterable[str] = ()) -> dict[str, int]:
        """Right answer -> its tokens with the closing tag; of a regression, the scores of its grid.

        Args:
            label_sets: those of a multi-label task's rows; if empty, all labels together count as an answer.
        """
        labels = task.sample_labels
        if task.score_range is not None:
            labels = task.score_grid
        elif longest := sorted(set(label_sets), key=len)[-MAX_LABEL_SETS:]:
            labels = [*task.labels, task.no_label, *longest]
        return {task.answer(label): len(ids) for label, ids in self.label_ids(task, labels).items()}

    def check_answers(self, task: Task) -> None:
        """Check that the tokenizer can represent every answer of a task.

        Raises:
            UserError: the tokens of an answer and the closing tag decode to another text, which the parser would never
                accept (a tokenizer that lower-cases, or lacks a character). Spaces around the answer may be lost.
        """
        for label, ids in self.label_ids(task).items():
            answer = task.answer(label)
            text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            found, closed, rest = text.partition(CLOSE)
            if not closed or rest or nfc(found.strip()) != nfc(answer.strip()):
                raise UserError(
                    f"task {task.name}: this model's tokenizer cannot write the answer {written(answer)!r}: its tokens "
                    f"decode to {text!r}; give the label another word, or use another model.path"
                )

    def _encoded(
        self, task: Task, fields: Mapping[str, str], demonstrations: Sequence[Demonstration] = ()
    ) -> tuple[list[int], str]:
        """Token ids and text of a prompt of any length."""
        if self.template is not None:
            ids, text = self.template.encode(*chat_turns(task, fields, demonstrations), OPEN)
            return ids[: len(ids) - self._ends], text
        text = prompt_text(task, fields, demonstrations)
        return self._ids(text), text

    def _ids(self, text: str, data: bool = False) -> list[int]:
        """Token ids of a text to be continued: without the tokens that some tokenizers append (EOS).

        Args:
            data: encode control tokens in the text as characters, as the plain form always does.
        """
        ids = self._tokenized(text, data)
        return ids[: len(ids) - self._ends]

    def _tokenized(self, text: str, data: bool = False) -> list[int]:
        # A chat template writes its own special tokens; the plain form adds the tokenizer's (BOS for Llama).
        plain = self.template is None
        literal = {"split_special_tokens": True} if (plain or data) and self.control.occur_in(text) else {}
        return self.tokenizer(text, add_special_tokens=plain, **literal)["input_ids"]

    def _num_ends(self) -> int:
        """Number of tokens that the tokenizer appends to any text."""
        last = zip(reversed(self._tokenized("<")), reversed(self._tokenized(">")), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], last))
