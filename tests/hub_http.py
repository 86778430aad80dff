"""HTTP for the stand-in for the Hub: requests, answers, errors as the Hub words them, and faults on demand."""

import contextlib
import json
import re
import socket
import socketserver
import sys
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Request:
    """What was asked and, once answered, the status; None for one that was dropped before handling."""

    server: str  # 'hub' or 'cdn'
    method: str
    path: str  # with its query, as sent
    authorization: str | None
    status: int | None = None
    wrote: bool = False  # it changed what the server holds
    headers: dict = field(default_factory=dict)
    body: bytes = b''

    def __repr__(self):
        return f'{self.method} {self.path} -> {self.status}{" wrote" * self.wrote}'

    @property
    def parts(self):
        return [unquote(part) for part in urlsplit(self.path).path.split('/')[1:]]

    @property
    def query(self):
        return {key: values[-1] for key, values in parse_qs(urlsplit(self.path).query).items()}

    def flag(self, name):
        return self.query.get(name, '').lower() in ('1', 'true')  # the client writes 1, True and true

    def json(self):
        try:
            return json.loads(self.body)
        except ValueError:
            raise Refused(400, 'Invalid JSON') from None


@dataclass
class Reply:
    status: int = 200
    body: bytes = b''
    headers: dict = field(default_factory=dict)


def as_json(value, status=200, **headers):
    headers = {'Content-Type': 'application/json; charset=utf-8', **headers}
    return Reply(status, json.dumps(value).encode(), headers)


class Refused(Exception):
    """An answer that is an error. X-Error-Code makes the exception of the client, X-Error-Message its text."""

    def __init__(self, status, message, code=None, **more):
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more

    def reply(self):
        reply = as_json({'error': self.message, **self.more}, self.status)
        # A line break would end the header, and headers are Latin-1.
        reply.headers['X-Error-Message'] = ' '.join(self.message.split()).encode('latin-1', 'replace').decode('latin-1')
        if self.code:
            reply.headers['X-Error-Code'] = self.code
        if self.status == 401:
            reply.headers['WWW-Authenticate'] = 'Bearer realm="Authentication required", charset="UTF-8"'
        return reply


@dataclass
class Fault:
    match: str | re.Pattern
    action: str | int
    times: int
    seconds: float

    def fits(self, request):
        line = f'{request.method} {request.path}'
        found = self.match in line if isinstance(self.match, str) else self.match.search(line)
        return self.times > 0 and bool(found)


def flipped(data):
    """One bit of the byte in the middle is another: the same size, another hash."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def ranged(request, data, headers):
    """All of data, or what the Range header asks for; its end may lie behind the end of the file."""
    headers = {'Accept-Ranges': 'bytes', **headers}
    found = re.fullmatch(r'bytes=(\d*)-(\d*)', request.headers.get('range', ''))
    if not found or found.group() == 'bytes=-':
        return Reply(200, data, headers)
    first, last = found.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        return Reply(416, b'', {**headers, 'Content-Range': f'bytes */{len(data)}'})
    return Reply(206, data[start:stop], {**headers, 'Content-Range': f'bytes {start}-{stop - 1}/{len(data)}'})


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # or closing would wait for connections that the client keeps open
    request_queue_size = 128

    def __init__(self, hub, name, app):
        self.hub, self.name, self.app, self.open = hub, name, app, set()
        super().__init__(('127.0.0.1', 0), Handler)

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # HTTPServer would ask the name service for the name of this machine
        self.server_name, self.server_port = self.server_address[:2]

    def get_request(self):
        connection, address = super().get_request()
        self.open.add(connection)
        return connection, address

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):
            self.hub.errors.append(traceback.format_exc())  # an OSError is a client that went away

    def close(self):
        self.shutdown()
        self.server_close()
        for connection in list(self.open):  # or threads would go on answering on connections that are kept alive
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def _body(self):
        """All of it, always: what stays unread would be taken for the next request on this connection."""
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            return self._exactly(int(self.headers.get('Content-Length') or 0))
        parts = []
        while size := int(self.rfile.readline().split(b';')[0] or b'-1', 16):
            parts.append(self._exactly(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b''.join(parts)

    def _exactly(self, size):
        data = self.rfile.read(size) if size >= 0 else b''
        if len(data) != size:  # the client was killed; half of a commit can look like a smaller one
            raise ConnectionError('the request ended too early')
        return data

    def _serve(self):
        hub = self.server.hub
        headers = {key.lower(): value for key, value in self.headers.items()}
        request = Request(self.server.name, self.command, self.path, headers.get('authorization'), headers=headers)
        request.body = self._body()
        hub.requests.append(request)
        fault = hub.take_fault(request)
        if fault.action == 'stall':
            hub.closing.wait(fault.seconds)
        if fault.action == 'corrupt_body':
            request.body = flipped(request.body)
        if fault.action != 'drop':
            reply = self._handle(request, fault)
            request.status, request.body = reply.status, b''
        if fault.action in ('drop', 'drop_after'):
            self.close_connection = True
            return
        if hub.take_fault(request, reply).action == 'corrupt':
            reply.body = flipped(reply.body)
        self._send(reply)

    def _handle(self, request, fault):
        hub = self.server.hub
        try:
            if isinstance(fault.action, int):
                reply = Refused(fault.action, 'A fault that the test asked for').reply()
                if fault.action == 429:
                    reply.headers['Retry-After'] = f'{fault.seconds:.0f}'
                return reply
            with hub.lock:
                return self.server.app(request)
        except Refused as refused:
            return refused.reply()
        except Exception:
            hub.errors.append(f'{request}\n{traceback.format_exc()}')
            return as_json({'error': hub.errors[-1]}, 500)

    def _send(self, reply):
        self.send_response(reply.status)
        for key, value in reply.headers.items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(reply.body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve
