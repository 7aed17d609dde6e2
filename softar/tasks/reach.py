"""Reachability in layered graphs: the task in which a thought that holds many paths at once should
help, and the parity of the number of paths, in which it should not."""

import itertools
import random
from collections.abc import Callable

from datasets import Dataset

from ..checks import check_least
from .task import Task

REACH_SIZE, REACH_TEST = 10_000, 1000
TRIES = 5000  # graphs drawn for one that fits
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
    in ProsQA (arXiv:2412.06769), without its shortcuts: both candidates have as many edges, and so
    as many mentions; edges and candidates stand in random order; graph and names are fresh in each
    row. Chance is one half.

    The prompt is `Links: cat > dog, dog > fish, ... From cat: fish or bird? Path:`, the completion
    the nodes of a path, ` dog fish`, of which the last is the answer and those before it, one of
    each layer between, the thought. `traces` holds all walks of a thought's length, equally likely,
    each with the right answer: their marginals are the exact frontier of the search.

    With `parity` the question is `... From cat to fish: odd or even?`, the number of paths, at least
    one; all that are asked about have as many edges. The completion is a path to that node without
    its end, then the answer.

    Args:
        layers: of `width` nodes each, behind the first node; a thought has layers - 1 steps.
        out_degree: edges of each node, to different nodes of the next layer.
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
            edges = _graph(layers, width, out_degree, rng)
            if made := ask(edges, rng.sample(names, layers * width + 1), rng):
                return made
        what = "a node with an even and one with an odd number of paths" if parity else "one of two"
        raise ValueError(
            f"layers={layers}, width={width}, out_degree={out_degree}: none of {TRIES} graphs has {what} "
            "reachable, with as many edges: take a greater width, or fewer edges"
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


def _graph(layers: int, width: int, out_degree: int, rng: random.Random) -> Edges:
    def targets() -> tuple[int, ...]:
        return tuple(rng.sample(range(width), out_degree))

    return [[targets()], *([targets() for _ in range(width)] for _ in range(layers - 1))]


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


def _reach_row(edges: Edges, names: list[str], rng: random.Random) -> dict | None:
    """A row about this graph, or None where no two candidates are alike."""
    paths, entering = count_paths(edges), _entering(edges)
    pairs = [
        (b, c)
        for b, c in itertools.permutations(range(len(paths)), 2)
        if paths[b] and not paths[c] and entering[b] == entering[c] > 0
    ]
    if not pairs:
        return None
    name = _namer(names, len(paths))
    right, wrong = rng.choice(pairs)
    last = len(edges)
    shown = rng.sample([name(last, right), name(last, wrong)], 2)
    question = f"From {name(0, 0)}: {shown[0]} or {shown[1]}?"
    return _row(edges, name, question, right, name(last, right), rng) | dict(
        wrong=name(last, wrong)
    )


def _parity_row(edges: Edges, names: list[str], rng: random.Random) -> dict | None:
    """A row about a node with as many edges as a node has going out, or None where there is none to
    each answer: so that both are as frequent for every graph that is taken."""
    paths, entering = count_paths(edges), _entering(edges)
    usual = len(edges[0][0])
    alike = [n for n in range(len(paths)) if paths[n] and entering[n] == usual]
    odd, even = ([n for n in alike if paths[n] % 2 == rest] for rest in (1, 0))
    if not (odd and even):
        return None
    name = _namer(names, len(paths))
    answer = rng.choice(("odd", "even"))
    node = rng.choice(odd if answer == "odd" else even)
    question = f"From {name(0, 0)} to {name(len(edges), node)}: odd or even?"
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
