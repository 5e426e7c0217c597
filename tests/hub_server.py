"""A Hugging Face Hub stand-in on 127.0.0.1 for tests: model repositories with one branch, kept in memory.

``huggingface_hub`` reads ``HF_ENDPOINT`` when it is imported: set it in the environment of a client process.
Any bearer token is accepted, and every file is a regular git blob: uploads never need LFS or Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Tree = Mapping[str, bytes]

_API_PATH = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<call>[^/]+)(?:/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?)?"
)
_FILE_PATH = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    query: Mapping[str, list[str]]
    authorized: bool
    body: bytes


@dataclass(frozen=True)
class _Reply:
    status: HTTPStatus
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True)
class _Repo:
    private: bool
    commits: dict[str, Tree]

    @property
    def head(self) -> str:
        """The commit ``main`` is at, which is the newest: there is no other branch."""
        return next(reversed(self.commits))


def _json(value: Any, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> _Reply:
    return _Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


def _error(status: HTTPStatus, message: str, code: str = "", commit: str = "") -> _Reply:
    """An error answer; huggingface_hub picks the exception class by ``code``."""
    headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
    return _json({"error": message}, status, {name: value for name, value in headers.items() if value})


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entries(tree: Tree, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """What ``tree`` lists under ``folder``, in the Hub's form; a folder's oid is a placeholder."""
    prefix = f"{folder}/" if folder else ""
    folders = {str(parent): b"" for path in tree for parent in PurePosixPath(path).parents if parent.name}
    return [
        {"type": "file" if path in tree else "directory", "path": path, "oid": _oid(data), "size": len(data)}
        for path, data in sorted({**folders, **tree}.items())
        if path.startswith(prefix) and (recursive or "/" not in path.removeprefix(prefix))
    ]


def _apply_commit(tree: Tree, operations: list[dict[str, Any]]) -> Tree:
    """``tree`` after the operations of an NDJSON commit, its header left out."""
    files = dict(tree)
    for operation in operations:
        value = operation["value"]
        match operation["key"]:
            case "file":
                files[value["path"]] = base64.b64decode(value["content"])
            case "deletedFile" | "deletedFolder":
                gone = value["path"].rstrip("/")
                files = {path: data for path, data in files.items() if not f"{path}/".startswith(f"{gone}/")}
            case key:
                raise ValueError(f"unsupported commit operation: {key}")
    return files


class HubServer:
    """Context manager that serves an empty Hub on a free port of 127.0.0.1."""

    def __init__(self, user: str = "user") -> None:
        self.user = user
        self.requests: list[tuple[str, str]] = []
        self._repos: dict[str, _Repo] = {}
        self._lock = Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The files ``repo_id`` holds now; ``KeyError`` for a repository that was never created."""
        with self._lock:
            repo = self._repos[repo_id]
            return dict(repo.commits[repo.head])

    def answer(self, request: _Request) -> _Reply:
        """Record one request and answer it."""
        with self._lock:
            self.requests.append((request.method, request.path))
            return self._route(request)

    def _route(self, request: _Request) -> _Reply:
        if not request.authorized and (request.method == "POST" or request.path == "/api/whoami-v2"):
            return _error(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        match (request.method, request.path):
            case ("GET", "/api/whoami-v2"):
                access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
                return _json({"type": "user", "name": self.user, "orgs": [], "auth": access})
            case ("POST", "/api/validate-yaml"):
                return _json({"errors": [], "warnings": []})
            case ("POST", "/api/repos/create"):
                return self._create(json.loads(request.body))
        found = _API_PATH.fullmatch(request.path) or _FILE_PATH.fullmatch(request.path)
        repo = self._repos.get(found["repo"]) if found else None
        if found is None or repo is None or (repo.private and not request.authorized):
            status = HTTPStatus.NOT_FOUND if request.authorized else HTTPStatus.UNAUTHORIZED
            return _error(status, "Repository not found", "RepoNotFound")
        call = found.groupdict().get("call", "resolve")
        revision, path = unquote(found["revision"] or "main"), unquote(found["path"] or "")
        commit = repo.head if revision == "main" else revision
        if commit not in repo.commits:
            return _error(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", "RevisionNotFound")
        tree = repo.commits[commit]
        match (request.method, call):
            case ("GET" | "HEAD", "resolve"):
                if path not in tree:
                    return _error(HTTPStatus.NOT_FOUND, "Entry not found", "EntryNotFound", commit)
                headers = {"ETag": f'"{_oid(tree[path])}"', "X-Repo-Commit": commit}
                return _Reply(HTTPStatus.OK, tree[path], headers)
            case ("GET", None | "revision"):
                siblings = [{"rfilename": name, "size": len(data)} for name, data in sorted(tree.items())]
                state = {"sha": commit, "private": repo.private, "siblings": siblings}
                return _json({"id": found["repo"], "tags": [], **state})
            case ("GET", "tree"):
                entries = _entries(tree, path, request.query.get("recursive") == ["true"])
                if path and not entries:
                    return _error(HTTPStatus.NOT_FOUND, "Entry not found", "EntryNotFound", commit)
                return _json(entries)
            case ("POST", "preupload"):
                sent = [file["path"] for file in json.loads(request.body)["files"]]
                oids = {name: _oid(tree[name]) if name in tree else None for name in sent}
                mode = {"uploadMode": "regular", "shouldIgnore": False}
                return _json({"files": [{"path": name, "oid": oid, **mode} for name, oid in oids.items()]})
            case ("POST", "commit") if revision == "main" and "create_pr" not in request.query:
                header, *operations = map(json.loads, request.body.splitlines())
                if not commit.startswith(header["value"].get("parentCommit", "")):
                    return _error(HTTPStatus.PRECONDITION_FAILED, "main has moved on from the parent commit")
                oid = _oid(commit.encode() + request.body)
                repo.commits[oid] = _apply_commit(tree, operations)
                url = f"{self.endpoint}/{found['repo']}/commit/{oid}"
                return _json({"success": True, "commitOid": oid, "commitUrl": url})
        return _error(HTTPStatus.NOT_IMPLEMENTED, f"not served here: {request.method} {request.path}")

    def _create(self, payload: dict[str, Any]) -> _Reply:
        if payload.get("type", "model") != "model":
            return _error(HTTPStatus.NOT_IMPLEMENTED, "only model repositories are served here")
        repo_id = f"{payload.get('organization') or self.user}/{payload['name']}"
        answer = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self._repos:
            return _json({**answer, "error": "You already created this model repo"}, HTTPStatus.CONFLICT)
        self._repos[repo_id] = _Repo(payload.get("visibility") == "private", {_oid(repo_id.encode()): {}})
        return _json(answer)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, hub: HubServer, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        authorized = self.headers.get("Authorization", "").startswith("Bearer ")
        reply = self.hub.answer(_Request(self.command, url.path, parse_qs(url.query), authorized, body))
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output free of access lines."""
