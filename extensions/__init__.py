"""PPO with LoRA for language understanding, as an extension of OpenRLHF and DeepSpeed.

torch is loaded by `from extensions import Predictor`, not by `import extensions`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from extensions.common.versions import __version__

if TYPE_CHECKING:
    from extensions.inference import Answer, Predictor

__all__ = ["Answer", "Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Answer", "Predictor"):
        from extensions import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
