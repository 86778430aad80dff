"""What the stand-in for the Hub holds: users, repositories, commits, refs; its rules for file names and cards."""

import hashlib
import re
import time
from dataclasses import dataclass, field
from functools import cached_property

import yaml

LFS_LIMIT = 10 << 20
LFS_SUFFIXES = ('.safetensors', '.bin', '.pt', '.pth', '.ckpt', '.onnx', '.h5', '.npz', '.npy', '.gz', '.zip', '.tar')
GITATTRIBUTES = ''.join(f'*{suffix} filter=lfs diff=lfs merge=lfs -text\n' for suffix in LFS_SUFFIXES).encode()


@dataclass
class User:
    name: str
    role: str  # 'read' or 'write', of the token
    orgs: tuple = ()


@dataclass
class Blob:
    """A file of a commit: in git itself, or as a pointer to LFS."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def oid(self):
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()

    @property
    def pointer(self):
        text = f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n'
        return text.encode()

    @property
    def etag(self):
        return self.sha256 if self.lfs else self.oid


@dataclass
class Commit:
    oid: str
    parent: str | None
    message: str
    author: str
    blobs: dict[str, Blob]
    date: str = field(default_factory=lambda: time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime()))

    @property
    def files(self):
        return {path: blob.data for path, blob in self.blobs.items()}


@dataclass
class Repo:
    """A repository; a new one has, as on the Hub, a commit with .gitattributes only.

    `commits` holds those of all branches and pull requests, oldest first. `objects` are the uploaded large files,
    visible to nobody before a commit names them.
    """

    name: str
    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    discussions: list[dict] = field(default_factory=list)

    def __post_init__(self):
        self.add('refs/heads/main', None, {'.gitattributes': Blob(GITATTRIBUTES, False)}, 'initial commit', 'system')

    def add(self, ref, parent, blobs, message, author):
        content = ''.join(f'{path} {blob.oid}\n' for path, blob in sorted(blobs.items()))
        text = f'{self.name} {len(self.commits)} {parent} {message}\n{content}'
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, message, author, blobs)
        self.commits.append(commit)
        self.refs[ref] = commit.oid
        return commit

    def find(self, rev):
        """The commit of a branch, tag, refs/... or full commit id; None if there is none."""
        oid = next((self.refs[r] for r in (f'refs/heads/{rev}', f'refs/tags/{rev}', rev) if r in self.refs), rev)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    def files(self, rev='main'):
        if self.find(rev) is None:
            raise KeyError(f'{self.name} has no revision {rev}')
        return self.find(rev).files

    def _names(self, kind):
        return {ref.removeprefix(kind): oid for ref, oid in self.refs.items() if ref.startswith(kind)}

    head = property(lambda self: self.refs['refs/heads/main'])
    branches = property(lambda self: self._names('refs/heads/'))
    tags = property(lambda self: self._names('refs/tags/'))


def bad_path(path):
    """Whether a name would lead out of the repository, or into git's own folder."""
    return any(p in ('', '.', '..', '.git') for p in path.split('/')) or '\\' in path or not path.isprintable()


def needs_lfs(path, size, sample):
    return path.endswith(LFS_SUFFIXES) or size > LFS_LIMIT or b'\0' in sample


def card_errors(text):
    """What is wrong with the metadata on top of a README.md: (errors, warnings)."""
    found = re.match(r'---\r?\n(.*?)^---\s*$', text, re.DOTALL | re.MULTILINE)
    if not found:
        return [], ['empty or missing yaml metadata in repo card']
    try:
        data = yaml.safe_load(found.group(1))
    except yaml.YAMLError as error:
        return [f'Invalid YAML: {error}'], []
    if data is None:
        return [], ['empty or missing yaml metadata in repo card']
    if not isinstance(data, dict):
        return ['the metadata must be a mapping'], []
    errors = []
    for key in ('license', 'library_name', 'pipeline_tag'):
        if not isinstance(data.get(key) or '', str):
            errors.append(f'"{key}" must be a string')
    for key in ('tags', 'datasets', 'metrics'):
        value = data.get(key) or []
        if not isinstance(value, (str, list)) or not all(isinstance(entry, str) for entry in value):
            errors.append(f'"{key}" must be an array of strings')
    try:
        errors += [error for model in data.get('model-index') or [] for error in result_errors(model)]
    except (AttributeError, KeyError, TypeError):
        errors.append('"model-index" must be an array of {name, results}')
    return errors, []


def result_errors(model):
    """Of an entry of model-index; raises one of many errors if it is not even a mapping of lists of mappings."""
    if not model['name'] or not isinstance(model['results'], list):
        raise TypeError
    for result in model['results']:
        for a, b in (('task', 'type'), ('dataset', 'type'), ('dataset', 'name')):
            if not result.get(a, {}).get(b):
                yield f'"model-index": {a}.{b} is required'
        if not all('type' in metric and 'value' in metric for metric in result.get('metrics') or [{}]):
            yield '"model-index": each metric needs type and value'
