# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd_jax.data.problems import Problem
from opsd_jax.errors import UserError
from opsd_jax.evaluation.generations import (
    Generation,
    GenerationLog,
    Place,
    fields_of,
    generation_of,
    read_generations,
)

PROBLEM = Problem("p", "q", "s", "a")


def generation(sample: int, text="text") -> Generation:
    return Generation(PROBLEM, text, 3, True, 0.5, sample, "7", "graded")


def place(sample: int) -> Place:
    return Place("student", "sampled", "p", sample)


def write(folder, count: int, record=None) -> bytes:
    with GenerationLog(folder, record or {"seed": 0}) as log:
        for sample in range(count):
            log.append(place(sample), generation(sample))
    return (folder / "generations.jsonl").read_bytes()


def test_a_line_is_given_back(tmp_path):
    write(tmp_path, 3)
    found, _ = read_generations(tmp_path / "generations.jsonl")
    assert list(found) == [place(0), place(1), place(2)]
    assert generation_of(PROBLEM, 1, found[place(1)]) == generation(1)


@given(st.text(st.characters(exclude_categories=[]), max_size=20))
def test_any_text_survives_its_line(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("log")
    with GenerationLog(folder, {}) as log:
        log.append(place(0), generation(0, text))
        log.append(place(1), generation(1))
    found, _ = read_generations(folder / "generations.jsonl")
    assert generation_of(PROBLEM, 0, found[place(0)]).text == text
    assert len(found) == 2


def test_wherever_a_kill_cuts_the_last_line_the_whole_ones_stay(tmp_path):
    whole = write(tmp_path, 3)
    path = tmp_path / "generations.jsonl"
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        with GenerationLog(tmp_path, {"seed": 0}) as log:
            assert list(log.found) == [place(0), place(1)]
            log.append(place(2), generation(2))
        assert path.read_bytes() == whole


def test_a_process_that_does_not_write_leaves_the_file_alone(tmp_path):
    whole = write(tmp_path, 2)
    (tmp_path / "generations.jsonl").write_bytes(whole + b"torn")
    with GenerationLog(tmp_path, {"seed": 0}, writes=False) as log:
        log.append(place(2), generation(2))
    assert (tmp_path / "generations.jsonl").read_bytes() == whole + b"torn"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", ":3: not a generation"),
        ("{}", ":3: not a generation"),
        ("[]", ":3: not a generation"),
        (json.dumps(place(5)._asdict()), ":3: not a generation"),
        (json.dumps(place(0)._asdict() | fields_of(generation(0))), ":3: .* second time"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    whole = write(tmp_path, 2)
    (tmp_path / "generations.jsonl").write_bytes(whole + line.encode() + b"\n")
    with pytest.raises(UserError, match=message):
        GenerationLog(tmp_path, {"seed": 0})


def test_another_evaluation_in_the_folder_is_refused(tmp_path):
    whole = write(tmp_path, 2, {"seed": 0, "step": 5})
    with pytest.raises(UserError, match="seed was 0 and is now 1; use another folder as out"):
        GenerationLog(tmp_path, {"seed": 1, "step": 5})
    with pytest.raises(UserError, match="step was 5 and is now None"):
        GenerationLog(tmp_path, {"seed": 0})
    assert (tmp_path / "generations.jsonl").read_bytes() == whole
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(UserError, match="no evaluation.json"):
        GenerationLog(tmp_path, {"seed": 0, "step": 5})


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        GenerationLog(tmp_path / "file" / "folder", {})
