"""
A local server that speaks as much of the Hugging Face Hub's HTTP API as `huggingface_hub` needs to share models.

Repositories live in memory: commits are whole snapshots, branches and tags point at them, large files go over Git LFS
(basic or multipart). Not spoken: Xet, pull requests, data sets, Spaces.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_repository import Refusal, Repository, is_large, object_id


@dataclass
class Cut:
    """
    Connections to break: those of requests that `request` (a regular expression over "METHOD /path") finds.

    If `answered`, what is asked is done and half of the answer is sent; if not, half of the question is read.
    """

    request: str
    times: int = 1
    answered: bool = False


class HubServer(ThreadingHTTPServer):
    """
    The Hub, as a context manager. `endpoint` is what `HF_ENDPOINT` names.

    Tests look into `repositories` and `requests` ("METHOD /path" and the range, in order), break connections with
    `cuts`, let `readers` into gated repositories and set `part_size` for uploads in parts. User "someone" owns the
    tokens `WRITE` and `READ`, user "other" owns `OTHER`.
    """

    WRITE, READ, OTHER = "hf_write", "hf_read", "hf_other"
    TOKENS: ClassVar = {WRITE: ("someone", "write"), READ: ("someone", "read"), OTHER: ("other", "write")}
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        # Another host to the client: large files are elsewhere, where tokens must not go.
        self.storage = f"http://localhost:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_size: int | None = None
        self.readers: set[str] = set()
        self.cuts: list[Cut] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news; other errors are answered with 500."""

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repo_id].files(revision)

    def take_cut(self, line: str) -> Cut | None:
        with self.lock:
            for cut in self.cuts:
                if cut.times and re.search(cut.request, line):
                    cut.times -= 1
                    return cut
        return None


class HubRequest(BaseHTTPRequestHandler):
    """One request: `ROUTES` finds the method by the path; the groups of the pattern are its arguments."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        """Nothing to the terminal."""

    def answer(self) -> None:
        url = urlsplit(self.path)
        line = f"{self.command} {unquote(url.path)}"
        self.server.requests.append(" ".join([line, *filter(None, [self.headers["Range"]])]))
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.cut = self.server.take_cut(line)
        try:
            self.body = self.read_body()
            if self.cut and not self.cut.answered:
                return self.hang_up()
            if "Authorization" in self.headers and self.headers["Host"] in self.server.storage:
                raise Refusal(400, "A token was sent to the storage")
            auth = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if auth and auth not in self.server.TOKENS:
                raise Refusal(401, "Invalid credentials in Authorization header")
            self.user, self.role = self.server.TOKENS.get(auth, (None, None))
            for methods, pattern, handle in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in methods:
                    with self.server.lock:
                        return handle(self, *(group and unquote(group) for group in match.groups()))
            raise Refusal(404, f"No such route: {line}")
        except Refusal as refusal:
            self.reply({"error": str(refusal)}, refusal.status, refusal.headers)
        except ConnectionError:
            self.close_connection = True
        except Exception as error:
            self.reply({"error": repr(error)}, 500, {"X-Error-Message": f"The test's server failed: {error!r}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self) -> bytes:
        """The body, or half of it where the connection is to break."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size + 2)[:-2])
            self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length", 0))
        return self.rfile.read(length // 2 if self.cut and not self.cut.answered else length)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def reply(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.cut else body)
        if self.cut:
            self.hang_up()

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    # Who may what

    def repository(self, repo_id: str) -> Repository:
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and self.user != repo_id.split("/")[0]):
            # The Hub does not tell strangers what exists.
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, repo_id: str) -> Repository:
        repository = self.repository(repo_id)
        self.check_write(repo_id.split("/")[0])
        return repository

    def check_write(self, namespace: str) -> None:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if self.user != namespace or self.role != "write":
            raise Refusal(403, f'You must use a write token with rights in the namespace "{namespace}"')

    # The account and its repositories

    def whoami(self) -> None:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "test", "role": self.role}
        self.reply({"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": token}})

    def create_repository(self) -> None:
        namespace = self.json.get("organization") or self.user
        repo_id = f"{namespace}/{self.json['name']}"
        self.check_write(namespace)
        answer = {"name": repo_id, "url": f"{self.server.endpoint}/{repo_id}"}
        if repo_id in self.server.repositories:
            return self.reply({**answer, "error": "You already created this model repo"}, 409)
        # The first word for it is `huggingface_hub` 2's, the second that of older ones.
        private = self.json.get("visibility") == "private" or bool(self.json.get("private"))
        repository = self.server.repositories[repo_id] = Repository(private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.reply(answer)

    def validate_card(self) -> None:
        content = self.json["content"]
        errors = []
        if front_matter := re.match(r"---\s*\n(.*?)\n---", content, re.DOTALL):
            try:
                if not isinstance(yaml.safe_load(front_matter[1]), dict):
                    errors = ["YAML metadata is no mapping"]
            except yaml.YAMLError as error:
                errors = [str(error)]
        warnings = [] if front_matter else [{"message": "empty or missing yaml metadata in repo card"}]
        self.reply({"errors": [{"message": e} for e in errors], "warnings": warnings}, 400 if errors else 200)

    def information(self, repo_id: str, revision: str | None) -> None:
        repository = self.repository(repo_id)
        commit = repository.resolve(revision or "main")
        files = repository.commits[commit]
        facts = {"id": repo_id, "sha": commit, "private": repository.private, "tags": []}
        gated = "auto" if repository.gated else False
        self.reply({**facts, "gated": gated, "siblings": [{"rfilename": path} for path in sorted(files)]})

    def references(self, repo_id: str) -> None:
        repository = self.repository(repo_id)

        def listed(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit} for n, commit in names.items()]

        branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
        self.reply({"branches": branches, "converts": [], "tags": tags, "pullRequests": []})

    def branch(self, repo_id: str, name: str) -> None:
        repository = self.writable(repo_id)
        if name in repository.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        else:
            repository.branches[name] = repository.resolve(self.json.get("startingPoint", "main"))
        self.reply({})

    def tag(self, repo_id: str, name: str) -> None:
        repository = self.writable(repo_id)
        if self.json["tag"] in repository.tags:
            raise Refusal(409, f"Tag reference exists already: {self.json['tag']}")
        else:
            repository.tags[self.json["tag"]] = repository.resolve(name)
        self.reply({})

    # Reading

    def tree(self, repo_id: str, revision: str, folder: str | None) -> None:
        recursive = self.query.get("recursive", "").lower() == "true"
        self.reply(self.repository(repo_id).entries(revision, folder or "", recursive))

    def file(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.repository(repo_id)
        if repository.gated and self.user not in {repo_id.split("/")[0], *self.server.readers}:
            raise Refusal(403 if self.user else 401, f"Access to model {repo_id} is restricted.", "GatedRepo")
        commit = repository.resolve(revision)
        content = repository.commits[commit].get(path)
        if content is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{object_id(content)}"', "Accept-Ranges": "bytes"}
        if not is_large(content):
            return self.send_range(content, headers)
        self.server.large_files[object_id(content)] = content
        linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        where = f"{self.server.storage}/large-files/{object_id(content)}"
        self.reply(b"", HTTPStatus.FOUND, {**headers, **linked, "Location": where})

    def large_file(self, name: str) -> None:
        self.send_range(self.server.large_files[name], {"ETag": f'"{name}"'})

    def send_range(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.reply(content, 200, headers)
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        if start >= len(content):
            raise Refusal(416, "Range not satisfiable")
        headers = {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}
        self.reply(content[start : end + 1], HTTPStatus.PARTIAL_CONTENT, headers)

    # Writing: what is large? → upload it → commit

    def preupload(self, repo_id: str, revision: str) -> None:
        there = self.writable(repo_id).files(revision)
        files = []
        for file in self.json["files"]:
            mode = "lfs" if is_large(base64.b64decode(file["sample"])) else "regular"
            known = {"oid": object_id(there[file["path"]])} if file["path"] in there else {}
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        self.reply({"files": files})

    def start_uploads(self, repo_id: str) -> None:
        self.writable(repo_id)
        objects, part_size = [], self.server.part_size
        for wanted in self.json["objects"]:
            if wanted["oid"] not in self.server.large_files:
                href, header = f"{self.server.storage}/uploads/{wanted['oid']}", {}
                if part_size is not None and wanted["size"] > part_size:
                    parts = range(1, -(-wanted["size"] // part_size) + 1)
                    header = {"chunk_size": str(part_size), **{str(part): f"{href}/{part}" for part in parts}}
                verify = {"href": f"{self.server.endpoint}/{repo_id}/verify"}
                wanted = {**wanted, "actions": {"upload": {"href": href, "header": header}, "verify": verify}}
            objects.append(wanted)
        self.reply({"transfer": "multipart" if part_size else "basic", "objects": objects})

    def upload(self, name: str) -> None:
        if self.command == "POST":  # all parts are there
            parts = [self.server.parts.pop((name, part["partNumber"])) for part in self.json["parts"]]
            self.body = b"".join(parts)
        if hashlib.sha256(self.body).hexdigest() != name:
            raise Refusal(400, "The content does not have the SHA-256 that it was announced with")
        self.server.large_files[name] = self.body
        self.reply({})

    def upload_part(self, name: str, part: str) -> None:
        self.server.parts[name, int(part)] = self.body
        self.reply(b"", 200, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def verify(self, repo_id: str) -> None:
        if len(self.server.large_files.get(self.json["oid"], b"")) != self.json["size"]:
            raise Refusal(404, "The file was not uploaded whole")
        self.reply({})

    def commit(self, repo_id: str, branch: str) -> None:
        repository = self.writable(repo_id)
        if branch not in repository.branches:
            raise Refusal(404, f"Invalid branch: {branch}", "RevisionNotFound")
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        if header["value"].get("parentCommit", repository.branches[branch]) != repository.branches[branch]:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        name = repository.apply(operations, branch, header["value"]["summary"], self.server.large_files)
        self.reply({"commitOid": name, "commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{name}"})


MODEL = r"/api/models/([^/]+/[^/]+)"
ROUTES = [
    (["GET"], r"/api/whoami-v2", HubRequest.whoami),
    (["POST"], r"/api/repos/create", HubRequest.create_repository),
    (["POST"], r"/api/validate-yaml", HubRequest.validate_card),
    (["GET"], rf"{MODEL}(?:/revision/([^/]+))?", HubRequest.information),
    (["GET"], rf"{MODEL}/refs", HubRequest.references),
    (["POST"], rf"{MODEL}/branch/([^/]+)", HubRequest.branch),
    (["POST"], rf"{MODEL}/tag/([^/]+)", HubRequest.tag),
    (["GET"], rf"{MODEL}/tree/([^/]+)(?:/(.+))?", HubRequest.tree),
    (["POST"], rf"{MODEL}/preupload/([^/]+)", HubRequest.preupload),
    (["POST"], rf"{MODEL}/commit/([^/]+)", HubRequest.commit),
    (["POST"], r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", HubRequest.start_uploads),
    (["PUT", "POST"], r"/uploads/(\w+)", HubRequest.upload),
    (["PUT"], r"/uploads/(\w+)/(\d+)", HubRequest.upload_part),
    (["POST"], r"/([^/]+/[^/]+)/verify", HubRequest.verify),
    (["GET", "HEAD"], r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", HubRequest.file),
    (["GET", "HEAD"], r"/large-files/(\w+)", HubRequest.large_file),
]
