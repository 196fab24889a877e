# SPDX-License-Identifier: Apache-2.0
import pickle

from opsd_jax.data.problems import Problem
from opsd_jax.data.record import Message
from opsd_jax.host.identity import problems_digest

TURNS = (Message("system", "Be brief."), Message("user", "2+2?"))


def test_a_conversation_reads_as_its_turns():
    assert Problem("1", "2+2?", "", "4").question_text == "2+2?"
    assert Problem("1", TURNS[1:], "", "4").question_text == "2+2?"
    assert Problem("1", TURNS, "", "4").question_text == "system: Be brief.\n\nuser: 2+2?"


def test_columns_are_no_part_of_a_hash_and_reach_a_worker():
    problem = Problem("1", TURNS, "", "4", columns={"hint": "add"})
    assert pickle.loads(pickle.dumps(problem)) == problem and hash(problem)
    assert problem != Problem("1", TURNS, "", "4")


def test_the_digest_of_problems_covers_columns_and_turns():
    plain = [Problem("1", "2+2?", "", "4")]
    digests = {
        problems_digest(problems)
        for problems in (
            plain,
            [Problem("1", TURNS, "", "4")],
            [Problem("1", "2+2?", "", "4", columns={"hint": "add"})],
            [Problem("1", "2+2?", "", "4", columns={"hint": "sum"})],
        )
    }
    assert len(digests) == 4
