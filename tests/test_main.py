# SPDX-License-Identifier: Apache-2.0
"""The command line refuses what it cannot use in one sentence, before it loads anything."""

import contextlib
import os
import random
import re
import sys

import jax
import pytest

from opsd_jax.errors import UserError
from opsd_jax.main import main
from opsd_jax.run.generate import check_length

# One complete command of each kind; nothing that they name is there.
COMMANDS = {
    "train": {"--gin_file": "no.gin", "--workdir": "no_run"},
    "eval": {"--workdir": "no_run"},
    "eval --compare": {"--compare": "no_a"},
    "generate": {"--model": "no_model", "--prompt": "x"},
    "export": {"--workdir": "no_run", "--out": "no_out"},
    "probe": {"--gin_file": "no.gin"},
    "tokens": {"--workdir": "no_run"},
    "report": {"--workdir": "no_run", "--out": "no.html"},
}
NUMBERS = ["nan", "inf", "-inf", "1e400", "-1", "1.5", "", " ", "x", "0x10", "9" * 10, "9" * 5000]
NUMBERS += ["½", "٣½", "1e5", "None", "-0.5", "1,000", "\udcff", "\0", "0.5", "1"]
TEXTS = ["\udcff", "a\ud800b", "\0", "a\0b"]
PATHS = ["", *TEXTS, "x" * 5000, "x" * 300, "a_pipe", "a_file/below", "gs://b/r", "s3://b"]
ADDRESSES = ["", "host", "host:", ":80", "a b:1", "host:0", "host:65536", "gs://b:1", *TEXTS]
FLAGS = {
    "generate": {
        **dict.fromkeys(("--temperature", "--top_p", "--min_p", "--repetition_penalty"), NUMBERS),
        **dict.fromkeys(("--top_k", "--max_tokens", "--seed", "--presence_penalty"), NUMBERS),
        **{"--prompt": TEXTS, "--stop": ["", *TEXTS], "--model": PATHS},
    },
    "train": {
        **{"--gin_file": [*PATHS, "a_folder"], "--workdir": [*PATHS, "a_file"]},
        **{"--coordinator": ADDRESSES, "--num_processes": NUMBERS, "--process_id": NUMBERS},
    },
    "eval": {"--out": [*PATHS, "a_file"], "--gin_file": PATHS, "--gin_bindings": TEXTS},
    "export": {"--out": [*PATHS, "a_file"], "--format": ["", "x", *TEXTS]},
    "probe": {"--num": [*NUMBERS, "0", "1025"], "--seed": NUMBERS, "--out": ["a_folder"]},
    "tokens": {"--num": [*NUMBERS, "0", "1025"], "--seed": NUMBERS, "--workdir": ["a_file"]},
    "report": {
        **{"--out": [*PATHS, "a_folder"], "--levels": [*NUMBERS, "0", "2"], "--name": TEXTS},
        **{"--workdir": [*PATHS, "L=a_file", "L=a_pipe", "a_file"]},
    },
    "eval --compare": {"--compare": [*PATHS, "a_file"]},
}
for _command in ("eval", "export", "tokens"):
    FLAGS[_command]["--step"] = ["", "x", "-1", "1.0", "Best", "²", "1e3", "9" * 30, "\udcff"]
# What is no fault of these flags, where int() or float() can read it.
BOUNDS = {
    "--temperature": lambda x: 0 <= x < 2.0**128,
    "--top_p": lambda x: 0 < x <= 1,
    "--min_p": lambda x: 0 <= x <= 1,
    "--repetition_penalty": lambda x: 0 < x < 2.0**128,
    "--presence_penalty": lambda x: abs(x) < 2.0**128,
    "--levels": lambda x: 0 < x <= 1,
    "--top_k": lambda x: isinstance(x, int) and 0 <= x < 2**31,
    "--max_tokens": lambda x: isinstance(x, int) and 1 <= x < 2**31,
    "--num": lambda x: isinstance(x, int) and 1 <= x <= 1024,
    "--seed": lambda x: isinstance(x, int) and 0 <= x < 2**32,
}


def is_fine(flag, value):
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return flag in BOUNDS and "_" not in value and BOUNDS[flag](kind(value))
    return False


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "a_file").write_text("")
    os.mkfifo(tmp_path / "a_pipe")
    return tmp_path


def told(arguments, capsys):
    """What the command says; it may print nothing else and must end with status 2."""
    assert main(arguments) == 2, arguments
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, (arguments, err)
    err.encode()  # a terminal could not show it
    return err


def arguments_of(command, changed):
    words = command.split()
    fixed = COMMANDS[command] | changed
    compare = {"--compare": ["no_b"]} if "--compare" in fixed else {}
    pairs = [(flag, [value, *compare.get(flag, [])]) for flag, value in fixed.items()]
    flat = [f"{flag}={v[0]}" if len(v) == 1 else flag for flag, v in pairs]
    extra = [word for _, v in pairs if len(v) > 1 for word in v]
    return [words[0], *flat, *extra]


WILD = [(c, f, v) for c, flags in FLAGS.items() for f, values in flags.items() for v in values]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wild_value_of_any_flag_is_refused_in_one_sentence(command, places, capsys):
    before = sorted(places.rglob("*"))
    for _, flag, value in [wild for wild in WILD if wild[0] == command]:
        said = told(arguments_of(command, {flag: value}), capsys)
        assert said.startswith(f"opsd {command.split()[0]}: ")
        assert len(said) < 400, said
        assert (flag in said) != is_fine(flag, value), (flag, value, said)
    assert sorted(places.rglob("*")) == before


def test_wild_values_together_and_flags_that_are_none(places, capsys):
    random.seed(20)
    for _ in range(150):
        command = random.choice([c for c in COMMANDS if " " not in c])
        wild = [w for w in WILD if w[0] == command]
        changed = {f: v for _, f, v in random.sample(wild, random.randint(1, 3))}
        arguments = arguments_of(command, changed)
        for _ in range(random.randint(0, 2)):
            junk = random.choice(["--", "-", "--nope", "--seed", "x", "--step=best", "\udcff", ""])
            arguments.insert(random.randint(1, len(arguments)), junk)
        if random.random() < 0.2:
            arguments.pop(random.randrange(len(arguments)))
        told(arguments, capsys)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "opsd: the following arguments are required: command; see opsd --help"),
        (["nope"], "opsd: argument command: invalid choice: 'nope'"),
        (["train"], "opsd train: the following arguments are required: --gin_file, --workdir"),
        (["generate", "--model=m", "--prompt=x", "--temperature=inf"], "--temperature must be a n"),
        (["generate", "--model=m", "--prompt=x", "--max_tokens=9999999999"], "--max_tokens must"),
        (
            ["generate", "--model=m", "--prompt=\udcff"],
            "--prompt must be valid Unicode, not '",
        ),
        (
            ["generate", "--model=a_pipe", "--prompt=x"],
            "--model must be a folder or a file, not the pipe",
        ),
        (
            ["report", "--workdir=r", "--out="],
            "opsd report: --out must not be empty; see",
        ),
        (
            ["report", "--workdir=r", "--out=a_folder"],
            "--out must be a file, not the folder 'a_",
        ),
        (
            ["report", "--workdir=r", "--out=r", "--levels", "nan"],
            "--levels must be in (0, 1]",
        ),
        (
            ["train", "--gin_file=a_folder", "--workdir=r"],
            "--gin_file must be a file, not",
        ),
        (
            ["train", "--gin_file=no.gin", "--workdir=a_file"],
            "--workdir must be a folder, not",
        ),
        (
            ["train", "--gin_file=no.gin", "--workdir=az://bucket/r"],
            "--workdir must be a path on a file system that is mounted here, not 'az://bucket/r': "
            "in buckets there are workdirs alone, named as gs://BUCKET/RUN or s3://BUCKET/RUN",
        ),
        (["eval", "--workdir=gs://b"], "--workdir must be gs://BUCKET/RUN, not 'gs://b'"),
        (["report", "--workdir=L=s3://b", "--out=r"], "--workdir must be s3://BUCKET/RUN, not"),
        (
            ["export", "--workdir=gs://bucket/r", "--out=gs://bucket/m"],
            "--out must be a path on a file system that is mounted here, not 'gs://bucket/m'",
        ),
        (["tokens", "--workdir=r", "--step=1.5"], "--step must be a number or 'best', not '1.5'"),
        (["tokens", "--workdir=r", "--num=0"], "--num must be an integer >= 1 and <= 1024, not 0"),
    ],
)
def test_the_sentence_names_the_flag(arguments, words, places, capsys):
    assert words in told(arguments, capsys)


def test_a_distributed_process_that_is_alone_is_told(places, capsys, monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    (places / "a.gin").write_text("")
    said = told(["train", "--gin_file=a.gin", "--workdir=run", "--distributed"], capsys)
    assert "--distributed: coordinator_address should be defined" in said


@pytest.mark.parametrize(
    "lengths, words",
    [((0, 5, 10), "--prompt must not be empty"), ((7, 4, 10), "--max_tokens must be at most 3, n")],
)
def test_an_answer_has_a_prompt_and_positions(lengths, words):
    check_length(6, 4, 10)
    with pytest.raises(UserError, match=re.escape(words)):
        check_length(*lengths)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--coordinator=h:1"], "go together; --num_processes is missing"),
        (["--num_processes=2", "--process_id=0"], "go together; --coordinator is missing"),
        (
            ["--coordinator=h:1", "--num_processes=2", "--process_id=2"],
            "--process_id must be an integer >= 0 and <= 1, not 2",
        ),
        (
            ["--coordinator=h:1", "--num_processes=0", "--process_id=0"],
            "--num_processes must be an integer >= 1, not 0",
        ),
        (["--coordinator=h:1:2", "--num_processes=1", "--process_id=0"], "must be HOST:PORT"),
    ],
)
def test_plain_hosts_name_all_of_their_pod(flags, words, places, capsys):
    for command in (["train", "--gin_file=a_file", "--workdir=r"], ["eval", "--model=a_folder"]):
        assert words in told([*command, *flags], capsys)


def test_plain_hosts_are_joined_as_named(places, monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *named, **_: joined.append(named))
    flags = ["--coordinator=[fd00::1]:8476", "--num_processes=2", "--process_id=1"]
    assert main(["train", "--gin_file=a_file", "--workdir=r", *flags]) == 2  # an empty experiment
    assert joined == [("[fd00::1]:8476", 2, 1)]


def test_a_run_that_was_stopped_ends_with_the_status_asked_for(places, monkeypatch, capsys):
    monkeypatch.setattr("opsd_jax.run.config.load_experiment", lambda *_: (None, ""))
    monkeypatch.setattr("opsd_jax.evaluation.summary.summary", lambda workdir: "")
    arguments = ["train", "--gin_file=a_file", "--workdir=r"]
    for stops, flag, status in ((1, "=75", 75), (1, None, 0), (0, "=75", 0), (1, "=126", 2)):
        told = lambda *_, on_stop, stops=stops: [on_stop() for _ in range(stops)]  # noqa: E731
        monkeypatch.setattr("opsd_jax.run.train.train", told)
        assert main([*arguments, *([f"--stopped_status{flag}"] if flag else [])]) == status
    assert "--stopped_status must be an integer >= 0 and <= 125, not 126" in capsys.readouterr().err


def test_an_interpreter_that_cannot_print_the_value_still_tells(places, capsys):
    assert sys.getfilesystemencoding() == "utf-8"
    assert told(["report", "--workdir=\udcff", "--out=x"], capsys).isascii()
