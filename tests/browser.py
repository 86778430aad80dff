"""A headless Chromium, driven over a pipe by the DevTools protocol: pages opened, buttons pressed, errors noted."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
_ON_3_AND_4 = (
    'import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])'
)


class Browser:
    """One tab; `errors` and `addresses` hold what its console complained of, and what it asked for."""

    def __init__(self, folder, width=1300, height=1500):
        inward, self._write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in os.pipe())
        self._read, outward = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in os.pipe())
        flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--remote-debugging-pipe']
        flags += ['--no-first-run', '--disable-background-networking', f'--user-data-dir={folder}']
        flags += [f'--window-size={width},{height}', 'about:blank']
        words = [sys.executable, '-c', _ON_3_AND_4, str(inward), str(outward), CHROMIUM, *flags]
        self._process = subprocess.Popen(words, pass_fds=(inward, outward), stderr=subprocess.DEVNULL)
        os.close(inward), os.close(outward)
        self._number, self._rest, self._session = 0, b'', None
        self.errors, self.addresses = [], []
        targets = self.call('Target.getTargets')['targetInfos']
        page = next(target['targetId'] for target in targets if target['type'] == 'page')
        self._session = self.call('Target.attachToTarget', targetId=page, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network', 'DOM'):
            self.call(f'{domain}.enable')

    def call(self, method, timeout=60, **params):
        """Send a command and wait for its answer; events on the way are noted."""
        self._number += 1
        message = {'id': self._number, 'method': method, 'params': params}
        message |= {'sessionId': self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b'\0')
        end = time.monotonic() + timeout
        while (answer := self._next(end)).get('id') != self._number:
            self._note(answer)
        assert 'error' not in answer, (method, answer['error'])
        return answer['result']

    def _next(self, end):
        while b'\0' not in self._rest:
            assert select.select([self._read], [], [], max(end - time.monotonic(), 0))[0], 'the browser does not answer'
            part = os.read(self._read, 1 << 16)
            assert part, 'the browser has ended'
            self._rest += part
        message, _, self._rest = self._rest.partition(b'\0')
        return json.loads(message)

    def _note(self, event):
        method, params = event.get('method'), event.get('params', {})
        if method == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'assert'):
            self.errors.append(' '.join(str(item.get('value', item.get('description'))) for item in params['args']))
        elif method == 'Runtime.exceptionThrown':
            self.errors.append(str(params['exceptionDetails']))
        elif method == 'Log.entryAdded' and params['entry']['level'] == 'error':
            self.errors.append(f'{params["entry"]["text"]} {params["entry"].get("url", "")}')
        elif method == 'Network.requestWillBeSent':
            self.addresses.append(params['request']['url'])

    def open(self, address):
        self.call('Page.navigate', url=address)

    def ask(self, script):
        """The value of an expression of JavaScript."""
        answer = self.call('Runtime.evaluate', expression=script, returnByValue=True)
        assert 'exceptionDetails' not in answer, answer
        return answer['result'].get('value')

    def wait(self, script, seconds=120):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.ask(f'!!({script})'):
            assert time.monotonic() < end, f'{script} is not so; the page says {self.ask("document.body.innerText")}'
            time.sleep(0.1)

    def upload(self, selector, path):
        """Choose a file in an input."""
        root = self.call('DOM.getDocument')['root']['nodeId']
        node = self.call('DOM.querySelector', nodeId=root, selector=selector)['nodeId']
        self.call('DOM.setFileInputFiles', nodeId=node, files=[str(path)])

    def picture(self, path):
        """Save what the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.call('Page.captureScreenshot', format='png')['data']))

    def close(self):
        self._process.terminate()
        self._process.wait()
        os.close(self._write), os.close(self._read)
