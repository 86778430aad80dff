"""The checked file of released weights: out of the checkout, else from the Hugging Face Hub at the pinned commit.

No client checks the content of what it downloads: a flipped bit arrives silently, over HTTP and over xet. Here the
SHA-256 in the package decides.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from .releases import STAGED, WEIGHTS, Release

_CONNECT_S = 3.0
_OWN = 'or pass a file of your own: pretrained_cfg_overlay=dict(file=PATH)'


def weights_file(release: Release, staged: Path = STAGED) -> Path:
    """A release's model.safetensors, checked against the SHA-256 in the package.

    Args:
        release: which.
        staged: model_cards/ of a checkout; where it lacks the file, the Hub is asked.

    Raises:
        FileNotFoundError: if neither the checkout nor the Hub has it.
        PermissionError: if the Hub wants a token, or another one.
        ConnectionError: if the Hub does not answer, or must not be asked.
        ValueError: if the file is not the released one.
    """
    path = staged / release.name / WEIGHTS
    if path.is_file():
        return release.check(path)
    if release.commit is None:
        raise FileNotFoundError(
            f'{release.name} is not on the Hub yet, and {path} does not exist; use a checkout of the repository, which '
            f'holds it, {_OWN}'
        )
    try:
        return release.check(_fetch(release))
    except ValueError as error:  # a damaged cache is worth one more download
        damage = error
    try:
        path = _fetch(release, force_download=True)
    except ConnectionError as error:
        raise ConnectionError(f'the cached file is damaged ({damage}), and cannot be fetched again: {error}') from None
    try:
        return release.check(path)
    except ValueError as error:
        for file in (path.resolve(), path):
            file.unlink(missing_ok=True)
        raise ValueError(
            f'{_where(release)} does not hold the released file, and it was deleted from the cache: {error}'
        ) from None


def _fetch(release: Release, **options: Any) -> Path:
    """The file in the client's cache; downloaded where it is not there yet."""
    import huggingface_hub
    from huggingface_hub import errors

    where = _where(release)
    if not options:
        cached = huggingface_hub.try_to_load_from_cache(release.repo, WEIGHTS, revision=release.commit)
        if isinstance(cached, str):
            return Path(cached)
    _knock(where)
    try:
        return Path(huggingface_hub.hf_hub_download(release.repo, WEIGHTS, revision=release.commit, **options))
    except errors.GatedRepoError:
        raise PermissionError(
            f'{where} is gated; ask for access at {_page(release)}, then type: hf auth login'
        ) from None
    except errors.RepositoryNotFoundError as error:
        raise PermissionError(
            f'{where} is missing, private, or closed to your token ({_status(error)}); type hf auth login, or unset a '
            f'wrong HF_TOKEN, {_OWN}'
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f'{where}: that commit is gone; type pip install -U timm-robust, {_OWN}') from None
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f'{where} cannot be reached: {error.__cause__ or error}; try again later, {_OWN}'
        ) from None
    except errors.EntryNotFoundError:
        raise FileNotFoundError(f'{where} holds no {WEIGHTS}; type pip install -U timm-robust, {_OWN}') from None
    except errors.HfHubHTTPError as error:
        kind = PermissionError if _status(error) in (401, 403) else ConnectionError
        raise kind(
            f'{where}: the Hub answered {_status(error)}; check HF_TOKEN or type hf auth login, {_OWN}'
        ) from None
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f'{where}: the download failed: {error}; try again, {_OWN}') from None


def _knock(where: str) -> None:
    """Find out in seconds whether the Hub answers: the client itself tries for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f'{where} has to come from the Hub, but HF_HUB_OFFLINE is set; unset it, {_OWN}')
    try:
        get_session().head(constants.ENDPOINT, timeout=_CONNECT_S)
    except Exception as error:  # of requests, httpx or httpx2, by the client's version
        raise ConnectionError(
            f'{where} cannot be reached ({type(error).__name__} at {constants.ENDPOINT}); check the network, {_OWN}'
        ) from None


def _where(release: Release) -> str:
    return f'{release.name} ({release.repo}@{(release.commit or "")[:12]})'


def _page(release: Release) -> str:
    from huggingface_hub import constants

    return f'{constants.ENDPOINT}/{release.repo}'


def _status(error: Exception) -> int | None:
    with contextlib.suppress(AttributeError):
        return int(error.response.status_code)  # type: ignore[attr-defined]
    return None
