"""What a repository of the Hub is to `hub_server`: commits that are whole snapshots, and names that point at them."""

import base64
import hashlib
from dataclasses import dataclass, field


class Refusal(Exception):
    """An answer that is an error, in the headers that the client reads."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        named = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.status, self.headers = status, {name: value for name, value in named.items() if value is not None}


def is_large(content: bytes) -> bool:
    """Whether a file goes over LFS: as git tells binary files, by a NUL in what it reads of them first."""
    return b"\0" in content[:512]


def object_id(content: bytes) -> str:
    """What the client compares to see whether a file changed: SHA-256 of a large file, git's blob id of others."""
    if is_large(content):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Snapshots by commit id (path → content), the titles of the commits, branches and tags by name → commit id."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str:
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def files(self, revision: str) -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]

    def commit(self, branch: str, files: dict[str, bytes], title: str) -> str:
        parent = self.branches.get(branch)
        tree = sorted((path, object_id(content)) for path, content in files.items())
        name = hashlib.sha1(repr((parent, title, tree, len(self.commits))).encode()).hexdigest()
        self.commits[name], self.titles[name] = files, title
        self.branches[branch] = name
        return name

    def apply(self, operations: list[dict], branch: str, title: str, large_files: dict[str, bytes]) -> str:
        """One commit of what the client asks for, or none if any of it cannot be done."""
        files = dict(self.files(branch))
        for operation in operations:
            kind, path = operation["key"], operation["value"]["path"]
            if kind == "file":
                files[path] = base64.b64decode(operation["value"]["content"])
            elif kind == "lfsFile":
                if operation["value"]["oid"] not in large_files:
                    raise Refusal(400, f"LFS pointer of {path} points to a file that does not exist")
                files[path] = large_files[operation["value"]["oid"]]
            else:
                gone = [p for p in files if p == path or (kind == "deletedFolder" and p.startswith(path))]
                if not gone:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                files = {p: content for p, content in files.items() if p not in gone}
        return self.commit(branch, files, title)

    def entries(self, revision: str, folder: str, recursive: bool) -> list[dict]:
        """What `git ls-tree` would list of a folder."""
        prefix = f"{folder}/" if folder else ""
        below = {path: content for path, content in self.files(revision).items() if path.startswith(prefix)}
        if folder and not below:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        entries: dict[str, dict] = {}
        for path, content in sorted(below.items()):
            first, *rest = path.removeprefix(prefix).split("/")
            if rest:
                entries[prefix + first] = {"type": "directory", "path": prefix + first, "size": 0, "oid": "0" * 40}
            if not rest or recursive:
                entries[path] = {"type": "file", "path": path, "size": len(content), "oid": object_id(content)}
                if is_large(content):
                    entries[path]["lfs"] = {"oid": object_id(content), "size": len(content), "pointerSize": 134}
        return list(entries.values())
