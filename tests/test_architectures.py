"""Every causal architecture of transformers, tiny: it decodes softly as it should, or is refused by
name before its first forward.

H: a mixture of one token is that token, so top_k=1 equals hard decoding equals `model.generate`.
R: a row of a ragged batch is decoded as by itself.

Weights are float64 and all drawn, also those that start as 0, behind which an error could hide. What
is compared agrees to 2e-5 where a layer computes in float32, and to 1e-12 elsewhere; the faults that
this is for make .1 and more.
"""

import contextlib
import dataclasses
import warnings

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from tiny import PAD, QUIET, counted, left_padded, model_of, seeded, tokenizer_of, with_lora
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Gemma3nConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import softar
from softar.caches import NEVER_STATIC
from softar.decoders.beam import BeamDecoder, BeamOptions
from softar.decoders.beam_collapse import BeamCollapse, beam_collapse
from softar.decoders.soft_beam import SoftBeam, soft_beam
from softar.feedback import STACKED, StepTemperature, hidden_size
from softar.models import reading
from softar.models.reading import (
    BLIND_TO_PADDING,
    DECODERS,
    IN_PLACE,
    NEED_TOKENS,
    ONE_BY_ONE,
    ONE_ROW,
    SHORT_CACHES,
    check_keeps_apart,
)
from softar.models.source import TEXT_ALONE
from softar.rl.actions import k_samples_logp, replay
from softar.sft.config import SoftSFTConfig
from softar.sft.forward import mixed_forward, soft_forward
from softar.sft.preflight import freeze
from softar.sft.trainer import SoftSFTTrainer
from softar.soft import Soft, entropy, hard, mk_proba_dist, soft_inputs, token_inputs

VOCAB, STEPS = 40, 3
ROWS = ([5, 11, 12, 13, 14], [5, 21])
CLOSE = dict(rtol=0, atol=1e-3)

# Fields of configurations, by the names that architectures give them.
SIZES = {
    VOCAB: """vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size
        unpadded_vocab_size""",
    64: "max_position_embeddings n_positions max_target_positions n_ctx rel_extent",
    32: """hidden_size d_model n_embd dim emb_dim intermediate_size ffn_dim n_inner d_ff dff ffn_hidden_size
        feed_forward_size decoder_ffn_dim encoder_ffn_dim shared_intermediate_size intermediate_size_mlp lru_width
        embedding_size mlp_dim image_size mm_embed_dim output_proj_dims mm_posemb_size""",
    16: """moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size q_lora_rank
        kv_lora_rank expert_ffn_hidden_size output_channels""",
    8: """head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim state_size mamba_d_state mamba_n_heads mamba_d_head
        mamba_chunk_size chunk_size linear_key_head_dim linear_value_head_dim linear_head_dim sliding_window
        attention_window_size hidden_size_per_layer_input rotary_dim patch_size nemo_conv_channels swa_head_dim""",
    4: """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        num_decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts conv_kernel
        time_step_rank mamba_dt_rank linear_num_value_heads laurel_rank swa_num_attention_heads""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
        num_key_value_heads num_kv_heads num_experts_per_tok moe_k moe_topk num_experts_per_token expand
        linear_num_key_heads swa_num_key_value_heads altup_num_inputs eos_token_id zero_expert_num""",
    1: "n_group topk_group n_shared_experts first_k_dense_replace mamba_n_groups bos_token_id",
    0: "num_kv_shared_layers pad_token_id",
    0.3: "initializer_range",
    # tokens of images and sounds, out of the way
    39: "image_token_id audio_token_id",
    38: "boi_token_id eoi_token_id",
    37: "video_token_id boa_token_id eoa_token_id eoa_token_index",
}
FIELDS = {name: size for size, names in SIZES.items() for name in names.split()}
FIELDS |= {"is_decoder": True}
ALL_HEADS = dict(num_key_value_heads=4)
LINEAR = dict(layer_types=["linear_attention", "full_attention"])
MAMBA = dict(layer_types=["mamba", "attention"])
MORE = {
    **dict.fromkeys(
        """axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa
        longcat_flash minicpm3 sarvam_mla youtu""".split(),
        ALL_HEADS,
    ),
    **dict.fromkeys("qwen3_next qwen3_5_text qwen3_5_moe_text".split(), LINEAR),
    "bailing_hybrid": LINEAR | ALL_HEADS,
    "bamba": dict(attn_layer_indices=[1]),
    "dory": dict(n_input_layers=1, n_output_layers=1),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gemma3n_text": dict(
        layer_types=["sliding_attention", "full_attention"], activation_sparsity_pattern=[0.0, 0.0]
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=8),
    "granitemoehybrid": MAMBA,
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, use_mamba_kernels=False
    ),
    "kimi_linear": LINEAR | ALL_HEADS,
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm3": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "mamba2": dict(num_heads=8),
    "nemotron_h": dict(
        layers_block_type=["mamba", "attention"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
    ),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(axial_pos_embds_dim=(8, 24), axial_pos_shape=(8, 8)),
    "xmod": dict(languages=["en"], default_language="en"),
    "zamba2": dict(
        layer_types=["mamba", "hybrid"],
        hybrid_layer_ids=[1],
        n_mamba_heads=8,
        mamba_headdim=8,
        mamba_ngroups=1,
        num_mem_blocks=1,
    ),
    "zaya": dict(num_experts_per_tok=1),
}
NOT_BUILT = {
    "blt": "reads bytes through three nets of their own",
    "cohere_compass_text": "its configuration has no default that builds",
    "dbrx": "transformers 5.19 cannot build it: its attention's configuration has no rope_theta",
    "dots3_note": "names settings of its 42nd layer; its text model is dots3_note_text",
    "gemma3n": "needs timm; as a text model it is gemma3n_text",
    "gemma4_assistant": "drafts for a Gemma 4 and reads its cache",
    "gemma4_unified_assistant": "drafts for a Gemma 4 and reads its cache",
    "got_ocr2": "its image encoder cannot be made small; its text model is Qwen 2",
    "musicgen": "needs an encoder of texts; it answers sounds",
    "musicgen_melody": "needs an encoder of texts; it answers sounds",
    "qwen4_exp": "transformers 5.19 has no defaults that build",
    "qwen4_exp_text": "transformers 5.19 has no defaults that build",
    "xlstm": "transformers 5.19 cannot run it in these sizes",
    "zamba": "transformers 5.19 ties its layers by names of two digits",
}
# transformers' own code cannot run these in float64
FLOAT32 = "bloom granite_swa granitemoe_swa mpt prophetnet xglm xlnet".split()
# of packed rows, told by positions where examples begin
MIXED = """
    afmoe bailing_hybrid bamba bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot
    blenderbot-small bloom camembert data2vec-text electra ernie falcon_h1 falcon_mamba
    gpt_oss granitemoehybrid inkling2_loop_text inkling2_text inkling_text jamba kimi_linear
    lara_mini lfm2 lfm2_moe lfm3 mamba mamba2 marian
    mbart megatron-bert minimax mpt mvp nemotron_h olmo_hybrid opt pegasus plbart prophetnet
    qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma rembert roberta
    roberta-prelayernorm roc_bert roformer rwkv trocr xglm xlm-roberta xlm-roberta-xl xmod zamba2
    zaya
""".split()
IS_5_24 = Version(transformers.__version__) >= Version("5.24")
if IS_5_24:  # their only attention there makes NaN of padded rows in float64
    FLOAT32 += ["gemma2", "vaultgemma"]
else:
    MIXED.append("falcon")
SINCE_5_24 = "bailing_hybrid dots3_note inkling2_loop_text inkling2_text lara_mini lfm3".split()
REFUSED = {*NEED_TOKENS, "cpmant", "openai-gpt", "reformer", "xlnet"} - {*NOT_BUILT}


def tiny_config(config_class, **more):
    fields = {field.name for field in dataclasses.fields(config_class)}
    parts = {
        name: tiny_config(part)
        for name, part in config_class.sub_configs.items()
        if part.__name__ != "AutoConfig"
    }
    sizes = {name: size for name, size in FIELDS.items() if name in fields}
    return config_class(**sizes | MORE.get(config_class.model_type, {}) | parts | more)


MORE["fuyu"] = dict(text_config=tiny_config(CONFIG_MAPPING["persimmon"]))


def build(kind, **more):
    config = tiny_config(CONFIG_MAPPING[kind], **more)
    dtype = torch.float32 if kind in FLOAT32 else torch.float64
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        # the grouped kernels of experts are not made for float64
        config._experts_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    rng = seeded()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=rng)
            else:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    return model


def decode(model, rows, **settings):
    config = softar.SoftConfig(max_new_tokens=STEPS, **settings)
    return softar.generate(model, *left_padded(rows), config=config)


def check_soft_is_hard(model, rows):
    """H, and that a mixture of more than one token is another input."""
    ids, mask = left_padded(rows)
    one, other = decode(model, rows, mixer="soft", top_k=1), decode(model, rows, mixer="hard")
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False)
    assert one.sequences.tolist() == other.sequences.tolist() == greedy.tolist()
    assert_close(one.record.entropy, other.record.entropy, **CLOSE)


def check_static_cache_is_right_or_refused(model, rows, batch):
    """batch: the rows decoded with the model's usual cache."""
    ids, mask = left_padded(rows)
    config = softar.SoftConfig(mixer="soft", top_k=5, max_new_tokens=STEPS)
    how = dict(config=config, cache_implementation="static")
    if model.config.model_type in NEVER_STATIC or not model._supports_default_dynamic_cache():
        with pytest.raises(ValueError, match=type(model).__name__):
            softar.generate(model, ids, mask, **how)
        return
    static = softar.generate(model, ids, mask, **how)
    assert static.completions.tolist() == batch.completions.tolist()
    assert_close(static.record.weights, batch.record.weights, **CLOSE)


def check_row_alone_is_row_in_batch(model, rows):
    """R, of the last row, which is the padded one -> all rows."""
    batch = decode(model, rows, mixer="soft", top_k=5)
    alone = decode(model, rows[-1:], mixer="soft", top_k=5)
    assert alone.completions[0].tolist() == batch.completions[-1].tolist()
    assert_close(alone.record.entropy[0], batch.record.entropy[-1], **CLOSE)
    return batch


def check_packed_rows_are_kept_apart_or_refused(model, kind):
    """Of those that keep them apart logits are off by at most 4e-6 of how much they differ between
    positions, of the others by .8 and more."""
    ids, says = torch.randint(5, 37, (23,), generator=seeded()), f"{type(model).__name__} reads the"
    with pytest.raises(ValueError, match=says) if kind in MIXED else contextlib.nullcontext():
        check_keeps_apart(model, ids, [10, 8, 5], rows=2)


def check_sequential_reads_as_one_forward_or_is_refused(model):
    """Of tokens, with gradient, behind a prompt longer than any window."""
    ids, marked = torch.randint(5, 37, (1, 16), generator=seeded()), torch.zeros(1, 16).bool()
    marked[:, 11:14] = True

    def step():
        model.zero_grad()
        how = dict(mode="sequential", window=2)
        logits = soft_forward(model, ids, None, marked, lambda _, gold: hard(gold), **how)
        logits.logsumexp(-1).sum().backward()
        return logits

    if reading.reads_on(model):
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits
        assert_close(step(), whole, **CLOSE)
        return
    says = f"'sequential'.* {type(model).__name__} .*'parallel'"
    with counted(model) as calls, pytest.raises(ValueError, match=says):
        step()
    assert not calls


@torch.no_grad()
def check_training_reads_rows_as_decoding_does(model, rows):
    """Padded on the right, and each alone."""
    out = decode(model, rows, mixer="hard", top_k=None)
    whole = [torch.tensor([*row, *made]) for row, made in zip(rows, out.completions.tolist())]
    ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=PAD)
    marked = torch.zeros_like(ids).bool()
    mask = torch.stack([torch.arange(ids.shape[1]) < len(row) for row in whole]).long()
    padded = soft_forward(model, ids, mask, marked, None)
    mixed = mixed_forward(model, ids, mask, ~marked, hard(ids))
    for number, row in enumerate(whole):
        full, none = torch.ones_like(row)[None], marked[:1, : len(row)]
        alone = soft_forward(model, row[None], full, none, None)[0]
        here = slice(len(rows[number]) - 1, len(row) - 1)
        for logits in (padded[number], mixed[number], alone):
            assert_close(entropy(logits[here]), out.record.entropy[number], rtol=0, atol=1e-2)


@torch.no_grad()
def check_width_of_hidden_states_is_known(model):
    out = model(input_ids=torch.tensor(ROWS[:1]), output_hidden_states=True)
    if model.config.model_type not in STACKED:
        assert out.hidden_states[-1].shape == (1, len(ROWS[0]), hidden_size(model))
        return
    assert out.hidden_states[-1].dim() == 4
    with pytest.raises(ValueError, match=f"{type(model).__name__} .* several last hidden states"):
        hidden_size(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_architecture_is_right_or_refused(kind):
    if kind in NOT_BUILT:
        pytest.skip(NOT_BUILT[kind])
    try:
        model = build(kind)
    except Exception as error:
        pytest.fail(f"{kind} is new here: add sizes for it to SIZES or MORE ({error!r})")
    rows = ROWS
    with counted(model) as calls:
        if kind in REFUSED:
            with pytest.raises(ValueError, match=type(model).__name__):
                decode(model, rows[:1])
        if kind in BLIND_TO_PADDING:
            with pytest.raises(ValueError, match=f"{type(model).__name__} does not see padding"):
                decode(model, rows)
            rows = [[5, 11, 12], [5, 21, 22]]
        if kind in ONE_ROW:
            with pytest.raises(ValueError, match=f"{type(model).__name__} does not keep the rows"):
                decode(model, [[5, 11, 12], [5, 21, 22]])
            rows = rows[:1]
        assert not calls
    if kind not in REFUSED:
        check_width_of_hidden_states_is_known(model)
        check_packed_rows_are_kept_apart_or_refused(model, kind)
        check_sequential_reads_as_one_forward_or_is_refused(model)
        if kind not in ONE_BY_ONE:  # whose whole forward in transformers sees later tokens
            check_training_reads_rows_as_decoding_does(model, rows)
        check_soft_is_hard(model, rows)
        batch = check_row_alone_is_row_in_batch(model, rows)
        check_static_cache_is_right_or_refused(model, rows, batch)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", "bloom gemma3n_text gpt2 lfm2 mamba prophetnet".split())
def test_beams_look_ahead_and_are_read_again_or_are_refused(kind):
    """One beam is greedy, three tokens at a time; where a model cannot, that is said."""
    model, (ids, mask) = build(kind), left_padded(ROWS if kind != "prophetnet" else ROWS[:1])
    config, decoded = softar.SoftConfig(max_new_tokens=STEPS + 2), 0
    greedy = softar.generate(model, ids, mask, config=config.changed(mixer="hard", top_k=None))
    for every in (1, 3):
        try:
            found, _ = beam_collapse(model, ids, mask, config, BeamCollapse(1, every))
        except ValueError as error:
            assert f"{type(model).__name__} goes on by one position" in str(error)
        else:
            decoded += 1
            assert torch.equal(found.sequences, greedy.sequences)
    assert decoded == {"mamba": 1, "lfm2": 1, "prophetnet": 1}.get(kind, 2)


@pytest.mark.parametrize("kind", ["opt", "gemma3n_text"])
def test_a_temperature_of_each_step_is_of_the_last_hidden_state_or_refused(kind):
    """Of what the head reads, where that is narrower than the layers."""
    more = {"word_embed_proj_dim": 24} if kind == "opt" else {}
    model = build(kind, **more)
    width = model.get_output_embeddings().in_features
    how = dict(step_temperature=StepTemperature(torch.randn(width, generator=seeded())))
    if kind in STACKED:
        with counted(model) as calls, pytest.raises(ValueError, match="leave out step_temperature"):
            decode(model, ROWS, **how)
        assert not calls
    else:
        check_width_of_hidden_states_is_known(model)
        alone, both = decode(model, ROWS[1:], **how), decode(model, ROWS, **how)
        assert_close(alone.record.weights[0], both.record.weights[1], **CLOSE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", "ctrl gemma3_text gpt2 lfm2 llama mistral moshi".split())
def test_parallel_training_is_whole_forwards_refreshed(kind):
    """By the definition, behind a prompt longer than any window; most kinds read it once."""
    model, passes = build(kind), 2
    ids, marked = torch.randint(5, 37, (2, 16), generator=seeded()), torch.zeros(2, 16).bool()
    marked[0, 11:14] = marked[1, 10:14] = True

    def feed(logits, gold):
        return mk_proba_dist(logits, top_k=3)

    def whole(inputs):
        inputs = {name: tokens.clone() for name, tokens in inputs.items()}
        return model(**inputs, use_cache=False).logits

    with torch.no_grad():
        inputs, at = token_inputs(model, ids), marked[:, 1:]
        for _ in range(passes):
            mixed = soft_inputs(model, feed(whole(inputs)[:, :-1][at], None))
            inputs = token_inputs(model, ids)
            inputs["inputs_embeds"][marked] = mixed["inputs_embeds"].to(model.dtype)
        logits = soft_forward(model, ids, None, marked, feed, passes=passes)
        assert_close(logits, whole(inputs), rtol=0, atol=1e-4)


def test_sequential_training_over_a_state_is_refused_before_it_starts(tmp_path):
    """And an adapter's; in parallel the model is taken."""
    for mode, adapted in (("sequential", False), ("sequential", True), ("parallel", False)):
        model = with_lora(build("lfm2")) if adapted else build("lfm2")
        args = SoftSFTConfig(output_dir=str(tmp_path), soft_mode=mode, think_steps=1, **QUIET)
        rows = Dataset.from_list([{"prompt": "w5", "completion": "w6 w7"}])
        refused = pytest.raises(ValueError, match=r"Lfm2ForCausalLM .*'parallel'")
        with refused if mode == "sequential" else contextlib.nullcontext():
            SoftSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer_of())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", "bert gemma3 gemma4 git gpt2".split())
def test_the_first_layers_are_those_that_read_text(kind):
    """Not those of a picture, which stand first in some; of git these are more."""
    model = build(kind, **({"num_hidden_layers": 1} if kind == "git" else {}))
    model(input_ids=torch.tensor(ROWS[:1])).logits.sum().backward()
    freeze(model, SoftSFTConfig(output_dir="", freeze_layers=1, freeze_embeddings=False))
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all(p.grad is not None for p in frozen.values())
    assert {name for name in frozen if ".0." not in name} == set()


def test_tables_name_what_there_is():
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *SINCE_5_24}
    assert {
        *NOT_BUILT,
        *REFUSED,
        *FLOAT32,
        *BLIND_TO_PADDING,
        *ONE_ROW,
        *ONE_BY_ONE,
        *SHORT_CACHES,
        *IN_PLACE,
        *NEED_TOKENS,
        *DECODERS,
        *NEVER_STATIC,
        *MIXED,
    } <= known


@pytest.fixture(params=["gemma3n_text", "gemma4_text"])
def layered(request):
    return build(request.param)


def test_layers_read_the_mixture_of_their_own_embeddings(layered):
    """By the definition; and what tokens are given is what the model makes of input_ids."""
    ids = torch.tensor([[5, 11, 12]])
    with torch.no_grad():
        assert_close(layered(**token_inputs(layered, ids)).logits, layered(input_ids=ids).logits)
        inputs = token_inputs(layered, torch.arange(VOCAB))
        soft = mk_proba_dist(torch.randn(2, 3, VOCAB, generator=seeded()), top_k=4)
        for k in (4, VOCAB):  # few tokens, and the dense product
            some = soft if k == 4 else mk_proba_dist(torch.randn(2, 3, VOCAB, generator=seeded()))
            for name, table in inputs.items():
                rows = table[some.ids].double()
                weights = some.weights.double()[(...,) + (None,) * (table.dim() - 1)]
                mixed = soft_inputs(layered, some)[name]
                assert_close(mixed, (weights * rows).sum(2).to(mixed.dtype), rtol=0, atol=1e-6)
        assert {*inputs} == {"inputs_embeds", "per_layer_inputs"}


def test_layers_read_it_in_training_and_replay(layered):
    """The first ratio of RL is 1, parallel soft SFT is sequential soft SFT, hard mixtures are
    tokens."""
    prompt = torch.tensor([[5, 11, 12, 13], [5, 6, 21, 22]])
    config = softar.SoftConfig(mixer="k-samples", top_k=None, max_new_tokens=5)
    out = softar.generate(layered, prompt, config=config, rng=seeded())
    soft, ones = Soft(out.record.ids, out.record.weights), torch.ones_like(out.record.token)
    logits = replay(layered, prompt, torch.ones_like(prompt), soft, ones)
    logp = k_samples_logp(logits, soft)
    assert_close(logp.sum(-1).float(), out.record.logp, rtol=0, atol=1e-4)

    mask = torch.zeros_like(out.sequences, dtype=torch.bool)
    mask[:, 4:7] = True
    modes = [
        soft_forward(
            layered,
            out.sequences,
            torch.ones_like(out.sequences),  # the pad token may be drawn
            mask,
            lambda x, gold: mk_proba_dist(x, top_k=3),
            mode=mode,
        )
        for mode in ("parallel", "sequential")
    ]
    assert_close(*modes, rtol=0, atol=1e-4)
    tokens = mixed_forward(layered, out.sequences, None, mask, hard(out.sequences))
    assert_close(tokens, layered(input_ids=out.sequences).logits, rtol=0, atol=1e-6)


def test_of_a_folder_with_images_and_sound_the_text_model_is_opened(tmp_path):
    """Gemma 3n as it is published: its whole needs timm, and takes no mixtures for its layers."""
    text = build("gemma3n_text")
    config = Gemma3nConfig(text_config=text.config.to_dict())
    config.architectures = ["Gemma3nForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    weights = {
        name.replace("model.", "model.language_model.", 1): value.clone()
        for name, value in text.state_dict().items()
        if name != "lm_head.weight"  # tied
    }
    parts = {f"model.{part}.x": torch.zeros(2) for part in TEXT_ALONE["gemma3n"]}
    save_file(weights | parts, tmp_path / "model.safetensors", {"format": "pt"})
    tokenizer_of().save_pretrained(tmp_path)
    model, _ = softar.load(tmp_path)
    ids = torch.tensor([[5, 11, 12]])
    assert_close(model(ids).logits, text(ids).logits, rtol=0, atol=1e-5)
    strange = {"model.strange.x": torch.zeros(2)}
    save_file(weights | parts | strange, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected keys 'model\.strange\.x' --"):
        softar.load(tmp_path)


@pytest.mark.parametrize("way", ["adapter", "0.21.2", "0.22.0"])
def test_virtual_tokens_that_peft_would_leave_out_are_refused(way, monkeypatch):
    model = with_lora(model_of())
    if way != "adapter":
        settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model = get_peft_model(model_of(), settings)
    monkeypatch.setattr(reading, "cache_name", lambda model: "cache")
    monkeypatch.setattr("importlib.metadata.version", lambda name: way)
    if way == "0.21.2":
        ids, mask = left_padded([[1, 11, 12]])
        beams = model, ids, mask, softar.SoftConfig(max_new_tokens=2)
        for start in (
            lambda: decode(model, [[1, 11, 12]]),
            lambda: soft_beam(*beams, SoftBeam(num_beams=2)),
            lambda: beam_collapse(*beams, BeamCollapse(num_beams=2)),
            lambda: BeamDecoder(model, tokenizer_of(), BeamOptions(2)),
        ):
            with counted(model) as calls, pytest.raises(ValueError, match=r"peft >= 0\.22"):
                start()
            assert not calls
    else:
        reading.check_virtual_tokens(model)


VIRTUAL = {
    "prompt": PromptTuningConfig,
    "prompt encoder": PromptEncoderConfig,
    "prefix": PrefixTuningConfig,
}


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("way", VIRTUAL)
def test_virtual_tokens_of_peft_are_read(way):
    """H, R, and the forward without cache; where PEFT does not see padding that is said."""
    settings = VIRTUAL[way](task_type="CAUSAL_LM", num_virtual_tokens=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(model_of(), settings).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.5)
    model.get_base_model().generation_config.eos_token_id = None
    rows = [[1, 11, 12], [1, 21, 22]]
    ids, mask = left_padded(rows)
    if IS_5_24 and Version(peft.__version__) < Version("0.22"):
        with pytest.raises(ValueError, match=r"loses its virtual tokens .*install peft >= 0\.22"):
            decode(model, rows)
        return
    greedy = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False
    )
    one, other = decode(model, rows, mixer="soft", top_k=1), decode(model, rows, mixer="hard")
    assert one.sequences.tolist() == other.sequences.tolist() == greedy.tolist()
    check_row_alone_is_row_in_batch(model, rows)
    soft = decode(model, rows, mixer="soft", top_k=5)
    fed = soft_inputs(model, Soft(soft.record.ids[:, :-1], soft.record.weights[:, :-1]))
    embeds = torch.cat([model.get_input_embeddings()(ids), fed["inputs_embeds"]], 1)
    logits = model(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2])).logits
    assert_close(entropy(logits[:, -STEPS:]), soft.record.entropy, **CLOSE)
    if way == "prefix":
        check_row_alone_is_row_in_batch(model, ROWS)
    else:
        with pytest.raises(ValueError, match="by PEFT does not see padding"):
            decode(model, ROWS)
