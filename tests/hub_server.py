"""A small stand-in for the Hugging Face Hub, on 127.0.0.1, for tests of what uploads and downloads models.

    with HubServer() as hub:
        subprocess.run([...], env=hub.env(tmp_path))
        assert hub.repo('ann/model').files()['config.json'] == b'{}'

It speaks the parts of the protocol that huggingface_hub needs to create a repository, upload, tag and download: large
files by LFS, commits, pull requests, tags. Status codes and headers follow recorded answers of the real Hub.
Models only. Not here: multipart LFS, LFS locks, .gitignore rules, merging, deleting or moving repositories.
"""

import base64
import hashlib
import importlib.util
import json
import os
import re
import secrets
import threading
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit


def _sibling(name):
    """With --import-mode=importlib tests have no package to import their neighbours from."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f'{name}.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hub_http, hub_repo = _sibling('hub_http'), _sibling('hub_repo')
Refused, Reply, as_json, ranged = hub_http.Refused, hub_http.Reply, hub_http.as_json, hub_http.ranged
Blob, Repo, User = hub_repo.Blob, hub_repo.Repo, hub_repo.User

WRITE = 'hf_writewritewritewritewritewritewrite'
READ = 'hf_readreadreadreadreadreadreadreadre'
STRANGER = 'hf_strangerstrangerstrangerstranger12'


class HubServer:
    """The Hub at `url` and its CDN at `cdn`, in threads, from `with` to the end of the block.

    The CDN has another origin (localhost), so that a client drops its token on the way there; it answers 400 to one
    that does not. A bug in the server itself is raised at the end of the block.
    """

    def __init__(self):
        self.tokens = {
            WRITE: User('ann', 'write', ('timm-robust',)),
            READ: User('ann', 'read', ('timm-robust',)),
            STRANGER: User('bob', 'write'),
        }
        self.repos, self.requests, self.errors, self.faults = {}, [], [], []
        self.lock = threading.RLock()  # a request is handled while none else is: of two commits one is the later
        self.closing = threading.Event()
        self._secret = secrets.token_hex(8)
        self._servers = [hub_http.Server(self, 'hub', self._hub), hub_http.Server(self, 'cdn', self._cdn)]
        self.url = f'http://127.0.0.1:{self._servers[0].server_port}'
        self.cdn = f'http://localhost:{self._servers[1].server_port}'

    def __enter__(self):
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind, *_):
        self.closing.set()
        for server in self._servers:
            server.close()
        if self.errors and kind is None:
            raise RuntimeError(f'hub_server itself failed:\n{self.errors[0]}')

    # What tests use.

    def env(self, home, token=WRITE):
        """Environment of a client: this server, nothing of the user's own settings, cache and login in home."""
        env = {k: v for k, v in os.environ.items() if not re.match('HF_|HUGGING|.*_proxy$', k, re.IGNORECASE)}
        env |= {'HF_ENDPOINT': self.url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_TELEMETRY': '1'}
        env |= {'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'NO_PROXY': '127.0.0.1,localhost'}
        # Clients of today do not ask whether the server knows xet: with hf_xet installed they just use it.
        return env | {'HF_HUB_DISABLE_XET': '1'} | ({'HF_TOKEN': token} if token else {})

    def repo(self, name):
        """The repository; KeyError if there is none."""
        return self.repos[name]

    def put(self, name, files, tag=None, message='put'):
        """Commits files on main over what is there, in a repository that is made if need be; returns the oid."""
        with self.lock:
            repo = self.repos.setdefault(name, Repo(name))
            blobs = dict(repo.find('main').blobs)
            for path, data in files.items():
                self._check_path(path)
                blobs[path] = Blob(data, hub_repo.needs_lfs(path, len(data), data[:512]))
                if blobs[path].lfs:
                    repo.objects[blobs[path].sha256] = data
            commit = repo.add('refs/heads/main', repo.head, blobs, message, name.split('/')[0])
            if tag:
                repo.refs[f'refs/tags/{tag}'] = commit.oid
            return commit.oid

    def writes(self):
        return [request for request in self.requests if request.wrote]

    def fault(self, match, action, times=1, seconds=1.0):
        """Does something wrong to the next `times` requests with match (text or compiled regex) in 'METHOD path?query'.

        'drop': closes the connection and does nothing. 'drop_after': does it, then closes without an answer. 'stall':
        waits for seconds first. A number: answers that status, 429 with seconds to wait, and does nothing. 'corrupt':
        changes one bit in the answer to a GET of bytes. 'corrupt_body': changes one bit of an uploaded large file
        before it is looked at. The last two leave other requests alone, also if they match.
        """
        known = ('drop', 'drop_after', 'stall', 'corrupt', 'corrupt_body')
        if action not in known and not isinstance(action, int):
            raise ValueError(f'action must be a status or one of {known}, got {action!r}')
        with self.lock:
            self.faults.append(hub_http.Fault(match, action, times, seconds))

    def take_fault(self, request, reply=None):
        with self.lock:
            for fault in self.faults:
                uploads = request.body and request.path.startswith(('/upload/', '/v1/xorbs/'))
                content = request.path.startswith(('/cdn/', '/xorbs/', '/api/resolve-cache/'))
                downloads = content and request.method == 'GET' and reply and reply.status in (200, 206) and reply.body
                if fault.action == 'corrupt' if reply else fault.action != 'corrupt':
                    fits = {'corrupt': downloads, 'corrupt_body': uploads}.get(fault.action, True)
                    if fits and fault.fits(request):
                        fault.times -= 1
                        return fault
        return hub_http.Fault('', '', 0, 0)

    # Who may do what.

    def _user(self, request):
        token = (request.authorization or '').removeprefix('Bearer ')
        if not token:
            return None
        if token not in self.tokens:
            raise Refused(401, 'Invalid credentials in Authorization header')
        return self.tokens[token]

    def _rights(self, user, namespace):
        return user is not None and namespace in (user.name, *user.orgs)

    def _readable(self, request, name, content=False):
        user, repo = self._user(request), self.repos.get(name)
        member = self._rights(user, name.split('/')[0])
        if repo is None or (repo.private and not member):
            # The Hub sends a 401 without the code; the client then knows by its https:// address what it means.
            message = 'Repository not found' if user else 'Invalid username or password.'
            raise Refused(404 if user else 401, message, 'RepoNotFound')
        if content and repo.gated and not member:
            message = f'Access to model {name} is restricted and you are not in the authorized list.'
            raise Refused(403 if user else 401, message, 'GatedRepo')
        return repo

    def _writable(self, request, name, pr=False):
        """The repository, if the token may write to it; anybody who can read may open a pull request."""
        repo, user = self._readable(request, name, content=True), self._user(request)
        if user is None:
            raise Refused(401, 'Invalid username or password.')
        if user.role != 'write':
            raise Refused(403, 'This token has no write access: it has the role read')
        if not pr and not self._rights(user, name.split('/')[0]):
            raise Refused(403, f"You don't have the required permissions to write to {name}")
        return repo

    def _check_path(self, path):
        if hub_repo.bad_path(path):
            raise Refused(422, f'Invalid file path: {path!r}')

    def _commit_of(self, repo, rev):
        commit = repo.find(rev)
        if commit is None:
            raise Refused(404, f'Invalid rev id: {rev}', 'RevisionNotFound')
        return commit

    def _signed(self, path, **query):
        """Address on the CDN, which knows no tokens: who has the signature may do it."""
        query = ''.join(f'&{key}={quote(value, safe="")}' for key, value in query.items())
        return f'{self.cdn}{path}?signature={self._signature(path)}{query}'

    def _signature(self, path):
        return hashlib.sha256(f'{self._secret} {path}'.encode()).hexdigest()[:16]

    # Routes.

    def _hub(self, request):
        match [request.method, *request.parts]:
            case ['GET', 'api', 'whoami-v2']:
                return self._whoami(request)
            case ['POST', 'api', 'validate-yaml']:
                self._user(request)  # nothing works with a wrong token, also not what works with none
                errors, warnings = hub_repo.card_errors(request.json().get('content', ''))
                texts = {'errors': [{'message': m} for m in errors], 'warnings': [{'message': m} for m in warnings]}
                return as_json(texts, 400 if errors else 200)
            case ['POST', 'api', 'repos', 'create']:
                return self._create(request)
            case [_, 'api', 'models', owner, name, *rest]:
                return self._models(request, f'{owner}/{name}', rest)
            case ['GET' | 'HEAD', 'api', 'resolve-cache', 'models', owner, name, sha, *path]:
                commit = self._commit_of(self._readable(request, f'{owner}/{name}', content=True), sha)
                blob = self._blob(commit, '/'.join(path))
                return ranged(request, blob.data, self._file_headers(commit, path[-1]) | {'ETag': f'"{blob.etag}"'})
            case ['GET' | 'HEAD', owner, name, 'resolve', rev, *path]:
                return self._resolve(request, f'{owner}/{name}', rev, '/'.join(path))
            case ['POST', owner, name, 'info', 'lfs', 'objects', 'batch' | 'verify' as what] if name.endswith('.git'):
                # Whether it is for a pull request is not said here; preupload and commit have looked at the rights.
                repo = self._writable(request, f'{owner}/{name.removesuffix(".git")}', pr=True)
                return self._lfs_batch(request, repo) if what == 'batch' else self._lfs_verify(request, repo)
        raise Refused(404, f'hub_server does not know {request.method} {request.path}')

    def _models(self, request, name, rest):
        match [request.method, *rest]:
            case ['GET']:
                return self._info(request, self._readable(request, name), 'main')
            case ['GET', 'revision', rev]:
                return self._info(request, self._readable(request, name), rev)
            case ['GET', 'refs']:
                return self._refs(request, self._readable(request, name))
            case ['GET', 'commits', rev]:
                return self._commits(self._readable(request, name), rev)
            case ['GET', 'tree', rev, *path]:
                return self._tree(request, self._readable(request, name), rev, '/'.join(path).strip('/'))
            case ['POST', 'paths-info', rev]:
                return self._paths_info(request, self._readable(request, name), rev)
            case ['POST', 'preupload', rev]:
                repo = self._writable(request, name, self._for_pr(request, rev))
                return self._preupload(request, self._commit_of(repo, rev))
            case ['POST', 'commit', rev]:
                return self._commit(request, self._writable(request, name, self._for_pr(request, rev)), rev)
            case ['POST', 'tag', rev]:
                return self._tag(request, self._writable(request, name), rev, 'refs/tags/', request.json().get('tag'))
            case ['POST', 'branch', branch]:
                start = (request.json() if request.body else {}).get('startingPoint') or 'main'
                return self._tag(request, self._writable(request, name), start, 'refs/heads/', branch)
            case ['DELETE', 'tag' | 'branch' as kind, ref]:
                return self._untag(request, self._writable(request, name), kind, ref)
            case ['POST', 'discussions']:
                return self._discuss(request, self._writable(request, name, pr=True))
            case ['GET', 'discussions', number] if number.isdigit():
                return self._discussion(self._readable(request, name), int(number))
        raise Refused(404, f'hub_server does not know {request.method} {request.path}')

    def _for_pr(self, request, rev):
        return request.flag('create_pr') or rev.startswith('refs/pr/')

    # Accounts and repositories.

    def _whoami(self, request):
        user = self._user(request)
        if user is None:
            raise Refused(401, 'Invalid username or password.')
        orgs = [{'type': 'org', 'id': org, 'name': org, 'fullname': org, 'roleInOrg': 'write'} for org in user.orgs]
        auth = {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': user.role}}
        who = {'type': 'user', 'id': user.name, 'name': user.name, 'fullname': user.name, 'isPro': False}
        return as_json({**who, 'email': f'{user.name}@example.com', 'orgs': orgs, 'auth': auth})

    def _create(self, request):
        user, wish = self._user(request), request.json()
        if user is None:
            raise Refused(401, 'Invalid username or password.')
        namespace = wish.get('organization') or user.name
        name = f'{namespace}/{wish.get("name")}'
        if user.role != 'write':
            raise Refused(403, 'This token has no write access: it has the role read')
        if not self._rights(user, namespace):
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        if wish.get('type', 'model') != 'model' or not re.fullmatch(r'[\w.-]{1,96}/[\w.-]{1,96}', name):
            raise Refused(400, f'Invalid repo: {wish}')
        if name in self.repos:  # the client reads url also here, with exist_ok
            raise Refused(409, 'You already created this model repo', url=f'{self.url}/{name}')
        private = bool(wish.get('private')) or wish.get('visibility') == 'private'
        self.repos[name] = Repo(name, private=private)
        request.wrote = True
        return as_json({'url': f'{self.url}/{name}', 'name': name, 'id': name})

    def _info(self, request, repo, rev):
        commit = self._commit_of(repo, rev)
        siblings = [{'rfilename': path} for path in sorted(commit.blobs)]
        if request.flag('blobs'):
            for entry in siblings:
                blob = commit.blobs[entry['rfilename']]
                entry |= {'size': len(blob.data), 'blobId': blob.oid}
                if blob.lfs:
                    sizes = {'size': len(blob.data), 'pointerSize': len(blob.pointer)}
                    entry['lfs'] = {'sha256': blob.sha256, **sizes}
        info = {'_id': repo.name, 'id': repo.name, 'modelId': repo.name, 'author': repo.name.split('/')[0]}
        info |= {'sha': commit.oid, 'lastModified': commit.date, 'createdAt': repo.commits[0].date}
        info |= {'private': repo.private, 'gated': 'manual' if repo.gated else False, 'disabled': False}
        return as_json({**info, 'siblings': siblings, 'tags': [], 'downloads': 0, 'likes': 0, 'spaces': []})

    def _refs(self, request, repo):
        def rows(kind, start=''):
            refs = [(ref, oid) for ref, oid in repo.refs.items() if ref.startswith(kind)]
            return [{'name': ref.removeprefix(start or kind), 'ref': ref, 'targetCommit': oid} for ref, oid in refs]

        refs = {'tags': rows('refs/tags/'), 'branches': rows('refs/heads/'), 'converts': []}
        return as_json(refs | ({'pullRequests': rows('refs/pr/', 'refs/pr/')} if request.flag('include_prs') else {}))

    def _commits(self, repo, rev):
        commit, rows = self._commit_of(repo, rev), []
        while commit:
            title, _, text = commit.message.partition('\n')
            row = {'id': commit.oid, 'title': title, 'message': text, 'date': commit.date}
            rows.append({**row, 'authors': [{'user': commit.author}]})
            commit = repo.find(commit.parent) if commit.parent else None
        return as_json(rows, **{'X-Total-Count': str(len(rows))})

    # Files.

    def _entry(self, path, blob):
        entry = {'type': 'file', 'oid': blob.oid, 'size': len(blob.data), 'path': path}
        if blob.lfs:
            entry['lfs'] = {'oid': blob.sha256, 'size': len(blob.data), 'pointerSize': len(blob.pointer)}
        return entry

    def _folders(self, commit):
        folders = {'/'.join(path.split('/')[:n]) for path in commit.blobs for n in range(1, path.count('/') + 1)}
        names = {folder: hashlib.sha1(f'{commit.oid} {folder}'.encode()).hexdigest() for folder in sorted(folders)}
        return {path: {'type': 'directory', 'oid': oid, 'size': 0, 'path': path} for path, oid in names.items()}

    def _tree(self, request, repo, rev, folder):
        commit = self._commit_of(repo, rev)
        folders = self._folders(commit)
        if folder and folder not in folders:
            raise Refused(404, f'{folder} does not exist on "{rev}"', 'EntryNotFound')
        entries = list(folders.values()) + [self._entry(*item) for item in sorted(commit.blobs.items())]
        start = f'{folder}/' if folder else ''
        inside = [entry for entry in entries if entry['path'].startswith(start)]
        if not request.flag('recursive'):
            inside = [entry for entry in inside if '/' not in entry['path'].removeprefix(start)]
        return as_json(inside)

    def _paths_info(self, request, repo, rev):
        commit = self._commit_of(repo, rev)
        if request.headers.get('content-type', '').startswith('application/json'):
            paths = request.json().get('paths', [])
        else:  # the Python client sends a form
            paths = parse_qs(request.body.decode()).get('paths', [])
        folders = self._folders(commit)
        known = [path for path in paths if path in commit.blobs or path in folders]  # others are left out, no error
        return as_json([folders.get(path) or self._entry(path, commit.blobs[path]) for path in known])

    def _blob(self, commit, path):
        if path not in commit.blobs:
            raise Refused(404, 'Entry not found', 'EntryNotFound')
        return commit.blobs[path]

    def _file_headers(self, commit, name):
        return {
            'X-Repo-Commit': commit.oid,
            'Content-Type': 'text/plain; charset=utf-8',
            'Content-Disposition': f'inline; filename*=UTF-8\'\'{quote(name)}; filename="{quote(name)}";',
        }

    def _resolve(self, request, name, rev, path):
        commit = self._commit_of(self._readable(request, name, content=True), rev)
        blob = self._blob(commit, path)
        headers = {'X-Repo-Commit': commit.oid, 'X-Linked-Etag': f'"{blob.etag}"', 'Accept-Ranges': 'bytes'}
        if not blob.lfs:
            asked = quote(request.path.partition('?')[0], safe='')
            headers['Location'] = (
                f'/api/resolve-cache/models/{name}/{commit.oid}/{quote(path)}?{asked}=&etag=%22{blob.oid}%22'
            )
            return Reply(307, b'Temporary Redirect', self._file_headers(commit, path) | headers)
        headers['X-Linked-Size'] = str(len(blob.data))
        headers['Location'] = self._signed(f'/cdn/{name}/{commit.oid}/{blob.sha256}', filename=path)
        return Reply(302, b'Found', headers)

    def _cdn(self, request):
        if request.authorization:
            raise Refused(400, 'Only one auth mechanism allowed')
        if request.query.get('signature') != self._signature(urlsplit(request.path).path):
            raise Refused(403, 'The request signature does not match')
        kind = {'Content-Type': 'application/octet-stream'}
        match [request.method, *request.parts]:
            case ['PUT', 'upload', owner, name, sha256]:
                if hashlib.sha256(request.body).hexdigest() != sha256:
                    raise Refused(400, 'The sha256 of the body is not the one that was announced')
                objects = self.repos[f'{owner}/{name}'].objects
                request.wrote = sha256 not in objects
                objects[sha256] = request.body
                return Reply(200, b'', {'ETag': f'"{sha256}"'})
            case ['GET' | 'HEAD', 'cdn', owner, name, oid, sha256]:
                blobs = self._commit_of(self.repos[f'{owner}/{name}'], oid).blobs.values()
                data = next(blob.data for blob in blobs if blob.sha256 == sha256)
                return ranged(request, data, {**kind, 'ETag': f'"{sha256}"'})
        raise Refused(404, f'hub_server does not know {request.method} {request.path}')

    # Uploads.

    def _lfs_batch(self, request, repo):
        objects = []
        for wish in request.json().get('objects', []):
            oid, size = wish.get('oid', ''), wish.get('size')
            entry = {'oid': oid, 'size': size, 'authenticated': True}
            if not re.fullmatch('[0-9a-f]{64}', oid):
                entry['error'] = {'code': 422, 'message': f'Invalid oid {oid}'}
            elif oid not in repo.objects:
                verify = f'{self.url}/{repo.name}.git/info/lfs/objects/verify'
                upload = {'href': self._signed(f'/upload/{repo.name}/{oid}'), 'header': {}}
                entry['actions'] = {'upload': upload, 'verify': {'href': verify, 'header': {}}}
            objects.append(entry)
        kind = {'Content-Type': 'application/vnd.git-lfs+json'}
        return as_json({'transfer': 'basic', 'objects': objects, 'hash_algo': 'sha256'}, **kind)

    def _lfs_verify(self, request, repo):
        wish = request.json()
        if len(repo.objects.get(wish.get('oid'), b'')) != wish.get('size'):
            raise Refused(404, f'There is no object {wish.get("oid")} of {wish.get("size")} bytes')
        return Reply()

    def _preupload(self, request, commit):
        files = []
        for wish in request.json().get('files', []):
            self._check_path(wish['path'])
            lfs = hub_repo.needs_lfs(wish['path'], wish['size'], base64.b64decode(wish.get('sample', '')))
            entry = {'path': wish['path'], 'uploadMode': 'lfs' if lfs else 'regular', 'shouldIgnore': False}
            if wish['path'] in commit.blobs:  # the client compares: the same oid is not sent again
                entry['oid'] = commit.blobs[wish['path']].etag
            files.append(entry)
        return as_json({'files': files, 'commitOid': commit.oid})

    def _commit(self, request, repo, rev):
        try:
            lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
            header = next(line['value'] for line in lines if line['key'] == 'header')
            lines = [(line['key'], line['value']) for line in lines if line['key'] != 'header']
        except (ValueError, KeyError, TypeError, StopIteration):
            raise Refused(400, 'Invalid commit: lines of JSON with a header are needed') from None
        parent, pr = header.get('parentCommit'), request.flag('create_pr')
        base = self._commit_of(repo, parent if pr and parent else rev)
        ref = rev if rev.startswith('refs/') else f'refs/heads/{rev}'
        if not pr and ref not in repo.refs:
            raise Refused(400, f'{rev} is not a branch')
        if not pr and parent and parent != base.oid:
            message = 'The branch was updated since you opened this page. Please refresh and try again.'
            raise Refused(412, message)
        blobs = self._changed(repo, dict(base.blobs), lines)
        if blobs.get('README.md') is not base.blobs.get('README.md') and 'README.md' in blobs:
            errors, _ = hub_repo.card_errors(blobs['README.md'].data.decode(errors='replace'))
            if errors:
                raise Refused(400, f'Invalid metadata in README.md: {errors[0]}')
        user, message = self._user(request), header.get('summary', '')
        if header.get('description'):
            message += f'\n\n{header["description"]}'
        if pr:
            ref = self._open(repo, user, message, True)
        commit = repo.add(ref, base.oid, blobs, message, user.name)
        request.wrote = True
        answer = {'success': True, 'commitOid': commit.oid, 'commitUrl': f'{self.url}/{repo.name}/commit/{commit.oid}'}
        link = f'{self.url}/{repo.name}/discussions/{len(repo.discussions)}'
        return as_json(answer | ({'pullRequestUrl': link} if pr else {}))

    def _changed(self, repo, blobs, lines):
        for key, value in lines:
            path = value['path']
            self._check_path(path.rstrip('/') if key == 'deletedFolder' else path)
            if key == 'file':
                blobs[path] = Blob(base64.b64decode(value['content']), False)
            elif key == 'lfsFile':
                if value['oid'] not in repo.objects:
                    raise Refused(400, f'LFS pointer pointed to a file that does not exist: {path} {value["oid"]}')
                blobs[path] = Blob(repo.objects[value['oid']], True)
            elif key in ('deletedFile', 'deletedFolder'):
                gone = [
                    p for p in blobs if p == path or (key == 'deletedFolder' and p.startswith(f'{path.rstrip("/")}/'))
                ]
                if not gone:
                    raise Refused(404, f'{path} does not exist', 'EntryNotFound')
                for p in gone:
                    del blobs[p]
            else:
                raise Refused(400, f'Unknown operation {key}')
        return blobs

    def _tag(self, request, repo, rev, kind, name):
        commit = self._commit_of(repo, rev)
        if not name or kind + name in repo.refs:
            what = 'Tag' if kind == 'refs/tags/' else 'Branch'
            raise Refused(409 if name else 400, f'{what} reference exists already')
        repo.refs[kind + name] = commit.oid
        request.wrote = True
        return as_json({})

    def _untag(self, request, repo, kind, name):
        ref = ('refs/tags/' if kind == 'tag' else 'refs/heads/') + name
        if ref == 'refs/heads/main' or ref not in repo.refs:
            raise Refused(404, f'Invalid rev id: {name}', 'RevisionNotFound')
        del repo.refs[ref]
        request.wrote = True
        return as_json({})

    # Pull requests.

    def _open(self, repo, user, title, pull):
        repo.discussions.append({'title': title, 'author': user.name, 'pull': pull, 'date': repo.commits[-1].date})
        ref = f'refs/pr/{len(repo.discussions)}'
        if pull:
            repo.refs[ref] = repo.head
        return ref

    def _discuss(self, request, repo):
        wish = request.json()
        self._open(repo, self._user(request), wish.get('title', ''), bool(wish.get('pullRequest')))
        request.wrote = True
        return as_json({'num': len(repo.discussions), 'pullRequest': bool(wish.get('pullRequest'))})

    def _discussion(self, repo, number):
        if not 1 <= number <= len(repo.discussions):
            raise Refused(404, 'Discussion not found')
        found = repo.discussions[number - 1]
        facts = {'title': found['title'], 'num': number, 'status': 'open', 'createdAt': found['date'], 'events': []}
        facts |= {'author': {'name': found['author']}, 'repo': {'name': repo.name, 'type': 'model'}}
        pull = {'changes': {'base': 'refs/heads/main'}, 'filesWithConflicts': []} if found['pull'] else {}
        return as_json({**facts, 'isPullRequest': found['pull'], **pull})
