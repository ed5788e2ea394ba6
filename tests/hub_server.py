"""A Hub of our own on the loopback: the parts of the Hugging Face Hub's HTTP interface that a
download needs, over plain folders.

It answers as huggingface.co does (https://huggingface.co/docs/hub/api, and what huggingface_hub
reads of it): small files from their `resolve` address, weights and Parquet by a redirect to other
storage, missing things by X-Error-Code.
"""

import contextlib
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

# the Hub keeps them apart and redirects to them
LARGE_FILES = (".safetensors", ".parquet", ".bin")
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
STORAGE = re.compile(r"/storage/(models|datasets)/([^/]+/[^/]+)/([^/]+)/(.+)")
MAIN = "main"


@dataclass
class Repository:
    """A folder served as one commit of a repository, whose number is the hash of all that is in it."""

    name: str
    folder: Path

    @cached_property
    def etags(self) -> dict[str, str]:
        """The hash of each file, by its path in the repository."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {
            path.relative_to(self.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }

    @cached_property
    def commit(self) -> str:
        """The hash of the repository, 40 hexadecimal digits as in git."""
        return hashlib.sha1(json.dumps(self.etags).encode()).hexdigest()

    def entry(self, path: str) -> dict:
        """Return what a listing says of a file, or of a folder."""
        if path not in self.etags:
            return {"type": "directory", "oid": self.commit, "size": 0, "path": path}
        size, etag = (self.folder / path).stat().st_size, self.etags[path]
        stored = (
            {"lfs": {"oid": etag, "size": size, "pointerSize": 130}} if path.endswith(LARGE_FILES) else {}
        )
        return {"type": "file", "oid": etag[:40], "size": size, "path": path, **stored}

    def paths(self) -> list[str]:
        """Return every file and folder of the repository."""
        folders = {parent.as_posix() for path in self.etags for parent in Path(path).parents} - {"."}
        return sorted(folders | set(self.etags))


class HubServer(ThreadingHTTPServer):
    """Serves `root`/models/<owner>/<name> and `root`/datasets/<owner>/<name> on a free port; a
    context manager that stops it.

    The folder is the branch main, and <name>@<revision> beside it another branch, or a tag.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.requests, self.repositories = root, [], {}
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.start()

    def start(self):
        """Answer, in a thread."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)

    @contextlib.contextmanager
    def away(self):
        """Let nothing listen at the address in this block."""
        self.shutdown()
        self.server_close()
        try:
            yield
        finally:
            self.socket = socket.socket(self.address_family, self.socket_type)
            self.server_bind()
            self.server_activate()
            self.start()

    def revisions(self, kind: str, name: str) -> dict[str, Repository]:
        """Return the commits of a repository by branch or tag, {} where there is no folder of that name."""
        folder = self.root / kind / name
        if (kind, name) not in self.repositories and folder.is_dir():
            found = {MAIN: folder} | {
                path.name.partition("@")[2]: path for path in folder.parent.glob(f"{folder.name}@*")
            }
            self.repositories[kind, name] = {key: Repository(name, path) for key, path in found.items()}
        return self.repositories.get((kind, name), {})

    def repository(self, kind: str, name: str, revision: str | None) -> Repository | None:
        """Return the commit that a branch, a tag, or its own number names, None where there is none."""
        revisions = self.revisions(kind, name)
        commits = {repository.commit: repository for repository in revisions.values()}
        return (revisions | commits).get(revision or MAIN)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    # else each answer waits 40 ms for the client to acknowledge its header
    disable_nagle_algorithm = True

    def do_GET(self):
        """Answer GET, and HEAD with the same header."""
        self.server.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        if path == "/":
            self.reply(200, b"a Hub of our own")
        elif match := API.fullmatch(path):
            self.answer_api(*match.groups())
        elif match := RESOLVE.fullmatch(path):
            self.answer_resolve("datasets" if match[1] else "models", *match.groups()[1:])
        elif match := STORAGE.fullmatch(path):
            self.send_file(self.server.repository(*match.groups()[:3]), match[4])
        else:
            self.missing("NotFound")

    do_HEAD = do_POST = do_GET

    def answer_api(self, kind: str, name: str, question: str | None, revision: str | None, path: str | None):
        """Answer what is in a repository."""
        repository = self.find(kind, name, revision)
        if repository is None:
            return
        if question in (None, "revision"):
            siblings = [{"rfilename": path} for path in repository.etags]
            state = {"private": False, "gated": False, "disabled": False, "tags": []}
            self.reply_json({"_id": "0", "id": name, "sha": repository.commit, **state, "siblings": siblings})
        elif question == "paths-info":
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
            self.reply_json([repository.entry(path) for path in asked if path in repository.paths()])
        elif path and path not in repository.paths():
            self.missing("EntryNotFound")
        else:
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true"
            inside = [entry for entry in repository.paths() if entry.startswith(f"{path}/" if path else "")]
            depth = path.count("/") + 1 if path else 0
            self.reply_json(
                [repository.entry(entry) for entry in inside if recursive or entry.count("/") == depth]
            )

    def answer_resolve(self, kind: str, name: str, revision: str, path: str):
        """Answer with a file, or with where a large one is stored."""
        repository = self.find(kind, name, revision)
        if repository is None:
            return
        if path not in repository.etags:
            self.missing("EntryNotFound", repository)
        elif path.endswith(LARGE_FILES):
            linked = {
                "X-Linked-Size": (repository.folder / path).stat().st_size,
                "X-Linked-ETag": f'"{repository.etags[path]}"',
            }
            stored = f"/storage/{kind}/{quote(name)}/{repository.commit}/{quote(path)}"
            where = self.server.endpoint + stored
            self.reply(302, headers={"Location": where, "X-Repo-Commit": repository.commit, **linked})
        else:
            self.send_file(repository, path)

    def find(self, kind: str, name: str, revision: str | None) -> Repository | None:
        """Return a repository; where it or its revision is missing, say so to the client and
        return None.
        """
        repository = self.server.repository(kind, name, revision)
        if repository is None:
            is_known = self.server.revisions(kind, name)
            self.missing("RevisionNotFound" if is_known else "RepoNotFound")
        return repository

    def send_file(self, repository: Repository, path: str):
        """Send a file, or the part of it that the client asks for."""
        content = (repository.folder / path).read_bytes()
        headers = {
            "ETag": f'"{repository.etags[path]}"',
            "X-Repo-Commit": repository.commit,
            "Accept-Ranges": "bytes",
        }
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self.reply(206, content[start : end + 1], headers)
        else:
            self.reply(200, content, headers)

    def missing(self, code: str, repository: Repository | None = None):
        """Say what is missing; an unknown repository is 401 on the Hub, for it may be a private
        one.
        """
        commit = {"X-Repo-Commit": repository.commit} if repository else {}
        self.reply(
            401 if code == "RepoNotFound" else 404,
            b"{}",
            {"X-Error-Code": code, "X-Error-Message": code, **commit},
        )

    def reply_json(self, value):
        """Send a value as JSON."""
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, content: bytes = b"", headers: dict | None = None):
        """Send an answer; the length of the content is in the header also where HEAD leaves the
        content out.
        """
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *message):
        """Print nothing; HubServer.requests has the requests."""
