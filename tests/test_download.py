"""What is said while a download waits, and what is never said."""

import json
import os
import threading

import pytest
import warm

from timm_robust.weights import download, without_password


def said(*sizes):
    lines = []
    download._watch(sizes, 'some.model', lines.append)
    return lines


def test_a_minute_without_progress_is_said_once_a_minute():
    looks = int(download._QUIET_S / download._POLL_S)
    [message] = said(*[7] * (looks + 3))
    assert message.startswith(
        'some.model: the download has made no progress for 60 s (7 bytes are here); still waiting'
    )
    assert len(said(*[7] * (2 * looks + 2))) == 2
    assert not said(*[7] * looks, *[8] * looks)  # it goes on just in time
    assert not said(*range(10 * looks))


def test_a_stall_is_said_while_the_body_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(download, '_POLL_S', 0.01)
    monkeypatch.setattr(download, '_QUIET_S', 0.02)
    lines, heard = [], threading.Event()
    with download.told_stalls(tmp_path, 'owner/name', 'here', lambda line: (lines.append(line), heard.set())):
        assert heard.wait(60)
    assert lines[0].startswith('here: the download has made no progress')


def test_the_bytes_of_half_written_files_count(tmp_path):
    (tmp_path / 'a.1f.incomplete').write_bytes(b'123')
    (tmp_path / 'b').write_bytes(b'12')
    assert download._bytes_in(tmp_path) == 5 and download._bytes_in(tmp_path / 'none') == 0


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('at https://me:secret@hub.example/x; try', 'at https://hub.example/x; try'),
        ('http://secret@host and ssh://a:b@c', 'http://host and ssh://c'),
        ('https://me:se@cret@host', 'https://host'),
        ('owner/name@main https://host/a@b', 'owner/name@main https://host/a@b'),
    ],
)
def test_addresses_lose_their_password(text, expected):
    assert without_password(text) == expected


def test_a_password_in_the_endpoint_is_never_said(tmp_path):
    """Nobody listens at the address; what fails there is told by our messages, and by the client's."""
    code = """
import json
from timm_robust.models.load import load_model
from timm_robust.weights import Release, read_release
from timm_robust.weights.download import _page
release = Release('resnet18_relu.at_cifar10_linf', 'a' * 64, 5, None, 'owner/name', 'b' * 40)
messages = [_page(release)]
for call in (lambda: read_release(release), lambda: load_model('hf-hub:owner/name')):
    try:
        call()
    except ConnectionError as error:
        messages.append(str(error))
print(json.dumps(messages))
"""
    environment = {**os.environ, 'HF_ENDPOINT': 'http://me:canary@127.0.0.1:9', 'HF_HOME': str(tmp_path)}
    run = warm.run(['-c', code], env=environment, timeout=200)
    messages = json.loads(run.stdout.splitlines()[-1])
    assert len(messages) == 3 and 'at http://127.0.0.1:9' in messages[1] and 'canary' not in run.stdout
