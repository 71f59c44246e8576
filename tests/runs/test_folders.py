"""Output folders are claimed, locked and replaced so that nothing is lost."""

import errno
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hsivi_diffusers.runs import folders
from hsivi_diffusers.runs.folders import claim_output_dir, in_turn, sole_writer


def test_a_new_output_folder_is_made_with_its_parents(tmp_path):
    path = claim_output_dir(str(tmp_path / "a" / "b"), keep=False)
    assert path == tmp_path / "a" / "b"
    assert path.is_dir()
    assert claim_output_dir(str(path), keep=False) == path


def test_a_filled_output_folder_is_refused_unless_it_may_be_kept(tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match="is not empty.*--overwrite_output_dir"):
        claim_output_dir(str(tmp_path), keep=False)
    assert claim_output_dir(str(tmp_path), keep=True) == tmp_path
    assert os.listdir(tmp_path) == ["precious"]


@pytest.mark.parametrize("keep", [False, True])
def test_a_file_or_no_name_is_no_output_folder(tmp_path, keep):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        claim_output_dir(str(tmp_path / "file"), keep)
    with pytest.raises(ValueError, match="--output_dir is missing"):
        claim_output_dir(None, keep)


def test_a_folder_has_one_writer_and_is_not_filled_by_its_lock(tmp_path):
    first = sole_writer(tmp_path)
    with first, pytest.raises(ValueError, match="is being written by another run"), sole_writer(tmp_path):
        pass
    with sole_writer(tmp_path):
        pass
    assert claim_output_dir(str(tmp_path), keep=False) == tmp_path


def test_processes_write_in_turn(tmp_path):
    """A lock is of the handle, and each has its own, so threads wait as processes do."""
    there, leave, order = threading.Event(), threading.Event(), []

    def first():
        with in_turn(tmp_path):
            there.set()
            leave.wait(10)
            order.append("first")

    def second():
        with in_turn(tmp_path):
            order.append("second")

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(first)]
        there.wait(10)
        running.append(pool.submit(second))
        assert not running[1].done()
        leave.set()
        for each in running:
            each.result(10)
    assert order == ["first", "second"]


def test_a_writer_that_is_killed_leaves_no_lock(tmp_path):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with sole_writer(tmp_path):
            os.write(writing, b"locked")
            time.sleep(60)
        os._exit(0)
    assert os.read(reading, 6) == b"locked"
    with pytest.raises(ValueError, match="is being written by another run"), sole_writer(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with sole_writer(tmp_path):
        pass


@pytest.mark.parametrize("lock", [sole_writer, in_turn])
@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_where_there_are_no_locks_a_run_is_warned_and_goes_on(tmp_path, monkeypatch, lock, error):
    def fail(self):
        raise error

    monkeypatch.setattr(folders.FileLock, "acquire", fail)
    with pytest.warns(UserWarning, match="cannot be locked .*: let no second run write to it"), lock(tmp_path):
        (tmp_path / "written").touch()
