# SPDX-License-Identifier: Apache-2.0
"""`opsd tokens`: its numbers against float64 NumPy, its texts by hand, the command end to end."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opsd_jax.data.tokenizer import HFTokenizer
from opsd_jax.divergence.losses import DivergenceConfig, TokenDivergence
from opsd_jax.main import main
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import output_head
from opsd_jax.pretrained.export import save_pretrained
from opsd_jax.run.tokens import TokenComparison, compare_tokens, token_rows, token_texts
from opsd_jax.sampling.prompts import Completion
from tests.data.test_tokenizer import SPECIAL, byte_tokenizer
from tests.divergence.oracle import Choice, probabilities, report, top_k
from tests.tiny import (
    VOCAB,
    WordTokenizer,
    text_hidden,
    tiny_batch,
    tiny_config,
    tiny_variables,
)

EVIL = "</script><script>window.broken=1</script>"


def completion_of(lengths: list[int], width: int) -> Completion:
    ids = np.random.default_rng(7).integers(3, VOCAB, (len(lengths), width))
    mask = np.arange(width) < np.array(lengths)[:, None]
    stopped = np.ones(len(lengths), bool)
    return Completion(ids.astype(np.int32), mask, np.zeros(mask.shape, np.float32), stopped)


@pytest.mark.parametrize(
    "choice",
    [
        Choice("forward_kl", clip="rescale", temperature=2.0),
        Choice("reverse_kl", clip="entry", support="teacher_top_k"),
        Choice("jensen_shannon", beta=0.3),
    ],
    ids=lambda choice: choice.name,
)
def test_every_token_is_what_float64_says(choice):
    """Text by text, token by token, each side with its own weights and prompt."""
    config = tiny_config()
    sides = (tiny_variables(config), tiny_variables(config, seed=1))
    batch, completion = tiny_batch(3), completion_of([4, 0, 2], 4)
    compare = jax.jit(compare_tokens, static_argnums=(0, 1, 6))
    settings = DivergenceConfig(**dataclasses.asdict(choice))
    found = jax.device_get(compare(Decoder(config), settings, *sides, batch, completion, 5))
    for b, t in zip(*np.nonzero(completion.mask), strict=True):
        logits = []
        for variables, context in zip(sides, (batch.student, batch.teacher), strict=True):
            text = [*context.ids[b, : context.lengths[b]].tolist(), *completion.ids[b, :t].tolist()]
            hidden = np.asarray(text_hidden(config)(variables, text)[-1], np.float64)
            kernel = np.asarray(output_head(variables["params"], config).kernel, np.float64)
            logits.append(kernel @ hidden)
        expected = report(choice, *logits, y=completion.ids[b, t])
        for name in ("divergence", "student_logps", "teacher_entropy", "teacher_logps"):
            got = getattr(found.terms, name)[b, t]
            np.testing.assert_allclose(got, expected[name], atol=3e-5, rtol=1e-4, err_msg=name)
        for side, side_logits in zip(("student", "teacher"), logits, strict=True):
            best = top_k(side_logits, 5)
            assert getattr(found, f"{side}_ids")[b, t].tolist() == best
            probs = probabilities(side_logits)[best]
            np.testing.assert_allclose(getattr(found, f"{side}_probs")[b, t], probs, atol=2e-5)
    assert np.all(found.terms.divergence[~completion.mask] == 0)


# ---- texts

BYTES = HFTokenizer(byte_tokenizer())


def merged_tokenizer() -> HFTokenizer:
    """Byte pairs as a trained vocabulary has them: a space with half of an emoji in one token."""
    alphabet = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("ð", "Ł"), ("Ġ", "ðŁ"), ("ĺ", "Ģ"), ("b", "c")]
    pieces = alphabet + ["".join(pair) for pair in merges]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>"))


def fallback_tokenizer() -> HFTokenizer:
    """Pieces that begin with a space, the first space not shown, bytes for all else (Llama's)."""
    pieces = ["<s>", "</s>", "▁one", "▁two", "s", *(f"<0x{i:02X}>" for i in range(256))]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"))


def test_a_character_stands_at_the_token_that_completes_it():
    ids = BYTES.encode("a😀é")
    assert token_texts(BYTES, ids) == ["a", "", "", "", "😀", "", "é"]
    merged = merged_tokenizer()
    ids = merged.encode("abc 😀 d")
    assert merged.inner.convert_ids_to_tokens(ids) == ["a", "bc", "ĠðŁ", "ĺĢ", "Ġ", "d"]
    assert token_texts(merged, ids) == ["a", "bc", "", " 😀", " ", "d"]


def test_leading_spaces_are_kept_but_the_first():
    tokenizer = fallback_tokenizer()
    emoji = [5 + byte for byte in "😀".encode()]
    texts = token_texts(tokenizer, [2, 3, 4, *emoji, *emoji, 2])
    assert texts == ["one", " two", "s", "", "", "", "😀", "", "", "", "😀", " one"]


def test_what_is_never_completed_is_shown_at_the_end():
    half = BYTES.encode("😀")[:2]
    assert token_texts(BYTES, [*BYTES.encode("a"), *half]) == ["a", "", "\ufffd"]
    assert token_texts(BYTES, [*half, *BYTES.encode("b")]) == ["", "", "\ufffdb"]
    assert token_texts(BYTES, [*half, BYTES.stop_ids[0]]) == ["", "", "\ufffd"]
    assert token_texts(BYTES, []) == []


@given(st.lists(st.integers(0, 260), max_size=12))
@settings(max_examples=100, deadline=None)
def test_joined_they_are_the_decoded_text(ids):
    texts = token_texts(BYTES, ids)
    assert len(texts) == len(ids) and "".join(texts) == BYTES.decode(ids)


# ---- rows of the page


def rows_of(tokenizer, ids, top_ids, divergence=0.5):
    """`token_rows` of one completion; both sides prefer `top_ids` [C, K]."""
    C, K = np.shape(top_ids)
    mask = np.arange(len(ids))[None] < C
    completion = Completion(np.array([ids]), mask, np.zeros(mask.shape), np.ones(1, bool))
    number = np.full(mask.shape, divergence)
    terms = TokenDivergence(*[number] * len(dataclasses.fields(TokenDivergence)))
    best = np.zeros((*mask.shape, K), int)
    best[0, :C] = top_ids
    probs = np.broadcast_to(number[..., None], best.shape)
    return token_rows(tokenizer, completion, TokenComparison(terms, best, probs, best, probs))


def test_alternatives_read_as_they_would_stand_there():
    stop, [a], emoji = BYTES.stop_ids[0], BYTES.encode("a"), BYTES.encode("😀")
    ids = [a, *emoji, stop]
    top = [[a, emoji[0]], [a, stop], [emoji[1], a], [emoji[2], a], [emoji[3], a], [stop, a]]
    [row] = rows_of(BYTES, ids, top)
    texts = [[text for _, text, _ in token["teacher_top"]] for token in row]
    # An `a` inside a character breaks it; a part of a character and the end have no text.
    assert texts == [["a", ""], ["a", ""], ["", "\ufffda"], ["", "\ufffda"], ["😀", "\ufffda"]] + [
        ["", "a"]
    ]
    assert [token["stop"] for token in row] == [False] * 5 + [True]
    assert [token["text"] for token in row] == ["a", "", "", "", "😀", ""]
    assert [pair[0] for token in row for pair in token["student_top"]] == sum(top, [])


def test_alternatives_keep_their_leading_space():
    [row] = rows_of(fallback_tokenizer(), [2, 3], [[2, 3], [2, 4]])
    assert [[text for _, text, _ in t["student_top"]] for t in row] == [
        ["one", "two"],
        [" one", "s"],
    ]


def test_an_empty_completion_has_no_rows_and_numbers_that_json_lacks_are_null():
    assert rows_of(BYTES, [3, 3], np.zeros((0, 2))) == [[]]
    [[token]] = rows_of(BYTES, [3], [[3, 0]], divergence=np.nan)
    assert token["divergence"] is None and token["teacher_top"] == [[3, "", None], [0, "", None]]
    assert token["text"] == "" and token["stop"]
    json.dumps(token, allow_nan=False)


class HostileTokenizer(WordTokenizer):
    def decode(self, ids):
        return EVIL * len(ids)


def drawn(line):
    """What the page shows of a line of `opsd tokens`."""
    names = "step divergence question answer teacher_prompt analysis reward tokens".split()
    return {name: line.get(name) for name in names}


def test_hostile_tokens_end_up_as_text_on_the_page(tmp_path):
    (tmp_path / "run" / "tokens").mkdir(parents=True)
    (tmp_path / "run" / "config.gin").write_text("train.seed = 0\n")
    [tokens] = rows_of(HostileTokenizer(), [5, 6], [[5, 7], [8, 6]], divergence=np.inf)
    assert tokens[1]["text"] == tokens[0]["teacher_top"][1][1] == EVIL
    line = {"step": 1, "question": EVIL, "teacher_prompt": EVIL, "answer": EVIL, "tokens": tokens}
    (tmp_path / "run" / "tokens" / "step_000001.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["report", f"--workdir={tmp_path}/run", f"--out={tmp_path}/page.html"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["views"][0]["samples"] == [drawn(line)]


# ---- the command

GIN = """
train.model = @PretrainedModel()
PretrainedModel.path = "{folder}/model"
train.problems = @JsonlProblems()
train.heldout = @JsonlProblems()
JsonlProblems.path = "{folder}/problems.jsonl"
JsonlProblems.grader = "last_number"
train.num_steps = 1
train.batch_size = 8
train.learning_rate = 1e-3
train.eval_every_steps = 0
train.grader_workers = 0
teacher.weights = "live"
rollout.max_new_tokens = 5
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """One step of a random byte model on problems whose texts are hostile."""
    folder = tmp_path_factory.mktemp("tokens")
    config = tiny_config(vocab_size=264, num_layers=1)
    save_pretrained(str(folder / "model"), config, tiny_variables(config), BYTES)
    rows = ({"question": f"{i}{EVIL}", "solution": EVIL, "answer": f"{i}"} for i in range(9))
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.gin").write_text(GIN.replace("{folder}", str(folder)))
    flags = [f"--gin_file={folder / 'run.gin'}", f"--workdir={folder / 'run'}"]
    assert main(["train", *flags]) == 0
    return folder / "run"


@pytest.mark.slow
def test_the_command_writes_whole_lines_which_the_page_shows(workdir, capsys):
    assert main(["tokens", f"--workdir={workdir}", "--num=3"]) == 0
    path = workdir / "tokens" / "step_000001.jsonl"
    assert capsys.readouterr().out.strip() == str(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["question"] for line in lines] == [f"{i}{EVIL}" for i in range(3)]
    for line in lines:
        assert "".join(token["text"] for token in line["tokens"]) == line["completion"]
        assert EVIL in line["teacher_prompt"] and line["question"] in line["teacher_prompt"]
        assert 1 <= len(line["tokens"]) <= 5 and line["reward"] in (0.0, 1.0)
        assert line["stopped"] == line["tokens"][-1]["stop"] and line["step"] == 1
        for token in line["tokens"]:
            for side in ("student_top", "teacher_top"):
                probs = [prob for _, _, prob in token[side]]
                assert len(probs) == 5 and probs == sorted(probs, reverse=True)
            assert token["divergence"] > 0
    before = path.read_bytes()
    assert main(["tokens", f"--workdir={workdir}", "--num=3"]) == 0
    assert path.read_bytes() == before
    out = workdir.parent / "page.html"
    assert main(["report", f"--workdir={workdir}", f"--out={out}"]) == 0
    assert out.read_text().count("<script") == 2
    data = out.read_text().split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["views"][0]["samples"] == [drawn(line) for line in lines]


def test_bad_input_is_one_line_and_status_2(workdir, capsys):
    assert main(["tokens", f"--workdir={workdir}", "--num=0"]) == 2
    assert "--num must be an integer >= 1" in capsys.readouterr().err
    assert main(["tokens", f"--workdir={workdir}", "--step=7"]) == 2
    assert "7" in capsys.readouterr().err


def test_a_teacher_of_another_shape_is_refused(monkeypatch, capsys):
    found = SimpleNamespace(teacher=None)
    monkeypatch.setattr("opsd_jax.run.tokens.restore_run", lambda *_: found)
    assert main(["tokens", "--workdir=runs/x"]) == 2
    assert "runs/x: its teacher.model is of another shape" in capsys.readouterr().err
