"""The Hub of the tests, through the unmodified client: what goes in comes out, and the errors are the real ones."""

import contextlib
import hashlib
import io

import huggingface_hub
import huggingface_hub.errors
import pytest

from hub_server import signed_in

CARD = b"---\nlicense: mit\nlibrary_name: diffusers\ntags: [toy]\n---\n# A model\n"
FILES = {"README.md": CARD, "config.json": b"{}", "unet/w.safetensors": b"w" * 300_000, "grid.png": b"png"}


@pytest.fixture
def folder(tmp_path):
    for name, data in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "folder"


def ask(code, hub, home, token=None, offline=False):
    """What the code prints, with huggingface_hub as `hf`."""
    with signed_in(hub, home, token, offline), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {"hf": huggingface_hub})
    return printed.getvalue().strip()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def puts(hub):
    return [path for method, path in hub.requests if method == "PUT"]


def test_an_uploaded_folder_is_stored_and_its_large_files_are_sent_once(hub, folder, tmp_path):
    code = f"""
for name in ("alice/model", "org/copy"):
    hf.create_repo(name)
    first = hf.upload_folder(repo_id=name, folder_path={str(folder)!r}, commit_message="Add the model")
    again = hf.upload_folder(repo_id=name, folder_path={str(folder)!r})
    print(first.oid == again.oid, hf.create_repo(name, exist_ok=True).repo_id)
"""
    assert ask(code, hub, tmp_path, "hf_alice") == "True alice/model\nTrue org/copy"
    for name in ("alice/model", "org/copy"):
        head = hub.repos[name].branches["main"]
        assert head.files.items() >= FILES.items()
        assert (head.title, head.author) == ("Add the model", "alice")
    large = {sha256(FILES["unet/w.safetensors"]), sha256(FILES["grid.png"])}
    assert len(hub.uploads) == len(puts(hub)) == 2
    assert set(hub.uploads) == large


def test_a_snapshot_is_that_of_its_revision(hub, tmp_path):
    repo = hub.add_repo("alice/model", {"config.json": b"old", "w.safetensors": b"w"})
    first = repo.branches["main"]
    repo.commit(first.files | {"config.json": b"new"}, "Second", "alice")
    code = f"""
for revision in (None, "main", {first.sha!r}):
    with open(hf.snapshot_download("alice/model", revision=revision) + "/config.json") as file:
        print(file.read())
print([commit.title for commit in hf.list_repo_commits("alice/model")])
"""
    printed = ask(code, hub, tmp_path)
    assert printed.splitlines() == ["new", "new", "old", "['Second', 'Add files', 'initial commit']"]


@pytest.mark.parametrize("state", ["offline", "down", "stopped"])
def test_the_cache_serves_without_the_hub(hub, tmp_path, state):
    hub.add_repo("alice/model", FILES)
    code = 'print(hf.snapshot_download("alice/model"), hf.hf_hub_download("alice/model", "unet/w.safetensors"))'
    online = ask(code, hub, tmp_path)
    asked = len(hub.requests)
    hub.down = state == "down"
    if state == "stopped":
        hub.stop()
    assert ask(code, hub, tmp_path, offline=state == "offline") == online
    assert (len(hub.requests) > asked) == (state == "down")


REFUSALS = [
    ("hf_alice", 'hf.model_info("alice/none")', "RepositoryNotFoundError", 404, "Repository Not Found"),
    (None, 'hf.snapshot_download("alice/none")', "RepositoryNotFoundError", 401, "Invalid username or password."),
    ("hf_bob", 'hf.model_info("org/private")', "RepositoryNotFoundError", 404, "Repository Not Found"),
    ("hf_alice", 'hf.snapshot_download("org/m", revision="v9")', "RevisionNotFoundError", 404, "Invalid rev id: v9"),
    ("hf_alice", 'hf.hf_hub_download("org/m", "no.txt")', "EntryNotFoundError", 404, "Entry Not Found"),
    ("hf_wrong", 'hf.model_info("org/m")', "HfHubHTTPError", 401, "Invalid credentials in Authorization header"),
    ("hf_wrong", 'hf.create_repo("alice/new")', "HfHubHTTPError", 401, "Invalid username or password."),
    ("hf_alice", 'hf.create_repo("org/m")', "HfHubHTTPError", 409, "You already created this model repo"),
    ("hf_bob", 'hf.create_repo("org/new")', "HfHubHTTPError", 403, "don't have the rights to create a model"),
    ("hf_bob", 'hf.HfApi().create_branch("org/m", branch="v1")', "HfHubHTTPError", 403, "pass `create_pr=1`"),
]


@pytest.mark.parametrize(("token", "call", "error", "status", "message"), REFUSALS)
def test_a_refusal_is_the_error_of_the_real_hub(hub, tmp_path, token, call, error, status, message):
    hub.add_repo("org/m")
    hub.add_repo("org/private", private=True)
    code = f"""
try:
    {call}
except hf.errors.{error} as error:
    print(error.response.status_code, error)
"""
    printed = ask(code, hub, tmp_path, token)
    assert printed.startswith(str(status))
    assert message in printed
