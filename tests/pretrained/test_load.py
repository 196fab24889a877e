# SPDX-License-Identifier: Apache-2.0
"""Folders as people have them: what transformers reads is read, and all else is one sentence."""

import json
import os
import pty
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opsd_jax.data.tokenizer import load_tokenizer
from opsd_jax.errors import UserError
from opsd_jax.pretrained.export import save_pretrained
from opsd_jax.pretrained.load import load_pretrained
from tests.mutations import damaged_texts, mutants
from tests.pretrained.test_export import assert_same_bits, model_config, variables_of

TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"


def tokenizer_files(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz "]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(" ", "isolated"), decoders.Fuse()
    core.add_special_tokens(["<s>", "</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", chat_template=TEMPLATE)
    fast.save_pretrained(str(folder))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = model_config("llama")
    save_pretrained(str(folder), config, {"params": variables_of(config)["params"]})
    tokenizer_files(folder)
    ids = {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": None, "temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    return folder, load_pretrained(str(folder)).params


@pytest.fixture
def folder(made, tmp_path):
    """A copy of links, so that a test changes what it likes."""
    for file in made[0].iterdir():
        os.link(file, tmp_path / file.name)
    return tmp_path


def edit(folder, name, **changes):
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content | changes))


def rewrite(folder, change):
    tensors = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def in_shards(folder, names=("model-00001-of-00001.safetensors",), **extra):
    (folder / "model.safetensors").rename(folder / names[0])
    weight_map = dict.fromkeys(load_file(folder / names[0]), names[0]) | extra
    edit(folder, "model.safetensors.index.json", weight_map=weight_map)


def test_a_whole_file_wins_over_an_index_and_shards(folder, made):
    in_shards(folder)
    save_file(
        {k: v + 1 for k, v in load_file(made[0] / "model.safetensors").items()},
        folder / "model.safetensors",
    )
    wanted = jax.tree.map(lambda x: x + 1, made[1])
    assert_same_bits(load_pretrained(str(folder)).params, wanted)
    edit(folder, "model.safetensors.index.json", weight_map={"stale": "gone.safetensors"})
    assert_same_bits(load_pretrained(str(folder)).params, wanted)


def test_an_index_may_list_what_no_shard_has(folder, made):
    in_shards(
        folder,
        **{"model.layers.0.self_attn.rotary_emb.inv_freq": "model-00001-of-00001.safetensors"},
    )
    assert_same_bits(load_pretrained(str(folder)).params, made[1])


def test_a_model_saved_without_its_head(folder, made):
    from transformers import AutoModel, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made[0], tie_word_embeddings=True)
    AutoModel.from_pretrained(made[0]).save_pretrained(folder)
    edit(folder, "config.json", tie_word_embeddings=True)
    assert "embed_tokens.weight" in load_file(folder / "model.safetensors")
    params = load_pretrained(str(folder)).params
    np.testing.assert_array_equal(params["embed"], model.get_input_embeddings().weight.detach())


def make_pipe(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


REFUSED = {
    "weight_map a list": (
        lambda f: edit(f, "model.safetensors.index.json", weight_map=["model.safetensors"]),
        "weight_map must be an object, not",
    ),
    "weight_map of numbers": (
        lambda f: edit(f, "model.safetensors.index.json", weight_map={"a": 1}),
        "weight_map.a must be text, not 1",
    ),
    "a shard elsewhere": (
        lambda f: edit(f, "model.safetensors.index.json", weight_map={"a": "../b"}),
        "weight_map names ../b, not a file beside it",
    ),
    "fp8": (
        lambda f: rewrite(
            f, lambda t: t | {"lm_head.weight": t["lm_head.weight"].astype(ml_dtypes.float8_e4m3fn)}
        ),
        "lm_head.weight is stored as F8_E4M3",
    ),
    "an adapter beside it": (lambda f: edit(f, "adapter_config.json", r=8), "PEFT adapter"),
    "ten million layers": (
        lambda f: edit(f, "config.json", num_hidden_layers=10**7),
        "num_hidden_layers must be at most 10000",
    ),
    "a thousand layers": (
        lambda f: edit(f, "config.json", num_hidden_layers=1000),
        "num_hidden_layers 1000 does not fit the files, which have 21 tensors",
    ),
    "a width beyond memory": (lambda f: edit(f, "config.json", vocab_size=2**29), "536870912"),
    "a pad id beyond": (
        lambda f: edit(f, "generation_config.json", pad_token_id=32000),
        "pad_token_id must be below the vocabulary's size 64, not 32000",
    ),
    "an end id of text": (
        lambda f: edit(f, "generation_config.json", eos_token_id="2"),
        "eos_token_id must be a token id",
    ),
    "a pipe": (lambda f: make_pipe(f, "tokenizer.json"), "tokenizer.json: a pipe or device"),
    "a pipe for a config": (lambda f: make_pipe(f, "config.json"), "config.json: not a file"),
    "tied by text": (
        lambda f: edit(f, "config.json", tie_word_embeddings="false"),
        "tie_word_embeddings.*expected bool, got str",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_odd_folders_are_refused_in_a_sentence(case, folder):
    change, message = REFUSED[case]
    if "weight_map" in message:
        (folder / "model.safetensors").unlink()
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(str(folder))
    assert "\n" not in str(caught.value)


FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
)


def outcome(folder, wanted):
    """What became of a damaged folder; any exception but a UserError of one line is a fault."""
    try:
        found = load_pretrained(str(folder))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
        return "refused"
    if found.config.tie_embeddings:
        wanted = {k: v for k, v in wanted.items() if k != "lm_head"}
    assert_same_bits(found.params, wanted)
    return "read"


def damage(folder, name, count, seed=0):
    """(what was done) with the file replaced, for each mutant of it and each damaged text."""
    valid = json.loads((folder / name).read_text())
    for done, text in damaged_texts(valid) if name != "tokenizer.json" else ():
        (folder / name).unlink()
        (folder / name).write_bytes(text)
        yield done
    for done, mutant in mutants(valid, count, seed):
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(mutant))
        yield done


def check_damaged(folder, made, name, count):
    if name.endswith("index.json"):
        in_shards(folder)
    seen = []
    for done in damage(folder, name, count):
        try:
            seen.append(outcome(folder, made[1]))
        except Exception as error:
            raise AssertionError(f"{name}: {done}: {type(error).__name__}: {error}") from error
    assert "refused" in seen


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_never_end_in_a_traceback(name, folder, made):
    check_damaged(folder, made, name, count=12)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_many_damaged_files_never_end_in_a_traceback(name, folder, made):
    check_damaged(folder, made, name, count=400)


def header_of(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


@pytest.mark.parametrize("count", [40, pytest.param(600, marks=pytest.mark.slow)])
def test_damaged_headers_of_tensors_never_end_in_a_traceback(count, folder, made):
    path = folder / "model.safetensors"
    header, rest = header_of(path.read_bytes())
    seen = []
    for done, mutant in mutants(header, count):
        text = json.dumps(mutant).encode()
        path.unlink()
        path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
        try:
            seen.append(outcome(folder, made[1]))
        except Exception as error:
            raise AssertionError(f"{done}: {type(error).__name__}: {error}") from error
    assert "refused" in seen


PLANTED = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    pass
"""
LOAD = """
import sys
from opsd_jax.errors import UserError
from opsd_jax.pretrained.load import load_pretrained
try:
    load_pretrained(sys.argv[1])
    print("READ")
except UserError as error:
    print("REFUSED", error)
"""


def plant(folder, tokenizer_class):
    """Code that leaves a mark, named by the tokenizer, the config and the template."""
    mark = folder / "mark"
    for name in ("own.py", "modeling_own.py"):
        (folder / name).write_text(PLANTED.format(mark=str(mark)))
    edit(
        folder,
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "own.Own"]},
        tokenizer_class=tokenizer_class,
    )
    maps = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit(folder, "config.json", auto_map=maps)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system("
        f"'touch {mark}') }}}}"
    )
    return mark


@pytest.mark.parametrize("terminal", [False, True])
def test_planted_code_never_runs(terminal, folder):
    """At a terminal that would answer "y" to every question, and without one."""
    mark = plant(folder, "Own")
    command = [sys.executable, "-c", LOAD, str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if terminal:
        ours, theirs = pty.openpty()
        os.write(ours, b"y\ny\n")
    else:
        theirs = subprocess.DEVNULL
    done = subprocess.run(
        command, stdin=theirs, capture_output=True, text=True, timeout=120, env=environment
    )
    assert not mark.exists(), "the folder's code ran"
    assert "REFUSED" in done.stdout and "names Python code of its own (auto_map)" in done.stdout
    assert "[y/N]" not in done.stdout + done.stderr, "nobody is asked"


def test_code_beside_a_known_tokenizer_is_left_alone(folder, made):
    mark = plant(folder, "PreTrainedTokenizerFast")
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.encode("ab") and not mark.exists()
    with pytest.raises(Exception):  # noqa: B017 (the sandbox's own kinds)
        tokenizer.render("ask")
    assert not mark.exists()
    assert_same_bits(load_pretrained(str(folder)).params, jax.tree.map(jnp.asarray, made[1]))
