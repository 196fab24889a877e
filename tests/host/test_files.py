# SPDX-License-Identifier: Apache-2.0
"""A file is whole or the old one; what is read is what was whole."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd_jax.errors import UserError
from opsd_jax.host.files import (
    read_json_lines,
    read_metrics,
    read_text,
    require_mounted,
    require_writable,
    write_json_lines,
    write_whole,
)

texts = st.text(st.characters(), max_size=5)  # lone surrogates and line separators too


@given(rows=st.lists(st.dictionaries(texts, texts | st.integers()), max_size=4), cut=st.integers(1))
def test_what_is_written_is_read_but_for_a_torn_line(tmp_path_factory, rows, cut):
    path = tmp_path_factory.mktemp("lines") / "new" / "a.jsonl"
    write_json_lines(path, rows)
    assert read_json_lines(path) == json.loads(json.dumps(rows))
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps({"torn": "x" * 9}).encode()[: cut % 20])
    assert read_json_lines(path) == json.loads(json.dumps(rows))
    assert os.listdir(path.parent) == ["a.jsonl"]


def test_only_objects_whose_field_rises(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n[1]\n7\n{"step": "2"}\n{}\n{"step": 3}\n{"step": 3, "x": 0}\n')
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]
    assert len(read_json_lines(path)) == 5


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path):
    write_whole(tmp_path / "a", "old")
    (tmp_path / "folder").mkdir()
    for name in (tmp_path / "folder", Path("")):
        with pytest.raises(
            UserError, match=f"cannot write '{name}': it must be the name of a file"
        ):
            write_whole(name, "new")
    with pytest.raises(UserError, match="cannot write .*a/b"):
        write_whole(tmp_path / "a" / "b", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["a", "folder"]


@pytest.mark.parametrize(
    "value", ["0.5", [1.0], {}, True, float("nan"), float("inf"), 1e300, -(10**400)]
)
def test_a_metric_is_a_number_or_as_if_it_were_not_there(value, tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_json_lines(path, [{"step": 1, "a": value, "b": 2.5, "c": None}, {"step": value}])
    assert read_metrics(path) == [{"step": 1, "b": 2.5, "c": None}]


def test_what_is_no_line_of_json_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xff\n{"step": 1}\n' + b"[" * 100_000 + b'\n{"step": 1' + b"0" * 9999 + b"}")
    assert read_metrics(path) == [{"step": 1}]


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="must be a file"):
            read_text(name)
    (tmp_path / "a").write_text("12345")
    monkeypatch.setattr("opsd_jax.host.files.MOST_BYTES", 4)
    with pytest.raises(UserError, match="a must have at most 4 bytes, not 5"):
        read_text(tmp_path / "a")


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    require_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    for folder in ("/dev/null", str(tmp_path / "file" / "c"), "/proc/x"):
        with pytest.raises(UserError, match=f"cannot write to {folder}"):
            require_writable(Path(folder))


def test_a_bucket_is_no_folder_here():
    for fine in ("runs/a", "/runs/a:b", "c:/runs", "", Path("a/b:/c")):
        require_mounted(fine)
    for bucket in ("gs://b/r", Path("gs://b/r"), "s3://b", "file:///r"):
        with pytest.raises(UserError, match="the workdir must be a path .* not '"):
            require_mounted(bucket, "the workdir")
