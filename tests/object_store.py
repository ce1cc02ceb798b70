"""gs:// without Google: an object store in memory, for fsspec (and so epath) and for TensorStore.

A flat dict of names and contents, as such stores are: no directories, and nothing is renamed.
TensorStore, which reads and writes Orbax's arrays, and Google's client, which Orbax asks about the
bucket, speak to it over HTTP, in the language of Google's JSON API.
"""

import contextlib
import http.server
import io
import json
import threading
import urllib.parse

import fsspec


class Objects:
    """The contents by name, 'bucket/folder/file', each with the number of its version."""

    def __init__(self):
        self._lock = threading.Lock()
        self._versions = 0
        self.contents: dict[str, tuple[bytes, int]] = {}

    def put(self, name: str, content: bytes, expected: int | None = None) -> int | None:
        """Returns the new version; None if the one there is not the expected one (0: none)."""
        with self._lock:
            if expected is not None and self.contents.get(name, (b'', 0))[1] != expected:
                return None
            self._versions += 1
            self.contents[name] = content, self._versions
            return self._versions

    def delete(self, name: str) -> bool:
        with self._lock:
            return self.contents.pop(name, None) is not None

    def names(self, prefix: str = '') -> list[str]:
        with self._lock:
            return sorted(name for name in self.contents if name.startswith(prefix))


OBJECTS = Objects()


class _Written(io.BytesIO):
    """A file that becomes an object when it is closed."""

    def __init__(self, name):
        super().__init__()
        self._name = name

    def close(self):
        if not self.closed:
            OBJECTS.put(self._name, self.getvalue())
        super().close()


class FileSystem(fsspec.AbstractFileSystem):
    """What fsspec makes of OBJECTS."""

    protocol = ('gs', 'gcs')
    cachable = False

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        if path in OBJECTS.contents:
            found = {path: self._file(path)}
        else:
            prefix = f'{path}/' if path else ''
            found = {}
            for name in OBJECTS.names(prefix):
                child, below, _ = name[len(prefix) :].partition('/')
                child = prefix + child
                found[child] = self._folder(child) if below else self._file(child)
            if not found:
                raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def info(self, path, **_):
        path = self._strip_protocol(path)
        if path in OBJECTS.contents:
            return self._file(path)
        if not path or OBJECTS.names(f'{path}/'):
            return self._folder(path)
        raise FileNotFoundError(path)

    def _file(self, name):
        return {'name': name, 'size': len(OBJECTS.contents[name][0]), 'type': 'file'}

    def _folder(self, name):
        return {'name': name, 'size': 0, 'type': 'directory'}

    def _open(self, path, mode='rb', **_):
        path = self._strip_protocol(path)
        if mode == 'wb':
            return _Written(path)
        if mode != 'rb':
            raise ValueError(f'objects are read or written whole, found mode {mode}')
        if path not in OBJECTS.contents:
            raise FileNotFoundError(path)
        return io.BytesIO(OBJECTS.contents[path][0])

    def cp_file(self, path1, path2, **_):
        content = self.cat_file(path1)
        OBJECTS.put(self._strip_protocol(path2), content)

    def rm_file(self, path):
        # What is no object may be a folder, which goes with its objects.
        OBJECTS.delete(self._strip_protocol(path))

    def rm(self, path, recursive=False, maxdepth=None):
        path = self._strip_protocol(path)
        if path not in OBJECTS.contents and not OBJECTS.names(f'{path}/'):
            raise FileNotFoundError(path)
        for name in [path, *(OBJECTS.names(f'{path}/') if recursive else ())]:
            OBJECTS.delete(name)

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def _asked(self) -> tuple[str, dict[str, str]]:
        """Returns the object's name, or the bucket's followed by '/', and the query."""
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        _, _, rest = url.path.partition('/storage/v1/b/')
        bucket, _, name = rest.partition('/o')
        name = query.get('name') or urllib.parse.unquote(name.removeprefix('/'))
        return f'{bucket}/{name}', query

    def _answer(self, status: int, content: bytes = b'', **headers) -> None:
        self.send_response(status)
        self.send_header('Content-Length', str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        self.wfile.write(content)

    def _metadata(self, name: str) -> dict[str, str]:
        content, version = OBJECTS.contents[name]
        bucket, _, rest = name.partition('/')
        date = '2030-01-01T00:00:00.000Z'
        return {
            'kind': 'storage#object', 'name': rest, 'bucket': bucket, 'generation': str(version),
            'metageneration': '1', 'size': str(len(content)), 'timeCreated': date, 'updated': date,
        }  # fmt: skip

    def do_GET(self):
        name, query = self._asked()
        if '/o' not in self.path:
            return self._answer(200, json.dumps({'name': name.rstrip('/')}).encode())
        if name.endswith('/'):
            found = OBJECTS.names(name + query.get('prefix', ''))
            items = [self._metadata(name) for name in found]
            return self._answer(200, json.dumps({'items': items}).encode())
        if name not in OBJECTS.contents:
            return self._answer(404)
        content, version = OBJECTS.contents[name]
        headers = {'x_goog_generation': version}
        if query.get('ifGenerationNotMatch') == str(version):
            return self._answer(304, **headers)
        if query.get('ifGenerationMatch', str(version)) != str(version):
            return self._answer(412)
        if asked := self.headers.get('Range'):
            first, _, last = asked.removeprefix('bytes=').partition('-')
            # 'bytes=-9' asks for the last 9.
            start = int(first) if first else max(0, len(content) - int(last))
            part = content[start : int(last) + 1 if first and last else None]
            headers['Content_Range'] = f'bytes {start}-{start + len(part) - 1}/{len(content)}'
            return self._answer(206, part, **headers)
        return self._answer(200, content, **headers)

    def do_POST(self):
        name, query = self._asked()
        content = self.rfile.read(int(self.headers['Content-Length']))
        expected = query.get('ifGenerationMatch')
        if OBJECTS.put(name, content, None if expected is None else int(expected)) is None:
            return self._answer(412)
        return self._answer(200, json.dumps(self._metadata(name)).encode())

    def do_DELETE(self):
        name, _ = self._asked()
        return self._answer(204 if OBJECTS.delete(name) else 404)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving():
    """Serves OBJECTS over HTTP, and gives the address."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()
