"""Is everybody paired with a ready neighbour, and nobody left out? The rule alone, over random orders of asks."""

from __future__ import annotations

import random

import networkx as nx
import pytest

from dtrain.matchmaker import Ask, Desk, Graph, Meeting, accepted, ask, end, graph_of, heard, hurry, is_alone, withdraw, word

RING = graph_of([(0, 1), (1, 2), (2, 3), (0, 3)], 4)
TRIANGLE = graph_of([(0, 1), (0, 2), (1, 2)], 3)
BRIDGED = graph_of([(0, 1), (1, 2), (2, 3), (0, 3), (4, 5), (5, 6), (6, 7), (4, 7), (3, 4)], 8)
"""Two squares that one edge joins."""
GRAPHS = {
    "ring": RING,
    "triangle": TRIANGLE,
    "bridged": BRIDGED,
    "star": graph_of([(0, leaf) for leaf in range(1, 6)], 6),
    "complete": graph_of([(a, b) for b in range(7) for a in range(b)], 7),
}


def test_two_who_are_ready_meet_under_one_number_and_are_ready_no_more() -> None:
    desk = ask(ask(Desk(), 2, RING), 1, RING)
    assert desk.met == {1: Meeting(1, 2), 2: Meeting(1, 1)}
    assert desk.ready == {}
    assert desk.last == {(1, 2): 1}


def test_who_is_no_neighbour_is_not_met() -> None:
    desk = hurry(hurry(ask(ask(Desk(), 0, RING), 2, RING), 0, RING), 2, RING)
    assert desk.met == {}
    assert set(desk.ready) == {0, 2}


def test_of_those_who_wait_the_one_met_least_recently_comes_first_and_of_equals_who_waits_longest() -> None:
    star = GRAPHS["star"]
    waiting = {leaf: Ask(order, patient=False) for leaf, order in ((1, 9), (2, 8), (3, 4), (4, 6))}
    desk = Desk(meetings=5, asks=9, ready=waiting, last={(0, 1): 5, (0, 3): 2})
    assert ask(desk, 0, star).met[0] == Meeting(6, 4)  # 2 and 4 never met 0, and 4 asked first


def test_a_patient_one_takes_the_older_half_of_its_neighbours_and_one_that_hurries_any() -> None:
    desk = Desk(meetings=3, last={(0, 1): 3, (1, 2): 2})
    desk = ask(ask(desk, 0, RING), 1, RING)
    assert (accepted(desk, 0, RING), accepted(desk, 1, RING)) == ((3,), (2,))
    assert desk.met == {}
    desk = hurry(desk, 0, RING)
    assert desk.met == {}, "1 is patient still"
    assert hurry(desk, 1, RING).met == {0: Meeting(4, 1), 1: Meeting(4, 0)}


def test_what_was_given_is_not_taken_back_and_what_was_not_is() -> None:
    desk = ask(Desk(), 0, RING)
    assert withdraw(desk, 0).ready == {}
    assert ask(withdraw(desk, 0), 1, RING).met == {}
    met = ask(desk, 1, RING)
    assert withdraw(met, 0) == met


def test_who_ended_meets_nobody_and_who_is_left_over_is_alone() -> None:
    desk = end(ask(Desk(), 0, RING), 0)
    assert ask(desk, 1, RING).met == {}
    assert not is_alone(desk, 1, RING)
    assert is_alone(end(desk, 2), 1, RING)
    # 2 has 3 alone left, so it accepts 3 however lately they met.
    assert accepted(ask(end(Desk(meetings=1, last={(2, 3): 1}), 1), 2, RING), 2, RING) == (3,)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("seed", range(3))
def test_in_any_order_all_meet_again_and_again_over_edges_that_join_them(name: str, seed: int) -> None:
    """Random words; an island that asks for long enough meets, and the edges of late meetings hold the graph together."""
    graph, draw = GRAPHS[name], random.Random(seed)
    met: list[tuple[int, int]] = []
    desk, waited = Desk(), dict.fromkeys(graph, 0)
    for _ in range(1500):
        node = draw.choice(list(graph))
        before = desk
        if node in desk.ready:
            desk = withdraw(desk, node) if draw.random() < 0.05 else hurry(desk, node, graph)
        else:
            desk = ask(desk, node, graph)
        if desk.meetings > before.meetings:
            assert desk.meetings == before.meetings + 1
            peer = desk.met[node].peer
            assert peer in graph[node]
            assert peer in before.ready
            assert desk.met[peer] == Meeting(desk.meetings, node)
            met.append((node, peer))
            waited[node] = waited[peer] = 0
        for each in desk.ready:
            waited[each] += 1
            # A star's leaves take turns at its one centre, 5 meetings that are 2 of 6 islands' words each, and words are drawn.
            assert waited[each] < 500, f"island {each} waits for ever"
    late = nx.Graph(met[-8 * len(graph) :])
    assert set(late) == set(graph)
    assert nx.is_connected(late)


@pytest.mark.parametrize("name", ["ring", "bridged"])
def test_islands_that_step_alike_do_not_fall_apart_into_pairs(name: str) -> None:
    """All ask in the same order, again and again: by who comes first alone 0 and 1 would meet for ever."""
    graph = GRAPHS[name]
    desk, met = Desk(), set[tuple[int, int]]()
    for _ in range(20):
        for node in graph:
            before = desk
            desk = (hurry if node in desk.ready else ask)(desk, node, graph)
            if desk != before and desk.meetings > before.meetings:
                met.add((node, desk.met[node].peer))
    assert nx.is_connected(nx.Graph(list(met)))


def test_a_desk_follows_from_the_words_that_were_said() -> None:
    said = ((2, "ask"), (1, "ask"), (0, "ask"), (0, "withdraw"), (0, "ask"), (0, "hurry"), (3, "end"))
    desk = Desk()
    for node, what in said:
        desk = heard(desk, word(node, what), RING)
    met = ask(ask(Desk(), 2, RING), 1, RING)
    assert desk == end(hurry(ask(withdraw(ask(met, 0, RING), 0), 0, RING), 0, RING), 3)
    assert (desk.met[2].peer, set(desk.ready), desk.ended) == (1, {0}, {3})


def test_the_graph_names_each_neighbour_on_both_sides() -> None:
    graph: Graph = graph_of([(0, 2), (1, 2)], 4)
    assert graph == {0: (2,), 1: (2,), 2: (0, 1), 3: ()}
