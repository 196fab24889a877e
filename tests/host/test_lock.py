# SPDX-License-Identifier: Apache-2.0
"""A folder has one writer; the next is told so, or that nothing keeps it out."""

import errno
import fcntl
import os
import shutil

import pytest

from opsd_jax.errors import UserError
from opsd_jax.host.lock import only_writer
from opsd_jax.main import main
from tests.pods import run_pod
from tests.run.test_eval import command as eval_command
from tests.run.test_eval import folder  # noqa: F401
from tests.run.test_train import command

REFUSED = "another command is writing to {}; wait for its end, or name another folder"


def test_a_second_training_or_evaluation_is_refused_and_touches_nothing(folder, capsys):  # noqa: F811
    for name, asked in (
        ("run", command(folder / "run", "train.num_steps = 1")),
        ("out", eval_command(folder, "out")),
    ):
        with only_writer(folder / name, print):
            assert main(asked) == 2
            assert os.listdir(folder / name) == [".lock"]
        told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opsd ")]
        assert told == [f"opsd {asked[0]}: {REFUSED.format(folder / name)}"]
        assert not (folder / name).exists()
        with only_writer(folder / name, print):  # the end of the other has set it free
            pass


PAIR = """
from pathlib import Path
from opsd_jax.errors import UserError
from opsd_jax.host.lock import only_writer

jax.distributed.initialize()
try:
    with only_writer(Path(arguments[0]), print):
        print("took it")
except UserError as error:
    print(error)
"""


def test_no_process_of_a_pod_waits_for_one_that_was_refused(tmp_path):
    with only_writer(tmp_path, print):
        (first, _), (second, _) = run_pod(PAIR, tmp_path)
    assert first.splitlines()[-1] == REFUSED.format(tmp_path)
    assert second.splitlines()[-1] == f"{tmp_path} cannot be used; process 0 tells why"
    assert [text.splitlines()[-1] for text, _ in run_pod(PAIR, tmp_path)] == ["took it"] * 2


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    said = []
    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_writer(tmp_path, said.append):
        assert len(said) == 1 and "cannot be locked (No locks available)" in said[0]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file"):
        with only_writer(tmp_path / "file", print):
            pass


def test_nothing_stays_where_nothing_was_unless_something_was_written(tmp_path):
    deep = tmp_path / "some" / "run"
    for is_made, left in ((False, []), (True, [".lock"])):
        if is_made:
            deep.mkdir(parents=True)
            (deep / ".lock").touch()
        with pytest.raises(UserError, match="refused"), only_writer(deep, print):
            raise UserError("refused")
        assert sorted(path.name for path in tmp_path.rglob(".lock")) == left
        assert deep.parent.exists() == is_made
    with only_writer(tmp_path / "other", print):
        (tmp_path / "other" / "config.gin").touch()
    assert sorted(os.listdir(tmp_path / "other")) == [".lock", "config.gin"]


def test_a_lock_that_its_owner_removed_is_made_again(tmp_path, monkeypatch):
    """Opened while another command held it, locked after that one has ended and removed it."""
    numbers = []

    def removed_first(file, how):
        numbers.append(os.fstat(file.fileno()).st_nlink)
        if len(numbers) == 1:
            (tmp_path / "run" / ".lock").unlink()
            (tmp_path / "run").rmdir()

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with only_writer(tmp_path / "run", print):
        assert len(numbers) == 2 and (tmp_path / "run" / ".lock").exists()
    assert os.listdir(tmp_path) == []


def test_a_link_to_what_is_not_there_is_named_and_stays(tmp_path):
    link = tmp_path / "runs"
    link.symlink_to(tmp_path / "not_mounted")
    for place in (link, link / "some" / "run"):
        with pytest.raises(UserError, match=f"{link} is a link to what is not there"):
            with only_writer(place, print):
                pass
        assert link.is_symlink()


def test_the_reason_is_told_though_the_folder_is_gone(tmp_path):
    with pytest.raises(UserError, match="the true reason"), only_writer(tmp_path / "run", print):
        shutil.rmtree(tmp_path / "run")
        raise UserError("the true reason")
