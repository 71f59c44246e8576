"""A small Hugging Face Hub on the loopback, for tests.

Model repositories live in memory; the unmodified client reaches them over HTTP with `HF_ENDPOINT` set to
`hub.url`. Answers, headers and error texts follow the real Hub as far as the client looks at them. Left out:
pull requests, Xet, revisions with a slash in their name.

`signed_in` has the client of this process talk to the hub. `HF_*` variables are read when huggingface_hub is
imported: `run_clients` runs code that must read them, or import something first, in a process of its own, which costs
several seconds. Both disable Xet, or the client would take files called "lfs" there.
"""

import asyncio
import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from unittest import mock

import uvicorn
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import constants, file_download, hf_api, utils
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

ORGS = {"alice": ["org"], "bob": []}
READS = ("GET", "HEAD")
LOOPBACK = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


class HubError(Exception):
    """An answer that the client raises an error for."""

    def __init__(self, status, message, code=None, headers=None, **body):
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.body = {"error": message, **body}


@dataclass(frozen=True)
class Commit:
    sha: str
    files: dict[str, bytes]
    title: str
    message: str
    author: str
    date: str
    parents: tuple["Commit", ...]  # all of them, the newest first


@dataclass
class Repo:
    id: str
    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, Commit] = field(default_factory=dict)

    def commit(self, files, title, author, message="", branch="main"):
        head = self.branches.get(branch)
        # The number of the commit keeps two commits of one content apart, as the date does in git.
        content = [self.id, len(self.commits), title, sorted((path, git_sha(data)) for path, data in files.items())]
        sha = hashlib.sha1(repr(content).encode()).hexdigest()
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        parents = (head, *head.parents) if head else ()
        self.branches[branch] = Commit(sha, dict(files), title, message, author, date, parents)
        self.commits.append(self.branches[branch])
        return self.branches[branch]

    def find(self, revision):
        known = {commit.sha: commit for commit in self.commits} | self.branches
        if revision not in known:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return known[revision]


@dataclass
class Call:
    """What a handler is told of a request; `repo` is None where the address names none."""

    params: dict
    body: bytes
    user: str | None
    repo: Repo | None

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def commit(self):
        return self.repo.find(self.params.get("rev", "main"))


def is_lfs(path):
    return path.endswith((".safetensors", ".png"))


def git_sha(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def file_sha(path, data):
    """The hash the Hub knows the file by: its ETag, and what the client compares before an upload."""
    return hashlib.sha256(data).hexdigest() if is_lfs(path) else git_sha(data)


class Hub:
    """The server and its state: `with Hub() as hub:` runs it in a thread.

    Switches: `down` answers 503 to everything; `refuse_uploads` holds the numbers (from 1) of the PUTs of lfs files
    that are answered 403; `after_commit` is called after each commit, which then loses the connection instead of being
    answered. `uploads` records the sha256 of each lfs file stored. `stop()` closes the port, as with no network.
    """

    def __init__(self):
        self.tokens = {"hf_alice": "alice", "hf_bob": "bob"}
        self.repos = {}
        self.blobs = {}
        self.uploads = []
        self.puts = 0
        self.refuse_uploads = set()
        self.after_commit = None
        self.down = False
        self.app = Starlette(routes=self.routes(), exception_handlers={HubError: self.refuse})

    def __enter__(self):
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        # h11 is named because `drop` reaches into its connection, asgi3 because uvicorn misreads bound methods.
        options = {"http": "h11", "interface": "asgi3", "lifespan": "off", "timeout_graceful_shutdown": 1}
        self.server = uvicorn.Server(uvicorn.Config(self.serve, log_level="error", **options))
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()
        while not self.server.started and self.thread.is_alive():
            time.sleep(0.005)
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        self.server.should_exit = True
        self.thread.join()

    def add_repo(self, name, files=None, author="alice", **options):
        """Make a repository, as the tests may do without a client."""
        self.repos[name] = repo = Repo(name, **options)
        first = repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit", author)
        if files:
            repo.commit(first.files | files, "Add files", author)
        return repo

    def routes(self):
        api, lfs = "/api/models/{space}/{name}", "/{space}/{name}.git/info/lfs/objects"
        table = [
            ("GET", "/api/whoami-v2", self.whoami),
            ("POST", "/api/validate-yaml", self.validate_yaml),
            ("POST", "/api/repos/create", self.create_repo),
            ("GET", "/{space}/{name}/resolve/{rev}/{path:path}", self.resolve),
            ("GET", api, self.model_info),
            ("GET", api + "/revision/{rev}", self.model_info),
            ("GET", api + "/tree/{rev}", self.tree),
            ("GET", api + "/commits/{rev}", self.commits),
            ("POST", api + "/branch/{branch}", self.create_branch),
            ("POST", api + "/preupload/{rev}", self.preupload),
            ("POST", api + "/commit/{rev}", self.commit),
            ("POST", lfs + "/batch", self.lfs_batch),
            ("POST", lfs + "/verify", self.lfs_verify),
        ]
        routes = [Route(path, self.endpoint(handler), methods=[method]) for method, path, handler in table]
        return [*routes, Route("/lfs/{oid}", self.put_blob, methods=["PUT"])]

    def endpoint(self, handler):
        async def answer(request):
            user, repo = self.user(request), None
            if "name" in request.path_params:
                repo = self.readable(request, user) if request.method in READS else self.writable(request, user)
            body = await request.body()
            reply = handler(Call(request.path_params, body, user, repo))
            if handler == self.commit and self.after_commit:
                self.after_commit()
                await self.drop(request)
                return Response()
            return reply if isinstance(reply, Response) else JSONResponse(reply)

        return answer

    async def serve(self, scope, receive, send):
        app = JSONResponse({"error": "Service Unavailable"}, 503) if self.down else self.app
        await app(scope, receive, send)

    async def refuse(self, request, error):
        return JSONResponse(error.body, error.status, error.headers)

    def user(self, request):
        """The name behind the token; None without a token."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens and request.method in READS:
            raise HubError(401, "Invalid credentials in Authorization header")
        if token and token not in self.tokens:
            self.ask_to_log_in(request.path_params)
        return self.tokens.get(token)

    def ask_to_log_in(self, params):
        # Over https the client takes such a 401 on a repository for a missing one; over http it needs the code.
        raise HubError(401, "Invalid username or password.", "RepoNotFound" if "name" in params else None)

    def owns(self, user, space):
        return space == user or space in ORGS.get(user, [])

    def readable(self, request, user):
        space = request.path_params["space"]
        repo = self.repos.get(f"{space}/{request.path_params['name']}")
        if repo and (not repo.private or self.owns(user, space)):
            return repo
        if user is None:
            self.ask_to_log_in(request.path_params)
        raise HubError(404, "Repository not found", "RepoNotFound")

    def writable(self, request, user):
        repo = self.readable(request, user)
        if user is None:
            self.ask_to_log_in(request.path_params)
        if not self.owns(user, request.path_params["space"]):
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def whoami(self, call):
        if call.user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in ORGS.get(call.user, [])]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "name": call.user, "fullname": call.user, "orgs": orgs, "auth": auth}

    def validate_yaml(self, call):
        """Asked without a token by `ModelCard.validate`."""
        return {"errors": [], "warnings": []}

    def create_repo(self, call):
        if call.user is None:
            self.ask_to_log_in(call.params)
        space = call.json.get("organization") or call.user
        if not self.owns(call.user, space):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{space}"')
        name = f"{space}/{call.json['name']}"
        if name in self.repos:
            raise HubError(409, "You already created this model repo", url=f"{self.url}/{name}")
        # huggingface_hub 0.34 says "private", later releases "visibility".
        private = bool(call.json.get("private")) or call.json.get("visibility") == "private"
        self.add_repo(name, author=call.user, private=private)
        return {"url": f"{self.url}/{name}", "name": name}

    def resolve(self, call):
        path, commit = call.params["path"], call.commit
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        data = commit.files[path]
        headers |= {"ETag": f'"{file_sha(path, data)}"', "Accept-Ranges": "bytes"}
        if is_lfs(path):
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(data))}
        return Response(data, 200, headers)

    def model_info(self, call):
        repo, commit = call.repo, call.commit
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        about = {"lastModified": commit.date, "private": repo.private, "tags": [], "siblings": siblings}
        return {"id": repo.id, "author": repo.id.split("/")[0], "sha": commit.sha, **about}

    def tree(self, call):
        rows = []
        for path, data in sorted(call.commit.files.items()):
            rows.append({"type": "file", "path": path, "size": len(data), "oid": git_sha(data)})
            if is_lfs(path):
                rows[-1]["lfs"] = {"oid": file_sha(path, data), "size": len(data), "pointerSize": 134}
        return JSONResponse(rows)

    def commits(self, call):
        return [
            {"id": at.sha, "title": at.title, "message": at.message, "date": at.date, "authors": [{"user": at.author}]}
            for at in (call.commit, *call.commit.parents)
        ]

    def create_branch(self, call):
        call.repo.branches[call.params["branch"]] = call.repo.find(call.json.get("startingPoint", "main"))
        return {}

    def preupload(self, call):
        answers, files = [], call.commit.files
        for path in (wanted["path"] for wanted in call.json["files"]):
            mode = "lfs" if is_lfs(path) else "regular"
            sha = file_sha(path, files[path]) if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": sha})
        return {"files": answers}

    def lfs_batch(self, call):
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in call.json["objects"]]
        for answer in objects:
            if answer["oid"] not in self.blobs:  # no actions: nothing to send
                upload = {"href": f"{self.url}/lfs/{answer['oid']}"}
                verify = {"href": f"{self.url}/{call.repo.id}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    async def put_blob(self, request):
        """Stands for the signed address of a store, which asks for no token."""
        self.puts += 1
        number, sha = self.puts, request.path_params["oid"]
        data = await request.body()
        if number in self.refuse_uploads:
            raise HubError(403, "Request has expired")
        if hashlib.sha256(data).hexdigest() != sha:
            raise HubError(400, "The content does not match its sha256")
        self.blobs[sha] = data
        self.uploads.append(sha)
        return Response()

    async def drop(self, request):
        # ASGI has no way to drop a connection; uvicorn's `receive` is a method of the object that holds it.
        request.receive.__self__.transport.abort()
        await asyncio.sleep(0)  # until uvicorn has noticed: else it complains of the answer that is missing

    def lfs_verify(self, call):
        return {}

    def commit(self, call):
        branch, repo = call.params["rev"], call.repo
        if branch not in repo.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header, *changes = map(json.loads, call.body.splitlines())
        head, about = repo.branches[branch], header["value"]
        if about.get("parentCommit", head.sha) != head.sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for change in changes:
            self.change(files, change["key"], **change["value"])
        done = repo.commit(files, about["summary"], call.user, about.get("description", ""), branch)
        return {"success": True, "commitOid": done.sha, "commitUrl": f"{self.url}/{repo.id}/commit/{done.sha}"}

    def change(self, files, key, path, content="", oid="", **_):
        if key == "file":
            files[path] = base64.b64decode(content)
        elif key == "lfsFile" and oid in self.blobs:
            files[path] = self.blobs[oid]
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"{key} {path} cannot be committed")


@contextmanager
def signed_in(hub, home, offline=False, token="hf_alice"):
    """Within it, the client of this process talks to the hub, and keeps its cache and logins under `home`."""
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    template = settings["HUGGINGFACE_CO_URL_TEMPLATE"]  # which huggingface_hub before 1.0 has twice
    with (
        mock.patch.multiple(constants, **settings),
        mock.patch.object(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, create=True),
        mock.patch.object(hf_api.api, "endpoint", hub.url),
        mock.patch.object(dynamic_modules_utils, "HF_MODULES_CACHE", str(home / "modules")),
        mock.patch.dict(os.environ, {**LOOPBACK, "HF_TOKEN": token}),
    ):
        # The client connects anew: some releases keep a session that was made offline. The second is of before 1.0.
        forget_sessions = getattr(utils, "close_session", None) or utils.reset_sessions
        forget_sessions()
        try:
            yield
        finally:
            forget_sessions()


FORKS = """
import json, os, sys, traceback
from diffusers import DDPMPipeline
for place, code in enumerate(json.loads(sys.stdin.read())):
    if (child := os.fork()) == 0:
        for stream in (1, 2):
            os.dup2(os.open(f"{place}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
        status = 1
        try:
            exec(code, {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run_clients(codes, hub, home):
    """Runs pieces of Python code, each in a process that has imported diffusers and whose client talks to the hub.

    Returns the completed processes. They share one import, which takes longer than they do, and what `home` caches.
    """
    home.mkdir(parents=True, exist_ok=True)
    disabled = [f"HF_HUB_DISABLE_{what}" for what in ("XET", "TELEMETRY", "UPDATE_CHECK", "PROGRESS_BARS")]
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), **LOOPBACK, **dict.fromkeys(disabled, "1")}
    others = {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORM"))}
    options = {"env": others | ours, "cwd": home, "text": True, "check": True, "timeout": 600}
    run = subprocess.run([sys.executable, "-c", FORKS], input=json.dumps(codes), stdout=subprocess.PIPE, **options)
    told = [[(home / f"{place}.{stream}").read_text() for stream in (1, 2)] for place in range(len(codes))]
    statuses = map(int, run.stdout.split())
    return [subprocess.CompletedProcess(*each) for each in zip(codes, statuses, *zip(*told, strict=True), strict=True)]
