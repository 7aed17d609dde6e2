"""The task `reach`: one candidate is reachable, nothing but the search tells which, and the traces
are the frontier."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest
import torch

from softar.models import word_tokenizer
from softar.sft.data import frontier
from softar.tasks import load_task, no_thought, reach

SIZES = [dict(), dict(layers=3, width=5), dict(layers=2, width=3, out_degree=1), dict(layers=5)]


def read(prompt):
    """-> edges as (from, to), the first node, and what is asked about."""
    edges = re.findall(r"(\w+) > (\w+)", prompt)
    start, first, second = re.search(r"From (\w+)(?: to|:) (\w+)(?: or (\w+)\?)?", prompt).groups()
    return edges, start, [first, second]


def paths_to(edges, start):
    """How many there are to each node, by walking them all."""
    counts, here = Counter({start: 1}), Counter({start: 1})
    while here:
        after = Counter()
        for a, b in edges:
            after[b] += here[a]
        here = +after
        counts += here
    return counts


@pytest.mark.parametrize("sizes", SIZES)
def test_exactly_one_candidate_is_reachable_and_both_look_alike(sizes):
    task = reach(**sizes, held_out=60, size=20)
    layers = sizes.get("layers", 4)
    assert task.think_steps == layers - 1
    first = Counter()
    for row in [*task.train, *task.test]:
        edges, start, candidates = read(row["prompt"])
        counts = paths_to(edges, start)
        assert [c for c in candidates if counts[c]] == [row["answer"]]
        ends, starts = Counter(b for _, b in edges), Counter(a for a, _ in edges)
        assert ends[candidates[0]] == ends[candidates[1]] > 0
        assert starts[candidates[0]] == starts[candidates[1]] == 0
        assert len({*edges}) == len(edges)
        path = [start, *row["completion"].split()]
        assert all(step in edges for step in itertools.pairwise(path)) and path[-1] == row["answer"]
        assert len(path) == layers + 1
        assert task.score(f" {row['answer']}.", row) == 1 and task.score(" zzz", row) == 0
        first[candidates[0] == row["answer"]] += 1
    assert 0.3 < first[True] / first.total() < 0.7


def test_traces_are_every_walk_and_their_marginals_the_frontier():
    task = reach(3, 5, held_out=20, size=1)
    words = [*dict.fromkeys(w for row in task.test for t in row["traces"] for w in t.split())]
    for row in task.test:
        edges, start, _ = read(row["prompt"])
        traces = [t.split() for t in row["traces"]]
        assert len(traces) == 2**2 and {t[-1] for t in traces} == {row["answer"]}
        soft = frontier(torch.tensor([[words.index(w) for w in t] for t in traces]))
        here = Counter({start: 1})
        for step in range(2):
            after = Counter()
            for a, b in edges:
                after[b] += here[a]
            here = +after
            weights = Counter()
            for i, w in zip(soft.ids[step].tolist(), soft.weights[step].tolist()):
                weights[words[i]] += w
            assert weights == {w: n / here.total() for w, n in here.items()}


def back(edges, node, steps):
    """Paths to a node from those of each layer behind it: a Counter for each step back."""
    here, layers = Counter({node: 1}), []
    for _ in range(steps):
        before = Counter()
        for a, b in edges:
            before[a] += here[b]
        here = +before
        layers.append(here)
    return layers


SHORTCUTS = {  # of (edges, layers of `back` up to the first one) -> a number: the larger is chosen
    "edges": lambda edges, layers: layers[0].total(),
    "edges of its parents": lambda edges, layers: layers[1].total(),
    "paths from all of the first layer": lambda edges, layers: layers[-1].total(),
    "nodes of the first layer": lambda edges, layers: len(layers[-1]),
    "ancestors": lambda edges, layers: sum(map(len, layers)),
    "most paths from one node": lambda edges, layers: max(max(x.values()) for x in layers),
    # on these the two may differ, and neither side is the likelier
    "edges between ancestors": lambda edges, layers: sum(
        b in here for _, b in edges for here in layers[:-1]
    ),
    "edges of its siblings": lambda edges, layers: sum(
        edges.count((a, c)) for a in layers[0] for _, c in edges
    ),
    "where its parents stand": lambda edges, layers: min(
        i for i, (a, _) in enumerate(edges) if a in layers[0]
    ),
}


@pytest.mark.parametrize("layers, width", [(4, 4), (4, 5), (3, 4)])
def test_searching_back_without_the_first_nodes_edges_is_at_chance(layers, width):
    task, points = reach(layers, width, held_out=300, size=1), Counter()
    for row in task.test:
        edges, start, candidates = read(row["prompt"])
        candidates.sort(key=lambda node: node != row["answer"])
        bare = [edge for edge in edges if edge[0] != start]
        found = [back(bare, node, layers - 1) for node in candidates]
        for right, wrong in zip(*found):
            assert sorted(right.values()) == sorted(
                wrong.values()
            )  # as many paths, from as many nodes
        for name, number in SHORTCUTS.items():
            right, wrong = (number(bare, each) for each in found)
            points[name] += (right > wrong) + (right == wrong) / 2
        whole = [back(edges, node, layers)[-1][start] for node in candidates]
        points["search"] += whole[0] > whole[1]
    assert points.pop("search") == len(task.test)
    for name, count in points.items():
        assert abs(count / len(task.test) - 0.5) < 0.1, name  # 3.5 standard deviations


def features(row):
    """What a reader sees that takes edges one by one, whatever it does with them: where and how often
    each candidate stands, and the first node."""
    edges, start, candidates = read(row["prompt"])
    made = []
    for node in [*candidates, start]:
        at = [i for i, edge in enumerate(edges) if node in edge]
        with_start = sum(start in edges[i] for i in at)
        made += [len(at), np.mean(at), min(at), max(at), with_start, len(node), ord(node[0])]
    return made


def test_a_reader_of_single_edges_is_at_chance():
    """Logistic regression, which finds the answer where it is told how many edges lead to the two
    candidates from nodes that edges lead to: so it can learn, and a join of two edges tells."""
    task = reach(2, 4, held_out=800, size=1600)

    def learnt(features):
        x, y = [], []
        for row in [*task.train, *task.test]:
            x.append(features(row))
            y.append(read(row["prompt"])[2][0] == row["answer"])
        x, y = torch.tensor(np.array(x), dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
        x = (x - x.mean(0)) / (x.std(0) + 1e-6)
        n = len(task.train)
        net = torch.nn.Linear(x.shape[1], 1)
        torch.nn.init.zeros_(net.weight)
        optimiser = torch.optim.LBFGS(net.parameters(), max_iter=50)

        def loss():
            optimiser.zero_grad()
            out = torch.nn.functional.binary_cross_entropy_with_logits(net(x[:n])[:, 0], y[:n])
            out.backward()
            return out

        optimiser.step(loss)
        return ((net(x[n:])[:, 0] > 0) == (y[n:] > 0)).float().mean().item()

    def joined(row):
        edges, start, candidates = read(row["prompt"])
        near = {b for a, b in edges if a == start}
        return [sum(a in near and b == c for a, b in edges) for c in candidates]

    assert abs(learnt(features) - 0.5) < 0.06  # 3.4 standard deviations
    assert learnt(joined) > 0.95


def test_parity_asks_about_nodes_of_as_many_edges():
    task = reach(3, 4, parity=True, held_out=200, size=10)
    degrees, answers = Counter(), Counter()
    for row in task.test:
        edges, start, (node, _) = read(row["prompt"])
        count = paths_to(edges, start)[node]
        assert count > 0 and row["answer"] == ("odd" if count % 2 else "even")
        degrees[sum(b == node for _, b in edges)] += 1
        answers[row["answer"]] += 1
    assert len(degrees) == 1 and min(answers.values()) > 70


def test_parity_has_as_many_walks_as_no_argument_tells():
    task = reach(3, 4, parity=True, held_out=100, size=1)
    walks, degrees = Counter(), Counter()
    for row in task.test:
        edges, start, _ = read(row["prompt"])
        degrees.update(Counter(a for a, _ in edges).values())
        walks[len(row["traces"])] += 1
        counts = paths_to(edges, start)
        thoughts = Counter(trace.split()[1] for trace in row["traces"])
        assert thoughts == {node: counts[node] for node in thoughts}  # of the second step
    assert {*degrees} == {1, 2, 3} and {*walks} >= {*range(2, 9)}
    assert max(walks.values()) < 35


def test_names_are_single_tokens_of_the_tokenizer():
    few = word_tokenizer(
        ["<pad>", "<bos>", "<eos>", "cat", "dog", "fish", "bird", "cow", "hat", "pen", "cup"]
    )
    task = reach(2, 3, 1, tokenizer=few, held_out=5, size=5)
    names = {w for row in task.test for edge in read(row["prompt"])[0] for w in edge}
    assert names <= {"cat", "dog", "fish", "bird", "cow", "hat", "pen", "cup"}
    with pytest.raises(ValueError, match=r"9 nodes .* has 8 of \d+ nouns"):
        reach(2, 4, tokenizer=few)


def test_rows_are_fresh_and_the_same_again():
    task, again, other = (reach(held_out=30, size=30, seed=s) for s in (0, 0, 1))
    prompts = [*task.train["prompt"], *task.test["prompt"]]
    assert len({*prompts}) == len(prompts)
    assert again.test["prompt"] == task.test["prompt"] != other.test["prompt"]
    assert no_thought(task).test[0]["completion"] == f" {task.test[0]['answer']}"


def test_arguments_stand_behind_the_name():
    assert load_task("reach:layers=3,width=5", size=3).think_steps == 2
    assert load_task("mnns:digits=2", size=3).think_steps == 1


@pytest.mark.parametrize(
    "spec",
    [
        "mnns:digits=2",
        "mnns:digits=3",
        "latin:n=3,held_out=2",
        "latin-prompt:n=3,held_out=2",
        "reach:parity=true,layers=2,held_out=4",
    ],
)
def test_a_task_with_arguments_is_named_after_all_of_its_spec(spec):
    """Tables and sweeps tell tasks apart by their names: mnns of 3 and of 5 digits were one."""
    assert load_task(spec, size=3).name == spec


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: reach(4, 3, 3), "out_degree=3, width=3"),
        (lambda: reach(4, 3, 2), "width=3, out_degree=2: none of .* has one of two"),
        (lambda: reach(4, 4, 1, parity=True), "out_degree=1: none of .* odd number .* more edges"),
        (lambda: reach(1, 3), "layers=1"),
        (lambda: reach(20, 20), "401 nodes"),
        (lambda: load_task("reach:layer=3"), "takes no 'layer', did you mean 'layers'"),
        (lambda: load_task("reach:layers=many"), "layers='many'"),
    ],
)
def test_graphs_that_cannot_be_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
