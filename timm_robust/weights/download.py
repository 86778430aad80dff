"""The checked content of released weights: out of the checkout, else from the Hugging Face Hub at the pinned commit.

No client checks the content of what it downloads: a flipped bit arrives silently, over HTTP and over xet. Here the
SHA-256 in the package decides, over the very bytes that are loaded.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .releases import STAGED, WEIGHTS, Release

_CONNECT_S, _POLL_S, _QUIET_S, _LONGEST_WAIT_S = 3.0, 5.0, 60.0, 60
_logger = logging.getLogger(__name__)
_OWN = 'or pass a file of your own: pretrained_cfg_overlay=dict(file=PATH)'


def read_release(release: Release, staged: Path = STAGED) -> bytes:
    """The content of a release's model.safetensors, checked against the SHA-256 in the package.

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
        return release.read(path)
    if release.commit is None:
        raise FileNotFoundError(
            f'{release.name} is not on the Hub yet, and {path} does not exist; use a checkout of the repository, which '
            f'holds it, {_OWN}'
        )
    try:
        return release.read(_fetch(release))
    except ValueError as error:  # a damaged cache is worth one more download
        damage = error
    try:
        path = _fetch(release, force=True)
    except ConnectionError as error:
        raise ConnectionError(f'the cached file is damaged ({damage}), and cannot be fetched again: {error}') from None
    try:
        return release.read(path)
    except ValueError as error:
        for file in (path.resolve(), path):
            file.unlink(missing_ok=True)
        raise ValueError(
            f'{_where(release)} does not hold the released file, and it was deleted from the cache: {error}'
        ) from None


def _fetch(release: Release, force: bool = False) -> Path:
    """The file in the client's cache; downloaded where it is not there yet, or by force."""
    import huggingface_hub
    from huggingface_hub import errors

    where = _where(release)
    if not force:
        cached = huggingface_hub.try_to_load_from_cache(release.repo, WEIGHTS, revision=release.commit)
        if isinstance(cached, str):
            return Path(cached)
    _check_reachable(where)
    try:
        with _watched(release.repo, where):
            return Path(
                huggingface_hub.hf_hub_download(release.repo, WEIGHTS, revision=release.commit, force_download=force)
            )
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
            f'{where} cannot be reached: {without_password(error.__cause__ or error)}; try again later, {_OWN}'
        ) from None
    except errors.EntryNotFoundError:
        raise FileNotFoundError(f'{where} holds no {WEIGHTS}; type pip install -U timm-robust, {_OWN}') from None
    except errors.HfHubHTTPError as error:
        kind = PermissionError if _status(error) in (401, 403) else ConnectionError
        raise kind(
            f'{where}: the Hub answered {_status(error)}; check HF_TOKEN or type hf auth login, {_OWN}'
        ) from None
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f'{where}: the download failed: {without_password(error)}; try again, {_OWN}') from None


def fetch_folder(spec: str) -> Path:
    """The config.json and the weights of a repository on the Hub, 'owner/name' or 'owner/name@revision', unread.

    Returns:
        The folder in the client's cache that holds them.

    Raises:
        ConnectionError: if they cannot be had.
    """
    import huggingface_hub

    repo, _, revision = spec.partition('@')
    folder = Path()
    try:
        with _watched(repo, repo):
            for names in (['config.json', WEIGHTS, '*.yaml'], ['config.json', 'pytorch_model.bin']):
                folder = Path(huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=names))
                if (folder / WEIGHTS).is_file():
                    break
    except Exception as error:  # of requests, httpx or httpx2, by the client's version
        reason = ' '.join(without_password(error).split())
        raise ConnectionError(f'hf-hub:{spec} cannot be had from the Hub: {reason}') from None
    return folder


def without_password(text: object) -> str:
    """The text, with user and password taken out of the addresses in it: https://user:secret@host to https://host."""
    return re.sub(r'(?<=://)[^/\s]+@', '', str(text))


@contextlib.contextmanager
def bounded_waits(say: Callable[[str], object]) -> Iterator[None]:
    """Say how long the Hub asks its client to wait, and end with an error where that is more than a minute.

    Raises:
        ConnectionError: inside the body, saying when to come back.
    """
    from huggingface_hub.utils import get_session

    def hear(response: Any) -> None:
        limit = re.search(r'\bt=(\d+)', response.headers.get('ratelimit', ''))
        after = limit[1] if limit else response.headers.get('retry-after', '').strip()
        if response.status_code not in (429, 503) or not after.isdecimal():
            return
        seconds = int(after)
        if seconds > _LONGEST_WAIT_S:
            back = time.strftime('%H:%M', time.localtime(time.time() + min(seconds, 10**8)))
            raise ConnectionError(f'the Hub asks to wait for {seconds} s; type the same again after {back}')
        say(f'the Hub asks to wait for {seconds} s; waiting, Ctrl-C ends it')

    hooks: list[Any] = getattr(get_session(), 'event_hooks', {}).get('response', [])  # older clients have none
    hooks.append(hear)
    try:
        yield
    finally:
        hooks.remove(hear)


@contextlib.contextmanager
def _watched(repo: str, where: str) -> Iterator[None]:
    """A download into the user's cache, whose waits and stalls go to the log."""
    from huggingface_hub import constants

    warn = _logger.warning
    with told_stalls(constants.HF_HUB_CACHE, repo, where, warn), bounded_waits(warn):
        yield


@contextlib.contextmanager
def told_stalls(cache: str | Path, repo: str, where: str, say: Callable[[str], object]) -> Iterator[None]:
    """Say when a download makes no progress for a minute: the client waits and retries in silence.

    Args:
        cache: folder of the client's cache.
        repo: that is downloaded from.
        where: it is, for the line.
        say: called with the line.
    """
    blobs, done = Path(cache) / f'models--{repo.replace("/", "--")}' / 'blobs', threading.Event()

    def sizes() -> Iterator[int]:
        yield _bytes_in(blobs)
        while not done.wait(_POLL_S):
            yield _bytes_in(blobs)

    thread = threading.Thread(target=_watch, args=(sizes(), where, say), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(sizes: Iterable[int], where: str, say: Callable[[str], object]) -> None:
    """Say so for each minute in which the number of bytes, told every _POLL_S seconds, stays the same."""
    seen, quiet = -1, 0.0
    for size in sizes:
        quiet = quiet + _POLL_S if size == seen else 0.0
        seen = size
        if quiet and quiet % _QUIET_S == 0:
            say(
                f'{where}: the download has made no progress for {quiet:.0f} s ({size:,} bytes are here); still '
                'waiting, Ctrl-C ends it'
            )


def _bytes_in(folder: Path) -> int:
    """Bytes in the files of a folder, half-written ones included."""
    total = 0
    for path in folder.glob('*'):
        with contextlib.suppress(OSError):  # renamed meanwhile
            total += path.stat().st_size
    return total


def _check_reachable(where: str) -> None:
    """Find out in seconds whether the Hub answers: the client itself tries for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f'{where} has to come from the Hub, but HF_HUB_OFFLINE is set; unset it, {_OWN}')
    try:
        get_session().head(constants.ENDPOINT, timeout=_CONNECT_S)
    except Exception as error:  # of requests, httpx or httpx2, by the client's version
        place = without_password(constants.ENDPOINT)
        raise ConnectionError(
            f'{where} cannot be reached ({type(error).__name__} at {place}); check the network, {_OWN}'
        ) from None


def _where(release: Release) -> str:
    return f'{release.name} ({release.repo}@{(release.commit or "")[:12]})'


def _page(release: Release) -> str:
    from huggingface_hub import constants

    return f'{without_password(constants.ENDPOINT)}/{release.repo}'


def _status(error: Exception) -> int | None:
    with contextlib.suppress(AttributeError):
        return int(error.response.status_code)  # type: ignore[attr-defined]
    return None
