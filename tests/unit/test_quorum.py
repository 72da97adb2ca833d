"""Do all islands find the same members, and never too few? The rule alone, over random orders of what islands see and say."""

from __future__ import annotations

import random
from itertools import permutations

import pytest

from dtrain.quorum import MOST_MISSED, Roll, can_do_without, check, heard, may_say, size, word

ROLL = Roll(num_islands=4, quorum=3)


def fold(roll: Roll, words: list[str]) -> Roll:
    for told in words:
        roll = heard(roll, told)
    return roll


def test_the_first_word_of_a_round_counts_in_whatever_order_they_come() -> None:
    words = [word(10, {0, 1, 2}), word(10, {1, 2, 3}), word(10, {0, 1, 2, 3}), word(20, {0, 2, 3}), word(20, {0, 1, 2})]
    for order in permutations(words):
        first = {step: next(told for told in order if told.startswith(f"{step} ")) for step in (10, 20)}
        roll = fold(ROLL, list(order))
        assert {step: word(step, members) for step, members in roll.members.items()} == first
        assert fold(roll, words) == roll, "and stays"


def test_fewer_than_a_quorum_are_no_members() -> None:
    assert heard(ROLL, word(10, {0, 1})) == ROLL
    assert fold(ROLL, [word(10, {0, 1}), word(10, {0, 1, 3})]).members == {10: {0, 1, 3}}


def test_who_may_be_named() -> None:
    everybody, none = {0, 1, 2, 3}, set[int]()
    for hurry in (False, True):
        assert may_say(ROLL, everybody, none, hurry=hurry), "nobody is missing"
        assert may_say(ROLL, {0, 1, 2}, {3}, hurry=hurry), "nobody who may come"
        assert not may_say(ROLL, {0, 1}, {2, 3}, hurry=hurry), "no quorum"
        assert may_say(ROLL, {0, 1, 2}, none, hurry=hurry) == hurry
    assert can_do_without(ROLL, {3})
    assert not can_do_without(ROLL, {2, 3})


def test_who_was_left_out_of_a_few_rounds_in_a_row_is_waited_for_unless_it_is_gone() -> None:
    roll = ROLL
    for k in range(MOST_MISSED):
        assert may_say(roll, {0, 1, 2}, set(), hurry=True)
        roll = heard(roll, word(k, {0, 1, 2}))
    assert not may_say(roll, {0, 1, 2}, set(), hurry=True)
    assert may_say(roll, {0, 1, 3}, set(), hurry=True), "another may be left out"
    assert may_say(roll, {0, 1, 2}, {3}, hurry=True)
    assert may_say(heard(roll, word(99, {0, 1, 3})), {0, 1, 2}, set(), hurry=True), "it was a member again"


@pytest.mark.parametrize("seed", range(5))
def test_islands_that_see_and_hear_other_things_agree_and_none_falls_far_behind(seed: int) -> None:
    """Islands hear words late, launch rounds at their own paces, and see another's wire late or not yet."""
    draw = random.Random(seed)
    n = draw.choice((3, 4, 7))
    k = n // 2 + 1
    words, rolls, read, all_heard = list[str](), [Roll(n, k) for _ in range(n)], [0] * n, Roll(n, k)
    launched = [0] * n
    """How many rounds; an island launches the next where it has heard the members of the last."""
    for _ in range(4000):
        node = draw.randrange(n) if draw.random() < 0.7 else draw.randrange(k)  # those up to k are faster
        for _ in range(draw.randrange(3)):
            if read[node] < len(words):
                rolls[node] = heard(rolls[node], words[read[node]])
                read[node] += 1
        now = launched[node]
        if now == 0 or now in rolls[node].members:
            launched[node] += 1
            continue
        here = {m for m in range(n) if launched[m] >= now and (m == node or draw.random() < 0.8)}
        if read[node] == len(words) and may_say(rolls[node], here, set(), hurry=draw.random() < 0.5):
            words.append(word(now, here))
            all_heard = heard(all_heard, words[-1])
        assert max(all_heard.members, default=0) - min(launched) <= MOST_MISSED
    assert all(fold(roll, words[at:]) == all_heard for roll, at in zip(rolls, read, strict=True))
    decided = all_heard.members
    assert len(decided) > 20
    assert min(map(len, decided.values())) >= k
    assert any(len(members) < n for members in decided.values())


def test_what_was_decided_long_ago_is_forgotten() -> None:
    roll = fold(ROLL, [word(step, {0, 1, 2}) for step in range(1000)])
    assert max(roll.members) == 999
    assert MOST_MISSED * 10 < len(roll.members) < 500
    assert roll.missed == {0: 0, 1: 0, 2: 0, 3: 1000}


def test_how_many_a_quorum_is() -> None:
    assert [size("60%", n) for n in (1, 2, 3, 4, 5, 8, 10)] == [1, 2, 2, 3, 3, 5, 6]
    assert all(2 * size("60%", n) > n for n in range(1, 1025)), "a majority"
    assert (size(None, 4), size("100%", 4), size(3, 4), size(4, 4), size("1%", 4)) == (4, 4, 3, 4, 1)
    with pytest.raises(ValueError, match=r"^sync.quorum = 5 is more than islands.count = 4; use 4 at most, [^\n]*$"):
        size(5, 4)
    for said in (0, -1, True, "60", "0%", "101%", "half", 0.6):
        with pytest.raises(ValueError, match=r"^quorum = [^\n]* is not allowed; use a number of islands, [^\n]*$"):
            check(said)
