"""The stand-in for the Hub keeps the Hub's contract, and the real client can work with it.

Status codes and header names are those of recorded answers of the real Hub. HUB_CLIENT_PYTHON=/path/to/python runs the
tests with the huggingface_hub of another environment.
"""

import base64
import hashlib
import http.client
import importlib.util
import json
import os
import random
import re
import struct
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import pytest

CLIENT = os.environ.get('HUB_CLIENT_PYTHON', sys.executable)
HAS_XET = 'HUB_CLIENT_PYTHON' in os.environ or importlib.util.find_spec('hf_xet')
XET = pytest.param(True, marks=pytest.mark.skipif(not HAS_XET, reason='hf_xet is not installed'), id='xet')
LFS = pytest.param(False, id='lfs')
NAME = 'timm-robust/resnet'
CARD = b'---\nlicense: apache-2.0\n---\n# A model\n'
WEIGHTS = random.Random(0).randbytes(1000)


@pytest.fixture
def hub(hub_server):
    with hub_server.HubServer() as server:
        yield server


@pytest.fixture
def filled(hub):
    """A repository with one tagged commit on top of the first, which holds .gitattributes only."""
    hub.put(NAME, {'README.md': CARD, 'config.json': b'{}', 'model.safetensors': WEIGHTS, 'logs/a.txt': b'a'}, tag='v1')
    return hub


def call(hub, method, path, body=None, token=None, **headers):
    """(status, headers, body) of one request on a connection of its own; redirects are not followed."""
    address = urlsplit(path if path.startswith('http') else hub.url + path)
    if isinstance(body, (dict, list)):
        body, headers = json.dumps(body), {'Content-Type': 'application/json', **headers}
    if token:
        headers['Authorization'] = f'Bearer {token}'
    connection = http.client.HTTPConnection(address.netloc, timeout=20)
    try:
        connection.request(method, address._replace(scheme='', netloc='').geturl(), body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def ndjson(parent=None, **files):
    """Body of a commit. Files are regular, or LFS if given as (sha256, size)."""
    lines = [{'key': 'header', 'value': {'summary': 'test', **({'parentCommit': parent} if parent else {})}}]
    for path, data in files.items():
        if isinstance(data, tuple):
            lines.append({'key': 'lfsFile', 'value': {'path': path, 'algo': 'sha256', 'oid': data[0], 'size': data[1]}})
        else:
            content = base64.b64encode(data).decode()
            lines.append({'key': 'file', 'value': {'path': path, 'content': content, 'encoding': 'base64'}})
    return '\n'.join(json.dumps(line) for line in lines)


def commit(hub, body, token, query='', name=NAME):
    return call(hub, 'POST', f'/api/models/{name}/commit/main{query}', body, token)


def lfs_actions(hub, data, token, name=NAME):
    oid = hashlib.sha256(data).hexdigest()
    wish = {'operation': 'upload', 'objects': [{'oid': oid, 'size': len(data)}], 'hash_algo': 'sha256'}
    status, _, body = call(hub, 'POST', f'/{name}.git/info/lfs/objects/batch', wish, token)
    assert status == 200
    return oid, json.loads(body)['objects'][0].get('actions')


def run_client(hub, home, code, token, **settings):
    """The JSON that a program with the real client prints. Needs a fresh home, or a cache would hide what is asked."""
    code = f'import json, os, sys\nfrom huggingface_hub import *\napi = HfApi()\n{code}'
    env = {**hub.env(home, token=token), **settings}
    done = subprocess.run([CLIENT, '-c', code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# The contract.


def test_head_of_a_large_file_redirects_to_another_origin(filled):
    head = filled.repo(NAME).head
    status, headers, body = call(filled, 'HEAD', f'/{NAME}/resolve/main/model.safetensors')
    assert (status, body) == (302, b'')
    assert headers['X-Repo-Commit'] == head
    assert headers['X-Linked-Etag'] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    assert headers['X-Linked-Size'] == str(len(WEIGHTS))
    assert int(headers['Content-Length']) != len(WEIGHTS)  # of the redirect, not of the file
    assert headers['Location'].startswith('http://localhost:') and filled.url.startswith('http://127.0.0.1:')
    assert 'X-Xet-Hash' not in headers

    status, headers, body = call(filled, 'GET', headers['Location'])
    assert (status, body) == (200, WEIGHTS)
    assert headers['Accept-Ranges'] == 'bytes' and headers['ETag']


def test_head_of_a_small_file_redirects_to_the_cache_of_its_commit(filled):
    head = filled.repo(NAME).head
    etag = f'"{hashlib.sha1(b"blob 2" + bytes(1) + b"{}").hexdigest()}"'  # as git names a file
    status, headers, _ = call(filled, 'HEAD', f'/{NAME}/resolve/v1/config.json')
    assert (status, headers['X-Repo-Commit'], headers['X-Linked-Etag']) == (307, head, etag)
    assert 'ETag' not in headers and 'X-Linked-Size' not in headers
    assert headers['Location'].startswith(f'/api/resolve-cache/models/{NAME}/{head}/config.json?')
    for method, body in (('HEAD', b''), ('GET', b'{}')):
        status, final, got = call(filled, method, headers['Location'])
        assert (status, final['ETag'], final['X-Repo-Commit'], got) == (200, etag, head, body)
        assert final['Content-Length'] == '2' and 'filename="config.json"' in final['Content-Disposition']


@pytest.mark.parametrize(
    ('wanted', 'status', 'answer', 'place'),
    [
        ('bytes=10-19', 206, WEIGHTS[10:20], 'bytes 10-19/1000'),
        ('bytes=990-', 206, WEIGHTS[990:], 'bytes 990-999/1000'),
        ('bytes=0-99999', 206, WEIGHTS, 'bytes 0-999/1000'),  # safetensors readers ask for more than there is
        ('bytes=-10', 206, WEIGHTS[-10:], 'bytes 990-999/1000'),
        ('bytes=1000-', 416, b'', 'bytes */1000'),
    ],
)
def test_range(filled, wanted, status, answer, place):
    location = call(filled, 'HEAD', f'/{NAME}/resolve/main/model.safetensors')[1]['Location']
    got = call(filled, 'GET', location, Range=wanted)
    assert (got[0], got[2], got[1]['Content-Range']) == (status, answer, place)


@pytest.mark.parametrize(
    ('path', 'status', 'code'),
    [
        (f'/{NAME}/resolve/main/missing.txt', 404, 'EntryNotFound'),
        (f'/{NAME}/resolve/v9/config.json', 404, 'RevisionNotFound'),
        (f'/api/models/{NAME}/revision/v9', 404, 'RevisionNotFound'),
        (f'/api/models/{NAME}/tree/main/missing', 404, 'EntryNotFound'),
        ('/api/models/timm-robust/missing', 401, 'RepoNotFound'),  # the Hub does not say whether it is there
        ('/timm-robust/missing/resolve/main/config.json', 401, 'RepoNotFound'),
        ('/api/whoami-v2', 401, None),
    ],
)
def test_errors_without_a_token(filled, path, status, code):
    got, headers, body = call(filled, 'GET', path)
    assert (got, headers['X-Error-Code']) == (status, code)
    assert headers['X-Error-Message'] == json.loads(body)['error']
    assert ('WWW-Authenticate' in headers) == (status == 401)


def test_who_may_read(hub_server, filled):
    repo, path = filled.repo(NAME), f'/{NAME}/resolve/main/config.json'

    def answers():
        got = [call(filled, 'HEAD', path, token=t) for t in (None, hub_server.STRANGER, hub_server.READ)]
        return [(status, headers['X-Error-Code']) for status, headers, _ in got]

    assert answers() == [(307, None)] * 3
    repo.gated = True
    assert answers() == [(401, 'GatedRepo'), (403, 'GatedRepo'), (307, None)]
    repo.gated, repo.private = False, True
    assert answers() == [(401, 'RepoNotFound'), (404, 'RepoNotFound'), (307, None)]
    status, headers, _ = call(filled, 'HEAD', path, token='hf_nobody')
    assert (status, headers['X-Error-Message']) == (401, 'Invalid credentials in Authorization header')
    assert 'X-Error-Code' not in headers


@pytest.mark.parametrize(('token', 'status'), [(None, 401), ('hf_nobody', 401), ('READ', 403), ('STRANGER', 403)])
def test_who_may_not_write(hub_server, filled, token, status):
    token = getattr(hub_server, token, token) if token else None
    wish = {'name': 'new', 'organization': 'timm-robust', 'visibility': 'public'}
    assert call(filled, 'POST', '/api/repos/create', wish, token)[0] == status
    assert commit(filled, ndjson(config=b'{}'), token)[0] == status
    assert call(filled, 'POST', f'/api/models/{NAME}/tag/main', {'tag': 'v2'}, token)[0] == status
    files = {'files': [{'path': 'a', 'size': 1, 'sample': ''}]}
    assert call(filled, 'POST', f'/api/models/{NAME}/preupload/main', files, token)[0] == status
    assert filled.writes() == [] and len(filled.repo(NAME).commits) == 2 and list(filled.repos) == [NAME]


def test_whoami(hub_server, hub):
    who = [json.loads(call(hub, 'GET', '/api/whoami-v2', token=t)[2]) for t in (hub_server.WRITE, hub_server.READ)]
    assert [w['auth']['accessToken']['role'] for w in who] == ['write', 'read']
    assert who[0]['name'] == 'ann' and who[0]['orgs'][0]['name'] == 'timm-robust'


def test_create(hub_server, hub):
    wish = {'name': 'resnet', 'organization': 'timm-robust', 'visibility': 'private'}
    status, _, body = call(hub, 'POST', '/api/repos/create', wish, hub_server.WRITE)
    assert (status, json.loads(body)['url']) == (200, f'{hub.url}/{NAME}')
    assert hub.repo(NAME).private and list(hub.repo(NAME).files()) == ['.gitattributes']
    status, _, body = call(hub, 'POST', '/api/repos/create', wish, hub_server.WRITE)
    assert (status, json.loads(body)['url']) == (409, f'{hub.url}/{NAME}')  # with exist_ok the client reads it


def test_tree_refs_commits_and_info(filled):
    head, sha256 = filled.repo(NAME).head, hashlib.sha256(WEIGHTS).hexdigest()

    def get(path):
        status, headers, body = call(filled, 'GET', f'/api/models/{NAME}{path}')
        assert (status, headers['Content-Type']) == (200, 'application/json; charset=utf-8')
        return json.loads(body)

    top = {entry['path']: entry for entry in get('/tree/main')}
    assert list(top) == ['logs', '.gitattributes', 'README.md', 'config.json', 'model.safetensors']
    assert top['logs'].keys() == {'type', 'oid', 'size', 'path'} and top['logs']['type'] == 'directory'
    large = top['model.safetensors']
    assert large['lfs'] == {'oid': sha256, 'size': 1000, 'pointerSize': 129} and large['type'] == 'file'
    assert re.fullmatch('[0-9a-f]{40}', large['oid']) and 'lfs' not in top['config.json']
    assert 'logs/a.txt' in [entry['path'] for entry in get('/tree/v1?recursive=True&expand=false')]
    assert [entry['path'] for entry in get('/tree/main/logs')] == ['logs/a.txt']

    branch = {'name': 'main', 'ref': 'refs/heads/main', 'targetCommit': head}
    tag = {'name': 'v1', 'ref': 'refs/tags/v1', 'targetCommit': head}
    assert get('/refs') == {'tags': [tag], 'branches': [branch], 'converts': []}
    assert get('/refs?include_prs=1')['pullRequests'] == []
    assert [c['title'] for c in get('/commits/main')] == ['put', 'initial commit']
    info = get('/revision/v1')
    assert (info['id'], info['sha'], info['private'], info['gated']) == (NAME, head, False, False)
    assert {'rfilename': 'logs/a.txt'} in info['siblings']
    assert get('?blobs=true')['siblings'][-1]['lfs'] == {'sha256': sha256, 'size': 1000, 'pointerSize': 129}


def test_paths_info_leaves_out_what_is_not_there(filled):
    form = 'paths=config.json&paths=missing&paths=logs&paths=model.safetensors&expand=False'
    kind = {'Content-Type': 'application/x-www-form-urlencoded'}
    status, _, body = call(filled, 'POST', f'/api/models/{NAME}/paths-info/main', form, **kind)
    assert status == 200
    assert [(e['path'], e['type']) for e in json.loads(body)] == [
        ('config.json', 'file'),
        ('logs', 'directory'),
        ('model.safetensors', 'file'),
    ]
    paths = {'paths': ['config.json', 'missing'], 'expand': True}
    assert len(json.loads(call(filled, 'POST', f'/api/models/{NAME}/paths-info/main', paths)[2])) == 1


def test_preupload_says_how_and_what_is_there(hub_server, filled):
    sample = base64.b64encode(b'{"a": 1}').decode()
    paths = ['config.json', 'model.safetensors', 'new.txt', 'huge.txt']
    files = [{'path': p, 'size': (20 << 20) if p == 'huge.txt' else 8, 'sample': sample} for p in paths]
    path = f'/api/models/{NAME}/preupload/main'
    status, _, body = call(filled, 'POST', path, {'files': files}, hub_server.WRITE)
    blobs = filled.repo(NAME).find('main').blobs
    assert status == 200 and [(f['path'], f['uploadMode'], f.get('oid')) for f in json.loads(body)['files']] == [
        ('config.json', 'regular', blobs['config.json'].oid),
        ('model.safetensors', 'lfs', hashlib.sha256(WEIGHTS).hexdigest()),
        ('new.txt', 'regular', None),
        ('huge.txt', 'lfs', None),
    ]


@pytest.mark.parametrize(
    'path', ['../out', 'a/../../out', '/etc/passwd', 'a//b', './a', 'a\\b', '.git/config', 'a\nb', '']
)
def test_no_path_leads_out_of_the_repository(hub_server, filled, path):
    assert commit(filled, ndjson(**{path: b'x'}), hub_server.WRITE)[0] == 422
    files = {'files': [{'path': path, 'size': 1, 'sample': ''}]}
    assert call(filled, 'POST', f'/api/models/{NAME}/preupload/main', files, hub_server.WRITE)[0] == 422
    assert len(filled.repo(NAME).commits) == 2


def test_a_large_file_is_seen_once_it_is_committed(hub_server, filled):
    data, repo = b'new weights', filled.repo(NAME)
    before = repo.files()
    oid, actions = lfs_actions(filled, data, hub_server.WRITE)
    reference = ndjson(**{'new.safetensors': (oid, len(data))})
    assert commit(filled, reference, hub_server.WRITE)[0] == 400  # not uploaded yet
    assert call(filled, 'PUT', actions['upload']['href'].split('?')[0], data)[0] == 403  # not signed
    assert call(filled, 'PUT', actions['upload']['href'], data + b'!')[0] == 400  # not what was announced
    verify = {'oid': oid, 'size': len(data)}
    assert call(filled, 'POST', actions['verify']['href'], verify, hub_server.WRITE)[0] == 404
    assert call(filled, 'PUT', actions['upload']['href'], data)[0] == 200
    assert call(filled, 'POST', actions['verify']['href'], verify, hub_server.WRITE)[0] == 200
    assert repo.files() == before and len(repo.commits) == 2
    assert lfs_actions(filled, data, hub_server.WRITE)[1] is None  # no second upload
    assert commit(filled, reference, hub_server.WRITE)[0] == 200
    assert repo.files() == {**before, 'new.safetensors': data}
    assert [r.method for r in filled.writes()] == ['PUT', 'POST']


def test_a_stale_parent_is_refused(hub_server, filled):
    repo = filled.repo(NAME)
    first = repo.head
    status, _, body = commit(filled, ndjson(first, a=b'1'), hub_server.WRITE)
    assert status == 200 and json.loads(body)['commitOid'] == repo.head
    assert json.loads(body)['commitUrl'] == f'{filled.url}/{NAME}/commit/{repo.head}'
    status, headers, _ = commit(filled, ndjson(first, b=b'2'), hub_server.WRITE)
    assert status == 412 and headers['X-Error-Message'].startswith('The branch was updated since')
    assert 'b' not in repo.files() and repo.find('main').parent == first


def test_of_concurrent_commits_one_wins(hub_server, filled, monkeypatch):
    repo, answers = filled.repo(NAME), []
    changed = filled._changed
    # Between the look at the parent and the commit; without a lock all would get through in this time.
    monkeypatch.setattr(filled, '_changed', lambda *args: time.sleep(0.01) or changed(*args))
    parent, barrier = repo.head, threading.Barrier(8)

    def race(i):
        barrier.wait()
        answers.append(commit(filled, ndjson(parent, **{f'{i}.txt': b'x'}), hub_server.WRITE)[0])

    threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sorted(answers) == [200] + [412] * 7
    assert len(repo.commits) == 3 and repo.find('main').parent == parent
    assert len(repo.files()) == 6


def test_delete_and_bad_commits(hub_server, filled):
    def operation(key, path):
        return f'{ndjson()}\n{json.dumps({"key": key, "value": {"path": path}})}'

    assert commit(filled, operation('deletedFolder', 'logs/'), hub_server.WRITE)[0] == 200
    assert commit(filled, operation('deletedFile', 'config.json'), hub_server.WRITE)[0] == 200
    assert sorted(filled.repo(NAME).files()) == ['.gitattributes', 'README.md', 'model.safetensors']
    assert commit(filled, operation('deletedFile', 'missing'), hub_server.WRITE)[0] == 404
    assert commit(filled, operation('rename', 'README.md'), hub_server.WRITE)[0] == 400
    assert commit(filled, 'no json', hub_server.WRITE)[0] == 400
    assert commit(filled, ndjson(**{'README.md': b'---\ntags: 3: 4\n---\n'}), hub_server.WRITE)[0] == 400
    assert len(filled.repo(NAME).commits) == 4


def test_tags_and_branches(hub_server, filled):
    repo, oid = filled.repo(NAME), filled.repo(NAME).head
    path = f'/api/models/{NAME}'
    assert call(filled, 'POST', f'{path}/tag/{oid}', {'tag': 'v2'}, hub_server.WRITE)[0] == 200
    assert call(filled, 'POST', f'{path}/tag/main', {'tag': 'v2'}, hub_server.WRITE)[0] == 409
    status, headers, _ = call(filled, 'POST', f'{path}/tag/v9', {'tag': 'v3'}, hub_server.WRITE)
    assert (status, headers['X-Error-Code']) == (404, 'RevisionNotFound')
    assert call(filled, 'POST', f'{path}/branch/dev', {}, hub_server.WRITE)[0] == 200
    assert repo.tags == {'v1': oid, 'v2': oid} and repo.branches == {'main': oid, 'dev': oid}
    assert call(filled, 'DELETE', f'{path}/tag/v2', None, hub_server.WRITE)[0] == 200
    assert list(repo.tags) == ['v1']


def test_a_pull_request_leaves_main_alone(hub_server, filled):
    repo, main = filled.repo(NAME), filled.repo(NAME).head
    status, _, body = commit(filled, ndjson(a=b'1'), hub_server.STRANGER, '?create_pr=1')
    assert (status, json.loads(body)['pullRequestUrl']) == (200, f'{filled.url}/{NAME}/discussions/1')
    assert repo.head == main and repo.files('refs/pr/1')['a'] == b'1'
    refs = json.loads(call(filled, 'GET', f'/api/models/{NAME}/refs?include_prs=1')[2])
    assert [r['ref'] for r in refs['pullRequests']] == ['refs/pr/1']
    more = call(filled, 'POST', f'/api/models/{NAME}/commit/refs%2Fpr%2F1', ndjson(b=b'2'), hub_server.STRANGER)
    assert more[0] == 200 and repo.head == main and len(repo.commits) == 4


@pytest.mark.parametrize(
    ('text', 'status', 'word'),
    [
        (CARD.decode(), 200, None),
        ('# no metadata', 200, 'empty'),
        ('---\nlicense: [\n---\n', 400, 'YAML'),
        ('---\nlicense: 3\n---\n', 400, 'license'),
        ('---\ntags: 3\n---\n', 400, 'tags'),
        ('---\nmodel-index:\n- name: a\n  results:\n  - task: {type: x}\n---\n', 400, 'dataset.type'),
        ('---\nmodel-index: {name: a}\n---\n', 400, 'model-index'),
    ],
)
def test_validate_yaml(hub, text, status, word):
    got, _, body = call(hub, 'POST', '/api/validate-yaml', {'content': text, 'repoType': 'model'})
    texts = [entry['message'] for entries in json.loads(body).values() for entry in entries]
    assert got == status and (any(word in t for t in texts) if word else texts == [])


def test_the_cdn_refuses_a_token(hub_server, filled):
    location = call(filled, 'HEAD', f'/{NAME}/resolve/main/model.safetensors')[1]['Location']
    assert call(filled, 'GET', location, token=hub_server.WRITE)[0] == 400
    assert filled.requests[-1].authorization == f'Bearer {hub_server.WRITE}'
    assert call(filled, 'GET', location)[0] == 200


def test_the_storage_of_xet_has_tokens_of_its_own(hub_server):
    def token(hub, kind, who):
        status, headers, body = call(hub, 'GET', f'/api/models/{NAME}/xet-{kind}-token/main', token=who)
        if status == 200:
            assert (headers['X-Xet-Cas-Url'], headers['X-Xet-Access-Token']) == (
                hub.url,
                json.loads(body)['accessToken'],
            )
            assert int(headers['X-Xet-Token-Expiration']) > time.time() + 60
        return status, headers['X-Xet-Access-Token']

    with hub_server.HubServer(xet=True) as hub:
        hub.put(NAME, {'config.json': b'{}'})
        status, reading = token(hub, 'read', None)
        assert (status, token(hub, 'write', None)[0], token(hub, 'write', hub_server.STRANGER)[0]) == (200, 401, 403)
        status, writing = token(hub, 'write', hub_server.WRITE)
        tokens = (hub_server.WRITE, reading, writing)  # the token of the Hub has no business there
        assert [call(hub, 'POST', '/v1/shards', b'no shard', t)[0] for t in tokens] == [401, 403, 400]
        assert call(hub, 'GET', '/v1/chunks/default/00', None, reading)[0] == 404
    with hub_server.HubServer() as hub:
        hub.put(NAME, {'config.json': b'{}'})
        assert token(hub, 'read', None)[0] == token(hub, 'write', hub_server.WRITE)[0] == 404


def test_connections_stay_open_and_end_with_the_server(hub_server):
    with hub_server.HubServer() as hub:
        connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=20)
        for _ in range(2):  # an error answer too must leave nothing unread behind
            connection.request('POST', '/api/nothing', b'x' * 100_000)
            assert connection.getresponse().read()
    with pytest.raises((http.client.HTTPException, OSError)):
        connection.request('GET', '/api/whoami-v2')
        connection.getresponse()


def test_a_request_that_is_cut_off_is_not_handled(hub_server, filled):
    connection = http.client.HTTPConnection(urlsplit(filled.url).netloc, timeout=20)
    connection.putrequest('POST', f'/api/models/{NAME}/commit/main')
    body = ndjson(a=b'1').encode() + b'\n'
    connection.putheader('Content-Length', str(len(body) + 100))
    connection.putheader('Authorization', f'Bearer {hub_server.WRITE}')
    connection.endheaders(body)  # a whole commit, but more was to come
    connection.sock.shutdown(1)
    assert connection.sock.recv(1) == b''
    assert len(filled.repo(NAME).commits) == 2 and filled.requests == []


def test_an_error_of_the_server_itself_is_not_kept_quiet(hub_server):
    with pytest.raises(RuntimeError, match='hub_server itself failed'), hub_server.HubServer() as hub:
        assert call(hub, 'POST', '/api/validate-yaml', [])[0] == 500


# Faults.


def test_dropped(hub_server, filled):
    filled.fault(re.compile(r'POST .*/commit/'), 'drop')
    with pytest.raises(http.client.RemoteDisconnected):
        commit(filled, ndjson(a=b'1'), hub_server.WRITE)
    assert len(filled.repo(NAME).commits) == 2 and filled.requests[-1].status is None and filled.writes() == []
    assert commit(filled, ndjson(a=b'1'), hub_server.WRITE)[0] == 200  # once means once


def test_answer_lost(hub_server, filled):
    filled.fault('/commit/main', 'drop_after')
    with pytest.raises(http.client.RemoteDisconnected):
        commit(filled, ndjson(a=b'1'), hub_server.WRITE)
    assert filled.repo(NAME).files()['a'] == b'1' and len(filled.writes()) == 1


def test_status_on_demand_twice(filled):
    filled.fault('GET /api/models', 503, times=2)
    assert [call(filled, 'GET', f'/api/models/{NAME}')[0] for _ in range(3)] == [503, 503, 200]


def test_stall(filled):
    filled.fault('whoami', 'stall', seconds=0.3)
    start = time.monotonic()
    assert call(filled, 'GET', f'/api/models/{NAME}')[0] == 200
    assert call(filled, 'GET', '/api/whoami-v2')[0] == 401
    assert time.monotonic() - start >= 0.3


def test_corrupt_download(filled):
    filled.fault('', 'corrupt')
    location = call(filled, 'HEAD', f'/{NAME}/resolve/main/model.safetensors')[1]['Location']  # no bytes: left alone
    damaged, intact = (call(filled, 'GET', location)[2] for _ in range(2))
    assert len(damaged) == len(WEIGHTS) and sum(a != b for a, b in zip(damaged, WEIGHTS, strict=True)) == 1
    assert intact == WEIGHTS


def test_corrupt_upload(hub_server, filled):
    filled.fault('', 'corrupt_body')
    oid, actions = lfs_actions(filled, b'new weights', hub_server.WRITE)
    answers = [call(filled, 'PUT', actions['upload']['href'], b'new weights')[0] for _ in range(2)]
    assert answers == [400, 200] and filled.repo(NAME).objects[oid] == b'new weights'


def test_a_fault_must_be_known(hub):
    with pytest.raises(ValueError, match=r"action must be a status or one of .*, got 'explode'"):
        hub.fault('GET', 'explode')


# The real client.

ROUND_TRIP = """
name, weights = 'timm-robust/resnet', open(os.environ['WEIGHTS'], 'rb').read()
card = b'---\\nlicense: apache-2.0\\n---\\n# A model\\n'
def files():
    yield CommitOperationAdd('README.md', card)
    yield CommitOperationAdd('config.json', b'{}')
    yield CommitOperationAdd('model.safetensors', os.environ['WEIGHTS'])
urls = [str(api.create_repo(name, exist_ok=True)) for _ in range(2)]
head = api.model_info(name).sha
done = api.create_commit(name, list(files()), commit_message='Weights', parent_commit=head)
again = api.create_commit(name, list(files()), commit_message='Weights', parent_commit=done.oid)
api.create_tag(name, tag='v1', revision=done.oid)
paths = {f: hf_hub_download(name, f, revision=done.oid) for f in ('README.md', 'config.json', 'model.safetensors')}
info = api.get_paths_info(name, ['model.safetensors', 'missing'])
pull = api.create_commit(name, [CommitOperationAdd('more.txt', b'more')], commit_message='Ask', create_pr=True)
print(json.dumps({
    'who': api.whoami()['name'], 'urls': urls, 'head': head, 'oid': done.oid, 'again': again.oid, 'paths': paths,
    'sha256': [i.lfs.sha256 for i in info], 'files': api.list_repo_files(name, revision='v1'), 'pull': pull.pr_revision,
    'tags': [t.name for t in api.list_repo_refs(name).tags], 'commits': len(api.list_repo_commits(name)),
    'exists': [api.file_exists(name, f) for f in ('config.json', 'missing')],
}))
"""


def three_megabytes(path):
    """Random bytes, zeros and float32 numbers: stored, LZ4 and grouped LZ4, each, in xet."""
    rng = random.Random(0)
    floats = b''.join(struct.pack('<f', rng.gauss(0, 0.1)) for _ in range(250_000))
    path.write_bytes(rng.randbytes(1_500_000) + bytes(500_000) + floats)
    return path


@pytest.mark.parametrize('xet', [LFS, XET])
def test_round_trip(hub_server, tmp_path, xet):
    source = three_megabytes(tmp_path / 'model.safetensors')
    with hub_server.HubServer(xet=xet) as hub:
        got = run_client(hub, tmp_path / 'home', ROUND_TRIP, hub_server.WRITE, WEIGHTS=str(source))
        repo = hub.repo(NAME)
    expected = {'README.md': CARD, 'config.json': b'{}', 'model.safetensors': source.read_bytes()}
    assert repo.files('v1') == {'.gitattributes': repo.commits[0].files['.gitattributes'], **expected}
    for name, data in expected.items():
        with open(got['paths'][name], 'rb') as file:
            assert file.read() == data
    assert got['urls'] == [f'{hub.url}/{NAME}'] * 2 and got['who'] == 'ann'
    assert [c.oid for c in repo.commits][:2] == [got['head'], got['oid']]
    assert got['again'] == got['oid'] == repo.head and got['commits'] == 2  # nothing new, so no commit
    assert got['sha256'] == [hashlib.sha256(expected['model.safetensors']).hexdigest()]
    assert sorted(got['files']) == sorted(repo.files('v1')) and got['tags'] == ['v1'] and got['exists'] == [True, False]
    assert got['pull'] == 'refs/pr/1' and repo.files('refs/pr/1')['more.txt'] == b'more'
    carried = [r.path for r in hub.requests if r.path.startswith(('/upload/', '/v1/xorbs/')) and r.wrote]
    assert len(carried) == 1 and carried[0].startswith('/v1/xorbs/' if xet else '/upload/')
    assert all(r.authorization is None for r in hub.requests if r.server == 'cdn')
    if xet:  # every kind of chunk was unpacked
        assert {c.compression for _, chunks in hub.xet.xorbs.values() for c in chunks} == {0, 1, 2}


@pytest.mark.skipif(not HAS_XET, reason='hf_xet is not installed')
def test_what_came_by_xet_goes_out_without_it(hub_server, tmp_path):
    """And to a second repository, from a home that knows the chunks already."""
    source = three_megabytes(tmp_path / 'model.safetensors')
    (tmp_path / 'model.txt').write_text('text')
    upload = """
for name in ('ann/one', 'ann/two'):
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=os.environ['FOLDER'], allow_patterns='*.safetensors')
api.upload_folder(repo_id='ann/one', folder_path=os.environ['FOLDER'], allow_patterns='model.*', create_pr=True)
print('null')"""
    fetch = "print(json.dumps(hf_hub_download('ann/two', 'model.safetensors')))"
    with hub_server.HubServer(xet=True) as hub:
        run_client(hub, tmp_path / 'home', upload, hub_server.WRITE, FOLDER=str(tmp_path))
        path = run_client(hub, tmp_path / 'other', fetch, None, HF_HUB_DISABLE_XET='1')
        assert 'model.txt' not in hub.repo('ann/one').files() and 'model.txt' in hub.repo('ann/one').files('refs/pr/1')
    with open(path, 'rb') as file:
        assert file.read() == source.read_bytes() == hub.repo('ann/one').files()['model.safetensors']
    assert hub.requests[-1].path.startswith('/cdn/')


REFUSALS = """
def attempt(action):
    try:
        return action() and 'done'
    except Exception as error:
        return f'{type(error).__name__}: {error}'.replace('\\n', ' ')
operations = [CommitOperationAdd('a.txt', b'a')]
def upload(name, **more):
    return attempt(lambda: api.create_commit(name, operations, commit_message='a', **more))
tokens = json.loads(os.environ['TOKENS'])
print(json.dumps({
    'stale': upload('timm-robust/resnet', parent_commit=os.environ['PARENT']),
    'tokens': {name: upload('timm-robust/resnet', token=token) for name, token in tokens.items()},
    'whoami': attempt(lambda: api.whoami(token='hf_nobody')),
    'card': attempt(lambda: api.upload_file(path_or_fileobj=b'---\\na: [\\n---\\n', path_in_repo='README.md',
                                            repo_id='timm-robust/resnet')),
    'missing': attempt(lambda: hf_hub_download('timm-robust/none', 'config.json', token=False)),
    'gated': attempt(lambda: hf_hub_download('timm-robust/gated', 'config.json', token=tokens['STRANGER'])),
    'entry': attempt(lambda: hf_hub_download('timm-robust/resnet', 'none.json')),
    'revision': attempt(lambda: hf_hub_download('timm-robust/resnet', 'config.json', revision='v9')),
    'tag': attempt(lambda: api.create_tag('timm-robust/resnet', tag='v1')),
}))
"""


def test_the_client_raises_what_it_raises_for_the_real_hub(hub_server, filled, tmp_path):
    filled.put('timm-robust/gated', {'config.json': b'{}'})
    filled.repo('timm-robust/gated').gated = True
    tokens = {'nobody': 'hf_nobody', 'READ': hub_server.READ, 'STRANGER': hub_server.STRANGER}
    settings = {'TOKENS': json.dumps(tokens), 'PARENT': filled.repo(NAME).commits[0].oid}
    got = run_client(filled, tmp_path, REFUSALS, hub_server.WRITE, **settings)
    assert 'HfHubHTTPError' in got['stale'] and '412' in got['stale'] and 'The branch was updated' in got['stale']
    assert '401' in got['tokens']['nobody'] and 'Invalid credentials' in got['tokens']['nobody']
    assert all('403 Forbidden' in got['tokens'][name] for name in ('READ', 'STRANGER'))
    assert 'Invalid user token' in got['whoami'] and got['card'].startswith('ValueError: Invalid metadata in README.md')
    kinds = {key: got[key].split(':')[0] for key in ('missing', 'gated', 'entry', 'revision')}
    assert kinds['missing'] == 'RepositoryNotFoundError' and kinds['gated'] == 'GatedRepoError'
    assert kinds['entry'] == 'RemoteEntryNotFoundError' and kinds['revision'] == 'RevisionNotFoundError'
    assert '409' in got['tag'] and 'Tag reference exists already' in got['tag']
    assert filled.writes() == []


ATTEMPT = """
from concurrent.futures import ThreadPoolExecutor
def attempt(name, data, **more):
    operations = [CommitOperationAdd('model.safetensors', data)]
    try:
        return api.create_commit(name, operations, commit_message='a', **more).oid
    except Exception as error:
        return f'{type(error).__name__}: {error}'
data = os.urandom(200_000)
"""
LFS_FAULTS = """
got = {name: attempt(f'ann/{name}', data) for name in ('retried', 'lost', 'damaged')}
got['again'] = attempt('ann/damaged', data)
with ThreadPoolExecutor() as pool:
    parent = api.model_info('ann/race').sha
    got['race'] = list(pool.map(lambda i: attempt('ann/race', os.urandom(9), parent_commit=parent), range(2)))
print(json.dumps(got))
"""
DOWNLOAD = "print(json.dumps(hf_hub_download('ann/down', 'model.safetensors', token=False)))"


def is_damaged(path, data):
    """The client checks the size only: that is why one flipped bit must be caught by whoever uses it."""
    with open(path, 'rb') as file:
        got = file.read()
    return len(got) == len(data) and sum(a != b for a, b in zip(got, data, strict=True)) == 1


def test_faults_as_the_client_sees_them(hub_server, hub, tmp_path):
    for name in ('retried', 'lost', 'damaged', 'race', 'down'):
        hub.put(f'ann/{name}', {'config.json': b'{}', 'model.safetensors': WEIGHTS})
    hub.fault('PUT /upload/ann/retried', 'drop')
    hub.fault('/api/models/ann/lost/commit', 'drop_after')
    hub.fault('PUT /upload/ann/damaged', 'corrupt_body')
    hub.fault('GET /cdn/ann/down', 'corrupt')
    got = run_client(hub, tmp_path / 'home', ATTEMPT + LFS_FAULTS, hub_server.WRITE)
    commits = {name: [c.oid for c in hub.repo(f'ann/{name}').commits][2:] for name in got if name != 'again'}
    assert commits['retried'] == [got['retried']]
    assert [r.status for r in hub.requests if r.path.startswith('/upload/ann/retried')] == [None, 200]
    assert got['lost'].startswith('RemoteProtocolError') and len(commits['lost']) == 1  # done, though it looks failed
    assert got['damaged'].startswith('RuntimeError') and commits['damaged'] == [got['again']]
    [winner], refused = commits['race'], [text for text in got['race'] if '412 Precondition' in text]
    assert winner in got['race'] and len(refused) == 1
    assert is_damaged(run_client(hub, tmp_path / 'fresh', DOWNLOAD, None), WEIGHTS)


@pytest.mark.skipif(not HAS_XET, reason='hf_xet is not installed')
def test_faults_over_xet(hub_server, tmp_path):
    twice = "print(json.dumps([attempt('ann/down', data) for _ in range(2)]))"
    with hub_server.HubServer(xet=True) as hub:
        hub.put('ann/down', {'config.json': b'{}'})
        hub.fault('POST /v1/xorbs/', 'corrupt_body')
        hub.fault('POST /v1/xorbs/', 'drop')  # of the second attempt
        failed, oid = run_client(hub, tmp_path / 'home', ATTEMPT + twice, hub_server.WRITE)
        hub.fault('GET /xorbs/', 'corrupt')
        path = run_client(hub, tmp_path / 'fresh', DOWNLOAD, None)
    asked = [(r.path.split('/')[2], r.status) for r in hub.requests if r.path.startswith(('/v1/xorbs', '/v1/shards'))]
    assert asked == [('xorbs', 200), ('shards', 400), ('xorbs', None), ('xorbs', 200), ('shards', 200)]
    assert '400 Bad Request' in failed and [c.oid for c in hub.repo('ann/down').commits][2:] == [oid]
    assert is_damaged(path, hub.repo('ann/down').files()['model.safetensors'])
