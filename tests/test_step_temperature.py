"""A temperature of each step, made of its last hidden state: its value and gradients, decoding by it,
and a training that keeps it beside the checkpoint."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_architectures import build
from test_guidance import assert_same_gradients, batch, grads_of, mild
from test_sft import ADAM, data, logged, lora, trained, trainer_of
from test_split import fsdp, split_by, training, zero
from tiny import END, PROMPTS, VOCAB, WIDTH, left_padded, model_of, seeded, with_lora
from transformers import Trainer

import softar
from softar import SoftConfig
from softar.config import STEP_TEMPERATURE_FILE as FILE
from softar.feedback import REACH, StepTemperature
from softar.mixers import guide
from softar.rl import SoftGRPOConfig
from softar.rl.guards import policy_of
from softar.sft.config import SoftSFTConfig
from softar.sft.forward import soft_forward
from softar.sft.learnt import LearntFilters, begins_from
from softar.sft.preflight import whole_weights_for
from softar.soft import Soft, dense, entropy, mk_proba_dist
from softar.split import check_split
from softar.thought import Kind, mk_think
from softar.vllm.request import parse


def steps_of(size=4.0, seed=3, width=WIDTH):
    return StepTemperature(size * torch.randn(width, generator=seeded(seed)))


def decode(model, rows, rng=None, **fields):
    ids, mask = left_padded(rows)
    config = SoftConfig(**{"max_new_tokens": 6} | fields)
    return softar.generate(model, ids, mask, rng=rng, config=config)


# -- the value


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 5.0, 1e4]), st.sampled_from([1e-2, 1, 99]))
def test_it_is_bounded_and_sees_no_scale(seed, size, scale):
    h = torch.randn(3, 5, WIDTH, generator=seeded(seed))
    step = steps_of(size, seed + 1)
    factor = step(h)
    assert factor.shape == (3, 5, 1) and factor.dtype == torch.float32
    assert ((factor >= 1 / REACH - 1e-6) & (factor <= REACH + 1e-5)).all()
    # what rounds is the sum in the exponent, of numbers as large as the weights
    torch.testing.assert_close(step(scale * h), factor, rtol=1e-5 + 4e-7 * size, atol=0)
    assert torch.equal(step(h)[1, 2], step(h[1, 2]))
    most = step(step.weights)  # as a training logs it
    assert (factor.log().abs() <= most.log() + 1e-5).all()
    # a step of Adam moves its logarithm by the rate at most, from the number's
    moved = StepTemperature(0.01 * step.weights.sign())(scale * h)
    assert (moved.log().abs() <= 0.01 + 1e-6).all()


@pytest.mark.parametrize("size", [0.0, 2.0])
@pytest.mark.parametrize("name", ["weights", "hidden"])
def test_gradients_are_those_of_finite_differences(name, size):
    """Through the mixture."""
    worth = torch.linspace(0, 1, VOCAB).square()
    x = 2 * torch.randn(4, VOCAB, generator=seeded(1))
    at = dict(weights=steps_of(size).weights, hidden=torch.randn(4, WIDTH, generator=seeded(2)))

    def total(**changed):
        now = at | changed
        temperature = 0.7 * StepTemperature(now["weights"])(now["hidden"])
        dist = mk_proba_dist(x, temperature=temperature, top_k=9, top_p=0.99)
        return (dist.weights * worth[dist.ids]).sum()

    leaf = at[name].clone().requires_grad_()
    (slope,) = torch.autograd.grad(total(**{name: leaf}), leaf)
    for seed in range(4):
        way = torch.randn(leaf.shape, generator=seeded(9 + seed))
        up, down = (total(**{name: at[name] + sign * 0.02 * way}).item() for sign in (1, -1))
        wanted = (up - down) / 0.04
        assert (slope * way).sum().item() == pytest.approx(wanted, rel=0.02, abs=2e-4)
    assert (slope.abs().max() > 1e-4) == (name == "weights" or size > 0)


def test_a_model_may_lie_on_several_devices(tmp_path):
    """As with a device_map: weights, hidden states and logits each elsewhere."""
    hidden, logits = torch.randn(2, WIDTH), torch.randn(2, VOCAB).to("meta")
    step = steps_of()
    assert step(hidden.to("meta")).device.type == "meta"
    read = mk_think(SoftConfig(step_temperature=step), step)(logits, None, hidden)
    assert read.soft.weights.device.type == "meta"
    args = SoftSFTConfig(str(tmp_path), learn_step_temperature=True, soft_top_k=4)
    learnt = LearntFilters(model_of(), args, VOCAB)
    assert learnt.mixture(logits, 0.0, hidden).weights.device.type == "meta"


# -- decoding


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(temperature=0.7, top_k=None, min_p=0.02),
        dict(temperature=3.0, top_p=0.9, keep=4, banned=(7, 9)),
        dict(mixer="gumbel", temperature=1.3),
        dict(mixer="hard", mixer_args={"sample": True}, temperature=0.6, softness=1.0),
        dict(mixer="k-samples", budget=3, think_end=END, answer_temperature=0.8),
    ],
)
def test_weights_of_0_decode_at_the_number_bit_for_bit(fields):
    model = model_of()
    nothing = StepTemperature(torch.zeros(WIDTH))
    one, other = (
        decode(model, PROMPTS, seeded(5), **fields, step_temperature=each)
        for each in (None, nothing)
    )
    assert torch.equal(one.sequences, other.sequences)
    for a, b in zip(one.record, other.record, strict=True):
        assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


@pytest.mark.parametrize("arch, tuned", [("llama", False), ("gemma2", False), ("qwen3", True)])
@torch.no_grad()
def test_each_step_is_mixed_at_its_own_temperature(arch, tuned):
    """By hand without a cache: the hidden state after the final norm; rows as if alone."""
    model, step = model_of(arch, eos_token_id=None, initializer_range=0.15), steps_of(8.0)
    model = with_lora(model) if tuned else model
    how = dict(temperature=0.8, top_k=12, step_temperature=step)
    out = decode(model, PROMPTS, **how)
    embed = model.get_input_embeddings()
    for row, prompt in enumerate(PROMPTS):
        alone = decode(model, [prompt], **how)
        near = dict(rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(alone.record.weights[0], out.record.weights[row], **near)
        inputs, factors = embed(torch.tensor([prompt])), []
        for t in range(out.record.token.shape[1]):
            seen = model(inputs_embeds=inputs, output_hidden_states=True)
            factors.append(step(seen.hidden_states[-1][0, -1]).item())
            own = 0.8 * factors[-1]
            h = entropy(seen.logits[0, -1], own).item()
            assert out.record.entropy[row, t].item() == pytest.approx(h, rel=1e-3, abs=1e-3)
            wanted = mk_proba_dist(seen.logits[:, -1], temperature=own, top_k=12)
            read = Soft(out.record.ids[row, None, t], out.record.weights[row, None, t])
            torch.testing.assert_close(dense(read, VOCAB), dense(wanted, VOCAB), **near)
            mixed = softar.soft_embed(read, embed)
            inputs = torch.cat([inputs, mixed[None].to(inputs)], 1)
        assert max(factors) > 1.2 * min(factors)


def test_a_cold_stop_is_told_by_the_steps_temperature_and_a_switch_is_not():
    model, hot = model_of(eos_token_id=None), steps_of(8.0)
    cold = StepTemperature(-hot.weights)
    how = dict(think_end=END, max_new_tokens=8)
    for step in (hot, cold):
        told = decode(model, PROMPTS, step_temperature=step, budget=3, **how).record.entropy
        plain = decode(model, PROMPTS, budget=3, **how).record.entropy
        assert not torch.allclose(told[:, 0], plain[:, 0], atol=1e-2)
        level = (told[0, 0] + plain[0, 0]).item() / 2  # between: one of them stops at once
        stops = dict(cold_stop_entropy=level, cold_stop_steps=1, **how)
        ends = [
            decode(model, PROMPTS[:1], step_temperature=each, **stops).record.kind[0, 0]
            for each in (step, None)
        ]
        assert (ends[0] == Kind.FORCED) == bool(told[0, 0] < level)
        assert (ends[1] == Kind.FORCED) == bool(plain[0, 0] < level)
        turns = dict(switch="block", switch_dwell=1, **how)
        one, other = (
            decode(model, PROMPTS, step_temperature=each, **turns).record.entropy[:, 0]
            for each in (step, None)
        )
        assert torch.equal(one, other)


def test_a_model_that_gives_no_numbers_is_named():
    model = model_of()
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"logits are NaN or infinite.*step 0, rows"):
        decode(model, PROMPTS, step_temperature=steps_of())


# -- training


def feeder(step, alpha=0.2):
    def feed(logits, gold, hidden=None):
        own = 0.9 if step is None else 0.9 * step(hidden)
        return guide(mk_proba_dist(logits, temperature=own, top_k=8), gold, alpha)

    return feed


def uncached(model, ids, mask, marked, feed):
    """The definition: marked columns from left to right, each after a whole forward of what is before."""
    table = model.get_input_embeddings()
    inputs, positions = table(ids), (mask.cumsum(1) - 1).clamp_min(0)

    def run(x):
        t = x.shape[1]
        how = dict(attention_mask=mask[:, :t], position_ids=positions[:, :t], use_cache=False)
        return model(inputs_embeds=x, output_hidden_states=True, **how)

    for t in marked.any(0).nonzero()[:, 0].tolist():
        seen = run(inputs[:, :t])
        soft = feed(seen.logits[:, -1], ids[:, t], hidden=seen.hidden_states[-1][:, -1])
        column = torch.where(marked[:, t, None], softar.soft_embed(soft, table), inputs[:, t])
        inputs = torch.cat([inputs[:, :t], column[:, None], inputs[:, t + 1 :]], 1)
    return run(inputs).logits


@pytest.mark.parametrize(
    "arch, padding", [("llama", "left"), ("llama", "right"), ("gemma2", "left")]
)
def test_both_modes_equal_the_definition_in_logits_and_gradients(arch, padding):
    """Of the model and of the weights; also with fewer logits than hidden states."""
    model, step, (ids, mask, marked) = mild(arch), steps_of(2.0), batch(padding)
    model.step = step.weights = torch.nn.Parameter(step.weights)
    real, feed = mask.bool(), feeder(step)
    expected = uncached(model, ids, mask, marked, feed)
    reference = grads_of(model, expected, mask)
    assert reference["step"].abs().max() > 1e-6
    for how in (dict(mode="sequential"), dict(), dict(last=11), dict(mode="sequential", last=11)):
        logits = soft_forward(model, ids, mask, marked, feed, hidden=True, **how)
        width = logits.shape[1]
        near = dict(rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            logits[real[:, -width:]], expected[:, -width:][real[:, -width:]], **near
        )
        if width == ids.shape[1]:
            assert_same_gradients(grads_of(model, logits, mask), reference, tol=2e-3)


@pytest.mark.parametrize("how", [dict(mode="sequential", window=2), dict(passes=2, grad_passes=1)])
def test_weights_of_0_train_at_the_number_bit_for_bit(how):
    model, (ids, mask, marked) = mild(), batch("left")
    found = {}
    for step in (None, StepTemperature(torch.zeros(WIDTH))):
        logits = soft_forward(
            model, ids, mask, marked, feeder(step), hidden=step is not None, **how
        )
        found[step is None] = logits, grads_of(model, logits, mask)
    assert torch.equal(found[True][0], found[False][0])
    assert_same_gradients(found[False][1], found[True][1], tol=1e-5)


LEARN = dict(
    learn_step_temperature=True,
    temperature_learning_rate=0.1,
    alpha_schedule="constant",
    alpha_start=0.2,
    soft_top_k=8,
    think_steps=3,
)


@pytest.mark.parametrize("peft, number", [(False, True), (True, False)])
def test_it_is_kept_beside_the_checkpoint_and_resumed(tmp_path, peft, number):
    """With a learnt number, whose factor it is, or a fixed one; a run that goes on is the same run,
    weights and all, and what was saved decodes as the trainer does."""
    more = dict(max_steps=4, save_strategy="steps", save_steps=2, soft_temperature=1.5)
    more |= dict(peft_config=lora() if peft else None, learn_temperature=number, eval_new_tokens=6)
    trainer = trained(tmp_path, **LEARN, **more, **ADAM)
    seen = logged(trainer, "soft_step_temperature")
    assert seen[0] == 1.0 and all(1 < factor < REACH for factor in seen[1:])
    saved, file = tmp_path / "checkpoint-4", "adapter_model" if peft else "model"
    assert not [name for name in load_file(saved / f"{file}.safetensors") if "soft_" in name]
    own = trainer._learnt.step.detach()
    assert torch.equal(load_file(saved / FILE)["weights"], own)
    config = SoftConfig.load(saved)
    assert config.step_temperature == str(saved / FILE)
    assert "StepTemperature of width 32" in (saved / "README.md").read_text()
    assert (config.temperature != 1.5) == number

    resumed = trained(
        tmp_path / "again", resume=str(tmp_path / "checkpoint-2"), **LEARN, **more, **ADAM
    )
    torch.testing.assert_close(resumed._learnt.step.detach(), own, rtol=1e-5, atol=1e-7)
    assert logged(resumed) == pytest.approx(logged(trainer), rel=1e-5)

    if peft:
        return
    opened, _ = softar.load(str(saved))
    ids, mask = left_padded(PROMPTS)
    theirs = softar.generate(trainer.model, ids, mask, config=trainer.decoding())
    ours = softar.generate(opened, ids, mask)
    assert ours.why.startswith("as its soft_config.json says")
    torch.testing.assert_close(ours.record, theirs.record, equal_nan=True)
    bare = softar.generate(opened, ids, mask, step_temperature=None)
    assert not torch.allclose(bare.record.weights[:, 0], ours.record.weights[:, 0], atol=1e-4)
    # a copy goes where the configuration goes
    config.save(tmp_path)
    assert torch.equal(load_file(tmp_path / FILE)["weights"], own)
    # decoders take it by the model's name, or leave it where it would say nothing
    spec = {
        "soft": True,
        "gumbel": True,
        "sampled": True,
        "discrete": False,
        "beam-collapse": False,
    }
    for name, has in spec.items():
        decoder = softar.make_decoder(f"{saved}={name}", max_new_tokens=4)
        assert (decoder.config.step_temperature is not None) == has, name
        assert len(decoder.decode(["<bos> w11"])) == 1
    for name, message in {
        "soft-beam": "step_temperature=.*: soft-beam hands out no hidden states",
        "vllm-soft": "step_temperature=.*: vLLM hands out no hidden states",
    }.items():
        with pytest.raises(ValueError, match=message):
            softar.make_decoder(f"{saved}={name}", max_new_tokens=4)
    softar.make_decoder(f"{saved}=soft-beam:step_temperature=null", max_new_tokens=4)
    # a second training goes on from it, or says that it would get lost
    second = trainer_of(tmp_path / "second", model=opened, **LEARN, **ADAM)
    assert torch.equal(second._learnt.step.detach(), own)
    with pytest.raises(
        ValueError, match=r"step_temperature in .* give learn_step_temperature=True"
    ):
        trainer_of(tmp_path / "third", model=softar.load(str(saved))[0], soft_top_k=8)
    with pytest.raises(ValueError, match=r"step_temperature in .*: RL trains at one temperature"):
        policy_of(str(saved), SoftGRPOConfig(str(tmp_path), soft_mixer="hard"))


def test_the_best_weights_come_with_theirs(tmp_path):
    how = dict(
        save_strategy="steps", eval_strategy="steps", save_steps=1, eval_steps=1, max_steps=3
    )
    how |= dict(load_best_model_at_end=True, metric_for_best_model="eval_soft_step_temperature")
    # the factor grows: the first is the best
    trainer = trainer_of(
        tmp_path, eval_dataset=data(4), greater_is_better=False, **LEARN, **how, **ADAM
    )
    trainer.train()
    best = load_file(tmp_path / "checkpoint-1" / FILE)["weights"]
    assert torch.equal(trainer._learnt.step.detach(), best)


def test_it_helps_where_a_number_does_not(tmp_path):
    """The model stays as it is: a temperature of each step lowers the loss further than one of all."""
    how = dict(max_steps=12, alpha_schedule="constant", alpha_start=0.0, soft_temperature=1.0)
    how |= dict(per_device_train_batch_size=8, think_steps=3, temperature_learning_rate=0.1)
    how |= dict(optim="adamw_torch", learning_rate=0.0, soft_top_k=None, soft_passes=3)
    losses = {}
    for name in ("learn_temperature", "learn_step_temperature"):
        trainer = trained(tmp_path / name, model=model_of(), **{name: True}, **how)
        losses[name] = logged(trainer)
    first, one, each = losses["learn_temperature"][0], *map(min, losses.values())
    assert losses["learn_step_temperature"][0] == pytest.approx(first, rel=1e-6)
    assert first - each > 2 * (first - one) > 0


# -- what cannot be


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(step_temperature="nowhere.safetensors"), "'nowhere.safetensors' is no file"),
        (dict(step_temperature=3), "step_temperature=3 must be text or a StepTemperature or None"),
        (dict(temperature=0.0), "step_temperature=.* does nothing where a thought's steps have no"),
        (dict(mixer="hard", top_k=None), "step_temperature=.* does nothing where"),
        (dict(mixer="hidden", budget=3), "step_temperature=.* does nothing where"),
        (dict(softness=0.0), "step_temperature=.* does nothing where"),
    ],
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        SoftConfig(**{"step_temperature": steps_of()} | fields)


def test_files_and_models_that_do_not_fit(tmp_path):
    file = tmp_path / "own.safetensors"
    for tensors in ({"weights": torch.zeros(2, 3)}, {}, {n: torch.zeros(WIDTH) for n in "ab"}):
        save_file(tensors, file)
        with pytest.raises(ValueError, match=r"own.safetensors' holds no weights"):
            decode(model_of(), PROMPTS, step_temperature=str(file))
    file.write_text("no tensors")
    with pytest.raises(ValueError, match=r"own.safetensors' holds no weights"):
        decode(model_of(), PROMPTS, step_temperature=str(file))
    with pytest.raises(ValueError, match="of width 8, and LlamaForCausalLM has them of 32"):
        decode(model_of(), PROMPTS, step_temperature=steps_of(width=8))
    with pytest.raises(ValueError, match="soft: step_temperature is made of hidden states"):
        parse({"step_temperature": "own.safetensors"})


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(soft_temperature=0.0), "soft_temperature=0.0 cannot be learnt from"),
        (dict(targets="oracle"), "learn_step_temperature=True gets no gradient: targets='oracle'"),
        (dict(soft_grad_passes=1), "learn_step_temperature=True gets no gradient: soft_passes=0"),
        (dict(soft_mixer="k-samples"), "learn_step_temperature=True gets no gradient: mixtures of"),
        (dict(latent_stages=2), "learn_step_temperature=True does nothing with latent_stages"),
    ],
)
def test_trainings_that_cannot_be(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SoftSFTConfig(str(tmp_path), learn_step_temperature=True, **options)


def test_hidden_states_side_by_side_are_refused_before_the_data_is_read(tmp_path):
    args = SoftSFTConfig(str(tmp_path), learn_step_temperature=True)
    with pytest.raises(
        ValueError, match=r"Gemma3nForCausalLM .* leave out .*learn_step_temperature"
    ):
        begins_from(build("gemma3n_text"), args)


def test_weights_that_are_split_are_refused(tmp_path, monkeypatch):
    """By FSDP2 and ZeRO-3; ZeRO-1 and ZeRO-2 have them whole."""
    options = whole_weights_for(SoftSFTConfig(str(tmp_path), learn_step_temperature=True))
    for there in (split_by(), *(split_by(zero=zero(stage)) for stage in (1, 2))):
        check_split(SimpleNamespace(accelerator=there, args=training()), **options)
    for there in (split_by(zero=zero(3)), split_by(fsdp())):
        with pytest.raises(ValueError, match="learn_step_temperature=True under FSDP or ZeRO-3"):
            check_split(SimpleNamespace(accelerator=there, args=training()), **options)
    # transformers' trainer notes it when it makes its accelerator
    make = Trainer.create_accelerator_and_postprocess

    def under_deepspeed(self):
        make(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", under_deepspeed)
    made = trainer_of(tmp_path, learn_step_temperature=True)
    assert made.is_deepspeed_enabled and made._learnt.step is not None
