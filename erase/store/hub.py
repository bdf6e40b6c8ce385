"""The model hub, asked once and briefly: its client retries for minutes and speaks of its own arguments."""

from __future__ import annotations

import re

SECONDS = 5.0
"""How long the hub may take to say whether it has a model."""


def is_id(name: str) -> bool:
    """Whether a name can be that of a model on the hub: `owner/name`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) is not None


def reachable(name: str) -> bool:
    """Whether the hub can be asked for a model; where it cannot, its cache may still have it.

    Raises:
        ValueError: the hub has no such model, or does not show it to this user, and the cache lacks it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().model_info(name, timeout=SECONDS)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403, 404) and not _cached(name):
            raise ValueError(
                f"model {name!r} is not a folder, and the hub has no public model of that name: check the name, or log "
                "in with hf auth login"
            ) from error
        return False
    except OfflineModeIsEnabled:
        return False
    except Exception as error:  # of the network: the client's types change with its versions
        if isinstance(error, TypeError | AttributeError):
            raise
        return False
    return True


def _cached(name: str) -> bool:
    """Whether the hub's cache has a model, or at least what names its parts."""
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file), str) for file in ("model_index.json", "config.json"))


def refusal(name: str, error: Exception, cached: bool) -> ValueError:
    """What a user can do about a download that failed.

    Args:
        name: of the model.
        error: what the client raised.
        cached: whether the cache alone was asked.
    """
    if cached:
        return ValueError(
            f"model {name!r} is not a folder here, the hub's cache lacks it, and the hub cannot be reached or is "
            "switched "
            "off (HF_HUB_OFFLINE): name a folder, or download the model where there is a network"
        )
    if "Gated" in type(error).__name__:
        return ValueError(
            f"model {name!r} is gated: accept its terms on its page of the hub, and log in with hf auth login"
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return ValueError(f"the download of model {name!r} failed ({reason}): try again, or name a folder")
