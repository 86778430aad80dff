"""Python processes whose libraries are in memory already, for tests of commands on Linux.

An import of torch takes seconds, and the tests start about two hundred processes. These are forks of one that has
imported what is not ours; all else is as if Python had been started: arguments, environment, streams, signals, exit.
Only the hash seed is the same for all.

    warm.run(['-m', 'timm_robust.evaluate', '--help'])   # subprocess.run([sys.executable, ...], captured, as text)
    warm.Popen([script, '--epochs', 3], stderr=PIPE)     # subprocess.Popen([sys.executable, ...], as text)

One thread each, and none of Python's own flags (-W, -X) nor PYTHON variables but PYTHONPATH: start those the usual way.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from subprocess import DEVNULL, PIPE

LIBRARIES = ('timm', 'torchvision', 'sklearn.datasets', 'matplotlib.figure', 'safetensors.torch', 'pyautoattack')
HUB = ('timm', 'huggingface_hub')  # read HF_ENDPOINT and the like as they are imported
LIMIT = 1 << 20  # bytes of arguments and environment
_server, _lock = [], threading.Lock()  # of this process: the socket of what forks


def control():
    """The socket of the process that forks, which is started by the first who asks."""
    with _lock:
        if not _server:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LIMIT)
            command = [sys.executable, __file__, str(theirs.fileno())]
            environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
            pipes = {'pass_fds': [theirs.fileno()], 'stdin': DEVNULL, 'stdout': DEVNULL}
            forks = subprocess.Popen(command, env=environment, **pipes)
            theirs.close()
            atexit.register(lambda: (ours.close(), forks.wait()))  # it ends when nobody is left to ask
            _server.append(ours)
    return _server[0]


class Popen:
    """A process; stdin, stdout and stderr are inherited, PIPE, DEVNULL or a file."""

    def __init__(self, words, *, env=None, cwd=None, stdin=None, stdout=None, stderr=None):
        self.args, self.returncode = [str(word) for word in words], None
        given, streams = [], []
        for number, stream in enumerate((stdin, stdout, stderr)):
            mine = None
            if stream == PIPE and number == 0:
                its, end = os.pipe()
                mine = os.fdopen(end, 'w')
            elif stream == PIPE:
                end, its = os.pipe()
                mine = os.fdopen(end)
            elif stream == DEVNULL:
                its = os.open(os.devnull, os.O_RDWR)
            else:
                its = os.dup(number if stream is None else stream.fileno())
            given.append(its)
            streams.append(mine)
        self.stdin, self.stdout, self.stderr = streams
        end, its = os.pipe()
        self._told = os.fdopen(end)
        given.append(its)
        what = {'words': self.args, 'env': dict(os.environ if env is None else env), 'cwd': str(cwd or os.getcwd())}
        socket.send_fds(control(), [json.dumps(what).encode()], given)
        for descriptor in given:
            os.close(descriptor)
        self.pid = self._hear()

    def _hear(self):
        """A number from the process that forks."""
        if not (line := self._told.readline()):
            raise ChildProcessError('the process that forks has ended; its error is above')
        return int(line)

    def poll(self):
        """The exit code, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        """The exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: if it still runs then.
        """
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._hear()
            self._told.close()
        return self.returncode

    def send_signal(self, number):
        """As os.kill, while it runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self):
        """SIGKILL, while it runs."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, text=None, timeout=None):
        """Give it a text, read what it prints, and wait: (stdout, stderr), None for one that is no PIPE.

        Raises:
            subprocess.TimeoutExpired: if it still runs then; it is killed.
        """
        if self.stdin:
            with self.stdin:
                self.stdin.write(text or '')
        end, texts = None if timeout is None else time.monotonic() + timeout, {}

        def read(stream):
            with stream:
                texts[stream] = stream.read()

        readers = [threading.Thread(target=read, args=(s,), daemon=True) for s in (self.stdout, self.stderr) if s]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if end is None else max(0, end - time.monotonic()))
        if any(reader.is_alive() for reader in readers):
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if end is None else max(0, end - time.monotonic()))
        return texts.get(self.stdout), texts.get(self.stderr)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind and self.poll() is None:  # the test failed: nothing else would end it
            self.kill()
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream:
                stream.close()
        self.wait()


def wait_for_line(process, text, seconds=300):
    """Read its stderr up to the line that holds this text; a process that does not say it in time is killed."""
    said, timer = [], threading.Timer(seconds, process.kill)
    timer.start()
    try:
        for line in process.stderr:
            said.append(line)
            if text in line:
                return
    finally:
        timer.cancel()
    raise AssertionError(f'{text!r} did not come in {seconds} s, but:\n{"".join(said)}')


def run(words, timeout=None, **options):
    """Run it to its end; the outcome has returncode, stdout and stderr, as text."""
    process = Popen(words, **{'stdout': PIPE, 'stderr': PIPE, **options})
    out, error = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def run_pair(words, env=None, timeout=300, **options):
    """Run it as two processes, told of each other as by torchrun; the outcome is that of both, the first one first."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    shared = {'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    shared = {**(os.environ if env is None else env), **shared}
    with ThreadPoolExecutor(2) as pool:
        ranks = ({**shared, 'RANK': rank, 'LOCAL_RANK': rank} for rank in '01')
        first, second = pool.map(lambda own: run(words, env=own, timeout=timeout, **options), ranks)
    code = first.returncode or second.returncode
    return subprocess.CompletedProcess(words, code, first.stdout + second.stdout, first.stderr + second.stderr)


def serve(control):
    """Fork a process for each request, and tell its number and its exit code to who asked.

    Returns:
        In each of those processes what it is to do; None here, when nobody is left to ask.
    """
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):  # tests skip what needs it
            importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one at the terminal is for pytest
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    asked = {}  # where to tell of whom
    while True:
        ready = select.select([control, ended], [], [])[0]
        if ended in ready:
            os.read(ended, 1024)
            for pid in list(asked):
                if (end := os.waitpid(pid, os.WNOHANG))[0]:
                    with contextlib.suppress(BrokenPipeError), asked.pop(pid) as told:
                        told.write(f'{os.waitstatus_to_exitcode(end[1])}\n')
        if control in ready:
            message, given, *_ = socket.recv_fds(control, LIMIT, 4)
            if not message:
                return None
            told = os.fdopen(given.pop(), 'w')
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for number, descriptor in enumerate(given):
                    os.dup2(descriptor, number)
                for descriptor in (*given, ended, wake):
                    os.close(descriptor)
                for other in (control, told, *asked.values()):
                    other.close()
                return json.loads(message)
            for descriptor in given:
                os.close(descriptor)
            told.write(f'{pid}\n')
            told.flush()
            asked[pid] = told


def become(words, env, cwd):
    """Do what `python WORDS` does."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    tempfile.tempdir = None  # what this process found, not TMPDIR of that one
    if 'numpy' in sys.modules:
        sys.modules['numpy'].random.seed()  # else all would draw the same
    if any(name.startswith('HF_') for name in env):
        for name in [name for name in sys.modules if name.partition('.')[0] in HUB]:
            del sys.modules[name]
    sys.path[1:1] = filter(None, env.get('PYTHONPATH', '').split(os.pathsep))
    kind, *rest = words
    if kind == '-c':
        sys.path[0], sys.argv = '', [kind, *rest[1:]]
        sys.modules['__main__'] = types.ModuleType('__main__')
        exec(compile(rest[0], '<string>', 'exec'), vars(sys.modules['__main__']))
    elif kind == '-m':
        sys.path[0], sys.argv = cwd, rest
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    else:
        sys.path[0], sys.argv = os.path.dirname(kind), words
        runpy.run_path(kind, run_name='__main__')


if __name__ == '__main__':
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        task = serve(listening)
    if task:
        become(**task)
