"""Prompts and answers as token ids that fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from extensions.common.errors import UserError
from extensions.prompts.chat_template import ChatTemplate, ControlTokens
from extensions.prompts.template import CLOSE, OPEN, Demonstration, chat_turns, dedup_key, prompt_text
from extensions.tasks import Task, nfc

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SPECIAL_TOKENS = 16  # that a tokenizer puts around a prompt, at most


def _shorter(lengths: Sequence[int], keep: int, fewer: int) -> int:
    """The most characters of each text under which there are at least `fewer` less in all than under `keep`; half of
    `keep` where there are not so many."""
    wanted = sum(min(length, keep) for length in lengths) - fewer
    if wanted <= 0:
        return keep // 2
    low, high = 0, keep - 1
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(length, middle) for length in lengths) <= wanted:
            low = middle
        else:
            high = middle - 1
    return low


class PromptEncoder:
    """Turns the fields of an example into token ids that fit.

    Args:
        tokenizer: of the model.
        max_tokens: longest prompt in tokens. A longer one loses its last demonstrations, as many as it takes, then the
            end of the longest text of the row among its task's `truncate` fields (default: all), and of the others
            once they are as long as what is left of it; never the question or the format.
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
        self.dropped: Counter[str] = Counter()  # task name -> prompts that lost demonstrations
        self.truncated: Counter[str] = Counter()  # task name -> prompts that lost the end of a text
        self._fitting: set[tuple[Any, ...]] = set()  # limit, task name, texts that no row may lose: prompts that fit
        self._ends = self._num_ends()

    def text(self, task: Task, fields: Mapping[str, str], shown: Sequence[Demonstration] = ()) -> str:
        """The whole prompt; in the chat form the assistant's turn begins with the opening tag."""
        if self.template is None:
            return prompt_text(task, fields, shown)
        return f"{self.template.render(*chat_turns(task, fields, shown))}{OPEN}"

    def encode(self, task: Task, fields: Mapping[str, str]) -> tuple[list[int], str]:
        """Token ids and text of a prompt of at most `max_tokens` tokens.

        Raises:
            UserError: the question and the format alone are longer than that.
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
            # Drop about as many characters as the excess tokens hold, then look again; always at least one.
            if keep == 0:
                named = ", ".join(map(repr, texts))
                raise UserError(
                    f"task {task.name}: a prompt needs more than the {self.max_tokens} tokens that it may have even "
                    f"without the texts that may be cut ({named}); raise prompt.max_tokens, lower "
                    "rollout.response_budget, or take a model with a longer context"
                )
            keep = _shorter(lengths, keep, max(1, int((len(ids) - self.max_tokens) * share)))
            cut = {name: value[:keep].rstrip() if len(value) > keep else value for name, value in texts.items()}
            ids, text = self._encoded(task, {**fields, **cut})
        self.truncated[task.name] += 1
        return ids, text

    def check(self, task: Task, fields: Mapping[str, str]) -> None:
        """Raises what `encode` would, without the cost of it.

        What may not fit is all but the texts that can be shortened, mostly the same for all rows of a task.
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
        """Whether the prompt of a row loses the end of a text."""
        return not self._surely_fits(task, fields) and len(self._encoded(task, fields)[0]) > self.max_tokens

    def _surely_fits(self, task: Task, fields: Mapping[str, str]) -> bool:
        return len(self.text(task, fields).encode()) + SPECIAL_TOKENS <= self.max_tokens

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
        """Label -> token ids of its answer and the closing tag after a prompt, for `Task.sample_labels`."""
        ids, text = self._encoded(task, dict.fromkeys(task.fields, ""))
        return {label: self.answer_ids(ids, text, task.answer(label)) for label in task.sample_labels}

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

    def _encoded(
        self, task: Task, fields: Mapping[str, str], shown: Sequence[Demonstration] = ()
    ) -> tuple[list[int], str]:
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
