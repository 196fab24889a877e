# SPDX-License-Identifier: Apache-2.0
"""experiments/rules.py: checkers and splits by hand, losses by slow loops, tables by hand."""

import importlib
import json
from pathlib import Path

import gin
import jax
import numpy as np
import pytest

from opsd_jax.errors import UserError
from opsd_jax.evaluation.runs import Run
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
    """(rules, keeping, lost, results), found as a user's commands find them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        patch.syspath_prepend(str(EXPERIMENTS / "rules"))
        with gin.unlock_config():  # Another file of this worker may have read a config.
            found = tuple(map(importlib.import_module, ("rules", "keeping", "lost", "results")))
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


# ---- runs, and the tables of what is kept of them


def result(results, method, kept, asked, seed=1, rate=1e-3, rule="json", before=""):
    """Evaluations at 0, 4,000 and 8,000 tokens, and the share of each question in the end."""
    lines = [
        {
            "step": i,
            results.TOKENS: 4000 * i,
            results.KEPT: value,
            results.SE: 0.05,
            "eval/student/length_mean": 40.0 - 10 * i,
            "probe/text_nats": 3 + 0.1 * i,
            "probe/facts": 0.5,
            "probe/kl_initial": 0.1 * i,
        }
        for i, value in enumerate(kept)
    ]
    return results.Result(rule, method, seed, rate, lines, asked, before)


@pytest.fixture
def finished(modules, monkeypatch):
    """(results, found): two methods of two seeds, a tuning run, and the model as it is."""
    results = modules[3]
    monkeypatch.setattr(results, "BUDGET", 6_000)

    def everywhere(shares):
        return dict.fromkeys(results.SPLITS, shares)

    found = [result(results, "SFT", [0, 0.1, 0.1], {}, seed=0, rate=1e-4)]
    for i in (0, 1):
        found.append(
            result(results, "OPSD", [0, 0.5, 0.9], everywhere([1, 1, 1, 0.5 + i / 4]), seed=1 + i)
        )
    for i in (1, 2):
        found.append(result(results, "SFT", [0, 0.2, 0.4], everywhere([0.5, 0.25, 0.5, 0]), seed=i))
    for name, shares in ((results.BARE, [0, 0.25]), (results.PROMPTED, [1, 0.5])):
        found.append(result(results, name, [0.125], everywhere(shares), seed=0, rate=0.0))
    return results, found


def test_the_table_by_hand(finished):
    results, found = finished
    table = results.rule_table(found, "json")
    assert table[2].startswith(
        "| OPSD | 0.700 ± 0.000 | 0.906 ± 0.044 | 0.906 ± 0.044 | 0.906 ± 0.044 | 8,000 "
        "| 20.0 ± 0.0 | 3.200 ± 0.000 |"
    )
    same = "0.312 ± 0.000"  # of two seeds
    assert table[3].startswith(f"| SFT | 0.300 ± 0.000 | {same} | {same} | {same} | 8,000 |")
    # 1, 1, 1, .625 minus .5, .25, .5, 0, question by question.
    assert "| +0.594 [+0.5" in table[3] and table[2].endswith("|  |")
    assert table[4].startswith("| not trained |  | 0.125 | 0.125 | 0.125 | 0 | 40.0 | 3.000 |")
    assert table[5].startswith("| prompted |  | 0.750 | 0.750 | 0.750 | 0 | 40.0 |")
    assert len(table) == 6


def test_a_short_run_has_no_number_at_the_budget(finished):
    results, found = finished
    for each in found:
        each.evaluations.pop()
    found = [each for each in found if each.evaluations]
    assert results.rule_table(found, "json")[2].startswith("| OPSD | – | 0.906")


def test_tuning_runs_are_the_table_where_there_is_no_other(finished):
    results, found = finished
    alone = [each._replace(seed=0) for each in found if each.asked and each.seed < 2]
    assert results.rule_table(alone, "json")[2].startswith("| OPSD | 0.700 | 0.875 | 0.875 |")


def test_what_is_written_is_read(finished, tmp_path):
    results, found = finished
    found.append(
        result(results, "OPSD", [0.5, 0.25], {"heldout": [1, 0], "before": [0.5]}, before="upper")
    )
    for each in found:
        if each.method == results.PROMPTED:
            del each.evaluations[0][results.SE]
    results.write(found, tmp_path / "a.csv")
    assert results.read(tmp_path / "a.csv") == found
    results.write(results.read(tmp_path / "a.csv"), tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_what_is_left_by_hand(finished):
    results, found = finished
    for method, left in (("OPSD", [0, 0, 0.5, 0.5]), ("SFT", [0.5, 0.5, 0.5, 1])):
        asked = {"heldout": [1, 1, 1, 0], "before": left}
        found.append(result(results, method, [0, 1], asked, seed=1, rule="upper", before="json"))
    table = results.forgetting_table(found, "json", "upper")
    assert table[2] == "| OPSD | 0.875 | 0.750 | 0.250 |  |"  # of the same seed before
    assert table[3].startswith("| SFT | 0.312 | 0.750 | 0.625 | -0.375 [-0.5")


def test_the_figure_is_the_same_twice(finished, tmp_path):
    pytest.importorskip("matplotlib")
    results, found = finished
    for name in ("a", "b"):
        results.draw(found, tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_tables_and_figure_of_the_page_are_those_of_the_kept_runs(modules, tmp_path):
    """experiments/README.md against experiments/rules/*.csv."""
    results, page = modules[3], (EXPERIMENTS / "README.md").read_text()
    found = results.read(EXPERIMENTS / "rules" / "runs.csv")
    lines = [line for rule in RULES for line in results.rule_table(found, rule)]
    then = results.read(EXPERIMENTS / "rules" / "then.csv")
    lines += results.forgetting_table(then, *(RULES[0], RULES[2]))
    assert len(lines) == 3 * 8 + 6
    assert [line for line in lines if line not in page] == []
    pytest.importorskip("matplotlib")
    results.draw(found, tmp_path / "rules.svg")
    drawn = (tmp_path / "rules.svg").read_text()
    kept = (EXPERIMENTS / "rules.svg").read_text()
    assert drawn.count("<path") == kept.count("<path")  # another matplotlib draws other digits


RULES = ["sentence", "json", "greeting"]


def test_a_second_rule_starts_from_the_first_ones_student(modules, tmp_path, monkeypatch):
    """The lines of its experiment, where it is kept, and what is asked of both rules."""
    rules, results = modules[0], modules[3]
    started, questions = [], []

    def trained(study, method, rate, seed, out):
        lines = study.seed_bindings(seed, out)
        started.append((out.name, rate, seed, lines))
        return Run(out / "run", None, "", [{"step": 0, results.KEPT: 0.5, results.TOKENS: 0}])

    def evaluated(workdir, folder, split, role, *lines):
        questions.append((str(folder.relative_to(tmp_path)), split, role, lines))
        write(folder, role, [0, 0.5])
        return folder

    monkeypatch.setattr(rules, "run", trained)
    monkeypatch.setattr(rules, "evaluated", evaluated)
    best = {name: 1e-3 for name in rules.METHODS}
    [(function, given), *others] = rules.jobs(tmp_path, ["sentence"], best, [1], "json")
    assert len(others) == 3
    found = function(*given)
    workdir = tmp_path / "sentence" / "run"
    assert [entry[0] for entry in started] == ["sentence", "sentence_then_json"]
    assert started[0][3] == ["RuleQuestions.rule = 'sentence'"]
    experiment, _ = load_experiment([str(EXPERIMENTS / "rules" / "opsd.gin")], started[1][3])
    assert experiment.train.model.workdir == str(workdir)
    assert experiment.train.problems.rule == "json"
    assert questions == [
        ("sentence_then_json/run/final/heldout", "heldout", "student", ()),
        (
            "sentence_then_json/run/final/sentence",
            "heldout",
            "student",
            ("heldout/RuleQuestions.rule = 'sentence'",),
        ),
    ]
    assert (found.rule, found.before, found.asked["before"]) == ("json", "sentence", [0, 0.5])


def test_the_whole_study_and_the_second_rule_write_their_files(
    modules, tmp_path, monkeypatch, capsys
):
    """Of made-up runs: what is written is what is read, tuning runs and the bare model included."""
    rules, results = modules[0], modules[3]
    pytest.importorskip("matplotlib")

    def asked(out, rule, name, rate, seed, first=""):
        shares = {split: [0.5, seed / 4] for split in results.SPLITS}
        shares |= {"before": [0.0, 1.0]} if first else {}
        return result(results, name, [0, 0.5], shares, seed, rate, rule, first)

    def learned(out, rule, name, rate, seed):
        lines = asked(out, rule, name, rate, seed).evaluations
        return Run(out, None, "", [{"step": 0}, *lines])

    def bases(out, rule):
        names = (results.BARE, results.PROMPTED)
        return [
            result(results, n, [0.1], asked(out, rule, n, 0, 1).asked, 0, 0.0, rule) for n in names
        ]

    for name, function in (("asked", asked), ("learned", learned), ("bases", bases)):
        monkeypatch.setattr(rules, name, function)
    best = {name: 1e-3 for name in rules.METHODS}
    rules.whole(tmp_path, RULES, best, [1, 2])
    found = results.read(tmp_path / "runs.csv")
    assert len(found) == 3 * 4 * 2 + 4 * 3 + 3 * 2
    assert (tmp_path / "table.md").read_text().count("| prompted |") == 3
    assert (tmp_path / "rules.svg").exists()
    rules.forgetting(tmp_path, ("sentence", "json"), best, [1, 2])
    assert {each.before for each in results.read(tmp_path / "then.csv")} == {"", "sentence"}
    assert "| OPSD | 0.438" in (tmp_path / "forgetting.md").read_text()
    assert "| OPSD | 0.438" in capsys.readouterr().out


def test_every_cell_is_a_job_of_its_own(modules, tmp_path):
    rules = modules[0]
    best = {name: 1e-3 for name in rules.METHODS}
    todo = rules.jobs(tmp_path, RULES, best, [1, 2], "")
    assert len(todo) == len(set(todo)) == 3 + 3 * 4 * 2
    assert [given[-1] for _, given in todo[3:]] == [1] * 12 + [2] * 12


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


def test_the_model_as_it_is(modules, tmp_path):
    rules = modules[0]
    for split in rules.SPLITS:
        write(tmp_path / "base" / f"json_{split}_student", "student", [0, 0.25])
        write(tmp_path / "base" / f"json_{split}_teacher", "teacher", [1, 0.5])
    bare, prompted = rules.bases(tmp_path, "json")
    assert (bare.method, bare.share("puzzles"), prompted.share("heldout")) == (
        modules[3].BARE,
        0.125,
        0.75,
    )
    assert bare.last("eval/student/length_mean") == 25.0


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
