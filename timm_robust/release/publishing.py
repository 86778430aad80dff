"""Publishing to the Hugging Face Hub: the one door to uploads.

A folder of model_cards/ becomes one atomic commit on the known head of its repository, and is believed only when the
server's hashes and a fresh download say so. The same call again changes nothing, and after a kill, a lost answer or a
race it finds out what happened before it calls that a failure.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from ..files import one_writer, sha256
from ..weights import TABLE, WEIGHTS, Release, bounded_waits, read_table, told_stalls, without_password, write_table
from .folder import ORGANISATION, check, files_of

_KEPT = ('.gitattributes',)
"""Files of the server's own, which a publication leaves alone."""
_LOGIN = 'type hf auth login, or set HF_TOKEN'
_NAME = re.compile(r'(?![-./])(?!.*(\.\.|//|\.lock(/|$)|/\.))[A-Za-z0-9._/-]{1,100}(?<![./])')
"""A part of what git takes as the name of a branch or a tag."""
_WAITS_S = (1.0, 4.0, 15.0)
"""Before each further try of what failed in passing."""
T = TypeVar('T')


class Refused(ValueError):
    """What was asked for would change released weights or move a tag, or is not allowed; nothing was written."""


@dataclass(frozen=True)
class Options:
    """How to publish.

    Args:
        org: the namespace on the Hub; None: what the table of releases says.
        revision: the branch.
        tag: a tag for the commit; it is never moved.
        private: make a new repository private.
        overwrite: allow other weights under a published name.
        dry_run: plan only; nothing is written.

    Raises:
        ValueError: for a name of a branch or a tag that git refuses.
    """

    org: str | None = None
    revision: str = 'main'
    tag: str | None = None
    private: bool = False
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Check the names before anything is public."""
        for what, name in (('tag', self.tag), ('branch', self.revision), ('organisation', self.org)):
            if name is not None and not _NAME.fullmatch(name):
                raise ValueError(
                    f'{name!r} is no name of a {what}; allowed are letters, digits and ._-/ between them, such as v1.0'
                )


@dataclass
class Plan:
    """What a publication would do.

    Args:
        repo: on the Hub.
        head: the commit that the branch is at; None if the repository is new.
        files: path -> 'new', 'changed', 'same' or 'gone'.
        tagged: the commit that the wished tag is at; None if there is no such tag.
        private: whether the repository is, or will be.
        branch: whether the branch is there.
        note: what else the reader should know.
    """

    repo: str
    head: str | None
    files: dict[str, str]
    tagged: str | None = None
    private: bool = False
    branch: bool = True
    note: str = ''

    @property
    def changes(self) -> dict[str, str]:
        """The files that a commit would touch."""
        return {path: what for path, what in self.files.items() if what != 'same'}


@dataclass
class Outcome:
    """What happened to one model.

    Args:
        name: '<arch>.<tag>'.
        repo: on the Hub.
        status: 'planned', 'published', 'unchanged' or 'failed'.
        commit: the commit that holds the files.
        changes: path -> 'new', 'changed' or 'gone'.
        tag: the tag that is now at that commit.
        url: where to look at it.
        message: why it failed, or what else there is to say.
    """

    name: str
    repo: str
    status: str
    commit: str | None = None
    changes: dict[str, str] = field(default_factory=dict)
    tag: str | None = None
    url: str | None = None
    message: str = ''


def repo_of(name: str, org: str | None = None, table: Path = TABLE) -> str:
    """The repository of a release: in `org`, else as the table says, else in the project's organisation."""
    if org:
        return f'{org}/{name}'
    release = read_table(table).get(name)
    return release.repo if release else f'{ORGANISATION}/{name}'


def publish(
    folder: Path,
    options: Options,
    *,
    table: Path = TABLE,
    say: Callable[[str], object] = print,
) -> Outcome:
    """Publish one staged model, verify it, and note its commit in the table of releases.

    Args:
        folder: model_cards/<arch>.<tag>.
        options: how.
        table: releases.json; gets repository and commit, unless on a branch or private.
        say: called with lines of text.

    Raises:
        Refused: if released weights would change without overwrite, a tag would move, or the token may not write.
        ValueError: if the folder is not what was staged, or not what the table holds, or the server holds other bytes
            than were sent.
        Exception: the client's, if the Hub cannot be reached or refuses.
    """
    folder = folder.resolve()
    check(folder)
    find_release(folder, table)
    repo = repo_of(folder.name, options.org, table)
    validate_repo_id(repo)
    with bounded_waits(say):
        return _publish(HfApi(library_name='timm_robust'), folder, repo, options, table, say)


def _publish(
    api: HfApi, folder: Path, repo: str, options: Options, table: Path, say: Callable[[str], object]
) -> Outcome:
    """What `publish` does, once the folder and the names are known to be right."""
    patiently(lambda: identify(api, repo, options.dry_run), say)
    plan = patiently(lambda: make_plan(api, folder, repo, options), say)
    outcome = Outcome(folder.name, repo, 'planned', plan.head, plan.changes, message=plan.note)
    for path, what in plan.files.items():
        say(f'{repo}: {what:8s}{path}')
    if options.dry_run:
        return outcome
    if plan.changes:
        outcome = replace(outcome, status='published', commit=upload(api, folder, plan, options, say))
    elif not plan.branch:
        api.create_branch(repo, branch=options.revision, revision=plan.head, exist_ok=True)
        outcome = replace(outcome, status='published')
    else:
        outcome = replace(outcome, status='unchanged')
    assert outcome.commit is not None  # a repository without a commit has everything to change
    try:
        verify(api, folder, repo, outcome.commit, say)
        if options.tag and plan.tagged is None:
            set_tag(api, repo, options.tag, outcome.commit, say)
    except Exception as error:
        if _passes(error) or isinstance(error, ConnectionError):
            raise ConnectionError(
                f'{repo} holds the files, commit {outcome.commit[:12]}, but then: {error}; type the same again'
            ) from error
        raise
    outcome.tag, outcome.url = options.tag, without_password(f'{api.endpoint}/{repo}')
    if options.revision == 'main' and not plan.private:
        note_commit(folder, repo, outcome.commit, table)
    return outcome


def identify(api: HfApi, repo: str, dry_run: bool) -> None:
    """Refuse a token that is missing, wrong, read-only or of somebody without the namespace, as far as one can tell.

    Raises:
        Refused: with the remedy.
    """
    try:
        user = api.whoami()
    except hub_errors.LocalTokenNotFoundError:
        if dry_run:  # a plan needs no token where the repository is public
            return
        raise Refused(f'no token; {_LOGIN}') from None
    except hub_errors.HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise Refused(f'the token is not valid; {_LOGIN} with one that may write to {repo}') from None
    role = user.get('auth', {}).get('accessToken', {}).get('role')
    if role == 'read':
        raise Refused(f'the token of {user["name"]} may only read; make one that may write to {repo}, then {_LOGIN}')
    owner, names = repo.partition('/')[0], [user['name'], *(org['name'] for org in user.get('orgs', []))]
    if owner not in names and role != 'fineGrained':
        raise Refused(f'{user["name"]} does not belong to {owner}, but to {", ".join(names)}; type --org NAME')


def make_plan(api: HfApi, folder: Path, repo: str, options: Options) -> Plan:
    """Compare the folder with the branch, by content hash; nothing is written.

    Raises:
        Refused: if released weights would change without overwrite, or the tag is at another commit.
    """
    try:
        info = api.repo_info(repo)
    except hub_errors.GatedRepoError:
        raise
    except hub_errors.RepositoryNotFoundError:
        return Plan(repo, None, dict.fromkeys(files_of(folder), 'new'), private=options.private)
    refs = api.list_repo_refs(repo)
    heads = {branch.name: branch.target_commit for branch in refs.branches}
    tags = {tag.name: tag.target_commit for tag in refs.tags}
    head = heads.get(options.revision, heads.get('main'))
    plan = Plan(repo, head, compare(api, folder, repo, head), tags.get(options.tag) if options.tag else None)
    plan.private, plan.branch = bool(info.private), options.revision in heads
    if options.private and not info.private:
        plan.note = f'{repo} exists and is public; --private does not change that.'
    if plan.files[WEIGHTS] == 'changed' and not options.overwrite:
        raise Refused(
            f'{repo} holds other weights under this name; type --overwrite to replace them, or name a new tag'
        )
    if plan.tagged is not None and (plan.changes or plan.tagged != head):
        raise Refused(f'tag {options.tag} of {repo} is at {plan.tagged[:12]}; tags never move: choose another')
    return plan


def compare(api: HfApi, folder: Path, repo: str, revision: str | None) -> dict[str, str]:
    """Path -> 'new', 'changed', 'same' or 'gone', by SHA-256 for large files and git's blob hash for others."""
    files = files_of(folder)
    tree = api.list_repo_tree(repo, recursive=True, revision=revision)
    remote = {entry.path: entry for entry in tree if hasattr(entry, 'blob_id')}  # a folder has none
    found = {}
    for path, file in files.items():
        if path not in remote:
            found[path] = 'new'
        else:
            found[path] = 'same' if same_content(file, remote[path]) else 'changed'
    return found | {path: 'gone' for path in remote if path not in files and path not in _KEPT}


def same_content(file: Path, remote: Any) -> bool:
    """Whether a file on the server has this file's content, by the hash that the server keeps."""
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == sha256(file))
    content = file.read_bytes()
    return bool(remote.blob_id == hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest())


def upload(api: HfApi, folder: Path, plan: Plan, options: Options, say: Callable[[str], object]) -> str:
    """One commit on the head of the plan; an answer that got lost is looked up before it counts as a failure.

    Raises:
        Refused: if somebody else committed meanwhile.
        Exception: the client's, if nothing was committed.
    """
    api.create_repo(plan.repo, private=options.private, exist_ok=True)
    head = plan.head or api.repo_info(plan.repo).sha
    if options.revision != 'main':
        api.create_branch(plan.repo, branch=options.revision, revision=head, exist_ok=True)
    files = files_of(folder)
    operations: list[Any] = [
        CommitOperationDelete(path) if what == 'gone' else CommitOperationAdd(path, str(files[path]))
        for path, what in plan.changes.items()
    ]
    message = f'Publish {folder.name}' if plan.head is None else f'Update {folder.name}'
    try:
        commit = api.create_commit(
            plan.repo,
            operations,
            commit_message=message,
            revision=options.revision,
            parent_commit=head,
        )
        return commit.oid
    except Exception as error:  # connection errors are those of requests, httpx or httpx2, by the client's version
        say(f'{plan.repo}: {type(error).__name__}; looking at what the server holds')
        now = {branch.name: branch.target_commit for branch in api.list_repo_refs(plan.repo).branches}
        current = now.get(options.revision)
        if current == head:
            raise
        if set(compare(api, folder, plan.repo, current).values()) == {'same'}:
            return str(current)
        raise Refused(
            f'somebody else committed to {plan.repo} meanwhile ({str(current)[:12]}); look at it, then repeat'
        ) from error


def set_tag(api: HfApi, repo: str, tag: str, commit: str, say: Callable[[str], object]) -> None:
    """Tag a commit; an answer that got lost is looked up.

    Raises:
        Refused: if somebody else put the tag elsewhere meanwhile.
    """
    patiently(lambda: api.create_tag(repo, tag=tag, revision=commit, exist_ok=True), say)
    tags = {one.name: one.target_commit for one in patiently(lambda: api.list_repo_refs(repo), say).tags}
    if tags.get(tag) != commit:
        raise Refused(f'tag {tag} of {repo} is at {str(tags.get(tag))[:12]} now; tags never move: choose another')


def patiently(call: Callable[[], T], say: Callable[[str], object]) -> T:
    """The answer of a call, which is made again a few times where it failed in passing: 429, 5xx, no connection."""
    for wait in _WAITS_S:
        try:
            return call()
        except Exception as error:
            if not _passes(error):
                raise
            say(f'{type(error).__name__}: {" ".join(str(error).split())[:100]}; again in {wait:.0f} s')
            time.sleep(wait)
    return call()


def _passes(error: Exception) -> bool:
    """Whether an error of the client may be gone a moment later."""
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if status is not None:
        return status == 429 or status >= 500
    return type(error).__module__.partition('.')[0] in ('httpx', 'httpx2', 'httpcore', 'requests', 'urllib3')


def verify(api: HfApi, folder: Path, repo: str, commit: str, say: Callable[[str], object]) -> None:
    """Believe nothing: compare the server's hashes, then every byte of a fresh download.

    Raises:
        ValueError: naming the file that differs.
    """
    for path, what in patiently(lambda: compare(api, folder, repo, commit), say).items():
        if what != 'same':
            raise ValueError(f'{repo}@{commit[:12]}: {path} is {what} on the server; type the same again')
    with tempfile.TemporaryDirectory() as cache, told_stalls(cache, repo, f'{repo}@{commit[:12]}', say):
        for path, file in files_of(folder).items():
            where = {'revision': commit, 'cache_dir': cache, 'endpoint': api.endpoint, 'token': api.token}
            fetched = patiently(partial(hf_hub_download, repo, path, **where), say)
            if sha256(fetched) != sha256(file):
                raise ValueError(f'{repo}@{commit[:12]}: {path} came back with other bytes; do not announce it')


def note_commit(folder: Path, repo: str, commit: str, table: Path) -> None:
    """Write repository and commit into the table of releases.

    Raises:
        ValueError: if the table is of other weights.
    """
    with one_writer(folder.parent):
        old = find_release(folder, table)
        new = replace(old, repo=repo, commit=commit)
        if new != old:
            write_table(read_table(table) | {new.name: new}, table)


def find_release(folder: Path, table: Path) -> Release:
    """The entry of these weights in the table of releases.

    Raises:
        ValueError: if the table is of other weights.
    """
    release = read_table(table).get(folder.name)
    if release is None or release.sha256 != sha256(folder / WEIGHTS):
        raise ValueError(f'{table} does not hold these weights of {folder.name}; type: timm-robust render')
    return release
