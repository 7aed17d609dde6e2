"""Reachability in layered graphs: the task in which a thought that holds many paths at once should
help, and the parity of the number of paths, of which normalised weights say less."""

import random
from collections.abc import Callable

from datasets import Dataset

from ..checks import check_least
from .task import Task

REACH_SIZE, REACH_TEST = 10_000, 1000
TRIES, LAYER_TRIES = 200, 50  # graphs drawn for one that fits, and of each layer
NOUNS = """
ant apple arm baby back bag ball band bank bar base bath bean bear bed bell belt bench bike bill bird
block blood board boat body bomb bone book boot border bottle bowl box boy brain branch bread brick
bridge brush bus butter button cab cake camera camp cap car card case castle cat cave chain chair
cheese chest child church circle city class cloth cloud club coast coat coffee corn cotton couch court
cow cream crop cross crown cup dance desk dog door dream dress drum duck dust ear earth egg engine eye
face factory fan farm fence field film finger fire fish flag flame flood floor flower forest frame
fruit game garden gas gate ghost giant girl glass gold grass guitar gun hall hand hat heart hill hole
home horse hotel house ice iron island jacket juice judge key king kitchen knife lake lamp land leaf
leg letter library light line lion lip lock machine mail man map mark market mask meat metal milk
mirror moon mother motor mountain mouse mouth music nail neck nest net nose nut ocean office oil
orange page paint palace pan paper park path pen piano picture pig pin pipe plane planet plant plate
pocket pool port pot pump queen rabbit radio rain rat ring river road robot rock roof room root rope
rose salt sand sea seat seed shadow sheet shell ship shirt shoe shop silver sister skin sky smoke
snake snow soil song soup spring star station steam steel stem stone storm street string sugar suit
sun table tail tank tape tea temple throat ticket tiger tongue tool tooth tower town toy track train
tree truck tube valley village wall war watch water wave weapon web wheel wind window wine wing
winter wire wolf wood wool word yard
""".split()

Edges = list[list[tuple[int, ...]]]  # [layer][node]: the nodes of the next layer that it points to


# Wide because it is a task of its own in each of these
def reach(
    layers: int = 4,
    width: int = 4,
    out_degree: int = 2,
    *,
    parity: bool = False,
    tokenizer=None,
    held_out: int = REACH_TEST,
    seed: int = 0,
    size: int | None = None,
) -> Task:
    """From the first node of a layered graph, which of two nodes of the last layer can be reached? As
    in ProsQA (arXiv:2412.06769), without its shortcuts: as many nodes of each layer lead to one
    candidate as to the other, by as many paths, and which of the two is right follows from the first
    node's edges alone; edges and candidates stand in random order; graph and names are fresh in each
    row. Chance is one half, and whoever does not read the first node's edges stays there.

    The prompt is `Links: cat > dog, dog > fish, ... From cat: fish or bird? Path:`, the completion
    the nodes of a path, ` dog fish`, of which the last is the answer and those before it, one of
    each layer between, the thought. `traces` holds all walks of a thought's length, equally likely,
    each with the right answer: their marginals are the exact frontier of the search.

    With `parity` the question is `... From cat to fish: odd or even?`, the number of paths, at least
    one; all that are asked about have `out_degree` edges. The completion is a path to that node
    without its end, then the answer. Each node has 1 to 2 out_degree - 1 edges (at most width), so
    that no argument tells the number of walks, by which a normalised mixture divides the paths to
    its nodes. What such a mixture knows is the ratios of these numbers. It cannot know a factor that
    all share, nor, where it is rounded, small differences; in whole numbers without a common
    factor, exact ratios do give the parity. It is harder to read there, not hidden.

    Args:
        layers: of `width` nodes each, behind the first node; a thought has layers - 1 steps.
        out_degree: edges of each node, to different nodes of the next layer; with `parity` their mean.
        tokenizer: names are nouns that are one token of it, a space before them included. None: of
            all NOUNS, which are words.
        held_out: test rows.   seed: of all that is drawn.   size: training rows, default 10000.

    Raises:
        ValueError: for a tokenizer with too few such nouns, which it counts, and for graphs that
            cannot have exactly one of two like candidates reachable.
    """
    check_least(
        dict(layers=layers, width=width, out_degree=out_degree, held_out=held_out),
        layers=2,
        width=2,
        out_degree=1,
        held_out=1,
    )
    names = single_tokens(NOUNS, tokenizer)
    if len(names) < layers * width + 1:
        raise ValueError(
            f"layers={layers}, width={width}: {layers * width + 1} nodes need as many names, and the tokenizer has "
            f"{len(names)} of {len(NOUNS)} nouns as single tokens: take fewer nodes, or tokenizer=None"
        )
    if out_degree >= width:
        raise ValueError(
            f"out_degree={out_degree}, width={width}: every node would be reachable, take fewer edges"
        )
    rng = random.Random(seed)
    ask = _parity_row if parity else _reach_row

    def row() -> dict:
        for _ in range(TRIES):
            if made := ask(layers, width, out_degree, rng.sample(names, layers * width + 1), rng):
                return made
        what = "a node with an even and one with an odd number of paths" if parity else "one of two"
        alike = f"with {out_degree} edges" if parity else "with as many paths to it at each layer"
        remedy = "more edges" if parity else "fewer edges"
        raise ValueError(
            f"layers={layers}, width={width}, out_degree={out_degree}: none of {TRIES} graphs has {what} "
            f"reachable, {alike}: take a greater width, or {remedy}"
        )

    test = [row() for _ in range(held_out)]
    tested = {made["prompt"] for made in test}
    train = (row() for _ in range(REACH_SIZE if size is None else size))
    return Task(
        name="reach-parity" if parity else "reach",
        train=Dataset.from_list([made for made in train if made["prompt"] not in tested]),
        test=Dataset.from_list(test),
        score=_score,
        think_steps=layers - 1,
        extract=_first_word,
        max_new_tokens=layers + 1,
    )


def single_tokens(words: list[str], tokenizer) -> list[str]:
    """Those that are one token behind a space; all without a tokenizer."""
    return [word for word in words if tokenizer is None or _is_single(word, tokenizer)]


def _is_single(word: str, tokenizer) -> bool:
    try:
        ids = tokenizer.encode(f" {word}", add_special_tokens=False)
    except Exception:  # tokenizers raises it itself, for a word outside a closed vocabulary
        return False
    return len(ids) == 1 and ids[0] not in (None, tokenizer.unk_token_id)


def count_paths(edges: Edges) -> list[int]:
    """From the first node to each of the last layer."""
    counts = [1]
    for layer in edges:
        after = [0] * len(edges[-1])
        for count, targets in zip(counts, layer):
            for target in targets:
                after[target] += count
        counts = after
    return counts


def _reach_row(
    layers: int, width: int, out_degree: int, names: list[str], rng: random.Random
) -> dict | None:
    """A row about a fresh graph, or None where drawing it came to an end.

    The two candidates and the graph behind the first node are drawn first, in a way that is the same
    for both: so nothing but the first node's edges, which are drawn last, tells which is right.
    """
    right, wrong = rng.sample(range(width), 2)
    to = tuple([int(i == node) for i in range(width)] for node in (right, wrong))
    edges = []
    for _ in range(layers - 1):  # from the last layer back
        for _ in range(LAYER_TRIES):
            if made := _layer_before(to, out_degree, rng):
                break
        else:
            return None
        layer, to = made
        edges = [layer, *edges]
    first = _targets(width, out_degree, [_leading(to[0])], _leading(to[1]), rng)
    edges = [[first], *edges]
    name = _namer(names, width)
    shown = rng.sample([name(layers, right), name(layers, wrong)], 2)
    question = f"From {name(0, 0)}: {shown[0]} or {shown[1]}?"
    return _row(edges, name, question, right, name(layers, right), rng) | dict(
        wrong=name(layers, wrong)
    )


def _layer_before(to: tuple[list[int], list[int]], out_degree: int, rng: random.Random):
    """A layer of edges to nodes from which so many paths lead to each candidate -> it, and the numbers
    from its own nodes: the same for both candidates, in another order, and from other nodes. No
    more than width - out_degree lead to one, so that the layer before can avoid them. None where what
    was drawn does not fit."""
    width, leading = len(to[0]), [_leading(some) for some in to]
    size = rng.randint(1, min(width - out_degree, out_degree * len(leading[0]) + 1))
    those = [{*rng.sample(range(width), size)} for _ in to]
    if those[0] == those[1]:
        return None
    layer = []
    for node in range(width):
        hit = [each for some, each in zip(those, leading) if node in some]
        avoid = {n for some, each in zip(those, leading) if node not in some for n in each}
        targets = _targets(width, out_degree, hit, avoid, rng)
        if targets is None:
            return None
        layer.append(targets)
    paths = tuple([sum(some[t] for t in targets) for targets in layer] for some in to)
    return (layer, paths) if sorted(paths[0]) == sorted(paths[1]) else None


def _targets(
    width: int, out_degree: int, hit: list[set[int]], avoid: set[int], rng: random.Random
) -> tuple[int, ...] | None:
    """So many different nodes, at least one of each set in `hit` and none in `avoid`; None where that
    cannot be, or the nodes drawn for the former are too many."""
    choices = [sorted(some - avoid) for some in hit]
    if not all(choices):
        return None
    some = {rng.choice(each) for each in choices}
    free = [node for node in range(width) if node not in avoid | some]
    if not 0 <= out_degree - len(some) <= len(free):
        return None
    return tuple(rng.sample([*some, *rng.sample(free, out_degree - len(some))], out_degree))


def _leading(paths: list[int]) -> set[int]:
    return {node for node, number in enumerate(paths) if number}


def _parity_row(
    layers: int, width: int, out_degree: int, names: list[str], rng: random.Random
) -> dict | None:
    """A row about a node with `out_degree` edges, or None where the graph has none to each answer: so
    that both are as frequent for every graph that is taken."""
    most = min(2 * out_degree - 1, width)
    edges = [
        [
            tuple(rng.sample(range(width), rng.randint(1, most)))
            for _ in range(width if depth else 1)
        ]
        for depth in range(layers)
    ]
    paths, entering = count_paths(edges), _entering(edges)
    alike = [n for n in range(width) if paths[n] and entering[n] == out_degree]
    odd, even = ([n for n in alike if paths[n] % 2 == rest] for rest in (1, 0))
    if not (odd and even):
        return None
    name = _namer(names, width)
    answer = rng.choice(("odd", "even"))
    node = rng.choice(odd if answer == "odd" else even)
    question = f"From {name(0, 0)} to {name(layers, node)}: odd or even?"
    return _row(edges, name, question, node, answer, rng)


def _row(
    edges: Edges, name: Callable, question: str, end: int, answer: str, rng: random.Random
) -> dict:
    lines = [
        f"{name(depth, node)} > {name(depth + 1, target)}"
        for depth, layer in enumerate(edges)
        for node, targets in enumerate(layer)
        for target in targets
    ]
    rng.shuffle(lines)
    walks = [*_walks(edges[:-1])]
    to_end = [walk for walk in walks if end in edges[-1][walk[-1]]]

    def say(walk: tuple[int, ...]) -> str:
        return "".join(f" {name(depth, node)}" for depth, node in enumerate(walk, 1)) + f" {answer}"

    return {
        "prompt": f"Links: {', '.join(lines)}. {question} Path:",
        "completion": say(rng.choice(to_end)),
        "answer": answer,
        "traces": [say(walk) for walk in walks],
    }


def _walks(edges: Edges) -> list[tuple[int, ...]]:
    """All ways from the first node through these layers: a node of each."""
    walks = [((), 0)]
    for layer in edges:
        walks = [((*walk, target), target) for walk, node in walks for target in layer[node]]
    return [walk for walk, _ in walks]


def _entering(edges: Edges) -> list[int]:
    """The edges into each node of the last layer."""
    targets = [target for node in edges[-1] for target in node]
    return [targets.count(node) for node in range(len(edges[-1]))]


def _namer(names: list[str], width: int) -> Callable[[int, int], str]:
    """(depth, node) -> its name; the first node has depth 0."""
    return lambda depth, node: names[0] if depth == 0 else names[1 + (depth - 1) * width + node]


def _first_word(text: str) -> str:
    return (text.split() or [""])[0].strip(".,")


def _score(text: str, row: dict) -> float:
    """1 where the first word behind the thought is the answer."""
    return float(_first_word(text) == row["answer"])
