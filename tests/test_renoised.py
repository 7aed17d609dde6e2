"""DiffusionGemma, which has no mask: softar's loop beside transformers' own `generate`, and what the
process promises by itself."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file
from test_denoise import denoiser
from tiny import EOS, PAD, tokenizer_of, with_lora
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from softar import make_decoder
from softar.diffusion import SOFTENERS, DenoiseConfig, denoise, label_probs, load
from softar.diffusion.losses import log_likelihood
from softar.diffusion.net import facts
from softar.diffusion.schedules import Schedule
from softar.diffusion.select import Belief
from softar.diffusion.soften import Slots, Softener
from softar.diffusion.stops import mk_stop
from softar.diffusion.unmasked import Nothing, to_logits
from softar.show.trace import to_json
from softar.soft import Soft

VOCAB, CANVAS = 64, 8
ROWS = ([21, 4, 33, 50, 12], [7, 8, 9], [40, 41, 42, 43])
ENDS = tuple(range(5, 20, 2))  # many, so that rows do end


@functools.cache
def gemma(sharpness=10.0, dtype=torch.float32, **changes):
    """20 thousand parameters, one of two layers sliding. A larger table makes it surer."""
    text = dict(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        num_experts=2,
        top_k_experts=1,
        moe_intermediate_size=8,
        max_position_embeddings=64,
        initializer_range=0.4,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    vision = dict(
        model_type="gemma4_vision",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        position_embedding_size=16,
    )
    config = DiffusionGemmaConfig(
        text_config=text | changes,
        vision_config=vision,
        canvas_length=CANVAS,
        image_token_id=VOCAB - 1,
        initializer_range=0.4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight.mul_(sharpness)
    model.set_experts_implementation("eager")  # the others have no float64
    return model.to(dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in map(list, rows)])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def run(model=None, rows=ROWS, **knobs):
    knobs = dict(gen_length=16, steps=12, end_ids=()) | knobs
    return denoise(model or gemma(), *padded(rows), **knobs)


# -- beside transformers

SETTINGS = {
    "as it is": {},
    "cold": dict(t_min=0.01, t_max=0.02),
    "constant": dict(t_min=0.5, t_max=0.5000001),
    "wide": dict(t_min=0.2, t_max=2.0, sampler_config=5.0),
    "patient": dict(t_min=0.01, t_max=0.02, stability_threshold=2, confidence_threshold=1.0),
    "hasty": dict(stability_threshold=0, confidence_threshold=2.0),
    "with ends": dict(eos_token_id=[*ENDS], pad_token_id=PAD),
    "cold with ends": dict(eos_token_id=[*ENDS], pad_token_id=PAD, t_min=0.01, t_max=0.02),
}


def ours(how):
    """Settings of `generate` as options of `denoise`."""
    knobs, stop = {"end_ids": ()}, {}
    for name, value in how.items():
        if name == "sampler_config":
            knobs |= dict(entropy_bound=value, select="entropy")
        elif name == "eos_token_id":
            knobs["end_ids"] = tuple(value)
        elif name.endswith("_threshold"):
            stop[name.removesuffix("_threshold")] = value
    if "t_min" in how:
        knobs["temperature"] = (how["t_max"], how["t_min"])
    return knobs | (dict(stop="stable", stop_args=stop) if stop else {})


def theirs(model, rows, how, seed, canvases=2, steps=6):
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        EntropyBoundSamplerConfig,
    )

    if "sampler_config" in how:
        how = how | {"sampler_config": EntropyBoundSamplerConfig(how["sampler_config"])}
    ids, mask = padded(rows)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=canvases * CANVAS - 3,
            max_denoising_steps=steps,
            **how,
        )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("sharpness", [1.5, 10.0])
def test_token_for_token_as_transformers_generates(name, sharpness):
    """Ragged rows, two canvases, 13 of 16 tokens asked for; and so many tokens a forward."""
    how, model = SETTINGS[name], gemma(sharpness)
    for seed in range(2):
        expected = theirs(model, ROWS, how, seed)
        out = run(model, gen_length=13, parity="diffusion_gemma", rng=seeded(seed), **ours(how))
        n = expected.sequences.shape[1]
        assert torch.equal(out.sequences[:, :n], expected.sequences)
        assert (out.sequences[:, n:] == PAD).all() and out.sequences.shape[1] == 5 + 16
        tokens, forwards = (out.committed_at >= 0).sum(1), out.row_forwards - out.row_stores
        torch.testing.assert_close(tokens / forwards, expected.tokens_per_forward)
        assert out.num_forwards >= out.row_forwards.max()
        assert out.store_forwards == (n - 5) // CANVAS == out.row_stores.max()
        assert out.token_forwards == 3 * (5 + (out.num_forwards - 1) * CANVAS)


def test_the_settings_reach_what_they_are_for():
    """Guards the sample: rows stop early, rows end, and draws differ."""
    outs = {
        name: run(gen_length=13, parity="diffusion_gemma", rng=seeded(), **ours(how))
        for name, how in SETTINGS.items()
    }
    assert (outs["as it is"].row_forwards == 14).all()
    for name in ("cold", "patient", "hasty"):
        assert (outs[name].row_forwards < 14).any(), name
    assert (outs["hasty"].row_forwards == 4).any()
    assert (outs["cold with ends"].completions == PAD).any()
    assert len({tuple(out.sequences.flatten().tolist()) for out in outs.values()}) > 4
    other = run(gen_length=13, parity="diffusion_gemma", rng=seeded(1))
    assert not torch.equal(other.sequences, outs["as it is"].sequences)


@pytest.mark.parametrize("bias", ["vision", None])
def test_one_canvas_in_half_precision_and_with_the_mask_of_images(bias):
    model = gemma(4.0, torch.bfloat16, use_bidirectional_attention=bias)
    expected = theirs(model, ROWS, SETTINGS["cold"], 3, canvases=1)
    out = run(
        model, gen_length=8, steps=6, parity="diffusion_gemma", rng=seeded(3),
        **ours(SETTINGS["cold"]),
    )  # fmt: skip
    assert torch.equal(out.sequences, expected.sequences)


def test_the_global_generator_serves_where_none_is_given():
    expected = theirs(gemma(), ROWS, {}, 7)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        out = run(parity="diffusion_gemma")
    assert torch.equal(out.sequences, expected.sequences)


# -- softar's own way

SOON = dict(stop="stable", stop_args={"stability": 0, "confidence": 4.0})
VARIANTS = {
    "as trained": {},
    "hard": dict(soften="hard"),
    "soft-token": dict(soften="soft-token"),
    "soft-mask": dict(soften="soft-mask", soften_args={"algorithm": "temperature"}),
    "evolving": dict(soften="evolving"),
    "slerp": dict(soften="slerp"),
    "threshold": dict(threshold=0.3, steps=None, gen_length=8, **SOON),
    "dynamic": dict(schedule="dynamic", threshold=0.3, gen_length=8, steps=6),
    "factor": dict(factor=2.0, select="margin", steps=None, gen_length=8, **SOON),
    "one temperature": dict(temperature=0.02),
    "with ends": dict(end_ids=ENDS, gen_length=24, steps=18),
    "cold with ends": dict(end_ids=ENDS, gen_length=24, steps=18, temperature=(0.02, 0.01)),
    "to the last step": dict(temperature=0.02, stop="never"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_decodes_alone_as_in_any_batch(name):
    """With a generator of its own; padding does not count, and rows that are decoded or ended do
    not draw."""
    knobs, model = VARIANTS[name], gemma(dtype=torch.float64)
    out = run(model, **knobs, rng=[seeded(s) for s in range(3)])
    for r, row in enumerate(ROWS):
        alone = run(model, [row], **knobs, rng=[seeded(r)])
        assert torch.equal(alone.completions[0], out.completions[r]), r
        assert torch.equal(alone.row_forwards, out.row_forwards[r : r + 1])
        same = alone.confidence[0, len(row) :]
        torch.testing.assert_close(same, out.confidence[r, 5:], rtol=0, atol=1e-5, equal_nan=True)


def test_variants_differ_and_stop():
    outs = {name: run(**knobs, rng=seeded()) for name, knobs in VARIANTS.items()}
    texts = {name: tuple(out.completions[:, :16].flatten().tolist()) for name, out in outs.items()}
    assert len({*texts.values()}) >= 10
    assert (outs["one temperature"].row_forwards < 14).any()
    assert (outs["to the last step"].row_forwards == 14).all()
    ended = outs["cold with ends"]
    for row, forwards in zip(ended.completions.tolist(), ended.row_forwards.tolist(), strict=True):
        end = next((i for i, token in enumerate(row) if token in ENDS), len(row))
        assert all(token == PAD for token in row[end + 1 :])
        assert forwards <= 7 * (end // CANVAS + 1)
    assert ended.num_forwards < 21


def test_a_row_that_has_ended_is_read_no_more_and_leaves_the_others_alone():
    knobs = dict(gen_length=24, steps=18)
    free = run(**knobs, rng=[seeded(s) for s in range(3)])
    others = {*free.completions[1:].flatten().tolist()}
    end = next(i for i, t in enumerate(free.completions[0, :8].tolist()) if t not in others)
    token = int(free.completions[0, end])
    out = run(**knobs, end_ids=(token,), rng=[seeded(s) for s in range(3)])
    assert torch.equal(out.sequences[1:], free.sequences[1:])
    assert torch.equal(out.completions[0, : end + 1], free.completions[0, : end + 1])
    assert (out.completions[0, end + 1 :] == PAD).all()
    assert out.row_stores.tolist() == [1, 3, 3] and out.row_forwards[0] <= 7
    canvases = 6 * CANVAS * (3 + 2 + 2)  # rows in each
    assert out.token_forwards == 3 * 5 + 2 * 2 * CANVAS + canvases


def test_soft_tokens_of_the_whole_vocabulary_are_what_the_model_was_trained_with():
    """With no share for the stand-in of the mask."""
    whole = Softener(lambda slots: Soft(*_all(slots)))
    seen = {}
    for soften in (None, whole, "hard"):
        calls = []
        run(gemma(1.5), rng=seeded(), soften=soften, callback=calls.append)
        seen[soften] = [call["confidence"][:, 5:13] for call in calls[:2]]
    for soften in (whole, "hard"):
        assert torch.equal(seen[soften][0], seen[None][0])
    torch.testing.assert_close(seen[whole][1], seen[None][1])
    assert (seen["hard"][1] - seen[None][1]).abs().max() > 1e-2


def _all(slots):
    weights = slots.belief.logits.softmax(-1)
    return torch.arange(VOCAB).expand_as(weights), weights


@pytest.mark.parametrize("K", [1, 3, 80])
def test_mixtures_as_logits(K):
    """Repeats, weights of 0, and the stand-in, which is every token alike."""
    generator = seeded(K)
    ids = torch.randint(VOCAB + 1, (50, K), generator=generator)
    ids[0] = VOCAB
    ids[1, 0] = 0
    weights = torch.rand(50, K, generator=generator)
    weights[2, 1:] = 0
    expected = torch.zeros(50, VOCAB)
    for row in range(50):
        for token, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
            expected[row] += weight / VOCAB if token == VOCAB else 0
            expected[row, token % VOCAB] += weight if token < VOCAB else 0
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(to_logits(Soft(ids, weights), VOCAB).softmax(-1), expected)


@pytest.mark.parametrize("name", [name for name, softener in SOFTENERS.items() if softener.fn])
def test_softeners_take_the_mean_of_all_tokens_for_the_mask(name):
    """What they mix is, up to its length, what the decoder gets."""
    table = gemma().model.decoder.embed_tokens
    nothing = Nothing(table, VOCAB)
    assert torch.equal(nothing(torch.arange(VOCAB)), table(torch.arange(VOCAB)))
    belief = Belief(3 * torch.randn(20, VOCAB, generator=seeded()), with_entropy=True)
    masked = torch.arange(20) % 3 > 0
    ids = belief.top_token.masked_fill(masked, VOCAB)
    slots = Slots(belief, ids, masked, torch.full((20,), 0.5), VOCAB, nothing)
    soft = SOFTENERS[name].fn(slots)
    mixed = (soft.weights[..., None] * nothing(soft.ids)).sum(-2)
    read = to_logits(soft, VOCAB).softmax(-1) @ table(torch.arange(VOCAB))
    torch.testing.assert_close(read.norm(dim=-1), read.norm(dim=-1).clamp_min(1e-6))
    cosine = torch.nn.functional.cosine_similarity(read, mixed, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(20))


def test_a_constraint_and_a_processor_bind_what_comes_out():
    class Odd(LogitsProcessor):
        def __call__(self, ids, scores):
            assert ids.shape == (len(scores), 5 + 16)
            return scores.masked_fill(torch.arange(VOCAB) % 2 == 0, -torch.inf)

    calls = []
    out = run(
        rng=seeded(),
        logits_processor=Odd(),
        allowed={-1: [3, 5], (0, 6): [9]},
        callback=calls.append,
    )
    assert (out.completions % 2 == 1).all()
    assert {*out.completions[:, -1].tolist()} <= {3, 5} and out.sequences[0, 6] == 9
    assert all(
        bool((call["sequences"][:, 5:] % 2 == 1)[call["committed"][:, 5:]].all()) for call in calls
    )
    for temperature in (0.02, 2.0):
        with pytest.raises(FloatingPointError, match=r"forward 1 are NaN, or -inf.*rows \[0"):
            run(logits_processor=Odd(), allowed={(0, 6): [8]}, temperature=temperature)
    penalised = run(rng=seeded(), logits_processor=RepetitionPenaltyLogitsProcessor(5.0))
    assert not torch.equal(penalised.sequences, run(rng=seeded()).sequences)


def test_what_a_callback_and_the_history_are_told():
    calls = []
    out = run(rng=seeded(), history=True, callback=calls.append, temperature=0.02)
    assert len(calls) == out.num_forwards - out.store_forwards
    assert len(out.states) == out.num_forwards + 1 and torch.equal(out.states[-1], out.sequences)
    committed = torch.zeros_like(out.sequences, dtype=torch.bool)
    for call in calls:
        index = call["step"]
        assert torch.equal(call["sequences"], out.states[index + 1])
        assert torch.equal(
            (out.states[index + 1] != out.states[index]) & ~call["committed"],
            torch.zeros_like(committed),
        )
        assert call["soft"].ids.shape[0] == int(call["where"].sum())
        assert (call["soft"].weights.sum(-1) < 1 + 1e-5).all()
        committed |= call["committed"]
    assert torch.equal(committed[:, 5:], torch.ones_like(committed[:, 5:]))
    again = run(rng=seeded(), temperature=0.02)
    assert torch.equal(again.sequences, out.sequences)


def test_a_stop_waits_for_tokens_that_stay_and_little_entropy():
    tokens, sure, unsure = torch.tensor([[1, 2]]), torch.zeros(1, 2), torch.ones(1, 2)
    stop = mk_stop("stable", stability=2, confidence=0.4)()
    seen = [stop(t, e).item() for t, e in [
        (tokens, sure), (tokens, sure), (tokens, unsure), (tokens, sure), (tokens + 1, sure),
        (tokens + 1, sure), (tokens + 1, sure),
    ]]  # fmt: skip
    assert seen == [False, False, False, True, False, False, True]
    assert mk_stop("stable", stability=0)()(tokens, sure).item()
    assert not mk_stop("never")()(tokens, sure).item()


def test_draws_of_a_belief_are_by_its_probabilities():
    """In chunks and whole; a token that cannot come never does."""
    for V in (50, 8192):
        logits = 3 * torch.randn(2, V, generator=seeded(), dtype=torch.float64).float()
        logits[:, ::3] = -torch.inf
        n = 40_000
        drawn = Belief(logits).draw  # [2] at a time is slow: many rows of the same two
        many = Belief(logits.repeat(n // 2, 1)) if V == 50 else None
        if many is None:
            tokens = torch.stack(
                [drawn(u) for u in torch.rand(400, 2, generator=seeded(), dtype=torch.float64)]
            )
            assert (tokens % 3 != 0).all()
            ranks = logits.softmax(-1).double().cumsum(-1)
            for u in (0.0, 0.2, 0.5, 0.999, 1 - 2**-53):
                token = drawn(torch.full((2,), u, dtype=torch.float64))
                at = ranks.gather(-1, token[:, None])[:, 0]
                before = at - logits.softmax(-1).double().gather(-1, token[:, None])[:, 0]
                assert (
                    (before <= u + 1e-6).all() and (at >= u - 1e-6).all() and (token % 3 != 0).all()
                )
            continue
        tokens = many.draw(torch.rand(n, generator=seeded(), dtype=torch.float64)).view(-1, 2)
        for row in range(2):
            share = torch.bincount(tokens[:, row], minlength=V) / len(tokens)
            p = logits[row].softmax(-1)
            assert ((share - p).abs() <= 5 * (p * (1 - p) / len(tokens)).sqrt() + 1e-9).all()


# -- what is refused

BAD = [
    (dict(gen_length=0), "gen_length=0, and the model has no mask"),
    (dict(steps=15), "steps=15 cannot be shared by 2 (blocks|canvases): choose a multiple of 2"),
    (dict(block_length=4), "block_length=4 contradicts the model, whose canvases are of 8"),
    (dict(cache="prefix", block_length=8), "cache='prefix'"),
    (dict(remask="cap", steps=12), "remask='cap' does not go with DiffusionGemma"),
    (dict(cfg_scale=1.0), "cfg_scale=1.0 does not go with DiffusionGemma"),
    (dict(alg_temp=1.0), "alg_temp=1.0 does not go with DiffusionGemma"),
    (dict(top_k=5, temperature=1.0), "top_k=5 does not go with DiffusionGemma"),
    (dict(ban_eos=True), "ban_eos=True does not go with DiffusionGemma"),
    (
        dict(schedule="linear"),
        "schedule='linear' shares out what is committed, and here nothing is",
    ),
    (
        dict(schedule=Schedule(lambda *_: None, revises=True)),
        "shares out what is committed, and here nothing is",
    ),
    (dict(schedule="wino", threshold=0.5), "schedule='wino' shares out what is committed"),
    (dict(rescale="l2", soften="soft-token"), "rescale='l2' does not go with DiffusionGemma"),
    (dict(select="margin"), "select='margin' does nothing: what is kept is bounded by entropies"),
    (dict(parity="llada"), "parity='llada' does not go with DiffusionGemma"),
    (dict(temperature=0.0), "temperature=0: the model reads its belief at this temperature"),
    (dict(temperature=(0.5, 0.0)), "must be a number, or .first, last., both > 0"),
    (dict(temperature=(0.5, 0.4, 0.3)), "must be a number, or .first, last., both > 0"),
    (dict(stop="soon"), "stop='soon' is unknown.*choose one of .'never', 'stable'"),
    (dict(stop="stable", stop_args={"stability": -1}), "stop_args stability=-1 must be a whole"),
    (dict(stop="never", stop_args={"stability": 1}), "stop='never' does not take .'stability'"),
    (dict(stop_args={"stability": 1}), "stop_args={'stability': 1} without stop"),
    (
        dict(parity="diffusion_gemma", rng=[seeded()] * 3),
        "give one generator, not one for each row",
    ),
    (dict(gen_length=64), "a prompt of 5 and gen_length=64 do not fit"),
    (dict(allowed={0: [5]}), "allowed names the slot 0, where there is no mask to fill"),
    (dict(rows=[[5, VOCAB - 1]]), "input_ids hold the image token"),
    (dict(rows=[[5], []]), "leaves rows .1. an empty prompt"),
]


@pytest.mark.parametrize("knobs, words", BAD, ids=[str(i) for i in range(len(BAD))])
def test_what_means_nothing_here_is_refused_in_one_line(knobs, words):
    with pytest.raises(ValueError, match=words) as error:
        run(**{"steps": None} | knobs)
    assert "\n" not in str(error.value)


def test_facts_and_lengths():
    known = facts(gemma())
    assert known.mask_id is None and known.block_length == CANVAS and known.vocab_size == VOCAB
    assert known.end_ids == (EOS,) and known.family == "diffusion_gemma"
    how = DenoiseConfig().as_trained(known)
    assert how.soften is None and how.temperature is None
    short, whole = (run(gen_length=n, steps=12, rng=seeded()) for n in (13, 16))
    assert torch.equal(short.sequences, whole.sequences[:, :-3])
    assert torch.equal(run(rng=seeded(), cache="exact").sequences, whole.sequences)
    free = run(end_ids=ENDS, early_stop=False, rng=seeded())
    assert torch.equal(free.sequences, whole.sequences)


# -- from a folder, and everywhere else


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As Gemma's are: a tokenizer with a mask token that the model knows nothing of."""
    path = tmp_path_factory.mktemp("gemma")
    gemma().save_pretrained(path, max_shard_size="20KB")
    tokenizer = tokenizer_of(VOCAB)
    tokenizer.add_special_tokens({"mask_token": tokenizer.convert_ids_to_tokens(4)})
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(path)
    return path


def test_a_folder_opens_as_it_is_and_is_saved_so(folder, tmp_path):
    model, tokenizer = load(folder)
    assert type(model) is DiffusionGemmaForBlockDiffusion and not model.training
    assert tokenizer.padding_side == "left" and tokenizer.mask_token is None
    assert facts(model) == facts(gemma())
    assert torch.equal(run(model, rng=seeded()).sequences, run(rng=seeded()).sequences)
    again = tmp_path / "as transformers has it"
    gemma().save_pretrained(again)
    model.save_pretrained(tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (again, tmp_path))
    assert before.keys() == after.keys()
    half, _ = load(folder, dtype="bfloat16")
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(vision_config=None), "says no vision_config"),
        (
            dict(text_config={"vocab_size": VOCAB}),
            "text_config of its config.json says no hidden_size",
        ),
        (dict(canvas_length=0), "canvas_length=0: a whole number"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder, tmp_path, changes, words):
    settings = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=words) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="a DiffusionGemma says all by itself"):
        load(folder, block_length=4)


def test_an_adapter_decodes(folder, tmp_path):
    targets = r".*(language_model|decoder)\.layers.*\.q_proj"
    with_lora(load(folder)[0], target_modules=targets, task_type=None).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(folder)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    model, _ = load(tmp_path)
    out = run(model, rng=seeded())
    assert not torch.equal(out.sequences, run(rng=seeded()).sequences)


def test_decoders_by_name_and_their_traces(folder):
    specs = [
        f"{folder}=denoise:steps=6",
        f"{folder}=hard:steps=6",
        f"{folder}=soft-token:k=2,bias=0,steps=6,stop=stable,stability=0,confidence=9.0",
    ]
    words = tokenizer_of(VOCAB).convert_ids_to_tokens([20, 21, 22])
    prompts = [" ".join(words), words[0]]
    for spec in specs:
        decoder = make_decoder(spec, max_new_tokens=6, trace=True)
        for answer in decoder.decode(prompts):
            assert 0 < len(answer.tokens) <= 6
            assert answer.num_forwards == (2 if "stop" in spec else 7)
            cells = [*answer.trace.states()][-1]
            assert all(text is not None for text, _ in cells)
            assert [text for text, _ in cells[-6:]][: len(answer.tokens)] == [
                decoder.tokenizer.decode([token]) for token in answer.tokens
            ]
            assert json.loads(to_json(answer.trace))
            mixed = {
                token
                for forward in answer.trace.forwards
                for soft in forward.soft.values()
                for token, _ in soft
            }
            assert bool(mixed) == ("hard" not in spec)
    assert (
        make_decoder(f"{folder}=denoise", max_new_tokens=6).columns["training"]
        == "self-conditioned"
    )
    with pytest.raises(ValueError, match="gen_length=0, and the model has no mask"):
        make_decoder(f"{folder}=denoise", max_new_tokens=0)


def test_fill_at_the_command_line(folder, capsys):
    from softar.cli.commands import fill

    words = " ".join(tokenizer_of(VOCAB).convert_ids_to_tokens([20, 21]))
    fill(words, model=str(folder), gen_length=8, steps=4, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["decoder"] == "denoise" and told["num_forwards"] == 5
    assert 0 < len(told["tokens"]) <= 8


def test_what_needs_a_mask_says_so():
    model = gemma()
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(
        ValueError, match="label_probs needs a mask token, and diffusion_gemma has none"
    ):
        label_probs(model, ids, [3, 4])
    with pytest.raises(ValueError, match="a bound by masks needs a mask token"):
        log_likelihood(model, ids[0], torch.tensor([False, False, True]))
    masked = denoiser()
    for knobs, words in (
        (dict(stop="never"), "stop='never' does not go with a model of masks"),
        (dict(temperature=(0.8, 0.4)), "is for models that redraw every slot"),
        (dict(parity="diffusion_gemma"), "is of a model without a mask"),
    ):
        with pytest.raises(ValueError, match=words):
            denoise(masked, ids, gen_length=8, **knobs)
