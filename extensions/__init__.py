"""PPO with LoRA for language understanding, as an extension of OpenRLHF and DeepSpeed.

`from extensions import Predictor` loads torch when it is asked for, not before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from extensions.inference import Answer, Predictor

__version__ = "0.1.0"
__all__ = ["Answer", "Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Answer", "Predictor"):
        return getattr(importlib.import_module("extensions.inference"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
