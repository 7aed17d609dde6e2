"""How near the gradient of a replayed decode is to that of the expected reward: nets of three tokens
that fill three slots, whose every trajectory is enumerated, so that no number is a sample. And what
a replay costs beside its bare forwards. Prints a table.

python recipes/bench_replay.py

# Latin squares in 8 forwards, 256 rows: processor time of one thread
OMP_NUM_THREADS=1 python recipes/bench_replay.py --cost 9
"""

import argparse
import functools
import itertools
import time
from typing import NamedTuple

import torch
from torch import Tensor

from softar.checks import check_least
from softar.diffusion import denoise, load
from softar.diffusion.architectures import LladaConfig, LladaForMaskedDiffusion
from softar.diffusion.config import DenoiseConfig
from softar.diffusion.models import facts
from softar.diffusion.record import Trajectory
from softar.diffusion.replay import log_probs, replay
from softar.evaluate import encode
from softar.recipes.bench_tools import interleaved, spread
from softar.tasks import load_task

WORDS, MASK, SLOTS = 3, 3, 3
PROMPT, BIAS, K = (0, 2), 0.5, 2
# of the prompt's tokens, as diffu-GRPO masks them
HIDE = 0.15
# of the policy before an update, how far its weights move, in units of their gradient's length
MOVE = 0.1
# of drawn slots, as if nobody had drawn them
TOKENS = "exact, tokens alone"
ESTIMATES = ("exact", "one-step", "hidden", "left-to-right")
# of the costs: templates and completions of each, as the recipe's; forwards; canvases in one
ROWS, GROUP, STEPS, CHUNK = 32, 8, 8, 256


class Leaf(NamedTuple):
    """A trajectory and its probability."""

    ids: list[int]
    order: list[int]  # the forward that decided each column, -1 for the prompt's
    soft: list[tuple[int, int, Tensor, Tensor]]  # forward, column, ids [K], weights [K]
    prob: Tensor  # with a graph
    # as which of its forward each column was drawn, where slots are draws, too, else -1
    drawn: list[int]


def net(seed: int) -> LladaForMaskedDiffusion:
    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(seed)
    config = LladaConfig(
        vocab_size=WORDS + 1,
        mask_token_id=MASK,
        eos_token_id=None,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        initializer_range=0.8,
        num_key_value_heads=2,
        **sizes,
    )
    return LladaForMaskedDiffusion(config).double().eval()


def leaves(model, config: DenoiseConfig, through: bool = False) -> list[Leaf]:
    """Every trajectory: written down anew from the definition, with nothing of softar's loop. through:
    the gradient goes through what the slots show, too."""
    steps, table = config.steps, model.get_input_embeddings().weight
    counts = [SLOTS // steps + (i < SLOTS % steps) for i in range(steps)]

    def grow(ids, order, shown, soft, at, logp, drawn):
        open_ = [c for c, token in enumerate(ids) if token == MASK]
        if not open_:
            return [Leaf(ids, order, soft, logp.exp(), drawn)]
        inputs = [
            shown[c][1] @ table[shown[c][0]] if c in shown else table[i] for c, i in enumerate(ids)
        ]
        logits = model(inputs_embeds=torch.stack(inputs)[None], use_cache=False).logits[0]
        logits = logits[:, :WORDS]
        sure = logits.softmax(-1).amax(-1)
        draws = (logits / config.temperature).log_softmax(-1)
        soft = soft + [(at, c, *mixture) for c, mixture in shown.items()]
        found, chosen = [], picked(sure, open_, counts[at], config.alg_temp)
        ways = itertools.product(chosen, itertools.product(range(WORDS), repeat=counts[at]))
        for (first, ranks, likely), tokens in ways:
            new, when, ranked, now = [*ids], [*order], [*drawn], logp + likely
            for c, rank, token in zip(first, ranks, tokens, strict=True):
                new[c], when[c], ranked[c], now = token, at, rank, now + draws[c, token]
            rest = [c for c in open_ if c not in first and config.soften == "soft-token"]
            mixtures = {c: mixed(logits[c], through) for c in rest}
            found += grow(new, when, mixtures, soft, at + 1, now, ranked)
        return found

    ids = [*PROMPT, *[MASK] * SLOTS]
    none = [-1] * len(ids)
    return grow(ids, none, {}, [], 0, torch.zeros((), dtype=torch.float64), none)


def picked(sure: Tensor, open_: list[int], count: int, alg_temp: float) -> list[tuple]:
    """The slots that a forward may decide, as which each was drawn, and the log-probability of that."""
    if not alg_temp or count == len(open_):
        first = sorted(open_, key=lambda c: -sure[c].item())[:count]
        return [(first, [-1] * count, 0.0)]
    found = []
    for first in itertools.permutations(open_, count):
        left, logp = [*open_], 0.0
        for c in first:
            logp = logp + sure[c] / alg_temp - torch.logsumexp(sure[left] / alg_temp, 0)
            left.remove(c)
        found.append((first, range(count), logp))
    return found


def mixed(logits: Tensor, through: bool) -> tuple[Tensor, Tensor]:
    """What "soft-token" shows."""
    probs, ids = logits.softmax(-1).topk(K)
    weights = torch.cat([probs, 1 - probs[:1] + BIAS])
    weights = weights / weights.sum()
    return torch.cat([ids, ids.new_tensor([MASK])]), weights if through else weights.detach()


def trajectory(found: list[Leaf]) -> Trajectory:
    """They as a decode records them, a row each."""
    after, order = (
        torch.tensor([leaf.ids for leaf in found]),
        torch.tensor([x.order for x in found]),
    )
    M = max(len(leaf.soft) for leaf in found)
    at, column = torch.full((len(found), M), -1), torch.zeros(len(found), M, dtype=torch.long)
    ids = torch.zeros(len(found), M, K + 1, dtype=torch.long)
    weights = torch.zeros(len(found), M, K + 1, dtype=torch.float64)
    for row, leaf in enumerate(found):
        for i, (forward, c, tokens, share) in enumerate(leaf.soft):
            at[row, i], column[row, i], ids[row, i] = forward, c, tokens
            weights[row, i] = share.detach()
    before, drawn = after.masked_fill(order >= 0, MASK), torch.tensor([x.drawn for x in found])
    opened = torch.where((before == MASK) & (drawn >= 0).any(), 0, -1)
    block = torch.zeros_like(after)
    return Trajectory(before, after, order, block, at, column, ids, weights, opened, drawn)


def reward(found: list[Leaf]) -> Tensor:
    """[trajectories] 1 where all slots agree, half where two neighbours do: tokens have to fit together."""
    slots = torch.tensor([leaf.ids[-SLOTS:] for leaf in found])
    same = (slots[:, 1:] == slots[:, :-1]).double()
    return same.mean(1)


def gradient(model, value: Tensor) -> Tensor:
    every = torch.autograd.grad(value, [*model.parameters()], retain_graph=True, allow_unused=True)
    pairs = zip(every, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def scores(model, config: DenoiseConfig, steps: Trajectory, **how) -> Tensor:
    """[trajectories, weights]: the gradient of each trajectory's log-probability by that method."""
    logp = log_probs(model, steps, config, chunk=1000, **how).sum(1)
    return torch.stack([gradient(model, one) for one in logp])


def hidings(method: str, L: int):
    """What of the prompt is hidden, and how likely that is."""
    if method != "hidden":
        yield None, 1.0
        return
    for which in itertools.product((False, True), repeat=len(PROMPT)):
        hidden = torch.zeros(1, L, dtype=torch.bool)
        hidden[0, : len(PROMPT)] = torch.tensor(which)
        yield hidden, HIDE ** sum(which) * (1 - HIDE) ** (len(PROMPT) - sum(which))


def compared(seed: int, config: DenoiseConfig, method: str) -> tuple[float, float, float, float]:
    """Of the estimate A grad log p, A the reward less its mean: cosine of its mean with the gradient of the
    expected reward, the relative error of that mean, the variance (both relative to that gradient's
    length), and the mean importance weight after an update, which is 1."""
    model = net(seed)
    exact = leaves(model, config, through=True)
    prob, value = torch.stack([leaf.prob for leaf in exact]), reward(exact)
    truth = gradient(model, (prob * value).sum())
    found = leaves(model, config)
    steps, p = trajectory(found), prob.detach()
    if method == TOKENS:
        steps = steps._replace(drawn_as=torch.full_like(steps.drawn_as, -1))
    advantage = value - (p * value).sum()
    moved = net(seed)
    with torch.no_grad():
        state = torch.nn.utils.parameters_to_vector(moved.parameters())
        state = state + MOVE * truth / truth.norm()
        torch.nn.utils.vector_to_parameters(state, moved.parameters())
    mean, square, weight = torch.zeros_like(truth), 0.0, 0.0
    for hidden, chance in hidings(method, steps.after.shape[1]):
        how = dict(
            method={"hidden": "one-step", TOKENS: "exact"}.get(method, method), hidden=hidden
        )
        each = advantage[:, None] * scores(model, config, steps, **how)
        mean = mean + chance * (p[:, None] * each).sum(0)
        square += chance * (p * each.square().sum(1)).sum()
        with torch.no_grad():
            ratio = log_probs(moved, steps, config, **how) - log_probs(model, steps, config, **how)
            weight += chance * float((p * ratio.sum(1).exp()).sum())
    cosine = torch.cosine_similarity(mean, truth, 0)
    error, spread = (mean - truth).norm() / truth.norm(), square - mean.square().sum()
    return float(cosine), float(error), float(spread / truth.square().sum()), weight


def cost(repeats: int) -> None:
    """Print the processor time of a replay with its backward, over that of as many forwards of the same
    rows by the bare model with theirs. A replay makes forwards that read the same once."""
    model, tokenizer = load("latin-diffusion-tiny")
    templates = load_task("latin").train["template"][:ROWS]
    ids = encode(tokenizer, [text for text in templates for _ in range(GROUP)])["input_ids"]

    def bare() -> None:
        model.zero_grad()
        for part in ids.repeat(STEPS, 1).split(CHUNK):
            logits = model(input_ids=part, use_cache=False).logits
            logits.log_softmax(-1)[..., 0].sum().backward()

    def replayed(steps: Trajectory, config: DenoiseConfig) -> None:
        model.zero_grad()
        for piece in replay(model, steps, config, chunk=CHUNK):
            piece.log_probs(steps.after[piece.rows, piece.cols]).sum().backward()

    runs = {"bare": bare}
    for soften, alg_temp in itertools.product(("hard", "soft-mask"), (0.0, 0.05)):
        knobs = dict(soften=soften, select="max-prob", alg_temp=alg_temp)
        config = DenoiseConfig(gen_length=0, steps=STEPS, temperature=0.25, **knobs)
        steps = denoise(
            model, ids, config=config, rng=torch.Generator().manual_seed(0), record=True
        ).trajectory
        name = f"{soften}, {f'drawn at {alg_temp}' if alg_temp else 'the surest'}"
        runs[name] = functools.partial(replayed, steps, config.as_trained(facts(model)))
    seconds = interleaved(runs, repeats, clock=time.process_time)
    print(f"{len(ids)} rows, {STEPS} forwards, {repeats} repeats: over the bare model")
    for name in [*runs][1:]:
        pairs = [own / other for own, other in zip(seconds[name], seconds["bare"], strict=True)]
        median, least, most = spread(pairs)
        print(f"| {name} | {median:.2f} ({least:.2f} to {most:.2f}) |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--cost", type=int, metavar="REPEATS", help="what a replay costs")
    args = parser.parse_args()
    if args.cost is not None:
        check_least(args, cost=1)
        torch.set_num_threads(1)
        return cost(args.cost)
    seeds = args.seeds
    print("| forwards | slots show | replay | cosine | relative error | variance | mean weight |")
    print("|---|---|---|---|---|---|---|")
    for steps, soften, alg_temp, methods in (
        (3, "hard", 0.0, ESTIMATES),
        (2, "hard", 0.0, ESTIMATES),
        (1, "hard", 0.0, ESTIMATES),
        (3, "soft-token", 0.0, ESTIMATES),
        (2, "soft-token", 0.0, ESTIMATES),
        (3, "hard", 0.1, ("exact", TOKENS)),
        (2, "hard", 0.1, ("exact", TOKENS)),
        (2, "soft-token", 0.1, ("exact", TOKENS)),
    ):
        shows = f"{soften}, drawn at {alg_temp}" if alg_temp else soften
        for method in methods:
            config = policy(steps, soften, alg_temp)
            rows = [sorted(column) for column in zip(*(compared(s, config, method) for s in seeds))]
            cells = (f"{c[len(c) // 2]:.3g} ({c[0]:.3g} to {c[-1]:.3g})" for c in rows)
            print(f"| {steps} | {shows} | {method} | {' | '.join(cells)} |", flush=True)


def policy(steps: int, soften: str = "hard", alg_temp: float = 0.0) -> DenoiseConfig:
    knobs = dict(k=K, bias=BIAS) if soften == "soft-token" else {}
    return DenoiseConfig(
        gen_length=SLOTS,
        steps=steps,
        temperature=0.7,
        select="max-prob",
        alg_temp=alg_temp,
        soften=soften,
        soften_args=knobs,
    )


if __name__ == "__main__":
    main()
