"""Chat templates and control tokens: those of the template are control tokens, those in the data are text."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from tokenizers import AddedToken

from extensions.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Opening tags that end a generation prompt: <think>, [THINK], <seed:think>, <reasoning>, <|START_THINKING|>
_THOUGHT = re.compile(
    r"(?P<left>[<\[\u25c1]\|?)(?P<name>[\w:-]*(?:think|thought|reason)[\w:-]*)(?P<right>\|?[>\]\u25b7])(?P<space>\s*)\Z",
    re.IGNORECASE,
)
_ENDS = {"begin": "end", "start": "end", "open": "close"}  # word in an opening tag -> word in its closing tag
_NOT_OPEN = {"no", "end", "close", "stop"}
_LONGEST_TAG = 64
_CHANNEL_OF_GEMMA_4 = re.compile(r"<\|channel>\w+\s*\Z")
_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # plane 15, used as separators


def closing(text: str) -> str:
    """The tag that closes a thinking block which a generation prompt opens; empty if it opens none.

    On separate lines if the opening tag ends its line, as templates write an empty thinking block.
    """
    if _CHANNEL_OF_GEMMA_4.search(text[-_LONGEST_TAG:]):
        return "<channel|>"
    tag = _THOUGHT.search(text[-_LONGEST_TAG:])
    parts = re.split("([_:-])", tag["name"]) if tag else []
    if tag is None or _NOT_OPEN & {part.lower() for part in parts}:
        return ""
    ends = [_like(_ENDS.get(part.lower(), part), part) for part in parts]
    name = "".join(ends) if ends != parts else f"/{tag['name']}"
    closed = f"{tag['left']}{name}{tag['right']}"
    return f"\n{closed}\n\n" if "\n" in tag["space"] else closed


def _like(word: str, model: str) -> str:
    return word.upper() if model.isupper() else word


class ControlTokens:
    """The special tokens of a tokenizer: control tokens in a template, characters in data."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added: Mapping[int, AddedToken] = getattr(tokenizer, "added_tokens_decoder", {})
        self.tokens = {token.content: (i, token) for i, token in added.items() if token.special and token.content}
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._literal: tuple[str, tuple[Any, dict[int, int]]] | None = None

    def occur_in(self, text: str) -> bool:
        return self.pattern.search(text) is not None

    def encode(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
        """Token ids of a text, without special tokens around it.

        Args:
            parts: of the text, each with whether its control tokens are encoded as such.
        """
        text = "".join(part for part, _ in parts)
        mark = next(character for character in map(chr, _PRIVATE_USE) if character not in text)
        masked = "".join(
            self.pattern.sub(lambda match: f"{mark}{self.tokens[match[0]][0]}{mark}", part) if control else part
            for part, control in parts
        )
        if self.tokenizer.is_fast:
            backend, token_of = self._with_aliases(mark)
            return [token_of.get(i, i) for i in backend.encode(masked, add_special_tokens=False).ids]
        ids: list[int] = []
        for k, piece in enumerate(re.split(f"{mark}([0-9]+){mark}", masked)):
            if k % 2:
                ids.append(int(piece))
            elif piece:
                ids += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _with_aliases(self, mark: str) -> tuple[Any, dict[int, int]]:
        """The tokenizer with its special tokens under aliases, and the token id of each alias.

        Encoding the parts separately would be wrong: SentencePiece adds a prefix space to the first part only, but
        would then add one to each.
        """
        if self._literal is None or self._literal[0] != mark:
            backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
            flags = ("lstrip", "rstrip", "single_word", "normalized")
            aliases = {f"{mark}{i}{mark}": (i, token) for i, token in self.tokens.values()}
            backend.add_tokens(
                [AddedToken(a, special=False, **{f: getattr(t, f) for f in flags}) for a, (_, t) in aliases.items()]
            )
            backend.encode_special_tokens = True
            backend.no_truncation()
            self._literal = mark, (backend, {backend.token_to_id(alias): i for alias, (i, _) in aliases.items()})
        return self._literal[1]


class ChatTemplate:
    """The chat template of a tokenizer, which must have one.

    Args:
        options: variables of the template; `enable_thinking` is false by default.

    Raises:
        UserError: the template refuses every prompt, or omits the text of messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.options = {"enable_thinking": False, **options}
        self.control = ControlTokens(tokenizer)
        # gpt-oss: its generation prompt names no channel, so the model would start with the analysis channel.
        self.harmony = "<|channel|>" in str(tokenizer.chat_template)
        # Some templates raise for a system message, some omit it.
        system, user = map(chr, _PRIVATE_USE[:2])
        self.system_role = True
        try:
            self.system_role = system in self.render(system, [user])
        except UserError:
            self.system_role = False
        shown = self.render(system, [user])
        if not (system in shown and user in shown):
            raise UserError(
                "prompt.chat_template: true, but this model's template omits the text of messages (it may expect "
                "lists of parts, with images); set it to false"
            )

    def render(self, system: str, turns: Sequence[str]) -> str:
        """The text up to the answer.

        Args:
            turns: of user and assistant alternately, the user's last. If the template has no system role, the system
                text is put before the first turn.

        Raises:
            UserError: the template refuses the messages.
        """
        messages = [{"role": ("user", "assistant")[k % 2], "content": turn} for k, turn in enumerate(turns)]
        if self.system_role:
            messages.insert(0, {"role": "system", "content": system})
        else:
            messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
        try:
            text = self._apply(messages)
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(
                f"prompt.chat_template: true, but this model's template refuses the prompt "
                f"({' '.join(str(error).split())}); set it to false, or set the variables that it needs in "
                "prompt.template_options"
            ) from error
        if self.harmony and text.endswith("<|start|>assistant"):
            return f"{text}<|channel|>final<|message|>"
        return f"{text}{closing(text)}"

    def _apply(self, messages: Sequence[Mapping[str, str]]) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **self.options
        )
        return text

    def encode(self, system: str, turns: Sequence[str], begun: str) -> tuple[list[int], str]:
        """Token ids and text of a conversation; see `render`.

        Args:
            begun: the beginning of the answer.
        """
        contents = (system, *turns)
        if not any(map(self.control.occur_in, contents)):
            text = f"{self.render(system, turns)}{begun}"
            return self.tokenizer(text, add_special_tokens=False)["input_ids"], text
        mark = next(c for c in map(chr, _PRIVATE_USE) if not any(c in content for content in contents))
        places = [f"{mark}{k}{mark}" for k in range(len(contents))]
        pieces = re.split(f"{mark}([0-9]+){mark}", self.render(places[0], places[1:]))
        parts = [(contents[int(piece)], False) if k % 2 else (piece, True) for k, piece in enumerate(pieces)]
        parts.append((begun, False))
        return self.control.encode(parts), "".join(part for part, _ in parts)
