# SPDX-License-Identifier: Apache-2.0
"""Data as it is: layouts of the common data sets, compressed shards, splits, names of the Hub."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from opsd_jax.data.files import JsonlProblems, ParquetProblems
from opsd_jax.data.problems import AnswerGrader, hash_share
from opsd_jax.data.record import Message, Problem
from opsd_jax.errors import UserError
from tests.host.test_hub import hub  # noqa: F401

ROW = {"id": "a", "question": "1+1?", "solution": "It is 2.", "answer": "2"}
USER, SYSTEM = {"role": "user", "content": "1+1?"}, {"role": "system", "content": "Be brief."}
SAID = {"role": "assistant", "content": r"It is \boxed{2}."}
VERL = {
    "data_source": "sums",
    "prompt": [USER],
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 7, "split": "train"},
}
OPEN_INSTRUCT = {"messages": [USER], "ground_truth": ["2", "two"], "dataset": "gsm8k"}
TRL = {"prompt": [SYSTEM, USER], "completion": [SAID]}
CHAT = {"messages": [SYSTEM, USER, SAID]}


def jsonl(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return str(path)


def columns(question, solution, answer, **more):
    named = {"question_column": question, "solution_column": solution, "answer_column": answer}
    return named | more


@pytest.mark.parametrize(
    ("row", "settings", "question", "solution", "answers"),
    [
        (VERL, columns("prompt", None, "reward_model.ground_truth"), "1+1?", "", ("2",)),
        (OPEN_INSTRUCT, columns("messages", None, "ground_truth"), "1+1?", "", ("2", "two")),
        (
            TRL,
            columns("prompt", "completion", "completion", answer_from="boxed"),
            (Message("system", "Be brief."), Message("user", "1+1?")),
            SAID["content"],
            ("2",),
        ),
        (
            CHAT,
            columns("messages", "messages", None),
            (Message("system", "Be brief."), Message("user", "1+1?")),
            SAID["content"],
            ("",),
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "s"}]},
            columns("conversations", "conversations", None),
            "q",
            "s",
            ("",),
        ),
        (
            {"q": [{"role": "user", "content": [{"type": "text", "text": "parts"}]}], "a": True},
            columns("q", None, "a"),
            "parts",
            "",
            ("True", "true"),
        ),
        ({"q": "q", "a": [1, 2.50]}, columns("q", None, "a"), "q", "", ("1", "2.5")),
        ({"d": {"q": "q"}, "a": [{"v": "x"}]}, columns("d.q", None, "a.0.v"), "q", "", ("x",)),
        ({"d.q": "q", "d": {"q": "no"}, "a": "1"}, columns("d.q", None, "a"), "q", "", ("1",)),
    ],
)
def test_layouts(row, settings, question, solution, answers, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", row)
    problem = JsonlProblems(path, grader="boxed", **settings).load()[0]
    assert problem.question == question and problem.solution == solution
    assert (problem.answer, *problem.other_answers) == answers


def test_parquet_reads_nested_columns_and_messages_the_same(tmp_path):
    settings = columns("prompt", None, "reward_model.ground_truth")
    rows = [VERL, VERL | {"prompt": [SYSTEM, USER]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = ParquetProblems(str(tmp_path / "rows.parquet"), **settings).load()
    same = JsonlProblems(jsonl(tmp_path / "rows.jsonl", *rows), **settings).load()
    assert [p.question for p in found.problems] == [p.question for p in same.problems]
    assert [p.columns for p in found.problems] == [p.columns for p in same.problems]
    assert found[0].columns == {
        "data_source": "sums",
        "reward_model.style": "rule",
        "extra_info.index": "7",
        "extra_info.split": "train",
    }


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        (VERL, {}, "verl: .*'prompt', .*solution_column = None, .* = 'reward_model.ground_truth'"),
        (OPEN_INSTRUCT, {}, "open-instruct: .*question_column = 'messages'.*'ground_truth'"),
        (TRL, {}, "TRL: .*question_column = 'prompt', .*'completion'.*answer_from"),
        (CHAT, {}, "other data sets: .*'messages', .*solution_column = 'messages'"),
        (CHAT, columns("messages", None, None), "the assistant's turn, which would be lo"),
        ({"q": [SAID]}, columns("q", "q", None), "`q` asks nothing"),
        ({"q": [SYSTEM]}, columns("q", None, None), "`q` asks nothing"),
        ({"q": [USER | {"role": "tool"}]}, columns("q", None, None), "turn 1 of 'tool'"),
        ({"q": [USER | {"content": None}]}, columns("q", None, None), "turn 1 without text"),
        (
            {"q": [USER | {"content": [{"type": "image"}]}]},
            columns("q", None, None),
            "something else than text in turn 1",
        ),
        ({"q": [SAID | {"tool_calls": [{}]}]}, columns("q", None, None), "tool calls in turn 1"),
        ({"q": "q", "s": [USER]}, columns("q", "s", None), "`s` has no turn of the assistant's"),
        (
            {"q": "q", "a": "5 #### 5."},
            columns("q", None, "a", answer_from="boxed"),
            r"set JsonlProblems.answer_from \('hashes' and 'last_number' would find one",
        ),
        ({"q": "q", "a": ["5", "a b c d."]}, columns("q", None, "a"), "the key 'a b c d.' is"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_what_to_bind(row, settings, words, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", row)
    with pytest.raises(UserError, match=f"rows.jsonl:1.*{words}") as caught:
        JsonlProblems(path, **settings).load()
    assert "\n" not in str(caught.value)


def test_parquet_says_what_to_bind(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([VERL]), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="no column `answer`.*layout of verl: Parquet"):
        ParquetProblems(str(tmp_path / "rows.parquet")).load()


def test_any_of_several_answers_is_right():
    problem = Problem("a", "q", "", "2", other_answers=("two",))
    grade = AnswerGrader(lambda answer, said: float(answer == said))
    assert [grade(problem, said) for said in ("2", "two", "3")] == [1.0, 1.0, 0.0]
    told = AnswerGrader(lambda answer, said: (float(answer == said), f"not {answer}"))
    assert told(problem, "two") == (1.0, "not two")


def test_further_columns_are_kept_within_a_limit(tmp_path):
    row = ROW | {"hint": "h", "long": "x" * 4001, "none": None, "tags": ["a"], "n": 2.0}
    path = jsonl(tmp_path / "rows.jsonl", row)
    kept = {"hint": "h", "none": "", "tags": '["a"]', "n": "2"}
    assert JsonlProblems(path).load()[0].columns == kept
    found = JsonlProblems(path, keep_columns=("long",)).load()[0].columns
    assert found == {"long": "x" * 4001}


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_shards_are_read_in_order_compressed_or_not(ending, tmp_path):
    for shard in (1, 0):
        rows = [ROW | {"id": f"{shard}{i}"} for i in range(3)]
        jsonl(tmp_path / f"train-{shard:05d}{ending}", *rows)
    loaded = JsonlProblems(str(tmp_path)).load()
    assert [p.id for p in loaded.problems] == ["00", "01", "02", "10", "11", "12"]


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_a_damaged_archive_is_one_sentence(ending, tmp_path):
    rows = [ROW | {"id": str(i), "x": str(hash(str(i)))} for i in range(2000)]
    path = tmp_path / f"rows{ending}"
    jsonl(path, *rows)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"rows{ending}") as caught:
            JsonlProblems(str(path)).load()
        assert "\n" not in str(caught.value)


def test_a_line_without_end_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("opsd_jax.data.files._MOST_LINE_BYTES", 1000)
    path = jsonl(tmp_path / "rows.jsonl.gz", ROW | {"x": "0" * 2000})
    with pytest.raises(UserError, match="a line of more than 1,000 bytes"):
        JsonlProblems(path).load()


def test_rows_behind_the_slice_are_not_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    jsonl(path, ROW)
    path.write_text(path.read_text() + "no JSON\n")
    assert len(JsonlProblems(str(path), stop=1).load()) == 1


def test_a_split_by_hash_shares_no_question_whatever_the_order(tmp_path):
    rows = [ROW | {"id": str(i), "question": f"{i % 50} +  1?"} for i in range(100)]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    train = JsonlProblems(path, hash_stop=0.8).load()
    heldout = JsonlProblems(path, hash_start=0.8).load()
    assert len(train) + len(heldout) == 100 and 5 < len(heldout) < 40
    asked = [{p.question for p in part.problems} for part in (train, heldout)]
    assert not asked[0] & asked[1]
    moved = JsonlProblems(jsonl(tmp_path / "b.jsonl", *rows[::-1]), hash_start=0.8).load()
    assert {p.id for p in moved.problems} == {p.id for p in heldout.problems}
    assert hash_share("a  b\n") == hash_share("a b") and 0 <= hash_share("a b") < 1
    with pytest.raises(UserError, match="hash_stop must be above JsonlProblems.hash_start = 0.5"):
        JsonlProblems(path, hash_start=0.5, hash_stop=0.5)


def test_a_split_by_column(tmp_path):
    rows = [ROW | {"id": str(i), "part": "test" if i % 3 == 0 else "train"} for i in range(7)]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    found = JsonlProblems(path, split_column="part", split="test").load()
    assert [p.id for p in found.problems] == ["0", "3", "6"]
    with pytest.raises(UserError, match="split must be a value of `part` .* 'test', 'train', not"):
        JsonlProblems(path, split_column="part", split="dev").load()
    with pytest.raises(UserError, match="JsonlProblems.split must be one of the values"):
        JsonlProblems(path, split_column="part")


def test_splits_and_subsets_of_a_folder(tmp_path):
    for name in ("main/train-00000-of-00001", "main/test-00000-of-00001", "socratic/train"):
        jsonl(tmp_path / f"{name}.jsonl", ROW | {"question": name})
    folder = str(tmp_path)
    for subset, split, wanted in (("main", "test", "main/test"), ("socratic", "train", "socratic")):
        (found,) = JsonlProblems(folder, subset=subset, split=split).load().problems
        assert found.question.startswith(wanted)
    with pytest.raises(UserError, match="split must be one of train, test, not 'dev'"):
        JsonlProblems(folder, subset="main", split="dev").load()
    with pytest.raises(UserError, match="subset must be one of main, socratic, not 'other'"):
        JsonlProblems(folder, subset="other").load()


# ------------------------------------------------------------------------------------ the Hub


def rows_text(*names):
    return "".join(json.dumps(ROW | {"id": name}) + "\n" for name in names)


FILES = {
    "README.md": "words",
    "main/train-00000-of-00002.jsonl": rows_text("m0"),
    "main/train-00001-of-00002.jsonl": rows_text("m1"),
    "main/test-00000-of-00001.jsonl": rows_text("t"),
    "extra/train.jsonl": rows_text("e"),
    "script.py": "raise SystemExit",
}


def ids(**settings):
    return [p.id for p in JsonlProblems("me/sums", **settings).load().problems]


def test_a_data_set_by_name_split_and_subset(hub):  # noqa: F811
    hub.commit("dataset", "me/sums", FILES)
    assert ids(subset="main", split="train") == ["m0", "m1"]
    assert ids(subset="main", split="test") == ["t"]
    assert ids(subset="extra") == ["e"]
    asked = {path.rpartition("/")[2] for method, path in hub.requests if "/resolve/" in path}
    assert "script.py" not in asked and "README.md" not in asked
    with pytest.raises(UserError, match="JsonlProblems.subset must be one of extra, main, not"):
        ids()
    with pytest.raises(UserError, match="JsonlProblems.split must be one of train, test, not None"):
        ids(subset="main")
    with pytest.raises(UserError, match="no .parquet file there, only .jsonl.*@JsonlProblems"):
        ParquetProblems("me/sums").load()


def test_a_card_tells_the_files_of_a_split(hub):  # noqa: F811
    hub.commit("dataset", "me/sums", {f"d/{n}.jsonl": rows_text(n) for n in "abc"})
    named = [{"split": "train", "path": ["d/a.*", "d/b*"]}, {"split": "test", "path": "d/c.jsonl"}]
    hub.cards["me/sums"] = {
        "configs": [
            {"config_name": "one", "data_files": named, "default": True},
            {"config_name": "two", "data_files": "d/*"},
        ]
    }
    assert ids(split="train") == ["a", "b"] and ids(split="test") == ["c"]
    assert ids(subset="two") == ["a", "b", "c"]
    with pytest.raises(UserError, match="split must be one of test, train, not 'dev'"):
        ids(split="dev")
    with pytest.raises(UserError, match="subset must be one of one, two, not 'three'"):
        ids(subset="three")


def test_a_missing_data_set_says_that_there_is_no_such_file_either(hub):  # noqa: F811
    with pytest.raises(UserError, match="me/none: no such local path, and the Hub answers 401"):
        JsonlProblems("me/none").load()
    for path in ("./me/sums", "a/b/c", "data/rows.jsonl", "rows"):
        with pytest.raises(UserError, match=f"{path} is no file, .* and no name of the Hub"):
            JsonlProblems(path).load()
    assert not [path for _, path in hub.requests if "none" not in path]


def test_a_pinned_data_set_is_read_offline(hub, monkeypatch):  # noqa: F811
    commit = hub.commit("dataset", "me/sums", {"train.jsonl": rows_text("a")})
    name = f"me/sums@{commit}"
    assert [p.id for p in JsonlProblems(name).load().problems] == ["a"]
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert [p.id for p in JsonlProblems(name).load().problems] == ["a"]


def test_hostile_names_of_files_are_not_asked_for(hub):  # noqa: F811
    evil = {f"{place}rows.jsonl": rows_text("evil") for place in ("../../", "/etc/", "a/../../")}
    hub.commit("dataset", "me/sums", {"train.jsonl": rows_text("a")} | evil)
    assert ids() == ["a"]
    assert not [path for _, path in hub.requests if "rows.jsonl" in path]
