# SPDX-License-Identifier: Apache-2.0
"""A file is whole or the old one; what is read is what was whole."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd_jax.errors import UserError
from opsd_jax.host.files import read_json_lines, write_json_lines, write_whole

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
    assert read_json_lines(path, "step") == []
    path.write_text('{"step": 1}\n[1]\n7\n{"step": "2"}\n{}\n{"step": 3}\n{"step": 3, "x": 0}\n')
    assert read_json_lines(path, "step") == [{"step": 1}, {"step": 3}]
    assert len(read_json_lines(path)) == 5


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path):
    write_whole(tmp_path / "a", "old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write .*folder: Is a directory"):
        write_whole(tmp_path / "folder", "new")
    with pytest.raises(UserError, match="cannot write .*a/b"):
        write_whole(tmp_path / "a" / "b", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["a", "folder"]
