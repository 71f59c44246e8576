"""The Hub of the tests, through the unmodified client: what goes in comes out, and the errors are the real ones."""

import contextlib
import hashlib
import io
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import huggingface_hub
import huggingface_hub.errors
import pytest
import safetensors.torch
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from hub_server import client_env, signed_in
from tiny_unet import make_unet

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


def test_the_hub_is_reached_beside_a_proxy_of_the_machine(hub, tmp_path, monkeypatch):
    """Of the two spellings of a variable the lower-case one wins."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "elsewhere.example")
    assert ask("print(hf.whoami()['name'])", hub, tmp_path, "hf_alice") == "alice"


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
    first = repo.tags["v1"] = repo.branches["main"]
    repo.commit(first.files | {"config.json": b"new"}, "Second", "alice")
    code = f"""
for revision in (None, "main", "v1", {first.sha!r}):
    with open(hf.snapshot_download("alice/model", revision=revision) + "/config.json") as file:
        print(file.read())
print([commit.title for commit in hf.list_repo_commits("alice/model")])
"""
    printed = ask(code, hub, tmp_path)
    assert printed.splitlines() == ["new", "new", "old", "old", "['Second', 'Add files', 'initial commit']"]


def test_tags_branches_and_deletions(hub, tmp_path):
    hub.add_repo("alice/model", FILES)
    code = """
api = hf.HfApi()
api.create_tag("alice/model", tag="v1")
api.create_branch("alice/model", branch="dev")
api.delete_folder("unet", "alice/model")
api.delete_file("grid.png", "alice/model", revision="dev")
print([ref.name for refs in (api.list_repo_refs("alice/model"),) for ref in refs.tags + refs.branches])
print([file.path for file in api.list_repo_tree("alice/model", revision="dev")])
api.delete_repo("alice/model")
"""
    branches, tree = ask(code, hub, tmp_path, "hf_alice").splitlines()
    assert branches == "['v1', 'main', 'dev']"
    assert tree == "['.gitattributes', 'README.md', 'config.json', 'unet']"
    assert hub.repos == {}


def test_the_model_info_is_read_from_the_card(hub, tmp_path):
    hub.add_repo("alice/model", FILES)
    code = """
info = hf.model_info("alice/model")
print(info.tags, info.library_name, info.card_data.license, len(info.siblings), info.private, info.gated)
"""
    assert ask(code, hub, tmp_path) == "['diffusers', 'toy', 'license:mit'] diffusers mit 5 False False"


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


GATED = 'hf.hf_hub_download("alice/gated", "config.json")'
REFUSALS = [
    ("hf_alice", 'hf.model_info("alice/none")', "RepositoryNotFoundError", 404, "Repository Not Found"),
    (None, 'hf.snapshot_download("alice/none")', "RepositoryNotFoundError", 401, "Invalid username or password."),
    ("hf_bob", 'hf.model_info("org/private")', "RepositoryNotFoundError", 404, "Repository Not Found"),
    ("hf_bob", GATED, "GatedRepoError", 403, "you are not in the authorized list"),
    (None, GATED, "GatedRepoError", 401, "Please log in."),
    ("hf_alice", 'hf.snapshot_download("org/m", revision="v9")', "RevisionNotFoundError", 404, "Invalid rev id: v9"),
    ("hf_alice", 'hf.hf_hub_download("org/m", "no.txt")', "EntryNotFoundError", 404, "Entry Not Found"),
    ("hf_wrong", 'hf.model_info("org/m")', "HfHubHTTPError", 401, "Invalid credentials in Authorization header"),
    ("hf_wrong", 'hf.create_repo("alice/new")', "HfHubHTTPError", 401, "Invalid username or password."),
    ("hf_alice", 'hf.create_repo("org/m")', "HfHubHTTPError", 409, "You already created this model repo"),
    ("hf_bob", 'hf.create_repo("org/new")', "HfHubHTTPError", 403, "don't have the rights to create a model"),
    ("hf_bob", 'hf.HfApi().create_tag("org/m", tag="v1")', "HfHubHTTPError", 403, "pass `create_pr=1`"),
]


@pytest.mark.parametrize(("token", "call", "error", "status", "message"), REFUSALS)
def test_a_refusal_is_the_error_of_the_real_hub(hub, tmp_path, token, call, error, status, message):
    hub.add_repo("org/m")
    hub.add_repo("org/private", private=True)
    hub.add_repo("alice/gated", {"config.json": b"{}"}, gated="auto")
    code = f"""
try:
    {call}
except hf.errors.{error} as error:
    print(error.response.status_code, error)
"""
    printed = ask(code, hub, tmp_path, token)
    assert printed.startswith(str(status))
    assert message in printed


def test_a_gated_repository_opens_to_its_readers_and_shows_its_info_to_all(hub, tmp_path):
    hub.add_repo("alice/gated", {"config.json": b"{}"}, gated="auto", readers={"bob"})
    ask(GATED, hub, tmp_path, "hf_bob")
    assert ask('print(hf.model_info("alice/gated").gated)', hub, tmp_path) == "auto"


def test_a_card_with_bad_metadata_is_refused_before_the_upload(hub, folder, tmp_path):
    (folder / "README.md").write_text("---\nlicense: [mit]\n---\n")
    hub.add_repo("alice/model")
    code = f'hf.upload_folder(repo_id="alice/model", folder_path={str(folder)!r})'
    with pytest.raises(ValueError, match='Invalid metadata in README.md.\n- "license" must be a string'):
        ask(code, hub, tmp_path, "hf_alice")
    assert not hub.uploads


def test_the_client_itself_tries_again_after_a_cut(hub, folder, tmp_path):
    hub.add_repo("alice/model")
    hub.cut_uploads = {1}
    ask(f'hf.upload_folder(repo_id="alice/model", folder_path={str(folder)!r})', hub, tmp_path, "hf_alice")
    assert len(puts(hub)) == 3
    assert len(hub.uploads) == 2
    assert hub.repos["alice/model"].branches["main"].files.items() >= FILES.items()


def test_a_second_try_sends_only_what_is_missing(hub, folder, tmp_path):
    hub.add_repo("alice/model")
    hub.refuse_uploads = {2}
    upload = f'hf.upload_folder(repo_id="alice/model", folder_path={str(folder)!r})'
    code = f"""
try:
    {upload}
except RuntimeError as error:
    print(error, "/", error.__cause__.response.status_code)
{upload}
"""
    printed = ask(code, hub, tmp_path, "hf_alice")
    assert printed.startswith("Error while uploading")
    assert printed.endswith("to the Hub. / 403")
    assert len(puts(hub)) == 3
    assert len(set(hub.uploads)) == len(hub.uploads) == 2
    assert [commit.title for commit in hub.repos["alice/model"].commits][1:] == ["Upload folder using huggingface_hub"]


def test_part_of_a_file_and_its_headers(hub):
    head = hub.add_repo("alice/model", FILES).branches["main"]
    request = Request(f"{hub.url}/alice/model/resolve/main/grid.png", headers={"Range": "bytes=1-"})
    with urlopen(request) as answer:
        assert (answer.status, answer.read()) == (206, b"ng")
        assert answer.headers["Content-Range"] == "bytes 1-2/3"
        assert answer.headers["X-Linked-ETag"] == answer.headers["ETag"] == f'"{sha256(b"png")}"'
    with urlopen(f"{hub.url}/alice/model/resolve/main/config.json") as answer:
        # git hash-object of a file that holds "{}"
        assert answer.headers["ETag"] == '"9e26dfeeb6e641a33dae4961196235bdb965b21b"'
    with pytest.raises(HTTPError) as missing:
        urlopen(f"{hub.url}/alice/model/resolve/main/none.txt")
    assert missing.value.headers["X-Repo-Commit"] == head.sha


def test_the_hf_command(hub, folder, tmp_path):
    command = [Path(sys.executable).with_name("hf"), "upload", "alice/model", folder]
    done = subprocess.run(command, env=client_env(hub, tmp_path, "hf_alice"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.repos["alice/model"].branches["main"].files.items() >= FILES.items()


def test_diffusers_pushes_and_loads_a_pipeline(hub, tmp_path):
    fresh = tmp_path / "fresh"
    with signed_in(hub, tmp_path / "home"):
        DDPMPipeline(unet=make_unet(), scheduler=DDPMScheduler()).push_to_hub("alice/ddpm")
        DDPMPipeline.from_pretrained("alice/ddpm", cache_dir=fresh)
    pushed = hub.repos["alice/ddpm"].branches["main"].files["unet/diffusion_pytorch_model.safetensors"]
    asked = len(hub.requests)
    # This process is offline again (conftest.py), so the weights can only come from what was downloaded.
    loaded = DDPMPipeline.from_pretrained("alice/ddpm", cache_dir=fresh).unet.state_dict()
    torch.testing.assert_close(loaded, safetensors.torch.load(pushed), rtol=0, atol=0)
    assert len(hub.requests) == asked
