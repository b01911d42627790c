"""Walks in a random directed graph, as a task for the policy's own samples: the graph, walks to
imitate, and the reward, which `plugins=[benchmarks/walks.py]` registers.

A prompt is the first node, a letter; a response is the rest of a walk to the node `a`, a letter for
each node. The idea is that of the example "randomwalks" of trlx; graph and reward are our own.
"""

from __future__ import annotations

import random
from functools import cache

from plumb.rollouts.answered import Answered
from plumb.rollouts.rewards import reward

NODES = "abcdefghijklmnopqrstu"
GOAL = NODES[0]  # no edge leaves it
LONGEST = 10  # nodes of a walk
EDGE = 0.1  # the probability of each edge
SEED = 2  # of the graph
# First nodes that are no prompts of the training. Some other node's shortest walks all pass through
# each, so that the training teaches how to go on from it.
HELD_OUT = "noqt"


@reward
def optimality(answered: Answered) -> float:
    """Return 1 for a shortest walk to the goal, 0 for one that does not get there within `LONGEST`
    nodes, takes an edge that does not exist, or does not end; linear in the nodes between.
    """
    walk = answered.prompt + answered.response
    edges = graph()
    if answered.ended != "eos" or walk[-1] != GOAL or len(walk) > LONGEST:
        return 0.0
    if any(there not in edges[here] for here, there in zip(walk, walk[1:], strict=False)):
        return 0.0
    shortest = nodes_to_goal()[walk[0]]
    return 1 - (len(walk) - shortest) / (LONGEST + 1 - shortest)


@cache
def graph() -> dict[str, str]:
    """Return the nodes that each node has an edge to. The goal can be reached from all."""
    draw = random.Random(SEED)
    while True:
        edges = {
            here: "".join(there for there in NODES if there != here and draw.random() < EDGE)
            for here in NODES
        } | {GOAL: ""}
        distances = _distances(edges)
        if len(distances) == len(NODES) and max(distances.values()) < LONGEST:
            return edges


@cache
def nodes_to_goal() -> dict[str, int]:
    """Return the number of nodes on a shortest walk from each node to the goal, both included."""
    return {node: 1 + distance for node, distance in _distances(graph()).items()}


def _distances(edges: dict[str, str]) -> dict[str, int]:
    """Return the edges on the shortest way from each node to the goal, where there is one."""
    distances = {GOAL: 0}
    for here in (reached := [GOAL]):
        for node in NODES:
            if here in edges[node] and node not in distances:
                distances[node] = distances[here] + 1
                reached.append(node)
    return distances


def random_walks(n: int, seed: int) -> list[str]:
    """Return walks that take any edge with equal probability until they are at the goal, or have
    `LONGEST` nodes; from each node in turn.
    """
    draw = random.Random(seed)
    starts = NODES[1:]
    walks = []
    for i in range(n):
        walk = starts[i % len(starts)]
        while walk[-1] != GOAL and len(walk) < LONGEST:
            walk += draw.choice(graph()[walk[-1]])
        walks.append(walk)
    return walks
