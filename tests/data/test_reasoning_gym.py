# SPDX-License-Identifier: Apache-2.0
import concurrent.futures
import multiprocessing
import subprocess
import sys

import pytest

from opsd_jax.data.grader_pool import Grade, GraderPool
from opsd_jax.data.reasoning_gym import ReasoningGym, ReasoningScorer
from opsd_jax.errors import UserError

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
reasoning_gym = pytest.importorskip(
    "reasoning_gym", reason="the extra reasoning, which wants a C compiler, is not installed"
)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def test_word_problems_have_worked_solutions(cache_dir):
    problems = ReasoningGym("gsm_symbolic", num_problems=5, seed=1).load(cache_dir)
    assert len(problems) == 5
    for problem in problems.problems:
        index = int(problem.id.split("/")[-1])
        entry = reasoning_gym.create_dataset("gsm_symbolic", seed=1, size=2000)[index]
        assert problem.question == entry["question"]
        assert problem.solution == entry["metadata"]["answer_cot"]
        assert problem.answer == entry["answer"]
        assert problems.grade(problem, f"so \\boxed{{{problem.answer}}}") == 1.0
        assert problems.grade(problem, "I do not know") < 1.0


def test_splits_never_share_a_question(cache_dir):
    """Neighbouring seeds of the library draw the same items; the splits hold all the same."""
    train = ReasoningGym("chain_sum", SUMS, num_problems=300, seed=0).load(cache_dir)
    heldout = ReasoningGym("chain_sum", SUMS, "heldout", num_problems=100, seed=1).load(cache_dir)
    questions = [p.question for p in train.problems + heldout.problems]
    assert len(set(questions)) == 400


def test_the_cache_gives_the_same_and_is_read_only_once_made(cache_dir, monkeypatch):
    source = ReasoningGym("chain_sum", SUMS, num_problems=20)
    fresh = source.load(None)
    assert source.load(cache_dir) == fresh
    draws = [int(p.id.split("/")[-1]) for p in fresh.problems]
    assert draws == sorted(draws)  # though TFDS stores in an order of its own

    def fail(self):
        raise AssertionError("generated again")

    monkeypatch.setattr(ReasoningGym, "_generate", fail)
    assert source.load(cache_dir) == fresh
    with pytest.raises(AssertionError, match="generated again"):
        ReasoningGym("chain_sum", SUMS, num_problems=20, seed=9).load(cache_dir)


def _load(cache_dir):
    return ReasoningGym("chain_sum", SUMS, num_problems=50, seed=77).load(cache_dir).problems


def test_processes_that_start_together_agree(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as processes:
        first, second = processes.map(_load, [str(tmp_path)] * 2)
    assert first == second == _load(str(tmp_path))


@pytest.mark.parametrize("name", ["graph_color", "knights_knaves", "n_queens", "rush_hour"])
def test_scorers_see_their_own_record(name):
    """Their records hold integer keys, tuples, NumPy strings, or no answer."""
    problems = ReasoningGym(name, num_problems=2).load()
    for problem in problems.problems:
        assert problems.grade(problem, "wrong") < 1.0
        if problem.answer:
            assert problems.grade(problem, problem.answer) == 1.0


def test_a_scorer_that_evaluates_text_is_kept_in_its_pool():
    problems = ReasoningGym("n_queens", num_problems=1).load()
    texts = ["9**9**9**9", "__import__('os').system('true')", problems[0].answer]
    with GraderPool(problems.grade, num_workers=1, time_limit_s=2.0) as pool:
        grades = pool.grade([problems[0]] * 3, texts)
    assert grades[0].outcome == "timeout"
    assert [grade.value for grade in grades[:2]] == [0.0, 0.0]
    assert grades[2] == Grade(1.0, answer=texts[2])


@pytest.mark.parametrize(
    ("completion", "grade"),
    [
        (r"<answer>\boxed{%s}</answer>", 1),
        ("<answer>$%s$</answer>", 1),
        ("<think>is it 0?</think>\n%s", 1),
        (r"<think>\boxed{%s}", 0),
        ("<answer>%s1</answer>", 0),
    ],
)
def test_answers_are_found_in_tags_and_boxes_and_behind_thoughts(cache_dir, completion, grade):
    problems = ReasoningGym("chain_sum", SUMS, num_problems=3, seed=0).load(cache_dir)
    for problem in problems.problems:
        found = problems.grade(problem, completion % problem.answer)
        assert (found == 1.0) == bool(grade)


def test_a_scorer_that_reads_one_notation_is_shown_a_plain_number():
    params = {"min_terms": 2, "max_terms": 2, "min_digits": 4, "max_digits": 4}
    problems = ReasoningGym("chain_sum", params, num_problems=5).load()
    for problem in problems.problems:
        grouped = f"{int(problem.answer):,}"
        for text in (grouped, grouped.replace(",", "{,}").replace("-", "\u2212")):
            assert problems.grade(problem, f"\\boxed{{{text}}}") == 1.0
        assert problems.grade(problem, f"\\boxed{{{grouped}.5}}") < 1.0


def test_answers_vote_by_value_or_by_text():
    same = ReasoningScorer("chain_sum", {}, "final").same
    assert same("1,234", "1234.0") and same("a b", "a  b")
    assert not same("12 apples", "12 pears") and not same("-5", "5")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "no_such"}, "reasoning-gym has no data set 'no_such'; it has ab, acre"),
        ({"name": "chain_sum", "params": {"x": 1}}, "its parameters are min_terms, max_terms"),
        ({"name": "chain_sum", "params": {"min_terms": -1}}, "chain_sum does not accept"),
        (
            {"name": "chain_sum", "split": "test"},
            "ReasoningGym.split must be 'train' or 'heldout', not",
        ),
        ({"name": "chain_sum", "num_problems": 0}, "num_problems must be an integer >= 1"),
        (
            {"name": "coin_flip", "params": {"min_trials": 1, "max_trials": 1}},
            "draws of coin_flip gave .* different train questions, not 1000",
        ),
    ],
)
def test_bad_settings_are_told(settings, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        ReasoningGym(**settings).load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot keep problems in .*file"):
        ReasoningGym("chain_sum", SUMS, num_problems=1).load(str(tmp_path / "file"))


def test_the_missing_package_is_named_and_tensorflow_is_not_imported():
    program = """if True:
        import sys
        from opsd_jax.data.reasoning_gym import ReasoningGym, ReasoningScorer
        ReasoningGym("coin_flip", num_problems=1).load()
        assert "tensorflow" not in sys.modules
        sys.modules["reasoning_gym"] = None
        ReasoningGym("coin_flip").load()
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    told = "UserError: ReasoningGym needs the package reasoning-gym: pip install '.[reasoning]'"
    assert told in result.stderr
