"""Do all islands hear the same words in the same order, through a real store, and is one that was killed not waited for?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import TCPStore

from dtrain.membership import HEARD_ALL, StoreMembership, forget_words, tell_lost
from dtrain.words import NOTHING, MemoryWords, StoreWords, Words

EACH = 100


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def client(server: TCPStore) -> TCPStore:
    return TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))


@pytest.mark.parametrize("where", ["store", "memory"])
def test_two_who_speak_at_once_are_heard_in_one_order_and_each_in_its_own(where: str, server: TCPStore) -> None:
    memory = MemoryWords()
    make: Callable[[], Words] = (lambda: StoreWords(client(server), "words")) if where == "store" else lambda: memory
    speakers = [make(), make()]
    assert speakers[0].heard(0) == []
    numbers: list[list[int]] = [[], []]

    def speak(who: int) -> None:
        numbers[who] = [speakers[who].say(f"{who} {k}") for k in range(EACH)]

    threads = [threading.Thread(target=speak, args=(who,)) for who in range(2)]
    for thread in threads:
        thread.start()
    heard: list[list[str]] = []
    for listener in (make(), make()):
        words: list[str] = []
        ends = time.monotonic() + 30
        while len(words) < 2 * EACH:  # while they speak: a number may be taken and its word not said yet
            assert time.monotonic() < ends
            words += listener.heard(len(words))
        heard.append(words)
    for thread in threads:
        thread.join()
    assert heard[0] == heard[1]
    for who in range(2):
        assert [heard[0][number - 1] for number in numbers[who]] == [f"{who} {k}" for k in range(EACH)]


def test_a_number_without_a_word_is_passed_over_after_a_while_and_its_owner_takes_another(server: TCPStore) -> None:
    store = client(server)
    patient, hasty = StoreWords(store, "words"), StoreWords(store, "words", gap_s=0.0)
    store.add("words/count", 1)  # and killed
    assert patient.say("late") == 2
    assert patient.heard(0) == []
    assert patient.heard(0) == []
    heard: list[str] = []
    ends = time.monotonic() + 30
    while not heard:
        assert time.monotonic() < ends
        heard += hasty.heard(0)
    assert heard == [NOTHING, "late"]
    assert patient.heard(0) == heard
    assert store.compare_set("words/1", "", "slow").decode() == NOTHING, "whoever took it sees that it is gone"


def test_words_that_all_have_heard_are_dropped(server: TCPStore) -> None:
    members = [StoreMembership(client(server), node=n, num_nodes=2, lanes=(0,), epoch=3) for n in range(2)]
    for k in range(5):
        members[0].words.say(str(k))
    members[0].beat(5)
    assert members[0].beats() == {}, "the other never did"
    assert forget_words(server, 2, 3, 0) == 0
    members[1].beat(3)
    assert members[0].beats() == {0: 1, 1: 1}
    assert forget_words(server, 2, 3, 0) == 3
    assert [server.check([f"words/3/{k}"]) for k in range(1, 6)] == [False] * 3 + [True] * 2
    assert members[1].words.heard(3) == ["3", "4"]
    members[1].beat(HEARD_ALL)
    members[0].beat(HEARD_ALL)
    assert forget_words(server, 2, 3, 3) == 5
    assert members[1].beats() == {0: 2, 1: 2}


def test_who_was_lost_is_told_of_one_epoch(server: TCPStore) -> None:
    now, before = (StoreMembership(client(server), node=0, num_nodes=3, lanes=(0,), epoch=epoch) for epoch in (1, 0))
    assert now.lost() == ()
    tell_lost(server, 1, [0, 2])
    assert (now.lost(), before.lost()) == ((0, 2), ())
    tell_lost(server, 1, [])
    assert now.lost() == ()
