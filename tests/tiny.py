"""Tiny random models and a tokenizer, built from configs alone: what the tests decode with. Nothing
is downloaded."""

import contextlib
import copy

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB, WIDTH = 64, 32
PAD, BOS, EOS, THINK, END = range(5)  # END is </think>
SIZES = dict(
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
    initializer_range=0.3,  # wide enough that greedy outputs vary
)
# tied and this wide, the Gemmas would repeat one token for ever
UNTIED = dict(tie_word_embeddings=False)
# The sliding windows are shorter than the sequences of the tests, so that sliding layers do slide.
CONFIGS = {
    "llama": lambda **kw: LlamaConfig(**kw),
    "qwen2": lambda **kw: Qwen2Config(**kw, tie_word_embeddings=True),
    "qwen3": lambda **kw: Qwen3Config(**kw, head_dim=8),
    "gemma": lambda **kw: GemmaConfig(**kw, head_dim=8),
    "gemma2": lambda **kw: Gemma2Config(
        **kw, head_dim=8, query_pre_attn_scalar=8, sliding_window=6, **UNTIED
    ),
    "gemma3": lambda **kw: Gemma3TextConfig(
        **kw,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        **UNTIED,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
ARCHS = tuple(CONFIGS)
# of a training: every step is logged, nothing shown or kept
QUIET = dict(logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True)


def model_of(arch="llama", seed=0, dtype=torch.float32, **changes):
    """A tiny random causal LM in eval mode; the same weights for the same arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CONFIGS[arch](**{"vocab_size": VOCAB, **SIZES, **changes})
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def with_lora(model, seed=1, **changes):
    """The model wrapped by PEFT, with adapters that really change it (B is not zero)."""
    settings = dict(
        r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, LoraConfig(**{**settings, **changes}))
        for name, p in wrapped.named_parameters():
            if any(
                part in name for part in ("lora_B", "lora_embedding_A", "trainable_tokens_delta")
            ):
                p.data.normal_(0, 0.3)
    return wrapped.eval()


def perturbed(model, seed=0, size=1e-5):
    """The model with each weight wrong by about `size` of itself: a hundred times what other
    kernels, a float64 run or another order of a batch make. Tests that compare two implementations
    over steps that feed back what they read take nets and lengths which survive this."""
    model, rng = copy.deepcopy(model), seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            p *= 1 + size * torch.randn(p.shape, generator=rng)
    return model


def tokenizer_of(vocab_size=VOCAB):
    """One word, one token: <pad> <bos> <eos> <think> </think> w5 w6 ... ; text is split at white
    space."""
    specials = ["<pad>", "<bos>", "<eos>", "<think>", "</think>"]
    words = specials + [f"w{i}" for i in range(len(specials), vocab_size)]
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def left_padded(rows):
    """Lists of ids -> input_ids and attention_mask [B, P], padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask


PROMPTS = ([BOS, 11, 12, 13, 14], [BOS, 21], [BOS, 31, 32])


class Forced(LogitsProcessor):
    """Forces script[row][step] (None: leave the row free). The raw logits stay the model's own."""

    def __init__(self, prompt_length, script):
        self.prompt_length, self.script = prompt_length, script

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_length
        out = scores.clone()
        for row, tokens in enumerate(self.script):
            if step < len(tokens) and tokens[step] is not None:
                out[row] = -torch.inf
                out[row, tokens[step]] = 0.0
        return out


@contextlib.contextmanager
def counted(model):
    """Collects the input shape [B, t] of every forward of a (possibly wrapped) model."""
    calls = []

    def note(module, args, kwargs):
        x = kwargs.get("inputs_embeds")
        x = kwargs.get("input_ids", args[0] if args else None) if x is None else x
        calls.append(tuple(x.shape[:2]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


class Largest(TorchDispatchMode):
    """The most elements that any operation wrote anew (views of what was there do not count)."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        before = {t.untyped_storage().data_ptr() for t in tensors}
        for t in tree_leaves(out):
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in before:
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def chi_square(counts, probs):
    """Chance of counts at least this far from n draws with these probabilities; rare outcomes taken
    together."""
    counts, probs = counts.double(), probs.double()
    assert counts[probs == 0].sum() == 0
    expected = counts.sum() * probs
    rare = expected < 8
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(
        torch.tensor((len(counts) - 1) / 2).double(), statistic / 2
    ).item()


@contextlib.contextmanager
def edited_logits(model, edit):
    """Replaces the logits of the last position, [B, V], by edit(step, logits); step 0 is the
    prompt's forward."""
    steps = []

    def replace(module, args, output):
        output.logits = output.logits.clone()
        output.logits[:, -1] = edit(len(steps), output.logits[:, -1])
        steps.append(None)
        return output

    handle = model.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
