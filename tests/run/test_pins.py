# SPDX-License-Identifier: Apache-2.0
"""A run keeps the commits of what it names on the Hub."""

import json
import re

import pytest

from opsd_jax.data.benchmarks import BENCHMARKS
from opsd_jax.data.tokenizer import HFTokenizer
from opsd_jax.errors import UserError
from opsd_jax.main import main
from opsd_jax.pretrained.export import save_pretrained
from opsd_jax.run.config import load_experiment
from opsd_jax.run.pins import pinned
from tests.data.test_tokenizer import byte_tokenizer
from tests.host.test_hub import hub  # noqa: F401
from tests.pods import run_pod
from tests.tiny import tiny_config, tiny_variables

ROWS = [
    {"question": f"{i}+1?", "solution": f"It is \\boxed{{{i + 1}}}.", "answer": i + 1}
    for i in range(16)
]
GIN = """
train.model = @PretrainedModel()
PretrainedModel.path = %MODEL
MODEL = "me/tiny"
train.problems = @JsonlProblems()
JsonlProblems.path = "me/rows@v1"
heldout/JsonlProblems.path = "me/rows"
train.heldout = @OtherReferences()
OtherReferences.source = @heldout/JsonlProblems()
train.num_steps = 1
train.batch_size = 8
train.learning_rate = 1e-3
train.grader_workers = 0
rollout.max_new_tokens = 3
evaluate.roles = ("student",)
evaluate.batch_size = 8
"""


GSM8K, AIME24 = BENCHMARKS["gsm8k"].hub_id, BENCHMARKS["aime24"].hub_id


@pytest.fixture
def named(hub, tmp_path, monkeypatch):  # noqa: F811
    """A gin file that names a model and two revisions of a data set."""
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    hub.v1 = hub.commit("dataset", "me/rows", {"train.jsonl": rows}, "v1")
    hub.rows = hub.commit("dataset", "me/rows", {"train.jsonl": rows.replace("+1?", " + 1?")})
    (tmp_path / "named.gin").write_text(GIN)
    return hub


def test_names_become_commits_in_the_experiment_and_its_text(named, tmp_path):
    experiment, text = load_experiment("named.gin")
    assert experiment.train.model.path == "me/tiny" and not named.requests
    found, written = pinned(experiment, text)
    full = {
        "me/tiny": f"me/tiny@{named.first}",
        "me/rows@v1": f"me/rows@{named.v1}",
        "me/rows": f"me/rows@{named.rows}",
    }
    assert found.train.model.path == full["me/tiny"]
    assert found.train.problems.path == full["me/rows@v1"]
    assert found.train.heldout.source.path == full["me/rows"]
    (tmp_path / "config.gin").write_text(written)
    again, _ = load_experiment("config.gin")
    assert again == found
    assert re.findall(r"^# Hub: (\S+) is", written, re.M) == sorted(full)
    for branch in ("main", "v1"):
        named.commit("dataset", "me/rows", {"train.jsonl": ""}, branch)
    named.requests.clear()
    assert pinned(experiment, text, tmp_path) == (found, written)  # of the workdir's own record
    assert pinned(again, written, tmp_path)[0] == found and not named.requests
    assert pinned(experiment, text)[0].train.problems.path != full["me/rows@v1"]


def test_benchmarks_and_the_tokenizer_of_a_random_model_are_pinned_too(named, tmp_path):
    """A benchmark without a path names its own data set, also by a macro."""
    commits = {repo: named.commit("dataset", repo, {"a": ""}) for repo in (GSM8K, AIME24)}
    experiment, text = load_experiment(
        "named.gin",
        [
            "train.model = @RandomModel()",
            "RandomModel.tokenizer = 'me/tiny'",
            "train.problems = @train/Benchmark()",
            "train/Benchmark.name = %OTHER",
            "OTHER = 'gsm8k'",
            "train.heldout = @Benchmark()",
            "Benchmark.name = 'aime24'",
        ],
    )
    found, written = pinned(experiment, text)
    assert found.train.model.tokenizer == f"me/tiny@{named.first}"
    assert found.train.problems.path == f"{GSM8K}@{commits[GSM8K]}"
    assert found.train.heldout.path == f"{AIME24}@{commits[AIME24]}"
    (tmp_path / "config.gin").write_text(written)
    assert load_experiment("config.gin")[0] == found
    for repo in commits:
        named.commit("dataset", repo, {"a": "moved"})
    named.requests.clear()
    assert pinned(experiment, text, tmp_path) == (found, written) and not named.requests
    local = load_experiment("config.gin", ["Benchmark.path = '/a/copy'"])
    assert pinned(*local)[0].train.heldout.path == "/a/copy"


def test_what_has_no_name_is_left_alone_and_a_wrong_one_is_told(named):
    experiment, text = load_experiment("named.gin", ["MODEL = 'smollm2'"])
    assert "smollm2" in pinned(experiment, text)[1]
    experiment, text = load_experiment("named.gin", ["MODEL = 'no/body'"])
    with pytest.raises(UserError, match="no/body: no such local path, and the Hub answers 401"):
        pinned(experiment, text)


@pytest.mark.slow
def test_a_run_goes_on_from_the_same_bytes_after_the_branches_moved(named, tmp_path, capfd):
    config = tiny_config(vocab_size=264, num_layers=1)

    def files(seed):
        folder = tmp_path / f"model{seed}"
        tokenizer = HFTokenizer(byte_tokenizer())
        save_pretrained(str(folder), config, tiny_variables(config, seed), tokenizer)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    named.first = named.commit("model", "me/tiny", files(0))
    flags = ["--gin_file=named.gin", "--gin_bindings=train.heldout = None"]
    command = ["train", *flags, f"--workdir={tmp_path / 'run'}"]
    assert main(command) == 0, capfd.readouterr().err
    text = (tmp_path / "run" / "config.gin").read_text()
    assert f"'me/tiny@{named.first}'" in text and f"me/rows@{named.v1}" in text
    named.commit("model", "me/tiny", files(1))
    named.commit("dataset", "me/rows", {"train.jsonl": json.dumps(ROWS[0])}, "v1")
    named.requests.clear()
    assert main([*command, "--gin_bindings=train.num_steps = 2"]) == 0, capfd.readouterr().err
    assert not named.requests  # neither moved nor asked again
    assert main([*command, "--gin_bindings=MODEL = 'me/tiny@main'"]) == 2
    told = capfd.readouterr().err
    assert f"MODEL was 'me/tiny@{named.first}' and is now 'me/tiny@" in told


POD = """
from opsd_jax.host.hub import model_folder
from opsd_jax.run.config import load_experiment
from opsd_jax.run.pins import pinned
jax.distributed.initialize()
found, text = pinned(*load_experiment("named.gin", ["train.heldout = None"]))
print("found", model_folder(found.train.model.path, "path"), found.train.problems.path)
"""


@pytest.mark.slow
def test_a_pod_asks_once_and_downloads_once_per_host(named, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", named.constants.ENDPOINT)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    named.delay_s = 0.2
    said = [out for out, _ in run_pod(POD)]
    found = {line for out in said for line in out.splitlines() if line.startswith("found")}
    assert len(found) == 1 and named.first in found.pop()
    asked = [path for method, path in named.requests if method == "GET"]
    assert sum("/revision/" in path for path in asked) == 2  # of the model and of the data set
    files = [path for path in asked if "/resolve/" in path]
    assert len(files) == len(set(files)) == 3
    named.private.add("me/tiny")
    with pytest.raises(AssertionError, match="the Hub answers 401|process 0 tells why"):
        run_pod(POD)


def test_a_name_that_is_nobodys_is_one_sentence(named, capfd):
    assert main(["generate", "--model=me/nothing", "--prompt=x"]) == 2
    assert "me/nothing: no such local path, and the Hub answers 401" in capfd.readouterr().err
    assert main(["eval", "--gin_file=named.gin", "--model=me/nothing", "--out=out"]) == 2
    assert "me/nothing: no such local path, and the Hub answers 401" in capfd.readouterr().err
