# SPDX-License-Identifier: Apache-2.0
"""experiments/rules.py: checkers and splits by hand, losses by slow loops, tables by hand."""

import csv
import importlib
import json
from pathlib import Path

import gin
import jax
import numpy as np
import pytest

from opsd_jax.errors import UserError
from opsd_jax.evaluation.runs import TOKENS, Run
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import output_head
from opsd_jax.run.config import load_experiment
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import pad
from opsd_jax.sampling.rollout import rollout
from tests.tiny import WordTokenizer, text_hidden, tiny_config, tiny_variables

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def modules():
    """(rules, keeping, lost), found as a user's commands find them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        patch.syspath_prepend(str(EXPERIMENTS / "rules"))
        with gin.unlock_config():  # Another file of this worker may have read a config.
            found = tuple(map(importlib.import_module, ("rules", "keeping", "lost")))
        yield found


KEPT = {
    "sentence": ["Clocks tell the time.", " Is it so late?\n", "They cost 3.5 euros each!"],
    "greeting": ["Dear friend, clocks are fine.", "\nDear friend,\n\nhello"],
    "upper": ["CLOCKS ARE 12 FINE."],
    "json": ['{"answer": "yes"}', ' {"answer": ""} \n'],
    "marks": ["<answer>yes\nno</answer>"],
    "closing": ["So. Stay curious!", "So. Stay curious! "],
}
BROKEN = {
    "sentence": ["", "Yes.", "Clocks tell the time", "One is here. Two is there.", "A b\nc d."],
    "greeting": ["", "Dear friend,", "Dear friend", "My dear friend, hello"],
    "upper": ["", "123", "CLOCKs"],
    "json": ["", '{"answer": 1}', '{"answer": "a", "b": "c"}', '{"answer": "cut', "[" * 99999],
    "marks": [
        "",
        "<answer></answer>",
        "so <answer>a</answer>",
        "<answer>a</answer><answer>b</answer>",
    ],
    "closing": ["", "Stay curious! I say."],
}


def test_every_checker_by_hand(modules):
    rules = modules[1].RULES
    assert set(KEPT) == set(BROKEN) == set(rules)
    for name, rule in rules.items():
        assert [t for t in KEPT[name] if not rule.check(t)] == [], name
        assert [t for t in BROKEN[name] if rule.check(t)] == [], name


def test_the_teacher_is_shown_answers_that_keep_its_rule_on_topics_of_their_own(modules):
    keeping = modules[1]
    asked = {word for question, _ in keeping.EXAMPLES for word in question.split()}
    assert not {f"{topic}?" for topic in keeping.TOPICS} & asked
    for name, rule in keeping.RULES.items():
        [problem, *_] = keeping.RuleQuestions(rule=name).load().problems
        turns = keeping.told_and_shown(problem)
        assert turns[0] == {"role": "system", "content": rule.words}
        assert turns[-1] == {"role": "user", "content": problem.question}
        said = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        assert len(said) == 2 and all(map(rule.check, said)), said


def test_no_topic_and_no_request_is_trained_on(modules):
    keeping = modules[1]
    sets = {s: keeping.RuleQuestions(rule="greeting", split=s).load() for s in keeping.SPLITS}
    topics = {s: {p.id.split("-")[0] for p in problems.problems} for s, problems in sets.items()}
    assert not topics["train"] & topics["heldout"] and topics["heldout"] == topics["requests"]
    texts = [p.question for problems in sets.values() for p in problems.problems]
    assert len(set(texts)) == len(texts) == 270 + 90 + 60
    asked = {s: {p.question.endswith("?") for p in sets[s].problems} for s in sets}
    assert asked == {"train": {True}, "heldout": {True}, "requests": {False}}
    problem = sets["train"][0]
    assert sets["train"].grade(problem, "Dear friend, a") == 1.0
    assert sets["train"].grade(problem, "a") == 0.0
    with pytest.raises(UserError, match="RuleQuestions.rule"):
        keeping.RuleQuestions(rule="greetings")


def test_puzzles_are_reasoning_gyms(modules):
    pytest.importorskip("reasoning_gym", reason="the extra reasoning is not installed")
    keeping = modules[1]
    found = keeping.RuleQuestions(rule="greeting", split="puzzles").load()
    assert len({p.question for p in found.problems}) == keeping.NUM_PUZZLES
    assert all("appear in the text" in p.question for p in found.problems)
    assert found.grade(found.problems[0], "Dear friend, a") == 1.0


def test_the_methods_differ_in_who_writes_and_in_what_is_learned(modules, tmp_path):
    rules = modules[0]
    seen = set()
    for method in rules.METHODS.values():
        lines = rules.study("greeting").seed_bindings(1, tmp_path)
        experiment, _ = load_experiment([str(EXPERIMENTS / method.gin_file)], lines)
        train = experiment.train
        assert train.problems.rule == train.heldout.rule == "greeting"
        assert (train.problems.split, train.heldout.split) == ("train", "heldout")
        assert experiment.teacher.weights == "initial" and len(train.probes) == 1
        seen.add((type(train.completions).__name__, type(train.objective).__name__))
    assert len(seen) == len(rules.METHODS) == 4


# ---- what is lost


class ChatWords(WordTokenizer):
    """Ids of the tiny model's vocabulary, one for every four letters of a word."""

    def encode(self, text):
        pieces = [word[at : at + 4] for word in text.split() for at in range(0, len(word), 4)]
        return [3 + sum(map(ord, piece)) % 21 for piece in pieces]

    def render_chat(self, messages, prefill, **switches):
        return self.encode(messages[-1].content)


def slow_logits(variables, ids):
    kernel = np.asarray(output_head(variables["params"], tiny_config()).kernel, np.float64)
    return np.asarray(text_hidden(tiny_config())(variables, ids), np.float64) @ kernel.T


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_text_and_facts_are_what_a_loop_says(modules, monkeypatch):
    lost, words, variables = modules[2], ChatWords(), tiny_variables(tiny_config())
    texts = ["a clock is old", "the sea", "one two three four five six seven eight nine"]
    groups = [
        ("the capital of {} is", "France Paris, Peru Lima, Italy Rome, Japan Tokyo"),
        ("not {} but", "hot cold, big small, up down"),
    ]
    monkeypatch.setattr(lost, "TEXT", texts)
    monkeypatch.setattr(lost, "FACTS", groups)
    nats = []
    for text in texts:
        ids = words.encode(text)
        logps = log_softmax(slow_logits(variables, ids))
        nats += [-logps[t - 1, ids[t]] for t in range(1, len(ids))]
    right, model = [], Decoder(tiny_config())
    for template, pairs in groups:
        names, ends = zip(*(pair.split() for pair in pairs.split(", ")), strict=True)
        firsts = [words.encode(end)[0] for end in ends]
        for row, name in enumerate(names):
            last = slow_logits(variables, words.encode(template.format(name)))[-1]
            right.append(int(np.argmax([last[first] for first in firsts])) == row)
    assert 0 < sum(right) < len(right)
    found = lost.what_is_lost(model, variables, None, words)
    assert found["probe/text_nats"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found["probe/facts"] == np.mean(right) and len(found) == 2


def test_ends_that_begin_alike_are_refused(modules, monkeypatch):
    lost, words = modules[2], ChatWords()
    monkeypatch.setattr(lost, "FACTS", [("not {} but", "hot cold, big coldness")])
    with pytest.raises(UserError, match="two ends of 'not {} but'"):
        lost.facts_accuracy(Decoder(tiny_config()), tiny_variables(tiny_config()), words)


def test_the_old_answers_are_the_initial_models(modules, monkeypatch):
    lost, words, config = modules[2], ChatWords(), tiny_config()
    model, initial, student = (
        Decoder(config),
        tiny_variables(config),
        tiny_variables(config, seed=1),
    )
    monkeypatch.setattr(lost, "NUM_QUESTIONS", 3)
    monkeypatch.setattr(lost, "NUM_TOKENS", 5)
    questions = [lost.QUESTIONS[i].format(topic=lost.TOPICS[i]) for i in range(3)]
    rows = [words.encode(q) for q in questions]
    settings = RolloutConfig(5).for_tokenizer(words.stop_ids, words.pad_id)
    ids, lengths = pad(rows, max(map(len, rows)), words.pad_id)
    said = rollout(model, initial, ids, lengths, jax.random.key(0), settings)
    values = []
    for b, row in enumerate(rows):
        answer = np.asarray(said.ids[b])[np.asarray(said.mask[b])].tolist()
        sides = [log_softmax(slow_logits(v, row + answer)) for v in (initial, student)]
        old, new = (logps[len(row) - 1 : len(row) + len(answer) - 1] for logps in sides)
        values += np.sum(np.exp(old) * (old - new), axis=1).tolist()
    got = lost.old_answers_kl(model, student, initial, words)
    assert got == pytest.approx(np.mean(values), rel=1e-4)
    assert lost.old_answers_kl(model, initial, initial, words) == pytest.approx(0, abs=1e-6)


# ---- tables


def a_run(folder, kept, final):
    """Evaluations at 0, 4,000 and 8,000 tokens, and the share of each problem in the end."""
    history = [
        {
            "step": i,
            TOKENS: 4000 * i,
            "eval/student/accuracy": value,
            "eval/student/accuracy_se": 0.05,
            "eval/student/length_mean": 40.0 - 10 * i,
            "probe/text_nats": 3 + 0.1 * i,
            "probe/facts": 0.5,
            "probe/kl_initial": 0.1 * i,
        }
        for i, value in enumerate(kept)
    ]
    for split in ("heldout", "requests", "puzzles"):
        write(folder / "final" / split, "student", final)
    return Run(folder, None, "", history)


def write(folder, role, shares):
    folder.mkdir(parents=True)
    rows = [
        {
            "role": role,
            "id": f"p{i}",
            "answer": "json",
            "num_samples": 4,
            "accuracy": share,
            "num_correct": int(4 * share),
        }
        for i, share in enumerate(shares)
    ]
    (folder / "by_problem.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({f"eval/{role}/length_mean": 25.0}))


@pytest.fixture
def finished(modules, tmp_path, monkeypatch):
    """Two methods of two seeds, and the model as it is."""
    monkeypatch.setattr(modules[0], "BUDGET", 6_000)
    names = [modules[0].FIRST, "SFT on the prompted model"]
    runs = {
        names[0]: [
            a_run(tmp_path / f"a{i}", [0, 0.5, 0.9], [1, 1, 1, 0.5 + i / 4]) for i in (0, 1)
        ],
        names[1]: [a_run(tmp_path / f"b{i}", [0, 0.2, 0.4], [0.5, 0.25, 0.5, 0]) for i in (0, 1)],
    }
    for split in ("heldout", "requests", "puzzles"):
        write(tmp_path / "base" / f"json_{split}_student", "student", [0, 0.25])
        write(tmp_path / "base" / f"json_{split}_teacher", "teacher", [1, 0.5])
    return runs, tmp_path


def test_the_table_by_hand(modules, finished):
    runs, out = finished
    table = modules[0].rule_table("json", runs, out)
    assert table[2].startswith(
        "| OPSD | 0.700 | 0.906 ± 0.044 | 0.906 ± 0.044 | 0.906 ± 0.044 | 8,000 | 20.0 | 3.200 |"
    )
    assert table[3].startswith(
        "| SFT on the prompted model | 0.300 | 0.312 | 0.312 | 0.312 | 8,000 |"
    )
    # 1, 1, 1, .625 minus .5, .25, .5, 0, problem by problem.
    assert "| +0.594 [+0.5" in table[3]
    assert table[4].startswith("| not trained |  | 0.125 | 0.125 | 0.125 | 0 | 25.0 | 3.000 |")
    assert table[5].startswith("| prompted |  | 0.750 | 0.750 | 0.750 | 0 | 25.0 |")


def test_a_second_rule_starts_from_the_first_ones_student(modules, finished, monkeypatch):
    """The lines of its experiment, and what is told of both rules."""
    rules = modules[0]
    runs, out = finished
    [one, two] = runs[rules.FIRST]
    write(two.workdir / "final" / "sentence", "student", [0, 0, 0.5, 0.5])
    lines = rules.after(one, "json").seed_bindings(1, out)
    experiment, _ = load_experiment([str(EXPERIMENTS / "rules" / "opsd.gin")], lines)
    assert experiment.train.model.workdir == str(one.workdir)
    assert experiment.train.problems.rule == "json"
    asked = []

    def trained(study, method, rate, seed, out):
        asked.append((rate, seed, out.name, study.seed_bindings(seed, out)))
        return two if out.name == "sentence_then_json" else one

    monkeypatch.setattr(rules, "run", trained)
    best = {name: 1e-3 for name in rules.METHODS}
    table = rules.forgetting(("sentence", "json"), best, [1], out)
    assert len(table) == 2 + 4 and table[2] == "| OPSD | 0.875 | 0.938 | 0.250 |"
    assert [a[2] for a in asked[:2]] == ["sentence", "sentence_then_json"]
    assert asked[1][3] == lines and asked[0][3] == ["RuleQuestions.rule = 'sentence'"]


def test_rates_are_those_of_the_texts(modules, tmp_path):
    """The bare model is asked once; every checker reads the same texts."""
    rules = modules[0]
    write(tmp_path / "base" / "upper_heldout_student", "student", [1, 1, 0.5, 0.5])
    folders = [f"upper_{column.replace(' ', '_')}" for column in rules.TOLD]
    for number, folder in enumerate([*folders, "upper_heldout_teacher"]):
        write(tmp_path / "base" / folder, "teacher", [1, 1, 0.5, 0.5 + number / 4])
    lines = "".join(json.dumps({"completion": text}) + "\n" for text in ["A B", "a", "b", "c"])
    (tmp_path / "base" / "upper_heldout_student" / "generations.jsonl").write_text(lines)
    [*_, line] = rules.rates(tmp_path, ["upper"])
    assert line.endswith("| 0.250 ± 0.250 | 0.750 ± 0.144 | 0.812 ± 0.120 | 0.875 ± 0.125 |")
    for settings in rules.TOLD.values():  # Each can be read.
        lines = ["RuleQuestions.rule = 'upper'", *settings]
        load_experiment([str(EXPERIMENTS / "rules" / "opsd.gin")], lines)


def test_a_short_run_has_no_number_at_the_budget(modules, finished):
    runs, out = finished
    for group in runs.values():
        for each in group:
            each.history.pop()
    assert modules[0].rule_table("json", runs, out)[2].startswith("| OPSD | – | 0.906")


def test_raw_numbers_and_figure_of_every_run(modules, finished, tmp_path):
    runs, out = finished
    keyed = {("json", name, s, 1e-3): r for name, rs in runs.items() for s, r in enumerate(rs)}
    modules[0].write_csv(keyed, out / "runs.csv")
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3 and {row["method"] for row in rows} == set(runs)
    assert rows[2][TOKENS] == "8000" and rows[2]["probe/text_nats"] == "3.2"
    assert [row["final/heldout"] for row in rows[:3]] == ["", "", "0.875"]
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        modules[0].draw({"json": runs}, out / f"{name}.svg")
    assert (out / "a.svg").read_bytes() == (out / "b.svg").read_bytes()
