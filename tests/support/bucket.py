"""A bucket for tests: what Cloud Storage answers to Google's C++ client, from a local folder."""

import contextlib
import re
import threading
import urllib.parse
from http import server
from pathlib import Path

import tensorflow as tf

# All of TensorFlow's calls that take paths, with the number of paths.
CALLS = {
    "GFile": 1, "copy": 2, "exists": 1, "glob": 1, "isdir": 1, "listdir": 1, "makedirs": 1,
    "mkdir": 1, "remove": 1, "rename": 2, "rmtree": 1, "stat": 1, "walk": 1,
}  # fmt: skip


class Handler(server.BaseHTTPRequestHandler):
    """Answers `objects.get` of the JSON API with `alt=media`, whole or a range."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        bucket, name = re.fullmatch("/storage/v1/b/([^/]+)/o/(.+)", path).groups()
        file = self.server.folder / bucket / name
        self.server.requests.append(f"gs://{bucket}/{name}")
        if not file.is_file():
            return self.answer(404)
        data = file.read_bytes()
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"]).groups()
        start = int(first) if first else max(0, len(data) - int(last))
        end = int(last) + 1 if first and last else len(data)
        self.answer(206, data[start:end], f"bytes {start}-{end - 1}/{len(data)}")

    def answer(self, status, data=b"", content_range=""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client leaves when it has its record
            self.wfile.write(data)

    def log_message(self, *_):
        pass


class Server(server.ThreadingHTTPServer):
    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.requests = Path(folder), []

    def handle_error(self, *_):
        pass  # the client closed the connection


@contextlib.contextmanager
def serve(folder, monkeypatch):
    """Makes gs://NAME/... the content of a folder's sub-folders; yields the list of requests.

    TensorFlow's client has a fixed address, so its calls go to the folder itself.
    """
    with Server(folder) as bucket:
        thread = threading.Thread(target=bucket.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{bucket.server_port}"
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", address)
        for name, paths in CALLS.items():
            monkeypatch.setattr(
                tf.io.gfile, name, redirect(getattr(tf.io.gfile, name), paths, folder)
            )
        try:
            yield bucket.requests
        finally:
            bucket.shutdown()
            thread.join()


def redirect(call, paths, folder):
    def redirected(*arguments, **options):
        local = [re.sub("^gs:/", str(folder), str(path)) for path in arguments[:paths]]
        return call(*local, *arguments[paths:], **options)

    return redirected
