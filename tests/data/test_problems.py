# SPDX-License-Identifier: Apache-2.0
import decimal
import json
import pickle

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsd_jax.data.files import JsonlProblems, ParquetProblems
from opsd_jax.data.problems import OtherReferences, Problem
from opsd_jax.errors import UserError

ROW = {"id": "a", "question": "1+1?", "solution": "It is 2.", "answer": "2"}


@pytest.fixture
def write(tmp_path):
    """Writes rows (objects, or text as it is) and gives the path."""

    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def without(key):
    return {name: value for name, value in ROW.items() if name != key}


def test_rows_become_problems(write):
    loaded = JsonlProblems(write(ROW, "", ROW | {"id": "b", "answer": 3})).load()
    assert len(loaded) == 2
    assert loaded[0] == Problem(**ROW)
    assert loaded[1] == Problem(**(ROW | {"id": "b", "answer": "3"}))
    assert loaded.grade(loaded[0], r"so \boxed{2}") == 1.0
    assert loaded.grade(loaded[1], r"so \boxed{2}") == 0.0


def test_rows_without_id_are_named_by_their_place(write):
    loaded = JsonlProblems(write(without("id"), "", without("id"))).load()
    assert [p.id for p in loaded.problems] == ["rows.jsonl:1", "rows.jsonl:3"]


def test_numbers_that_no_float_holds_are_read_whole(write):
    for number in ("9" * 400, "0." + "3" * 1500):
        row = json.dumps(ROW)[:-1] + f', "n": {number}}}'
        loaded = JsonlProblems(write(row.replace('"2"', number)), grader="exact").load()
        assert loaded[0].answer == loaded[0].columns["n"] == number


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (without("solution"), r"rows.jsonl:2: the row has no `solution`; add it.*to None"),
        (without("question"), r"rows.jsonl:2: the row has no `question`"),
        (without("answer"), r"rows.jsonl:2: the row has no `answer`"),
        (ROW | {"solution": " \n"}, r"rows.jsonl:2: `solution` is empty; fill it.*to None"),
        (ROW | {"solution": None}, r"rows.jsonl:2: `solution` is empty"),
        (ROW | {"question": ["x"]}, r"rows.jsonl:2: `question` must be text.*list"),
        (ROW | {"question": 7}, r"rows.jsonl:2: `question` must be text.*int"),
        (ROW | {"answer": {}}, r"rows.jsonl:2: `answer` must be text.*dict"),
        (ROW | {"answer": []}, r"rows.jsonl:2: `answer` is empty"),
        (ROW | {"answer": ["1", {}]}, r"rows.jsonl:2: `answer` must be text.*list"),
        (ROW | {"answer": ["1", None]}, r"rows.jsonl:2: `answer` is empty"),
        (ROW | {"question": []}, r"rows.jsonl:2: `question` is empty"),
        (ROW, r"rows.jsonl:2: the id 'a' occurs a second time"),
        ("{", r"rows.jsonl:2: not a line of JSON [(]Expecting .* at character [0-9][)]"),
        ("[1, 2]", r"rows.jsonl:2: a line must be a JSON object.*list"),
        ("[" * 100_000, r"rows.jsonl:2: not a line of JSON"),
        ('{"answer": ' + "9" * 10_000 + "}", r"rows.jsonl:2: not a line of JSON"),
        ('{"answer": 1.' + "3" * 5000 + "}", r"rows.jsonl:2: not a line of JSON .*5,001 digits"),
        ('{"id": "b", "question": "\\ud800"}', r"rows.jsonl:2: the row has no `solution`"),
        (json.dumps(ROW | {"question": "\ud800"}), r"rows.jsonl:2: `question` is not valid Uni"),
        (json.dumps(ROW | {"answer": float("nan")}), r"rows.jsonl:2: `answer` must be text.*float"),
    ],
)
def test_a_bad_row_is_named(write, bad, message):
    with pytest.raises(UserError, match=message) as caught:
        JsonlProblems(write(ROW, bad)).load()
    assert "\n" not in str(caught.value)


def test_a_row_unlike_those_before_it_says_nothing_of_the_files_layout(write):
    odd = {name: value for name, value in ROW.items() if name != "answer"}
    with pytest.raises(UserError, match=r"rows.jsonl:2: the row has no `answer`; add it, .*\w\.$"):
        JsonlProblems(write(ROW, odd | {"id": "b"})).load()
    with pytest.raises(UserError, match=r"rows.jsonl:1: .* looks like the layout.* = 'boxed'"):
        JsonlProblems(write(odd, odd | {"id": "b"})).load()


def test_bytes_that_are_no_text_are_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n\xff\xfe{}\n")
    with pytest.raises(UserError, match="rows.jsonl:2: not a line of JSON"):
        JsonlProblems(str(path)).load()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.binary(max_size=60))
def test_any_bytes_load_or_are_told(tmp_path, content):
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="fuzz.jsonl"):
        JsonlProblems(str(path)).load()


def test_nothing_to_read_is_told(write, tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl is no file"):
        JsonlProblems(str(tmp_path / "nowhere.jsonl")).load()
    with pytest.raises(UserError, match="rows.jsonl has no rows"):
        JsonlProblems(write("")).load()
    with pytest.raises(UserError, match="1 rows, so the slice from 1 is empty"):
        JsonlProblems(write(ROW), start=1).load()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"answer_from": "magic"}, "JsonlProblems.answer_from must be 'text', .*not 'magic'"),
        ({"grader": "magic"}, "JsonlProblems.grader is 'magic'; choose one of exact"),
        ({"start": 3, "stop": 3}, "JsonlProblems.stop must be an integer > 3 or None, not 3"),
    ],
)
def test_settings_are_checked_before_loading(setting, message):
    with pytest.raises(UserError, match=message):
        JsonlProblems("x.jsonl", **setting)


def test_directories_and_patterns(write, tmp_path):
    write(ROW, name="d/b.jsonl")
    write(ROW | {"id": "c"}, name="d/a/a.jsonl")
    write("not read", name="d/readme.txt")
    ids = [p.id for p in JsonlProblems(str(tmp_path / "d")).load().problems]
    assert ids == ["c", "a"]
    ids = [p.id for p in JsonlProblems(str(tmp_path / "d" / "b*")).load().problems]
    assert ids == ["a"]


def test_hidden_copies_are_not_read(write, tmp_path):
    write(ROW, name="d/a.jsonl")
    write(ROW | {"id": "b"}, name="d/.ipynb_checkpoints/a-checkpoint.jsonl")
    write(ROW | {"id": "c"}, name="d/._a.jsonl")
    for path in (tmp_path / "d", tmp_path / "d" / "*.jsonl", tmp_path / "d" / "**" / "*.jsonl"):
        assert [p.id for p in JsonlProblems(str(path)).load().problems] == ["a"]
    hidden = tmp_path / "d" / ".ipynb_checkpoints"  # named outright it is not hidden
    assert [p.id for p in JsonlProblems(str(hidden)).load().problems] == ["b"]


def test_a_path_with_brackets_is_a_path_where_it_is_there(write, tmp_path):
    write(ROW, name="run [1]/a.jsonl")
    write(ROW | {"id": "other"}, name="run 1/a.jsonl")
    for path in ("run [1]", "run [1]/a.jsonl", "run [1]/*.jsonl", "run [[]1]/*.jsonl"):
        loaded = JsonlProblems(str(tmp_path / path)).load()
        assert [p.id for p in loaded.problems] == ["a"], path
    assert [p.id for p in JsonlProblems(str(tmp_path / "run [0-9]/*")).load().problems] == ["other"]


def test_a_folder_that_only_looks_like_a_file_is_not_read(write, tmp_path):
    write(ROW, name="d/a.jsonl")
    (tmp_path / "d" / "old.jsonl").mkdir()
    assert len(JsonlProblems(str(tmp_path / "d")).load()) == 1


def test_slices_hold_rows_out(write):
    path = write(*(ROW | {"id": str(i)} for i in range(5)))
    train, held_out = JsonlProblems(path, stop=3).load(), JsonlProblems(path, start=3).load()
    assert [p.id for p in train.problems] == ["0", "1", "2"]
    assert [p.id for p in held_out.problems] == ["3", "4"]


@pytest.mark.parametrize(
    ("row", "settings", "problem"),
    [
        (  # GSM8K
            {"question": "q", "answer": "9 * 2 = 18\n#### 1,018"},
            {"solution_column": "answer", "answer_from": "hashes", "grader": "last_number"},
            ("q", "9 * 2 = 18\n#### 1,018", "1018"),
        ),
        (  # MATH, where the solution alone has the answer
            {"problem": "q", "solution": r"so $\boxed{\frac12}$"},
            {
                "question_column": "problem",
                "answer_column": "solution",
                "answer_from": "boxed",
            },
            ("q", r"so $\boxed{\frac12}$", r"\frac12"),
        ),
        (  # AMC and HMMT
            {"problem": "q", "answer": 27.0},
            {"question_column": "problem", "solution_column": None},
            ("q", "", "27"),
        ),
    ],
)
def test_layouts_of_public_benchmarks(write, row, settings, problem):
    loaded = JsonlProblems(write(row), **settings).load()[0]
    assert (loaded.question, loaded.solution, loaded.answer) == problem


def test_an_answer_that_is_not_where_it_should_be_is_told(write):
    with pytest.raises(UserError, match=r"rows.jsonl:1: no answer of the kind 'boxed' in `solu"):
        JsonlProblems(write(ROW), answer_column="solution", answer_from="boxed").load()


@pytest.mark.parametrize(
    ("key", "settings", "answer"),
    [
        ("$5$", {}, "$5$"),
        (1.5e-07, {}, "0.00000015"),
        (1e22, {}, "1" + "0" * 22),
        (0.1, {}, "0.1"),
        (-0.0, {}, "0"),
        (2**60 + 1, {}, str(2**60 + 1)),
        (2.50, {"grader": "last_number"}, "2.5"),
    ],
)
def test_keys_in_any_notation_are_found(write, key, settings, answer):
    loaded = JsonlProblems(write(ROW | {"answer": key}), **settings).load()
    problem = loaded[0]
    assert problem.answer == answer
    for text in (answer, answer.strip("$"), f"${answer.strip('$')}$"):
        assert loaded.grade(problem, rf"so \boxed{{{text}}}") == 1.0
    assert loaded.grade(problem, r"so \boxed{7}") == 0.0


@pytest.mark.parametrize(
    ("key", "settings", "words"),
    [
        ("The answer is five.", {}, "'The answer is five.' is prose.*grader = 'boxed'"),
        ("five", {"grader": "last_number"}, "not one number.*grader = 'last_number'"),
        ("9" * 2001, {}, r"'9+\.\.\.' is longer than 2,000 characters"),
        (r"so \boxed{5}", {}, "box of its own.*answer_from"),
        (
            r"\boxed{2}, hence \boxed{5}",
            {"answer_from": "boxed"},
            "`answer` has several boxes, '2' and '5' among them; keep",
        ),
    ],
)
def test_a_key_that_no_completion_can_match_is_named(write, key, settings, words):
    with pytest.raises(UserError, match=f"rows.jsonl:2: .*{words}") as caught:
        fine = ROW | {"answer": r"\boxed{2}" if "answer_from" in settings else "2"}
        JsonlProblems(write(fine, ROW | {"id": "b", "answer": key}), **settings).load()
    assert "\n" not in str(caught.value)


def test_graders_travel_without_the_problems(write):
    loaded = JsonlProblems(write(*(ROW | {"id": str(i)} for i in range(999)))).load()
    assert len(pickle.dumps(loaded.grade)) < 1000


@pytest.fixture
def write_parquet(tmp_path):
    def write(*rows, name="rows.parquet"):
        path = str(tmp_path / name)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
        return path

    return write


def test_parquet_reads_the_same(write, write_parquet):
    rows = [ROW | {"id": str(i), "answer": i, "extra": [i]} for i in range(3)]
    assert ParquetProblems(write_parquet(*rows)).load() == JsonlProblems(write(*rows)).load()


def test_bad_parquet_is_told(write_parquet, tmp_path):
    with pytest.raises(UserError, match=r"no column `solution`, only id, question, answer; set"):
        ParquetProblems(write_parquet(without("solution"))).load()
    with pytest.raises(UserError, match=r"rows.parquet:2: `solution` is empty"):
        ParquetProblems(write_parquet(ROW, ROW | {"id": "b", "solution": None})).load()
    with pytest.raises(UserError, match=r"rows.parquet has no rows"):
        path = write_parquet(ROW)
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(path)[:0], path)
        ParquetProblems(path).load()
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(UserError, match="broken.parquet: not a readable parquet file"):
        ParquetProblems(str(broken)).load()


def test_a_doubled_parquet_column_is_told(tmp_path):
    names, columns = zip(*ROW.items(), strict=True)
    path = str(tmp_path / "rows.parquet")
    values = [pyarrow.array([column]) for column in (*columns, "other")]
    table = pyarrow.Table.from_arrays(values, names=[*names, "answer"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(UserError, match="rows.parquet has two columns `answer`"):
        ParquetProblems(path).load()
    unread = pyarrow.Table.from_arrays(values[:-1] * 2, names=[*names, *(f"x{n}" for n in "1111")])
    pyarrow.parquet.write_table(unread, path)
    assert ParquetProblems(path).load()[0] == Problem(**ROW)


def test_numbers_of_parquet_files(tmp_path):
    path = str(tmp_path / "rows.parquet")
    rows = [ROW | {"answer": decimal.Decimal("1.50")}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert ParquetProblems(path).load()[0].answer == "1.5"
    narrow = pyarrow.array([0.1, None], pyarrow.float32())
    pyarrow.parquet.write_table(pyarrow.table({"question": ["Q", "R"], "answer": narrow}), path)
    assert ParquetProblems(path, solution_column=None, stop=1).load()[0].answer == "0.1"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW | {"answer": float("inf")}]), path)
    with pytest.raises(UserError, match="rows.parquet:1: `answer` must be text.*float"):
        ParquetProblems(path).load()


def test_other_references_keep_the_answers(write):
    rows = [ROW | {"id": str(i), "answer": i, "solution": f"s{i}"} for i in range(3)]
    loaded = OtherReferences(JsonlProblems(write(*rows), grader="exact")).load()
    assert [(p.id, p.answer, p.solution) for p in loaded.problems] == [
        ("0", "0", "s1"),
        ("1", "1", "s2"),
        ("2", "2", "s0"),
    ]
    assert loaded.grade(loaded[2], "2") == 1.0
    with pytest.raises(UserError, match="at least two"):
        OtherReferences(JsonlProblems(write(ROW))).load()


def test_a_key_that_is_written_twice_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "solution": "s", "answer": "1", "answer": "2"}\n')
    with pytest.raises(UserError, match="rows.jsonl:1: .*two values of 'answer'"):
        JsonlProblems(str(path)).load()


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("12345678901234567890.5", "12345678901234567890.5"),
        ("0.1234567890123456789", "0.1234567890123456789"),
        ("0.10000000000000001", "0.1"),
        ("1.50", "1.5"),
        ("1e-7", "0.0000001"),
    ],
)
def test_a_number_is_a_key_with_all_its_digits(written, key, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"question": "q", "solution": "s", "answer": {written}}}\n')
    problems = JsonlProblems(path=str(path)).load()
    assert problems[0].answer == key
    assert problems.grade(problems[0], f"\\boxed{{{key}}}") == 1.0


def test_a_number_beyond_memory_is_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    for number in ("1.2345678901234567890e999999999", "1e999999999", "1e" + "9" * 20):
        path.write_text(f'{{"question": "q", "solution": "s", "answer": {number}}}\n')
        with pytest.raises(UserError, match="rows.jsonl:1: `answer` must be text"):
            JsonlProblems(path=str(path)).load()
