# SPDX-License-Identifier: Apache-2.0
"""Models by name, from a Hub in a thread: pinned, resumed, cut short, gated, offline."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from opsd_jax.errors import UserError
from opsd_jax.host import hub as hub_module
from opsd_jax.host.hub import commit_of, is_hub_name, model_folder
from tests.hub_server import Hub, serving

FILES = {
    "config.json": "{}",
    "tokenizer.json": "{ }",
    "model.safetensors": b"weights " * 1000,
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": "raise SystemExit",
    "README.md": "words",
}
WANTED = {"config.json", "tokenizer.json", "model.safetensors"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with one model, and an empty cache."""
    import huggingface_hub.file_download
    from huggingface_hub import constants

    made = Hub()
    made.first = made.commit("model", "me/tiny", FILES)
    with serving(made) as address:
        made.constants = constants
        point_at(address, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
        yield made


def point_at(address, monkeypatch):
    """As HF_ENDPOINT does before the library is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def names_in(folder):
    root = Path(folder)
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def refusal(path="me/tiny", **options):
    with pytest.raises(UserError) as caught:
        model_folder(path, "PretrainedModel.path", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("Qwen/Qwen3-0.6B@main", True),
        ("Qwen/Qwen3-0.6B@refs/pr/3", True),
        ("./Qwen/Qwen3", False),
        ("/Qwen/Qwen3", False),
        ("~/Qwen", False),
        ("a/b/c", False),
        ("gpt2", False),
        ("data/rows.jsonl", False),
        ("data/*.parquet", False),
        ("a/..", False),
        ("a/b@../../x", False),
        ("a/", False),
        (None, False),
    ],
)
def test_what_is_a_name_of_the_hub(name, wanted):
    assert is_hub_name(name) is wanted


def test_what_is_on_disk_comes_first(tmp_path, monkeypatch, hub):
    (tmp_path / "me" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_folder("me/tiny", "path") == "me/tiny" and not hub.requests


def test_a_model_is_fetched_without_pickles_and_code(hub, capfd):
    folder = model_folder("me/tiny", "path")
    assert names_in(folder) == WANTED and folder.endswith(f"snapshots/{hub.first}")
    assert "Fetching me/tiny, 3 files (0.0 MB)" in capfd.readouterr().err
    hub.requests.clear()
    assert model_folder(f"me/tiny@{hub.first}", "path") == folder and not hub.requests


def test_a_tokenizer_is_fetched_without_weights(hub):
    assert names_in(model_folder("me/tiny", "path", weights=False)) == WANTED - {
        "model.safetensors"
    }


def test_shards_are_those_that_the_index_names(hub):
    shards = {f"model-{n:05d}-of-00002.safetensors": b"x" * n for n in (1, 2)}
    index = {"weight_map": {f"t{n}": shard for n, shard in enumerate(shards)}}
    files = {k: v for k, v in FILES.items() if k != "model.safetensors"} | shards
    files |= {"model.safetensors.index.json": json.dumps(index), "consolidated.safetensors": b"y"}
    hub.commit("model", "me/large", files)
    found = names_in(model_folder("me/large", "path"))
    assert found == {"config.json", "tokenizer.json", "model.safetensors.index.json", *shards}
    index["weight_map"]["t9"] = "gone.safetensors"
    files["model.safetensors.index.json"] = json.dumps(index)
    hub.commit("model", "me/large", files)
    assert "index.json names 'gone.safetensors', which the Hub does not have" in refusal("me/large")


def test_pickles_are_not_an_alternative(hub):
    hub.commit("model", "me/old", {"config.json": "{}", "pytorch_model.bin": b"pickle"})
    assert "only pickled weights (pytorch_model.bin)" in refusal("me/old")


def test_a_commit_stays_when_the_branch_moves(hub):
    old = model_folder(f"me/tiny@{commit_of('model', 'me/tiny')}", "path")
    second = hub.commit("model", "me/tiny", FILES | {"config.json": '{"new": 1}'})
    assert commit_of("model", "me/tiny") == second != hub.first
    new = model_folder("me/tiny@main", "path")
    assert [json.load(open(f"{f}/config.json")) for f in (old, new)] == [{}, {"new": 1}]
    assert "the Hub model me/tiny has no revision 'v9'" in refusal("me/tiny@v9")


@pytest.mark.parametrize("how", ["while it comes", "before it ends", "on disk"])
def test_a_file_cut_short_is_seen_and_fetched_again(hub, how, tmp_path):
    if how == "on disk":
        path = Path(model_folder("me/tiny", "path")) / "model.safetensors"
        blob = path.resolve()
        blob.write_bytes(b"weights")
        told = refusal()
        assert "has 7 bytes and not the 8,000 that the Hub has of me/tiny" in told
        Path(told.split()[0]).unlink()
    else:
        hub.cut["model.safetensors"] = 0 if how == "while it comes" else 4000
        assert "me/tiny was cut short while it was fetched" in refusal()
        hub.cut.clear()
    assert names_in(model_folder("me/tiny", "path")) == WANTED


def test_gated_private_and_missing_are_one_sentence(hub):
    hub.gated.add("me/tiny")
    told = refusal()
    assert "no such local path" in told and "gated: ask for access at https://hugg" in told
    hub.gated.clear()
    hub.private.add("me/tiny")
    assert "the Hub answers 401: no model of that name, or a private one" in refusal()
    assert "no such local path, and the Hub answers 401" in refusal("nobody/nothing")


def test_without_a_network_the_cache_serves_or_it_is_told(hub, monkeypatch, capfd):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    told = refusal()
    assert "me/tiny is not on this disk and cannot be fetched from the Hub: HF_HUB_OFFLINE" in told
    assert "run `hf download me/tiny`" in told
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    folder = model_folder("me/tiny", "path")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point_at(f"http://127.0.0.1:{free.getsockname()[1]}", monkeypatch)
    assert model_folder("me/tiny", "path") == folder
    assert f"commit {hub.first} of me/tiny is taken" in capfd.readouterr().err
    assert "cannot be fetched from the Hub: " in refusal("me/other")


def test_what_another_tool_has_left_is_taken_if_no_shard_is_missing(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "cache" / "models--me--other" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").write_text("x")
    name = f"me/other@{'a' * 40}"
    assert "has not all of 00002 shards, and HF_HUB_OFFLINE is set" in refusal(name)
    (folder / "model-00002-of-00002.safetensors").write_text("x")
    assert model_folder(name, "path") == str(folder)


@pytest.mark.parametrize("shards", [0, 1])
def test_what_another_tool_has_left_out_is_not_said_to_be_missing_on_the_hub(
    hub, monkeypatch, tmp_path, shards
):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "cache" / "models--me--other" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if shards:
        index = {"weight_map": {t: f"model-0000{t}-of-00002.safetensors" for t in "12"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "model-00001-of-00002.safetensors").write_text("x")
    told = refusal(f"me/other@{'a' * 40}")
    assert "and HF_HUB_OFFLINE is set: fetch the rest where there is a network" in told
    assert told.startswith(f"{folder} has not all that is wanted")


def test_two_processes_of_a_host_download_once(hub, tmp_path):
    code = (
        "from opsd_jax.host.hub import model_folder;"
        f"print(model_folder('me/tiny@{hub.first}', 'path'))"
    )
    own = {"HF_ENDPOINT": hub.constants.ENDPOINT, "HF_HUB_CACHE": str(tmp_path / "cache")}
    environment = os.environ | own | {"HF_HUB_OFFLINE": "0"}
    hub.delay_s = 0.1
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate() for process in pair]
    folders = {out.strip() for out, _ in said}
    assert sum("Fetching me/tiny" in errors for _, errors in said) == 1
    assert folders == {model_folder(f"me/tiny@{hub.first}", "path")}
    asked = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert len(asked) == len(set(asked)) == 3


def test_nothing_of_the_hub_is_imported_for_a_local_path(tmp_path):
    code = (
        "import sys; from opsd_jax.host.hub import model_folder; model_folder('x', 'path');"
        "print(sorted({'huggingface_hub', 'jax'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    assert hub_module.is_pinned("a/b@" + "0" * 40) and not hub_module.is_pinned("a/b")
