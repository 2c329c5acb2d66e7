"""Check of a model's name before transformers retries an unreachable hub for half a minute."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from extensions.common.errors import UserError
from extensions.recipe.paths import is_hub_name

TIMEOUT = 5.0  # seconds for the hub to answer


class HubUnreachable(UserError):
    """The model is not cached, and the hub cannot be asked whether it exists."""


@lru_cache(maxsize=64)
def check_source(path: str) -> None:
    """Check that `path` is a folder, in a package (`pip:`), in the hub's local cache, or on the hub.

    Raises:
        HubUnreachable: a hub name that is not cached, and the hub does not answer.
        UserError: `path` is none of these.
    """
    if path.startswith("pip:") or Path(path).is_dir():
        return
    if not is_hub_name(path):
        raise UserError(
            f"model.path: cannot load {path!r}: no such folder; give a folder with a model, a hub name, or pip:PACKAGE"
        )
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        return
    missing = f"model.path: cannot load {path!r}: it is neither a folder nor in the hub's cache on this machine"
    if constants.HF_HUB_OFFLINE:
        raise HubUnreachable(f"{missing}, and HF_HUB_OFFLINE is set; give a folder with a model")
    try:
        HfApi().model_info(path, timeout=TIMEOUT)
    except HFValidationError as error:
        raise UserError(f"{missing}, and it is no hub name: {' '.join(str(error).split())[:200]}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403, 404):
            raise UserError(
                f"{missing}, and the hub has no such visible model (status {status}): check the name; a private or "
                "gated model needs `hf auth login` or HF_TOKEN"
            ) from error
        raise HubUnreachable(f"{missing}, and the hub answers with status {status}; try again later") from error
    except Exception as error:  # network errors of whichever HTTP library the hub's client uses
        raise HubUnreachable(
            f"{missing}, and asking the hub failed ({type(error).__name__}: {error}); give a folder with a model, or "
            "make the hub reachable"
        ) from error
