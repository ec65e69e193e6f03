"""A Hub on this machine: repositories, and commits of files, as far as huggingface_hub uploads need them."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub(ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1 and remembers what it was sent.

    Attributes:
        repositories: name to the body of the request that made it.
        commits: in order, `{"repository", "summary", "files": {path: bytes}}`.
        requests: "METHOD path" of every request, and its authorisation.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.commits, self.requests, self.cards = {}, [], [], []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        self.server.requests.append((f"POST {path}", self.headers.get("Authorization")))
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            sent = json.loads(body)
            name = f"{sent['organization'] or 'someone'}/{sent['name']}"
            self.server.repositories.setdefault(name, sent)
            return self.answer({"url": f"{self.server.url}/{name}"})
        if path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body))
            return self.answer({"errors": [], "warnings": []})
        repository, verb = "/".join(parts[2:4]), parts[4]
        if verb == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        assert verb == "commit", path
        assert {line["key"] for line in lines} == {"header", "file"}, path
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        self.server.commits.append({"repository": repository, "summary": lines[0]["value"]["summary"], "files": files})
        oid = f"{len(self.server.commits):040x}"
        return self.answer(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repository}/commit/{oid}"}
        )

    def do_GET(self):
        self.server.requests.append((f"GET {self.path}", self.headers.get("Authorization")))
        self.answer({"error": "not here"}, 404)

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass
