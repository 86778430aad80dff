"""A small stand-in for the Hugging Face Hub, on 127.0.0.1, for tests of what publishes and loads models.

    with HubServer() as hub:
        subprocess.run([...], env=hub.env(tmp_path))
        assert hub.repos['ann/model'].files()['config.json'] == b'{}'

It speaks what huggingface_hub needs to create a repository, upload (large files by LFS), commit, tag and
download. Status codes and headers follow recorded answers of the real Hub. Whoever has a token may write:
that somebody should not is for the client to find out.
"""

import base64
import hashlib
import json
import os
import re
import socketserver
import threading
import time
import traceback
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WRITE = 'hf_writewritewritewritewritewritewrite'
READ = 'hf_readreadreadreadreadreadreadreadre'
STRANGER = 'hf_strangerstrangerstrangerstranger12'
LFS_SUFFIXES = ('.safetensors', '.npz')


@dataclass
class User:
    name: str
    role: str  # 'read' or 'write', of the token
    orgs: tuple = ()


@dataclass
class Blob:
    """A file of a commit: in git itself, or by LFS."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def oid(self):
        return hashlib.sha1(b'blob %d\0' % len(self.data) + self.data).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.lfs else self.oid


@dataclass
class Repo:
    """A repository; a new one has, as on the Hub, a commit with .gitattributes only.

    `commits` holds those of all branches, oldest first, and their files. `objects` are the uploaded
    large files, visible to nobody before a commit names them.
    """

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self):
        self.add('refs/heads/main', {'.gitattributes': Blob(b'*.safetensors filter=lfs\n', False)})

    def add(self, ref, blobs):
        oid = hashlib.sha1(f'{self.name} {len(self.commits)}'.encode()).hexdigest()
        self.commits[oid] = blobs
        self.refs[ref] = oid
        return oid

    def find(self, rev):
        """The id of the commit of a branch, a tag or an id."""
        oid = next((self.refs[r] for r in (f'refs/heads/{rev}', f'refs/tags/{rev}') if r in self.refs), rev)
        if oid not in self.commits:
            raise Refused(404, f'Invalid rev id: {rev}', 'RevisionNotFound')
        return oid

    def files(self):
        return {path: blob.data for path, blob in self.commits[self.head].items()}

    def names(self, kind):
        return {ref.removeprefix(kind): oid for ref, oid in self.refs.items() if ref.startswith(kind)}

    head = property(lambda self: self.refs['refs/heads/main'])
    branches = property(lambda self: self.names('refs/heads/'))
    tags = property(lambda self: self.names('refs/tags/'))


@dataclass
class Request:
    method: str
    path: str  # with its query, as sent
    token: str
    body: bytes

    @property
    def parts(self):
        return [unquote(part) for part in urlsplit(self.path).path.split('/')[1:]]

    def json(self):
        return json.loads(self.body or b'{}')


@dataclass
class Reply:
    status: int = 200
    body: bytes = b''
    headers: dict = field(default_factory=dict)


def as_json(value, status=200, **headers):
    return Reply(status, json.dumps(value).encode(), {'Content-Type': 'application/json', **headers})


class Refused(Exception):
    """An answer that is an error. X-Error-Code makes the exception of the client, X-Error-Message its text."""

    def __init__(self, status, message, code=None, **more):
        self.reply = as_json({'error': message, **more}, status, **{'X-Error-Message': message})
        if code:
            self.reply.headers['X-Error-Code'] = code


@dataclass
class Fault:
    match: str = ''
    action: str | int = ''
    times: int = 0
    seconds: float = 0.0


def flipped(data):
    """One bit of the byte in the middle is another: the same size, another hash."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


class HubServer(ThreadingHTTPServer):
    """The Hub at `url`, in threads, from `with` to the end of the block, which raises what went wrong in it."""

    daemon_threads = True
    block_on_close = False  # or closing would wait for connections that the client keeps open
    request_queue_size = 128

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.cdn = f'http://localhost:{self.server_port}'  # another origin to a client, as the Hub's is
        self.users = {
            WRITE: User('ann', 'write', ('timm-robust',)),
            READ: User('ann', 'read', ('timm-robust',)),
            STRANGER: User('bob', 'write'),
        }
        self.repos, self.requests, self.errors, self.faults = {}, [], [], []
        self.lock = threading.Lock()  # a request is handled while none else is: of two commits one is the later

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # HTTPServer would ask the name service for the name of this machine
        self.server_name, self.server_port = self.server_address[:2]

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind, *_):
        self.shutdown()
        self.server_close()
        if self.errors and kind is None:
            raise RuntimeError(f'hub_server itself failed:\n{self.errors[0]}')

    def handle_error(self, request, client_address):
        """What fails outside `answer` is a client that went away."""

    def env(self, home, token=WRITE):
        """Environment of a client: this server, nothing of the user's own settings, cache and login in home."""
        env = {k: v for k, v in os.environ.items() if not re.match('HF_|HUGGING|.*_proxy$', k, re.IGNORECASE)}
        env |= {'HF_ENDPOINT': self.url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_TELEMETRY': '1'}
        env |= {'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'NO_PROXY': '127.0.0.1,localhost'}
        # Clients of today do not ask whether the server knows xet: with hf_xet installed they just use it.
        return env | {'HF_HUB_DISABLE_XET': '1'} | ({'HF_TOKEN': token} if token else {})

    def fault(self, match, action, times=1, seconds=1.0):
        """Does something wrong to the next `times` requests with match in 'METHOD path?query'.

        'drop': closes the connection and does nothing. 'drop_after': does it, then closes without an answer. 'stall':
        waits for seconds first. A number: answers that status, 429 with seconds to wait, and does nothing. 'corrupt':
        changes one bit of the answer. 'corrupt_body': changes one bit of what came, before it is looked at.
        """
        self.faults.append(Fault(match, action, times, seconds))

    def take_fault(self, request):
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.match in f'{request.method} {request.path}':
                    fault.times -= 1
                    return fault
        return Fault()

    def answer(self, request):
        try:
            with self.lock:
                return self._route(request)
        except Refused as refused:
            return refused.reply
        except Exception:
            self.errors.append(f'{request.method} {request.path}\n{traceback.format_exc()}')
            return as_json({'error': self.errors[-1]}, 500)

    def _user(self, request):
        if request.token and request.token not in self.users:
            raise Refused(401, 'Invalid credentials in Authorization header')
        return self.users.get(request.token)

    def _repo(self, request, name, content=False):
        """The repository, if the token may read it, or even its files."""
        user, repo = self._user(request), self.repos.get(name)
        member = user and name.split('/')[0] in (user.name, *user.orgs)
        if repo is None or (repo.private and not member):
            raise Refused(404 if user else 401, 'Repository not found', 'RepoNotFound')
        if content and repo.gated and not member:
            raise Refused(403 if user else 401, f'Access to model {name} is restricted', 'GatedRepo')
        return repo

    def _route(self, request):
        match [request.method, *request.parts]:
            case ['GET', 'api', 'whoami-v2']:
                return self._whoami(self._user(request))
            case ['POST', 'api', 'validate-yaml']:
                self._user(request)  # nothing works with a wrong token, also not what works with none
                return as_json({'errors': [], 'warnings': []})
            case ['POST', 'api', 'repos', 'create']:
                return self._create(self._user(request), request.json())
            case [_, 'api', 'models', owner, name, *rest]:
                return self._models(request, self._repo(request, f'{owner}/{name}'), rest)
            case ['GET' | 'HEAD', owner, name, 'resolve', rev, *path]:
                return self._resolve(self._repo(request, f'{owner}/{name}', content=True), rev, '/'.join(path))
            case ['GET', 'cdn', owner, name, oid, path]:
                return Reply(200, self.repos[f'{owner}/{name}'].commits[oid][path].data)
            case ['POST', owner, name, 'info', 'lfs', 'objects', 'batch']:
                return self._lfs(self._repo(request, f'{owner}/{name.removesuffix(".git")}'), request.json())
            case ['PUT', 'upload', owner, name, sha256]:
                if hashlib.sha256(request.body).hexdigest() != sha256:
                    raise Refused(400, 'The sha256 of the body is not the one that was announced')
                self.repos[f'{owner}/{name}'].objects[sha256] = request.body
                return Reply()
        raise Refused(404, f'hub_server does not know {request.method} {request.path}')

    def _models(self, request, repo, rest):
        match [request.method, *rest]:
            case ['GET']:
                return self._info(repo, 'main')
            case ['GET', 'revision', rev]:
                return self._info(repo, rev)
            case ['GET', 'refs']:
                kinds = {'branches': 'refs/heads/', 'tags': 'refs/tags/'}
                rows = {
                    key: [{'name': n, 'ref': kind + n, 'targetCommit': oid} for n, oid in repo.names(kind).items()]
                    for key, kind in kinds.items()
                }
                return as_json(rows | {'converts': []})
            case ['GET', 'tree', rev]:
                return self._tree(repo.commits[repo.find(rev)])
            case ['POST', 'preupload', rev]:
                return self._preupload(request.json(), repo.commits[repo.find(rev)])
            case ['POST', 'commit', rev]:
                return self._commit(request, repo, rev)
            case ['POST', 'tag', rev]:
                return self._name(repo, 'refs/tags/' + request.json()['tag'], rev)
            case ['POST', 'branch', branch]:
                return self._name(repo, f'refs/heads/{branch}', request.json().get('startingPoint', 'main'))
        raise Refused(404, f'hub_server does not know {request.method} {request.path}')

    def _whoami(self, user):
        if user is None:
            raise Refused(401, 'Invalid username or password.')
        auth = {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': user.role}}
        orgs = [{'type': 'org', 'name': org} for org in user.orgs]
        return as_json({'type': 'user', 'name': user.name, 'orgs': orgs, 'auth': auth})

    def _create(self, user, wish):
        if user is None:
            raise Refused(401, 'Invalid username or password.')
        name = f'{wish.get("organization") or user.name}/{wish["name"]}'
        if name in self.repos:  # the client reads url also here, with exist_ok
            raise Refused(409, 'You already created this model repo', url=f'{self.url}/{name}')
        self.repos[name] = Repo(name, private=bool(wish.get('private')) or wish.get('visibility') == 'private')
        return as_json({'url': f'{self.url}/{name}', 'name': name, 'id': name})

    def _info(self, repo, rev):
        oid = repo.find(rev)
        siblings = [{'rfilename': path} for path in sorted(repo.commits[oid])]
        info = {'id': repo.name, 'sha': oid, 'private': repo.private, 'gated': 'manual' if repo.gated else False}
        return as_json({**info, 'siblings': siblings, 'tags': [], 'downloads': 0, 'likes': 0, 'spaces': []})

    def _tree(self, blobs):
        folders = {'/'.join(path.split('/')[:n]) for path in blobs for n in range(1, path.count('/') + 1)}
        entries = [{'type': 'directory', 'oid': '0' * 40, 'size': 0, 'path': folder} for folder in sorted(folders)]
        for path, blob in sorted(blobs.items()):
            entry = {'type': 'file', 'oid': blob.oid, 'size': len(blob.data), 'path': path}
            if blob.lfs:
                entry['lfs'] = {'oid': blob.sha256, 'size': len(blob.data), 'pointerSize': 134}
            entries.append(entry)
        return as_json(entries)

    def _resolve(self, repo, rev, path):
        oid = repo.find(rev)
        if path not in repo.commits[oid]:
            raise Refused(404, 'Entry not found', 'EntryNotFound')
        blob, headers = repo.commits[oid][path], {'X-Repo-Commit': oid}
        if not blob.lfs:
            return Reply(200, blob.data, {**headers, 'ETag': f'"{blob.etag}"'})
        headers |= {'X-Linked-Etag': f'"{blob.etag}"', 'X-Linked-Size': str(len(blob.data))}
        return Reply(302, b'', {**headers, 'Location': f'{self.cdn}/cdn/{repo.name}/{oid}/{path}'})

    def _lfs(self, repo, wish):
        objects = []
        for entry in wish['objects']:
            href = f'{self.url}/upload/{repo.name}/{entry["oid"]}'
            upload = {} if entry['oid'] in repo.objects else {'actions': {'upload': {'href': href, 'header': {}}}}
            objects.append({'oid': entry['oid'], 'size': entry['size'], **upload})
        kind = {'Content-Type': 'application/vnd.git-lfs+json'}
        return as_json({'transfer': 'basic', 'objects': objects, 'hash_algo': 'sha256'}, **kind)

    def _preupload(self, wish, blobs):
        files = []
        for entry in wish['files']:
            path = entry['path']
            mode = 'lfs' if path.endswith(LFS_SUFFIXES) else 'regular'
            known = {'oid': blobs[path].etag} if path in blobs else {}  # the client does not send the same again
            files.append({'path': path, 'uploadMode': mode, 'shouldIgnore': False, **known})
        return as_json({'files': files})

    def _commit(self, request, repo, rev):
        lines = [json.loads(line) for line in request.body.splitlines()]
        lines = [(line['key'], line['value']) for line in lines]
        parent, base = dict(lines)['header'].get('parentCommit'), repo.find(rev)
        if parent and parent != base:
            raise Refused(412, 'The branch was updated since you opened this page. Please refresh and try again.')
        blobs = dict(repo.commits[base])
        for key, value in lines:
            if key == 'file':
                blobs[value['path']] = Blob(base64.b64decode(value['content']), False)
            elif key == 'lfsFile':
                if value['oid'] not in repo.objects:
                    raise Refused(400, f'LFS pointer pointed to a file that does not exist: {value["path"]}')
                blobs[value['path']] = Blob(repo.objects[value['oid']], True)
            elif key == 'deletedFile':
                del blobs[value['path']]
        oid = repo.add(f'refs/heads/{rev}', blobs)
        return as_json({'success': True, 'commitOid': oid, 'commitUrl': f'{self.url}/{repo.name}/commit/{oid}'})

    def _name(self, repo, ref, rev):
        if ref in repo.refs:
            raise Refused(409, 'Reference exists already')
        repo.refs[ref] = repo.find(rev)
        return as_json({})


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def serve(self):
        hub, size = self.server, int(self.headers.get('Content-Length') or 0)
        body = self.rfile.read(size)
        if len(body) != size:  # the client was killed; half of a commit can look like a smaller one
            raise ConnectionError('the request ended too early')
        request = Request(self.command, self.path, self.headers.get('Authorization', '').removeprefix('Bearer '), body)
        hub.requests.append(request)
        fault = hub.take_fault(request)
        if fault.action == 'stall':
            time.sleep(fault.seconds)
        if fault.action == 'corrupt_body':
            request.body = flipped(request.body)
        if isinstance(fault.action, int):
            reply = Refused(fault.action, 'A fault that the test asked for').reply
            reply.headers |= {'Retry-After': f'{fault.seconds:.0f}'} if fault.action == 429 else {}
        elif fault.action != 'drop':
            reply = hub.answer(request)
        request.body = b''  # of 73 MB
        if fault.action in ('drop', 'drop_after'):
            self.close_connection = True
        else:
            self.send(Reply(reply.status, flipped(reply.body), reply.headers) if fault.action == 'corrupt' else reply)

    def send(self, reply):
        self.send_response(reply.status)
        for key, value in reply.headers.items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(reply.body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = serve
