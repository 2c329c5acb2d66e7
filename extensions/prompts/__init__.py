"""Prompt text, token ids, and the answer parser that rewards and evaluation share.

A prompt has the four parts of the paper's section 4.1 and ends with the opening tag; the model writes the answer and
the closing tag.
"""

from extensions.prompts.encoder import SPECIAL_TOKENS, PromptEncoder
from extensions.prompts.packed_labels import pack_label, response_text, unpack_label
from extensions.prompts.parser import is_label, parse_answer
from extensions.prompts.template import (
    CLOSE,
    OPEN,
    Demonstration,
    answer_format,
    chat_turns,
    dedup_key,
    prompt_text,
    render,
    surface_forms,
    written,
)

__all__ = [
    "CLOSE",
    "OPEN",
    "SPECIAL_TOKENS",
    "Demonstration",
    "PromptEncoder",
    "answer_format",
    "chat_turns",
    "dedup_key",
    "is_label",
    "pack_label",
    "parse_answer",
    "prompt_text",
    "render",
    "response_text",
    "surface_forms",
    "unpack_label",
    "written",
]
