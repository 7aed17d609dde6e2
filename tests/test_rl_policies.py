"""RL on the policies whose draw is not k samples: `gumbel`, `mixture-of-inputs` and `hybrid`. Ratio 1 at
the first update, exact replay, the gradient of the expected reward, and what is refused.

The equality with TRL's GRPO at one candidate is in test_rl_trainers.py, densities in
test_actions.py."""

import math

import pytest
import torch
from test_rl_trainers import CONFIGS, config, logged, lora, rollout, trainer, weights
from tiny import END, EOS, model_of, seeded

import softar
from softar.feedback import Gate
from softar.mixers import mk_mixer
from softar.rl.actions import ACTIONS, mixture, replay
from softar.rl.policies import KNOBS, NO_PROBABILITY
from softar.rl.rollout import payload
from softar.soft import hard, mk_proba_dist
from softar.thought import Kind, Record, stack

NEW = ("gumbel", "mixture-of-inputs", "hybrid")


@pytest.mark.parametrize(
    "mixer, kind, options",
    [
        ("gumbel", "grpo", {"soft_ratio": "joint", "beta": 0.1}),
        ("gumbel", "ppo", {}),
        ("mixture-of-inputs", "rloo", {"beta": 0.1}),
        ("hybrid", "grpo", {"beta": 0.1, "entropy_coef": 0.01}),
        ("hybrid", "ppo", {"vf_coef": 0.0}),
    ],
)
def test_the_ratio_is_one_at_the_first_update(tmp_path, mixer, kind, options):
    """Under LoRA, with ragged prompts: two passes over a rollout, the first of which has moved
    nothing, nor has it a divergence from the reference."""
    options |= {"num_ppo_epochs" if kind == "ppo" else "num_iterations": 2}
    done = trainer(tmp_path, kind, peft=lora(0.3), soft_mixer=mixer, soft_candidates=4, **options)
    before = weights(done.model)
    done.train()
    first, second = logged(done, "ratio/max_deviation")
    assert first < 1e-5 < 1e-3 < second
    if options.get("beta"):
        assert abs(logged(done, "kl")[0]) < 1e-6 < logged(done, "kl")[1]
    moved = [name for name, p in done.model.named_parameters() if not torch.equal(p, before[name])]
    assert moved and all("lora" in name or "v_head" in name for name in moved)
    done.save_model()
    made = softar.SoftConfig.load(tmp_path)
    assert made.mixer == mixer and made.mixer_args["candidates"] == 4 and made.top_k is None


@pytest.mark.parametrize("mixer", NEW)
def test_a_replay_scores_what_the_decode_drew(tmp_path, mixer):
    """Its own tokens, step by step, closing ones included; of gumbel the first of its draws."""
    made = trainer(
        tmp_path,
        soft_mixer=mixer,
        soft_candidates=5,
        temperature=0.8,
        per_device_train_batch_size=48,
        think_steps=5,
    )
    batch, record = rollout(made), made.seen.out.record
    logps = made._replay_rows(made.model, batch, 5)[0]
    chosen = (record.kind == Kind.SOFT) | (record.kind == Kind.HARD)
    ends = chosen & ((record.token == END) | (record.token == EOS))
    assert ends.any() and (record.kind == Kind.SOFT).sum() > 99
    assert torch.allclose(logps[..., 0][chosen], record.logp[chosen], atol=1e-4)
    assert logps.shape[-1] == (5 if mixer == "gumbel" else 1)
    exists = batch["soft_perturbed"] > -torch.inf
    if mixer == "gumbel":
        assert torch.equal(exists.sum(-1)[chosen], (1 + 4 * (record.kind == Kind.SOFT))[chosen])
        assert (batch["soft_perturbed"].diff(dim=-1)[record.kind == Kind.SOFT] <= 0).all()
        assert not logps[..., 1:][~exists[..., 1:]].any()


@pytest.mark.parametrize("mixer", ["mixture-of-inputs", "hybrid"])
def test_the_gradient_is_that_of_the_expected_reward(mixer):
    """Of a thought of one step and an answer of one token, all of them enumerated, the mixtures as
    they were in the rollout: the score times the reward against central differences of what the
    policy earns, by a forward of the test's own."""
    V, step = 6, 1e-4
    model = model_of(vocab_size=V, hidden_size=8, num_hidden_layers=1, dtype=torch.float64)
    prompt = torch.tensor([[0, 1, 5]])
    mask, rewards = torch.tensor([[0, 1, 1]]), torch.randn(V, V, generator=seeded(1)).double()
    with torch.no_grad():
        first = model(prompt[:, 1:]).logits[0, -1]
    mixed = mk_mixer(mixer, candidates=3)(mk_proba_dist(first.expand(500, V)), rng=seeded())
    at = torch.stack([(mixed.token == y).nonzero()[0, 0] for y in range(V)])  # each token was drawn
    ids, mass = mixed.soft.ids[at], mixed.soft.weights[at]

    def earned():
        table = model.get_input_embeddings().weight
        read = (mass.double()[..., None] * table[ids]).sum(1)  # [V, D]
        inputs = torch.cat([table[prompt[0, 1:]].expand(V, 2, -1), read[:, None]], 1)
        p = model(inputs_embeds=inputs).logits[:, 1:].softmax(-1)
        return (p[0, 0][:, None] * p[:, 1] * rewards).sum()

    y, z = (x.flatten() for x in torch.meshgrid(torch.arange(V), torch.arange(V), indexing="ij"))
    rows = [
        Record(ids[y], mass[y], y, *(torch.full((V * V,), x) for x in (int(Kind.SOFT), 0.0, 0.0))),
        Record(*hard(z), z, *(torch.full((V * V,), x) for x in (int(Kind.HARD), 0.0, 0.0))),
    ]
    batch, many = payload(stack(rows), 2), (V * V, 1)
    logits = replay(
        model, prompt.repeat(many), mask.repeat(many), mixture(batch), batch["soft_alive"]
    )
    drawn, more = ACTIONS[mixer].of(batch)
    logp = ACTIONS[mixer].logp(logits, drawn, **more).sum((1, 2))
    assert logp.exp().sum().item() == pytest.approx(1)
    ((logp.exp() * rewards[y, z]).detach() * logp).sum().backward()
    ways = [torch.randn(p.shape, generator=seeded(2)).double() for p in model.parameters()]
    ways[0][0] = 0.0  # of the embedding's padding row, which learns nothing
    found = sum((p.grad * way).sum() for p, way in zip(model.parameters(), ways))
    with torch.no_grad():
        ends = []
        for move in (step, -2 * step):
            for p, way in zip(model.parameters(), ways):
                p += move * way
            ends.append(earned())
    expected = (ends[0] - ends[1]) / (2 * step)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3) and abs(expected) > 1e-2


@pytest.mark.parametrize("mixer", NEW)
def test_the_reward_goes_up(tmp_path, mixer):
    """Even words, of an answer that follows a soft thought."""
    done = trainer(
        tmp_path,
        soft_mixer=mixer,
        soft_candidates=4,
        per_device_train_batch_size=32,
        num_generations=8,
        max_steps=12,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        max_completion_length=5,
        think_steps=2,
    )
    done.train()
    seen = logged(done, "reward")
    assert sum(seen[-3:]) / 3 > sum(seen[:3]) / 3 + 0.15


# -- what is refused


@pytest.mark.parametrize("kind", CONFIGS)
def test_mixers_without_a_probability_are_refused(tmp_path, kind):
    assert {*KNOBS} | {*NO_PROBABILITY} == {*softar.MIXERS} and {*KNOBS} == {*ACTIONS}
    for name in NO_PROBABILITY:
        says = f"soft_mixer='{name}' cannot be trained by RL: .*; choose one of .'k-samples'"
        with pytest.raises(ValueError, match=says):
            config(tmp_path, kind, soft_mixer=name)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"soft_candidates": 0}, "soft_candidates=0 must be at least 1"),
        ({"soft_mixer": "gumbel", "soft_tau": 0.0}, "soft_tau=0.0 must be > 0"),
        ({"soft_mixer": "mixture-of-inputs", "soft_beta": -1.0}, "soft_beta=-1.0 must be at least"),
        ({"soft_mixer": "k-samples", "soft_k": 0}, "soft_k=0 must be at least 1"),
        ({"soft_share": 1.5}, "soft_share=1.5 must lie in"),
        ({"soft_tau": 0.1}, "soft_tau=0.1 does nothing with this mixer: set soft_mixer='gumbel'"),
        ({"soft_k": 3}, "soft_k=3 does nothing with this mixer: set soft_mixer='k-samples'"),
        ({"soft_ratio": "joint"}, "soft_ratio='joint' does nothing with one draw a step"),
        (
            {"soft_mixer": "gumbel", "soft_candidates": 1, "embedding_grad": False},
            "embedding_grad=False does nothing with one draw a step",
        ),
        (
            {"soft_mixer": "gumbel", "soft_candidates": 1, "soft_tau": 0.3},
            "soft_tau=0.3 does nothing with one draw a step",
        ),
        ({"soft_share": 1.0, "soft_candidates": 10}, "soft_candidates=10 does nothing where"),
        ({"soft_share": 1.0, "embedding_grad": False}, "embedding_grad=False does nothing with"),
        (
            {"soft_mixer": "mixture-of-inputs", "soft_beta": math.inf, "soft_candidates": 3},
            "soft_candidates=3 does nothing where the drawn token is all",
        ),
        (
            {"soft_mixer": "k-samples", "soft_candidates": 3},
            "soft_candidates=3 does nothing .*='gumbel' or 'mixture-of-inputs' or 'hybrid'",
        ),
    ],
)
def test_options_that_cannot_be(tmp_path, options, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        config(tmp_path, **{"soft_mixer": "hybrid", **options})


@pytest.mark.parametrize(
    "options",
    [
        {"soft_mixer": "gumbel", "soft_candidates": 1},
        {"soft_mixer": "hybrid", "soft_share": 1.0},
        {"soft_mixer": "mixture-of-inputs", "soft_beta": math.inf},
    ],
)
def test_the_limits_of_single_tokens_are_there(tmp_path, options):
    """What was left out and does nothing at them is as it is elsewhere."""
    made = config(tmp_path, **options)
    knobs = made.decoding().mixer_args
    assert knobs["candidates"] == (1 if options["soft_mixer"] == "gumbel" else 10)
    assert knobs.get("tau", 0.1) == 0.1 and None in (made.soft_tau, made.soft_candidates)


def test_more_candidates_than_words(tmp_path):
    trainer(tmp_path, soft_mixer="gumbel", soft_candidates=62)
    with pytest.raises(ValueError, match="soft_candidates=63 must be at most 62"):
        trainer(tmp_path, soft_mixer="gumbel", soft_candidates=63)


@pytest.mark.parametrize(
    "theirs, ours, says",
    [
        ({"tau": 0.5}, {"soft_mixer": "gumbel"}, r"soft_tau=0.1, but soft_config.json .*tau=0.5"),
        ({"tau": 0.5}, {"soft_mixer": "gumbel", "soft_tau": 0.5}, None),
        ({"share": 0.3}, {"soft_mixer": "hybrid"}, r"soft_share=0.5, but .* says share=0.3: give"),
        ({"gate": "g"}, {"soft_mixer": "hybrid"}, r"gate=None, but .* says gate='.*g': give"),
        ({"share": 0.3}, {"soft_mixer": "gumbel"}, None),
        ({}, {"soft_mixer": "hybrid", "soft_share": 0.3}, r"soft_share=0.3, but .* says share=0.5"),
        ({}, {"soft_mixer": "hybrid"}, None),
        ({"tau": 0.1, "candidates": None}, {"soft_mixer": "gumbel"}, None),
        ({"candidates": 4, "tau": 0.1}, {"soft_mixer": "gumbel"}, "soft_candidates=10, but .*=4"),
        ({"candidates": 10}, {"soft_mixer": "gumbel"}, r"soft_tau=0.1, but .* says tau=0.5"),
    ],
)
def test_a_model_of_another_policy_is_refused(tmp_path, theirs, ours, says):
    folder, model = tmp_path / "m", model_of()
    model.save_pretrained(folder)
    if "gate" in theirs:
        Gate(32).save(tmp_path / "g")
        theirs = {"gate": str(tmp_path / "g")}
    mixer = "gumbel" if {"tau", "candidates"} & {*theirs} else "hybrid"
    softar.SoftConfig(mixer, theirs).save(folder)
    if says is None:
        assert trainer(tmp_path, model=str(folder), **ours).policy.mixer == ours["soft_mixer"]
        return
    with pytest.raises(ValueError, match=says):
        trainer(tmp_path, model=str(folder), **ours)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"soft_mixer": "gumbel"}, "soft_mixer='gumbel' is not there with rollout='vllm': .*loop"),
        (
            {"soft_mixer": "hybrid", "soft_candidates": 256},
            "soft_candidates=256 must be at most 255",
        ),
    ],
)
def test_what_vllm_cannot_record_is_refused(tmp_path, monkeypatch, options, says):
    monkeypatch.setattr("softar.rl.config.require_vllm", lambda: None)
    with pytest.raises(ValueError, match=says):
        config(tmp_path, rollout="vllm", **options)
    assert config(tmp_path, rollout="vllm", soft_mixer="mixture-of-inputs").soft_candidates == 10
