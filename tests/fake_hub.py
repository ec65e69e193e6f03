"""A Hub on this machine: repositories, commits, and its store of large files, as far as huggingface_hub uploads need them."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".bin", ".pt", ".pth")  # of the .gitattributes that the Hub gives a new repository


class FakeHub(ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1 and remembers what it was sent.

    Attributes:
        repositories: name to the body of the request that made it.
        commits: in order, `{"repository", "summary", "files": {path: bytes}, "large": paths}`; large files are those that
            came through the store, by Git LFS's batch protocol.
        store: SHA-256 to the bytes of a large file; `verified` has those that the client asked to verify.
        requests: "METHOD path" of every request, and its authorisation.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.commits, self.requests, self.cards = {}, [], [], []
        self.store, self.verified = {}, set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_POST(self):
        hub, body, path = self.server, self.body(), self.path.split("?")[0]
        hub.requests.append((f"POST {path}", self.headers.get("Authorization")))
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            sent = json.loads(body)
            name = f"{sent['organization'] or 'someone'}/{sent['name']}"
            hub.repositories.setdefault(name, sent)
            return self.answer({"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":
            hub.cards.append(json.loads(body))
            return self.answer({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.answer({"transfer": "basic", "objects": [self.upload(o) for o in json.loads(body)["objects"]]})
        if path == "/store/verify":
            sent = json.loads(body)
            assert len(hub.store[sent["oid"]]) == sent["size"]
            hub.verified.add(sent["oid"])
            return self.answer({})
        repository, verb = "/".join(parts[2:4]), parts[4]
        if verb == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in files}
            return self.answer(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        assert verb == "commit", path
        files, large, summary = {}, set(), None
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                summary = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert (line["key"], value["algo"]) == ("lfsFile", "sha256"), line
                files[value["path"]] = hub.store[value["oid"]]
                large.add(value["path"])
        hub.commits.append({"repository": repository, "summary": summary, "files": files, "large": large})
        oid = f"{len(hub.commits):040x}"
        return self.answer({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repository}/commit/{oid}"})

    def upload(self, wanted):
        """Where to send a large file, or nothing where the store has it."""
        if wanted["oid"] in self.server.store:
            return wanted
        actions = {"upload": f"{self.server.url}/store/{wanted['oid']}", "verify": f"{self.server.url}/store/verify"}
        return wanted | {"actions": {name: {"href": href} for name, href in actions.items()}}

    def do_PUT(self):
        body = self.body()
        self.server.requests.append(("PUT store", self.headers.get("Authorization")))
        assert hashlib.sha256(body).hexdigest() == self.path.rsplit("/", 1)[1]
        self.server.store[hashlib.sha256(body).hexdigest()] = body
        self.answer({})

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
