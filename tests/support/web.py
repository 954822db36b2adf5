"""A web server on the loopback address, for what is fetched; also a small Hugging Face Hub."""

import contextlib
import hashlib
import threading
from http import server


class Handler(server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        data = self.answer()
        if self.server.together is not None:
            self.server.together.wait(timeout=60)
        with contextlib.suppress(OSError):  # the client may have left
            self.wfile.write(data[: len(data) - self.server.missing])

    def answer(self):
        name = self.path.lstrip("/")
        self.server.requests.append(f"{self.command} {name}")
        data = self.server.files.get(name)
        self.send_response(404 if data is None else 200)
        data = data or b""
        self.send_header("Content-Type", self.server.kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)  # the Hub's, as the ETag
        if name not in self.server.files:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        return data

    def log_message(self, *_):
        pass


class Web(server.ThreadingHTTPServer):
    """A server of files by their names.

    Attributes:
        files: The files; others are answered with 404.
        requests: Methods and names that were asked for.
        kind: The content type of the answers.
        missing: Bytes at a file's end that are announced and not sent.
        together: Barrier at which answers wait for each other before their data; None: none.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.kind = {}, [], "application/octet-stream"
        self.missing, self.together = 0, None

    def address(self, name=""):
        return f"http://127.0.0.1:{self.server_port}/{name}"


@contextlib.contextmanager
def serve(monkeypatch):
    """Serves files while the context is open, past any proxy."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with Web() as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield web
        finally:
            web.shutdown()
            thread.join()
