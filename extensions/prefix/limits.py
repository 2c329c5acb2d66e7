"""What a micro-batch may hold, and the second, smaller attempt where memory runs out all the same."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch

Form = Literal["packed", "flash", "masked", "plain"]  # of a forward (`extensions.model.policy.ForwardPath`)
RESUME = (
    "No checkpoint has anything of it: resume with the same command and a lower model.micro_batch_tokens, {key} or "
    "evaluation.batch_size, or with model.gradient_checkpointing=true; a lower prompt.max_tokens or "
    "model.dtype=bfloat16 needs a fork"
)
Result = TypeVar("Result")
Item = TypeVar("Item")


class OutOfMemory(Exception):
    """Memory ran out, and no smaller micro-batch can help; the message names the keys to change."""


@dataclass(frozen=True)
class Cost:
    """What a pack takes memory for."""

    tokens: int
    # Query-key pairs whose scores are computed, masked ones included. A flash kernel, which stores no scores, takes
    # memory for its gathered keys: these, then.
    pairs: int

    @staticmethod
    def of_rows(rows: int, tokens: int, form: Form) -> Cost:
        """Of rows of `tokens` tokens each, without common prefixes."""
        whole = rows * tokens
        return Cost(whole, {"flash": whole, "masked": whole**2}.get(form, rows * tokens**2))


@dataclass(frozen=True)
class PackLimit:
    """The bounds of a pack. One row is always allowed.

    Args:
        rows: most rows.
        tokens: most packed tokens (shared prefixes count once; padded rows count whole); infinity: no bound.
        pair_cost: tokens that take as much memory as one of `Cost.pairs`; added to the packed tokens.
        form: of the forward, which decides what is computed.
    """

    rows: int
    tokens: float = math.inf
    pair_cost: float = 0.0
    form: Form = "packed"

    def admits(self, cost: Cost) -> bool:
        return cost.tokens + self.pair_cost * cost.pairs <= self.tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest row that is within the bound: n + pair_cost n^2 = tokens. The bound is finite."""
        if self.form == "flash":
            return int(self.tokens / (1 + self.pair_cost))
        return int(2 * self.tokens / (1 + math.sqrt(1 + 4 * self.pair_cost * self.tokens)))

    def cut(self, items: Sequence[Item], cost: Callable[[Sequence[Item]], Cost]) -> list[Sequence[Item]]:
        """Consecutive chunks, each with as many items as the bounds admit.

        Args:
            cost: of the pack of some items.
        """
        chunks: list[Sequence[Item]] = []
        first = 0
        while first < len(items):
            few, many = 1, min(self.rows, len(items) - first)
            if many > 1 and self.tokens < math.inf and not self.admits(cost(items[first : first + many])):
                while many - few > 1:  # `few` items are within the bounds (or one), `many` are not
                    middle = (few + many) // 2
                    fits = self.admits(cost(items[first : first + middle]))
                    few, many = (middle, many) if fits else (few, middle)
                many = few
            chunks.append(items[first : first + many])
            first += many
        return chunks


class MemoryLimits:
    """The bounds of the forwards of one kind (training, or sampling and likelihoods) in a run.

    Where memory runs out in spite of them, they are lowered once to half of the micro-batch that did not fit.

    Args:
        limit: `rows` are the most for any recipe key.
        cache_tokens: most tokens of the KV cache of rows that are decoded together.
        retry: whether a computation may be repeated with smaller micro-batches. Where ranks run the same number of
            forwards (ZeRO 3), it may not: the others would wait for ever.
        warn: called with one line when the bounds are lowered.
        key: recipe key of the rows, for that line.
        advice: what to do if the run ends for lack of memory; None: which keys to change for a resume.
    """

    def __init__(
        self,
        limit: PackLimit | None = None,
        cache_tokens: float = math.inf,
        retry: bool = True,
        warn: Callable[[str], None] = print,
        key: str = "evaluation.micro_batch_size",
        advice: str | None = None,
    ) -> None:
        self.advice = advice or RESUME.format(key=key)
        self.limit = limit or PackLimit(rows=2**31)
        self.cache_tokens, self.retry, self.warn, self.key = cache_tokens, retry, warn, key
        self.rows_together = 2**31  # decoded together
        self.current = (0, 0)  # rows and tokens of the computation under way
        self.lowered = False

    def of(self, rows: int) -> PackLimit:
        """The limit of packs, for the recipe's number of rows."""
        return replace(self.limit, rows=min(rows, self.limit.rows))

    def running(self, rows: int, tokens: int) -> None:
        """Record what is computed now, for the message if memory runs out."""
        self.current = (rows, tokens)

    def attempt(self, compute: Callable[[], Result], undo: Callable[[], bool] = lambda: True) -> Result:
        """The result of `compute`, which reads the bounds; repeated once with lower ones if memory runs out.

        Args:
            undo: removes all traces of the failed attempt. Returns False if that is impossible.

        Raises:
            OutOfMemory: again, or for a single row, or where a repetition is unsound.
        """
        for _ in range(2):
            try:
                return compute()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                what = " ".join(str(error).split())[:200]
            # Outside the handler: the exception's traceback keeps the tensors of the failed attempt alive.
            self._lower(what, undo)  # raises if they have been lowered before
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        raise AssertionError("the second failure raises in _lower")

    def _lower(self, what: str, undo: Callable[[], bool]) -> None:
        rows, tokens = self.current
        if self.lowered:
            raise OutOfMemory(self._ended("again, after the micro-batch was halved", what))
        if rows < 2:
            raise OutOfMemory(self._ended("and a single row cannot be split", what))
        if not self.retry or not undo():
            raise OutOfMemory(
                self._ended("and with these ranks (or inside the optimizer step) it cannot be repeated", what)
            )
        self.lowered = True
        self.limit = replace(self.limit, rows=rows // 2, tokens=min(self.limit.tokens, tokens / 2))
        self.rows_together = rows // 2
        self.warn(
            f"out of memory with a micro-batch of {rows} rows and {tokens} tokens ({what}). It is repeated, and the "
            f"run goes on, with at most {rows // 2} rows and {tokens // 2} tokens; its bits differ from those of a run "
            f"with the larger ones. For later runs set {self.key}={rows // 2} and "
            f"model.micro_batch_tokens={max(1, tokens // 2)}"
        )

    def _ended(self, why: str, what: str) -> str:
        rows, tokens = self.current
        return (
            f"out of memory in a micro-batch of {rows} row{'s' if rows != 1 else ''} and {tokens} tokens, {why} "
            f"({what}). {self.advice}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host's allocator (torch 2.13 raises a plain RuntimeError), has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
