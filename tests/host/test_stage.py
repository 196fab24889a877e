# SPDX-License-Identifier: Apache-2.0
"""The local folder that mirrors a workdir in a bucket."""

import os
from types import SimpleNamespace

import pytest

import opsd_jax
from opsd_jax.errors import UserError
from opsd_jax.evaluation.generations import GENERATIONS_FILE
from opsd_jax.evaluation.runs import parse_workdir
from opsd_jax.host import lease
from opsd_jax.host.bucket import BucketError
from opsd_jax.host.guard import forget_verdict, restored_step, write_verdict
from opsd_jax.host.lease import Lease
from opsd_jax.host.lock import only_writer
from opsd_jax.host.metrics import MetricWriters
from opsd_jax.host.progress import ProgressLine
from opsd_jax.host.stage import Stage, fetch, local, shown, stage_of, upload
from opsd_jax.run.finished_run import say


def content(folder) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_what_one_process_uploads_another_fetches(bucket_run):
    one, two = Stage(bucket_run), Stage(bucket_run)
    (one.folder / "samples").mkdir()
    (one.folder / "metrics.jsonl").write_text("1\n")
    (one.folder / "samples" / "step_1.jsonl").write_text("s")
    for unfinished in ("metrics.jsonl.tmp", ".hidden", "1.0.0.incompleteX"):
        (one.folder / unfinished).write_text("unfinished")
    (one.folder / "checkpoints").mkdir()
    (one.folder / "checkpoints" / "x").write_text("goes another way")
    one.upload()
    assert bucket_run.names() == ["metrics.jsonl", "samples/step_1.jsonl"]
    two.fetch()
    assert content(two.folder) == {"metrics.jsonl": "1\n", "samples/step_1.jsonl": "s"}
    with (one.folder / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    (one.folder / "samples" / "step_1.jsonl").unlink()  # not by us: as a cleaning of /tmp
    one.upload()
    assert (bucket_run / "samples/step_1.jsonl").is_file()
    two.fetch()
    assert content(two.folder)["metrics.jsonl"] == "1\n2\n"


def test_what_is_taken_back_is_taken_back_in_the_bucket(bucket_run):
    folder, other = local(str(bucket_run)), Stage(bucket_run)
    write_verdict(folder, [], 3)
    with MetricWriters(folder) as writers:
        writers.write_samples(2, [{"id": "1"}])
        writers.write_samples(4, [{"id": "1"}])
    upload(folder)
    other.fetch()
    assert bucket_run.names() == [
        "guard.json",
        "metrics.jsonl",
        "samples/step_000002.jsonl",
        "samples/step_000004.jsonl",
    ]
    forget_verdict(folder)
    with MetricWriters(folder, resumed_step=3):
        upload(folder)
    other.fetch()
    left = ["metrics.jsonl", "samples/step_000002.jsonl"]
    assert bucket_run.names() == left == sorted(content(other.folder))


def test_what_the_store_did_not_delete_is_deleted_by_the_next_upload(bucket_run, monkeypatch):
    folder = local(str(bucket_run))
    write_verdict(folder, [], 3)
    upload(folder)
    forget_verdict(folder)

    def away(path):
        raise BucketError(f"cannot delete {path}: UNAVAILABLE")

    with monkeypatch.context() as patch, pytest.raises(BucketError, match="UNAVAILABLE"):
        patch.setattr(type(bucket_run), "unlink", away)
        upload(folder)
    upload(folder)
    assert bucket_run.names() == []


def test_only_what_has_changed_travels(bucket_run, monkeypatch):
    stage = Stage(bucket_run)
    for name in ("a", "b"):
        (stage.folder / name).write_text(name)
    stage.upload()
    written, read = [], []
    path = type(bucket_run)
    write, reads = path.write, path.read
    monkeypatch.setattr(path, "write", lambda s, c: (written.append(str(s)), write(s, c))[1])
    (stage.folder / "a").write_text("longer")
    stage.upload()
    assert written == [f"{bucket_run}/a"]

    def noted(self, unless=None):
        found = reads(self, unless)
        read.append(found[0])
        return found

    monkeypatch.setattr(path, "read", noted)
    (bucket_run / "b").write(b"another's")
    stage.fetch()
    assert sorted(read, key=str) == [None, b"another's"]
    assert content(stage.folder) == {"a": "longer", "b": "another's"}


def test_a_folder_that_goes_while_the_stage_is_walked_stops_no_upload(bucket_run, monkeypatch):
    stage, list_folder = Stage(bucket_run), os.scandir
    (stage.folder / "data" / "1.0.0.incompleteX").mkdir(parents=True)
    (stage.folder / "metrics.jsonl").write_text("1\n")

    def renamed_meanwhile(path):
        if str(path).endswith("incompleteX"):
            raise FileNotFoundError(path)
        return list_folder(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", renamed_meanwhile)
        stage.upload()
    assert bucket_run.names() == ["metrics.jsonl"]


def test_an_object_that_would_lie_outside_of_the_folder_is_left(bucket_run):
    stage = Stage(bucket_run)
    spec = stage.source._spec
    import tensorstore as ts

    from opsd_jax.host.bucket import CONTEXT

    store = ts.KvStore.open(spec, context=CONTEXT).result()
    key = str(bucket_run).removeprefix("gs://memory/")
    for name in ("../../evil", "/etc/evil", "a/../../../evil", "a//b", "fine"):
        store.write(f"{key}/{name}", b"x").result()
    stage.fetch()
    assert content(stage.folder) == {"fine": "x"}


def test_a_writer_has_what_the_bucket_has_and_leaves_what_it_wrote(bucket_run):
    folder = local(str(bucket_run))
    assert stage_of(folder / "eval" / "x") and stage_of("/tmp/x") is None
    assert shown(folder) == str(bucket_run) and shown(folder / "a/b") == f"{bucket_run}/a/b"
    (bucket_run / "config.gin").write(b"written since")
    with only_writer(folder, print):
        assert content(folder) == {"config.gin": "written since"}
        assert bucket_run.names() == [".lock", "config.gin"]
        (folder / "metrics.jsonl").write_text("1\n")
    assert bucket_run.names() == ["config.gin", "metrics.jsonl"]
    with pytest.raises(UserError, match="the loss"), only_writer(folder, print):
        (folder / "metrics.jsonl").write_text("1\n2\n")
        raise UserError("the loss")
    assert (bucket_run / "metrics.jsonl").read_text() == "1\n2\n" and not (
        bucket_run / ".lock"
    ).is_file()


def test_who_has_lost_the_lock_uploads_nothing(bucket_run):
    stage = Stage(bucket_run)
    stage.lease, other = (Lease(bucket_run / ".lock", 0.2) for _ in range(2))
    stage.lease.take(print)
    other.take(print)
    (stage.folder / "metrics.jsonl").write_text("mine")
    with pytest.raises(UserError, match="has taken over"):
        stage.upload()
    assert bucket_run.names() == [".lock"]


def test_who_was_refused_the_lock_has_none(bucket_run, monkeypatch):
    folder, other = local(str(bucket_run)), Lease(bucket_run / ".lock")
    other.take(print)
    monkeypatch.setattr(Lease.__init__, "__defaults__", (0.2,))
    with pytest.raises(UserError, match="another command is writing"):
        with only_writer(folder, lambda text: other.renew()):
            pass
    (folder / "tokens.jsonl").write_text("{}")
    upload(folder)  # as `opsd tokens`, which asks for no lock
    assert bucket_run.names() == [".lock", "tokens.jsonl"]


def test_the_lock_is_renewed_between_the_files_of_a_long_upload(bucket_run, monkeypatch):
    stage, clock, locks = Stage(bucket_run), [0.0], []
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    stage.lease, write = Lease(bucket_run / ".lock"), type(bucket_run).write
    stage.lease.take(print)
    for name in "abc":
        (stage.folder / name).write_text(name)

    def slow(path, content):
        locks.append((bucket_run / ".lock").read()[0])
        clock[0] += 40.0
        return write(path, content)

    monkeypatch.setattr(type(bucket_run), "write", slow)
    stage.upload()
    assert len(set(locks)) == 3


def test_a_folder_that_is_mounted_is_itself(tmp_path):
    assert local(tmp_path) == local(str(tmp_path)) == tmp_path
    fetch(tmp_path)
    upload(tmp_path)
    with pytest.raises(UserError, match="in buckets there are workdirs alone"):
        local("az://bucket/run")


def test_a_workdir_of_the_report_may_be_in_a_bucket_and_have_a_label(bucket_run):
    assert parse_workdir(str(bucket_run)) == (None, local(str(bucket_run)))
    assert parse_workdir(f"OPSD={bucket_run}") == ("OPSD", local(str(bucket_run)))


def test_messages_name_what_the_user_named_and_not_the_stage(bucket_run, capsys):
    url, folder = str(bucket_run), local(str(bucket_run))
    with pytest.raises(UserError, match=f"^{url}: neither config.gin"):
        opsd_jax.load_run(url)
    for name in ("guard.json", f"eval/a/{GENERATIONS_FILE}"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("damaged\n")
    (folder / "metrics.jsonl").write_text('{"step": 3}\n')
    for call, words in (
        (lambda: opsd_jax.load_run(url).samples(2), f"^{url}/samples has no samples of step 2"),
        (lambda: restored_step(folder), f"^{url}/guard.json is damaged"),
        (lambda: opsd_jax.compare_evaluations(url, url), f"^{url}/eval/a is not finished"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    say(f"{folder}/one: found")
    with ProgressLine(3) as progress:
        progress.note(f"profile: {folder}/two")
    told = capsys.readouterr()
    assert (told.out + told.err).splitlines() == [f"{url}/one: found", f"profile: {url}/two"]
