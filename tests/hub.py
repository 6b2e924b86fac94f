"""A hub of one data set on this machine, as much of it as `datasets` asks for."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40


@contextmanager
def hub(files: dict[str, bytes]) -> Iterator[str]:
    """Serve a data set's files; yields the endpoint."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if found := re.search("/resolve/[^/]+/(.*)", path):
                self.file(found[1])
            elif "/tree/" in path:
                self.json([{"type": "file", "path": n, "size": len(files[n]), "oid": COMMIT} for n in files])
            else:
                self.json({"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]})

        do_HEAD = do_GET

        def file(self, name: str) -> None:
            if name not in files:
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            body, size = files[name], len(files[name])
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "Accept-Ranges": "bytes"}
            if part := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
                begin, end = int(part[1]), min(int(part[2]), size - 1)
                return self.reply(
                    206, body[begin : end + 1], headers | {"Content-Range": f"bytes {begin}-{end}/{size}"}
                )
            return self.reply(200, body, headers)

        def json(self, content: object) -> None:
            self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def reply(self, code: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
