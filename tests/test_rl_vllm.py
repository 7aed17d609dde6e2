"""RL rollouts on vLLM beside the loop's: the same thoughts for the same seeds after each update, in
one process or two.

This file is also the script that trains: `python tests/test_rl_vllm.py FOLDER` writes what happened
to FOLDER/out.pt, and to FOLDER/two.pt what happened in two processes that find each other as those of
torchrun do. They are forked once vLLM and trl are imported, which takes longer than their run.
"""

import dataclasses
import importlib.util
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import tiny
import torch
import warm
from accelerate import Accelerator, PartialState
from engine_script import model_of
from test_rl_trainers import ROWS, config, logged, lora, trainer, weights

from softar.config import SoftConfig
from softar.rl.rollout import decode_by_loop
from softar.rl.vllm_rollout import VLLMRollout, one_draw_a_slot, output_of
from softar.soft import Soft, dense
from softar.thought import Kind
from softar.vllm.machine import on_cpu
from softar.vllm.record import Read

pytestmark = pytest.mark.rest

ROOT = Path(__file__).parent.parent
# Plain gradient descent: Adam's first update is the sign of a gradient that may be rounding noise
SGD = dict(
    optim="sgd", learning_rate=0.05, max_grad_norm=0.0, max_steps=3, lr_scheduler_type="constant"
)
THOUGHT = dict(think_steps=None, think_end=None)  # all of the completion
CASES = {  # kind of trainer, options
    "grpo": ("grpo", dict(THOUGHT, **SGD)),
    "ppo": ("ppo", dict(THOUGHT, num_ppo_epochs=1, vf_coef=1.0, kl_coef=0.1, **SGD)),
    "often": (
        "grpo",
        dict(
            THOUGHT,
            **SGD | dict(max_steps=8),
            num_iterations=2,
            gradient_accumulation_steps=2,
            steps_per_generation=4,
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="steps",
            save_steps=3,
            per_device_eval_batch_size=4,
        ),
    ),
    "hard": ("rloo", dict(soft_mixer="hard", per_device_train_batch_size=24, **SGD)),
    "lora": ("grpo", dict(beta=0.1, **SGD | dict(learning_rate=0.5))),
    "adam": ("ppo", dict(num_ppo_epochs=2, soft_mixer="hybrid", soft_candidates=4)),
}


def pair(made):
    """Have each rollout of vLLM made by the loop too, on the model as it is then; they go to a
    list."""
    ask, pairs = made._ask_engine, []

    def both(prompts, rng):
        out = ask(prompts, rng)
        pairs.append((out, decode_by_loop(made, *tiny.left_padded(prompts), rng)))
        return out

    made._ask_engine = both
    return pairs


def run(folder, name, backend, **more):
    kind, options = CASES[name]
    options = dict(peft=lora()) | options if name == "lora" else options
    evals = dict(eval_rows=ROWS.select(range(4))) if name == "often" else {}
    made = trainer(
        folder / f"{name}-{backend}",
        kind,
        model=model_of("llama"),
        rollout=backend,
        **evals,
        **options | more,
    )
    return made


def found(made):
    keys = (
        "loss",
        "reward",
        "entropy",
        "ratio/max_deviation",
        "eval_loss",
        "eval_reward",
        "soft/thought_entropy",
    )
    return {"weights": weights(made.model)} | {key: logged(made, key) for key in keys}


def main(folder):
    out, threads = {}, torch.set_num_threads
    for name in CASES:
        made = run(folder, name, "vllm")
        before, pairs = weights(made.model), pair(made)
        made.train()
        out[name] = dict(found(made), pairs=list(pairs), before=before)
        if name == "lora":
            out["merged"] = [m.merged for m in made.model.modules() if hasattr(m, "merged")]
            out["interrupted"] = interrupted(made)
        if name == "grpo":
            out["long"] = refused(made._engine.decode, [[tiny.BOS] * 250], [0])
            out["stale"] = stale(made, pairs)
            out["answers"] = answers(made)
            out["left"] = [
                torch.set_num_threads is threads,
                torch.is_grad_enabled(),
                "RANK" in os.environ,
                os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING"),
            ]
        if name == "hard":  # more than vLLM computes at once, so that it may cut prompts
            out["many"] = made._engine.decode([[tiny.BOS] * 240] * 24, range(24)).completions
        made.close()
    out["resumed"] = resumed(folder)
    out["narrow"] = narrow(folder)
    torch.save(out, folder / "out.pt")


def stale(made, pairs):
    """Two rollouts after the last update: without its weights, and with them."""
    sync, made._engine.sync_weights = made._engine.sync_weights, lambda: None
    made._step = 100
    made._generate_single_turn([[tiny.BOS, 11, 12]] * 4, None, None, 4)
    made._engine.sync_weights = sync
    made._generate_single_turn([[tiny.BOS, 11, 12]] * 4, None, None, 4)
    return pairs[-2:]


def interrupted(made):
    """Ctrl-C on the way of the weights: are they the same after it, and what does another rollout
    say?"""
    engine, before = made._engine, weights(made.model)
    model = engine.llm.llm_engine.model_executor.driver_worker.model_runner.get_model()

    def load(pairs):
        next(pairs)
        raise KeyboardInterrupt

    model.load_weights = load
    try:
        engine.sync_weights()
    except KeyboardInterrupt:
        pass
    after = weights(made.model)
    merged = [m.merged for m in made.model.modules() if hasattr(m, "merged")]
    try:
        engine.sync_weights()
    except RuntimeError as error:
        return [torch.equal(before[name], after[name]) for name in before], merged, str(error)


def answers(made):
    """First tokens of many answers without a thought, and the policy's probabilities."""
    engine, temperature = made._engine, 0.7
    engine.decoding = dataclasses.replace(
        engine.decoding, budget=0, answer_temperature=temperature, max_new_tokens=2
    )
    prompt = [tiny.BOS, 11, 12]
    engine.sync_weights()
    out = engine.decode([prompt] * 2000, range(2000))
    with torch.no_grad():
        logits = made.model(torch.tensor([prompt])).logits[0, -1]
    return out.completions[:, 0], out.answer_start, (logits / temperature).softmax(-1)


def refused(what, *args):
    try:
        what(*args)
    except ValueError as error:
        return str(error)


def resumed(folder):
    """Weights of the run that goes on from the middle of the other, where a rollout is used
    twice."""
    made = run(folder, "often", "vllm")
    pairs = pair(made)
    made.train(resume_from_checkpoint=str(folder / "often-vllm" / "checkpoint-3"))
    made.close()
    return weights(made.model), pairs


def narrow(folder):
    """Rollouts of a model whose heads vLLM has no kernels for, tied, with a value head and an
    adapter in the way."""
    model = tiny.model_of(initializer_range=0.2, tie_word_embeddings=True)
    made = trainer(
        folder / "narrow",
        "ppo",
        model=model,
        rollout="vllm",
        peft=lora(),
        num_ppo_epochs=1,
        **THOUGHT,
        **SGD,
    )
    pairs = pair(made)
    made.train()
    made.close()
    return pairs


TWO = {1: "two", 2: "split"}
LEFT = [Path(f"/dev/shm/-tp:0-[0-1]-cpushm_{rank}") for rank in range(2)]


def two(folder, rank, shares):
    """shares: 2, one engine split over both; 1, one in each."""
    os.environ.update(rank)
    name, parts = TWO[shares], dict(per_device_train_batch_size=2, vllm_tensor_parallel_size=shares)
    made = run(folder / name, "grpo", "vllm", **parts)
    pairs = pair(made)
    made.train()
    long = refused(made._engine.decode, [[tiny.BOS] * (250 * (os.environ["RANK"] == "0") + 3)], [0])
    made.close()
    if os.environ["RANK"] == "1":
        torch.save(dict(found(made), pairs=pairs, long=long), folder / f"{name}.pt")
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


# --- the tests ---


def start(folder):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    for file in LEFT if on_cpu() else ():  # as an engine before has left them
        file.touch()
    done = warm.run(__file__, [folder], env)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    start(folder)
    of_two = {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in TWO.values()}
    return torch.load(folder / "out.pt", weights_only=False) | of_two


def apart(out, own):
    """In how many places is a rollout of vLLM not the loop's, but for the order of a step's draws?
    Compared are the thoughts, and all of a completion that is nothing else."""
    width = min(out.record.kind.shape[1], own.record.kind.shape[1])
    (given, ours) = (
        type(x.record)(*(column[:, :width] for column in x.record)) for x in (out, own)
    )
    limit = torch.where(own.answer_start > 0, own.answer_start, width)[:, None]
    mixtures = [dense(Soft(x.ids, x.weights), tiny.VOCAB) for x in (given, ours)]
    wrong = (given.token != ours.token) | (given.kind != ours.kind)
    wrong |= (mixtures[0] - mixtures[1]).abs().amax(-1) > 1e-6
    if own.config.mixer in ("k-samples", "hard"):  # a draw a slot
        wrong |= (given.ids[..., 0] != ours.ids[..., 0]) | (given.ids.shape[2] != ours.ids.shape[2])
        wrong |= (given.weights > 0).sum(-1) != (ours.weights > 0).sum(-1)
    wrong |= (given.entropy - ours.entropy).abs() > 1e-3
    return int(
        (wrong & (torch.arange(width) < limit)).sum() + (out.answer_start != own.answer_start).sum()
    )


def same(pairs, number):
    assert len(pairs) == number
    assert [apart(*pair) for pair in pairs] == [0] * number
    draws = torch.cat([out.completions[:, 0] for out, _ in pairs])
    assert len(draws.unique()) > 2


@pytest.mark.parametrize("name", ["grpo", "ppo", "often"])
def test_a_run_is_the_loops(made, tmp_path, name):
    """All of the completion is thought, so that both draw the same: rollouts, losses and
    weights."""
    theirs, ours = made[name], run(tmp_path, name, "loop")
    ours.train()
    same(theirs["pairs"], {"grpo": 3, "ppo": 3, "often": 14}[name])
    for key, value in found(ours).items():
        if key != "weights":
            assert theirs[key] == pytest.approx(value, abs=1e-5), key
    for key, value in weights(ours.model).items():
        assert (value - theirs["before"].get(key, value + 1)).abs().max() > 1e-5 or "v_head" in key
        torch.testing.assert_close(theirs["weights"][key], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name, number", [("hard", 3), ("lora", 3), ("adam", 1)])
def test_thoughts_are_the_loops_at_each_rollout(made, name, number):
    same(made[name]["pairs"], number)


def test_without_the_new_weights_it_is_noticed(made):
    without, with_them = (apart(*pair) for pair in made["stale"])
    assert without > 0 == with_them


def test_an_adapter_stays_apart_and_its_base_as_it_was(made):
    assert made["merged"] and not any(made["merged"])
    before, after = made["lora"]["before"], made["lora"]["weights"]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if "lora_" in key}


def test_an_interruption_ends_the_engine_and_leaves_the_policy_as_it_was(made):
    equal, merged, said = made["interrupted"]
    assert all(equal) and len(equal) > 20 and not any(merged)
    assert "the engine was ended, or interrupted at work" in said


def test_old_log_probabilities_are_the_models_own(made):
    """Where a rollout is used twice its first ratios are 1, but for the rounding of a replay in
    pieces; the second's are not."""
    first, second = made["adam"]["ratio/max_deviation"]
    assert first < 1e-5 < 1e-3 < second
    assert max(made["grpo"]["ratio/max_deviation"]) == 0


def test_answers_are_drawn_from_the_policy(made):
    tokens, starts, probs = made["answers"]
    assert not starts.any()
    expected = len(tokens) * probs
    counts = torch.bincount(tokens, minlength=tiny.VOCAB)
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 3).all()
    assert (
        (counts - expected).abs().sum() / len(tokens)
        < 0.25
        < (expected - len(tokens) / tiny.VOCAB).abs().sum() / len(tokens)
    )


def test_a_resumed_run_goes_on_as_it_would_have(made):
    again, pairs = made["resumed"]
    same(pairs, 1 + 2 * 4)  # one to train with, and two evaluations
    for key, value in made["often"]["weights"].items():
        torch.testing.assert_close(again[key], value, atol=1e-6, rtol=0)


def test_heads_that_vllm_cannot_serve_are_widened_at_each_rollout(made):
    same(made["narrow"], 3)


def test_more_prompts_than_fit_a_step(made):
    assert made["many"].shape == (24, 8) and len(made["many"].unique(dim=0)) > 12


def test_what_the_engine_leaves_in_the_process(made):
    assert made["left"] == [True, True, False, None]


def test_a_prompt_that_is_too_long_says_so(made):
    assert made["long"] == (
        "a prompt of 250 tokens and max_completion_length=8 are more than the 256 of the engine: shorten them, or give "
        "vllm_max_model_length=258 if the model can"
    )


@pytest.mark.parametrize("name", TWO.values())
def test_two_processes_are_one(made, name):
    """With an engine each, and with one that is split over both, of which no file of memory is left."""
    assert not any(file.exists() for file in LEFT)
    theirs = made[name]
    assert [apart(*pair) for pair in theirs["pairs"]] == [0] * 3
    for (mine, _), (all_rows, _) in zip(theirs["pairs"], made["grpo"]["pairs"], strict=True):
        width = mine.completions.shape[1]
        assert torch.equal(mine.completions, all_rows.completions[2:, :width])
    for key, value in made["grpo"]["weights"].items():
        torch.testing.assert_close(theirs["weights"][key], value, atol=1e-5, rtol=0)


def test_a_prompt_of_one_process_that_is_too_long_ends_none_in_waiting(made):
    """The other one, which shares the engine, would wait for it."""
    assert made["two"]["long"] is None
    assert "a prompt of 253 tokens" in made["split"]["long"]


# --- without an engine ---


def test_the_draws_of_a_step_are_its_slots():
    def read(token, mixture, kind=Kind.SOFT):
        return Read(token, tuple(mixture), tuple(mixture.values()), int(kind), 0.0, 0.0)

    step = one_draw_a_slot(read(7, {3: 0.2, 7: 0.6, 5: 0.2000001}), 5)
    assert step.ids == (7, 7, 7, 3, 5) and step.weights == (0.2,) * 5
    assert one_draw_a_slot(read(7, {7: 1.0}), 3).ids == (7, 7, 7)
    assert one_draw_a_slot(read(7, {7: 1.0}, Kind.FORCED), 3).ids == (7, 7, 7)
    with pytest.raises(RuntimeError, match="are not those of 2 draws"):
        one_draw_a_slot(read(7, {7: 0.6, 3: 0.1}), 2)


def test_a_record_that_follows_other_rules_is_an_error():
    decoding = SoftConfig(
        mixer="k-samples", mixer_args={"k": 2}, top_k=None, think_end=(tiny.END,), budget=1
    )
    step = Read(9, (9, 8), (0.5, 0.5), int(Kind.SOFT), -3.0, 1.0)
    closed = Read(tiny.END, (tiny.END,), (1.0,), int(Kind.FORCED), float("nan"), 1.0)
    ended = Read(tiny.EOS, (tiny.EOS,), (1.0,), int(Kind.HARD), float("nan"), 1.0)
    prompts = [[1, 5], [1, 6, 7]]
    out = output_of(prompts, [[step, closed], [ended]], decoding, [tiny.EOS], tiny.PAD)
    assert out.sequences.tolist() == [[0, 1, 5, 9, tiny.END], [1, 6, 7, tiny.EOS, tiny.PAD]]
    assert out.record.kind.tolist() == [[Kind.SOFT, Kind.FORCED], [Kind.HARD, Kind.PAD]]
    assert out.record.ids.tolist() == [[[9, 8], [4, 4]], [[2, 2], [0, 0]]]
    assert out.record.weights.tolist() == [[[0.5, 0.5], [1, 0]], [[1, 0], [1, 0]]]
    assert out.answer_start.tolist() == [2, 1] and out.prompt_length == 3 and out.num_forwards == 2
    with pytest.raises(RuntimeError, match="at step 1 vLLM followed other rules"):
        output_of(prompts, [[step, step], [ended]], decoding, [tiny.EOS], tiny.PAD)
    broken = step._replace(entropy=float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 0, rows \[0\]"):
        output_of(prompts, [[broken, closed], [ended]], decoding, [tiny.EOS], tiny.PAD)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"rollout": "hf"}, "rollout='hf' is unknown: choose one of .'loop', 'vllm'."),
        ({"temperature": 0.001}, "temperature=0.001 must be at least 0.01 with rollout='vllm'"),
        ({"soft_k": 300}, "soft_k=300 must be at most 256 with rollout='vllm'"),
        ({"vllm_mode": "server"}, "vllm_mode='server' is not supported.*in the trainer's process"),
        ({"vllm_tensor_parallel_size": 0}, "vllm_tensor_parallel_size=0 must be at least 1"),
        ({"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode=True is not supported"),
        (
            {"vllm_structured_outputs_regex": "a"},
            "vllm_structured_outputs_regex='a' is not supported",
        ),
        ({"use_vllm": True}, "use_vllm=True is not supported.*rollout='vllm' decodes softly"),
    ],
)
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_what_cannot_work_is_named(tmp_path, kind, options, says):
    with pytest.raises(ValueError, match=says) as caught:
        config(tmp_path, kind, **{"rollout": "vllm", **options})
    assert "\n" not in str(caught.value)


def test_without_vllm_it_says_how_to_get_it(tmp_path, monkeypatch):
    whole = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "vllm" else whole(name, *rest),
    )
    with pytest.raises(
        ValueError, match=r"rollout='vllm': vLLM is not installed: `pip install \"softar\[vllm\]\"`"
    ):
        config(tmp_path, rollout="vllm")
    assert config(tmp_path).rollout == "loop"


def test_an_engine_that_does_not_think_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.33.1")
    with pytest.raises(
        ValueError, match=r"vLLM 0\.33\.1 is not among the versions that softar thinks in"
    ):
        trainer(tmp_path, model=model_of("llama"), rollout="vllm")


def test_an_engine_for_more_processes_than_there_are_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vllm_tensor_parallel_size=2 must divide the 1 processes"):
        trainer(tmp_path, model=model_of("llama"), rollout="vllm", vllm_tensor_parallel_size=2)


def test_a_quantised_model_is_refused(tmp_path):
    model, decoding = model_of("llama"), config(tmp_path).decoding()
    model.is_quantized = True
    with pytest.raises(ValueError, match="the model is quantised"):
        VLLMRollout(model, Accelerator(cpu=True), tiny.tokenizer_of(), decoding, [tiny.EOS])


if __name__ == "__main__":
    import vllm  # noqa: F401

    folder, fork = Path(sys.argv[1]), multiprocessing.get_context("fork")
    for shares in TWO:
        jobs = [fork.Process(target=two, args=(folder, rank, shares)) for rank in warm.ranks(2)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert [job.exitcode for job in jobs] == [0, 0]
    main(folder)
