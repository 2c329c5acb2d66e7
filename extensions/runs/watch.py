"""One kind of warning about a training (`extensions.runs.health`): the interface of all kinds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

Metrics = dict[str, Any]
Records = Sequence[dict[str, Any]]


@dataclass
class Watch:
    """One kind of warning. Fields without a default are settings; those with one are its state, plain JSON."""

    name: ClassVar[str]  # key of its state

    def step(self, metrics: Metrics, records: Records) -> list[str]:
        """The warnings of one iteration, usually none."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        with_default = [f.name for f in fields(self) if f.default is not MISSING or f.default_factory is not MISSING]
        return {name: copy.deepcopy(getattr(self, name)) for name in with_default}

    def load_state(self, state: dict[str, Any]) -> None:
        vars(self).update(copy.deepcopy(state))
