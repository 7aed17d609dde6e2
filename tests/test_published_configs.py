"""The configurations of published trainings: read, and carried out on models with real vocabularies
and one layer."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_diffusion_models import stock, words, write
from tiny import Largest
from torch.utils._pytree import tree_leaves
from transformers import ModernBertConfig, ModernBertForMaskedLM, Qwen2Tokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from softar.diffusion import DenoiseConfig, denoise
from softar.diffusion.head import HEAD_FILE, load_head
from softar.diffusion.models import load
from softar.diffusion.net import facts
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer

CONFIGS = Path(__file__).parent.parent / "recipes" / "configs"
NAMES = ("dream7b_softmask_dora", "llada8b_softmask_dora", "modernbert_sft")
every_soft = pytest.mark.parametrize("name", NAMES[:2])


def read(name, folder, *options):
    parser = TrlParser((ScriptArguments, DiffusionSFTConfig, ModelConfig))
    given = [
        "--config",
        str(CONFIGS / f"{name}.yaml"),
        "--output_dir",
        str(folder),
        "--report_to",
        "none",
        *options,
    ]
    return parser.parse_args_and_config(given)


# -- what they say


@every_soft
def test_soft_mask_training_as_published(name, tmp_path):
    """The numbers of arXiv:2510.17206's code part."""
    data, args, model = read(name, tmp_path)
    expected = dict(
        learning_rate=1e-5,
        head_learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        max_grad_norm=7.0,
        weight_decay=0.0,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        num_train_epochs=1,
        gradient_checkpointing=True,
        bf16=True,
        softmasking_prob=0.8,
        head_k=3,
        head_algorithm="top-k",
        head_scale=1e-6,
        head_centre=-0.75,
        time_low=0.2,
        time_high=0.8,
        noise="rate",
        noise_eps=1e-3,
        train_padding=True,
        max_length=2048,
        seed=1231,
    )
    assert {field: getattr(args, field) for field in expected} == expected
    assert args.head_steepness == pytest.approx(10 / 1.5)
    assert args.get_warmup_steps(1000) == 30
    lora = get_peft_config(model)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_dora) == (16, 16, 0.0, True)
    assert (
        lora.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
        and lora.modules_to_save is None
    )
    ids = {"dream7b": "Dream-org/Dream-v0-Instruct-7B", "llada8b": "GSAI-ML/LLaDA-8B-Instruct"}
    assert model.model_name_or_path == ids[name.split("_")[0]] and model.dtype == "bfloat16"
    assert data.dataset_name == "allenai/tulu-3-sft-mixture"


def test_variable_rates_of_modernbert(tmp_path):
    data, args, model = read("modernbert_sft", tmp_path)
    expected = dict(
        noise="share",
        time_low=0.15,
        time_high=0.99,
        normalise="masks",
        softmasking_prob=0.0,
        max_length=512,
        num_train_epochs=1,
        train_padding=False,
    )
    assert {field: getattr(args, field) for field in expected} == expected
    assert model.model_name_or_path == "answerdotai/ModernBERT-large" and not model.use_peft
    assert data.dataset_name == "allenai/tulu-3-sft-mixture"


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_how_to_run_it(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert (
        f"accelerate launch recipes/sft_diffusion.py --config recipes/configs/{name}.yaml" in text
    )
    assert text.startswith("#") and f"output_dir: runs/{name}\n" in text


def test_a_misspelt_field_is_found(tmp_path):
    text = (CONFIGS / f"{NAMES[0]}.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(text.replace("softmasking_prob:", "softmask_prob:"))
    with pytest.raises(ValueError, match="softmask_prob"):
        read(str(tmp_path / "wrong"), tmp_path)


# -- carried out

# vocabulary, mask, end of text, and the other special tokens that a chat is written with
PUBLISHED = {
    "dream7b_softmask_dora": (
        "Dream",
        152064,
        151666,
        151643,
        {"<|im_start|>": 151644, "<|im_end|>": 151645},
    ),
    "llada8b_softmask_dora": (
        "llada",
        126464,
        126336,
        126081,
        {
            "<|startoftext|>": 126080,
            "<|start_header_id|>": 126346,
            "<|end_header_id|>": 126347,
            "<|eot_id|>": 126348,
        },
    ),
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
)


def folder_of(name, folder):
    """A random model of one layer with the published vocabulary, in the original layout, and a
    tokenizer."""
    kind, size, mask, eos, chat = PUBLISHED[name]
    fields = dict(mask_token_id=mask, eos_token_id=eos, pad_token_id=eos)
    sizes = dict(vocab_size=size, num_hidden_layers=1, pad_token_id=eos, eos_token_id=eos)
    model = stock(kind, max_position_embeddings=128, **sizes)
    # a model that is sure of nothing shows hard masks, and its head has no gradient
    model.lm_head.weight.data *= 20
    write(folder, model, kind, **fields)
    specials = chat | {
        "<|endoftext|>": eos,
        "<|mask|>" if kind == "Dream" else "<|mdm_mask|>": mask,
    }
    vocab = [f"w{i}" for i in range(max(specials.values()) + 1)]
    if kind == "Dream":
        # bytes, as Qwen2's tokenizer writes them
        vocab[:0x100] = [chr(0x100 + i) for i in range(0x100)]
        vocab[0x100 : 0x100 + 94] = [chr(c) for c in range(33, 127)]
    for token, place in specials.items():
        vocab[place] = token
    if kind == "Dream":
        made = Qwen2Tokenizer(
            vocab={w: i for i, w in enumerate(vocab)},
            merges=[],
            unk_token=None,
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            additional_special_tokens=[*specials],
            chat_template=CHATML,
        )
    else:
        made = words(vocab, [*specials], bos_token="<|startoftext|>", eos_token="<|endoftext|>")
    made.save_pretrained(folder)
    return folder


def chats(rows=8):
    def turn(role, first, n):
        return {"role": role, "content": " ".join(f"w{first + i}" for i in range(n))}

    return Dataset.from_list(
        [
            {"messages": [turn("user", 7 * r, 3), turn("assistant", 50 * r, 2 + r)]}
            for r in range(rows)
        ]
    )


class Products(Largest):
    """Also the operations, other than looking up, that read the memory of `table`."""

    LOOK_UPS = {"aten.embedding", "aten.detach", "aten.view", "aten.alias", "aten.t", "aten.expand"}

    def __init__(self, table):
        super().__init__()
        self.place, self.found = table.untyped_storage().data_ptr(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        if any(t.untyped_storage().data_ptr() == self.place for t in tensors):
            self.found.add(str(func.overloadpacket))
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.rest
@every_soft
def test_two_steps_on_the_real_vocabulary(name, tmp_path):
    base = folder_of(name, tmp_path / "base")
    options = dict(
        bf16="false",
        max_steps=2,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm="true",
        eval_decode_rows=0,
        softmasking_prob=1.0,
    )
    out = tmp_path / "out"
    _, args, settings = read(
        name, out, *(x for k, v in options.items() for x in (f"--{k}", str(v)))
    )
    model, tokenizer = load(base)
    known = facts(model)
    assert (known.vocab_size, known.mask_id, known.eos_id) == PUBLISHED[name][1:4]
    table = model.get_input_embeddings().weight
    trainer = DiffusionSFTTrainer(
        model,
        args,
        train_dataset=chats(),
        processing_class=tokenizer,
        peft_config=get_peft_config(settings),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    raw = {name: p.detach().clone() for name, p in trainer.head.raw.items()}

    asked, passes, places = [], [], []
    plain = trainer.model.get_base_model()

    def note(module, args, kwargs):
        passes.append(torch.is_grad_enabled())
        places.append(kwargs["inputs_embeds"][..., 0].numel())

    hooks = [
        plain.lm_head.register_forward_pre_hook(
            lambda module, args: asked.append(args[0][..., 0].numel())
        ),
        plain.model.register_forward_pre_hook(note, with_kwargs=True),
    ]
    with Products(table) as products:
        trainer.train()
    for hook in hooks:
        hook.remove()

    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert len(losses) == 2 and all(0 < loss < float("inf") for loss in losses)
    assert passes == [False, True] * 2  # read twice, the first time without gradient
    # The table is only looked up in, and logits are made for masked positions only.
    assert products.found <= Products.LOOK_UPS and "aten.embedding" in products.found
    assert all(n < all_of_them for n, all_of_them in zip(asked, places, strict=True))
    assert products.numel == max(asked) * known.vocab_size

    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    for projection in ("q", "k", "v", "o"):
        for part in ("lora_B", "lora_magnitude_vector"):
            assert any(f".{projection}_proj.{part}" in n for n in moved), (projection, part)
    assert all("lora_" in n or "soft_mask_head" in n for n in moved)
    shifts = {n: (p - raw[n]).abs().item() for n, p in trainer.head.raw.items()}
    assert (
        all(shifts[n] > 0 for n in ("scale", "centre", "steepness")) and shifts["temperature"] == 0
    ), shifts
    assert torch.equal(table, before["base_model.model.model.embed_tokens.weight"])

    trainer.save_model()
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert adapter["use_dora"] and adapter["r"] == adapter["lora_alpha"] == 16
    assert adapter["base_model_name_or_path"] == str(base)
    head = json.loads((out / HEAD_FILE).read_text())
    assert set(head) == {
        "transparency_alg",
        "transparency_scale",
        "transparency_centre",
        "transparency_steepness",
        "mixinputs_k",
        "mixture_temp",
        "transparency_scheduling",
    }
    assert head["transparency_alg"] == "mixinputs_with_topk" and head["mixinputs_k"] == 3
    saved = load_file(out / "adapter_model.safetensors")
    assert (
        saved
        and all("lora_" in n for n in saved)
        and sum(t.numel() for t in saved.values()) < known.vocab_size
    )

    again, tokenizer = load(out)
    x = torch.tensor([[5, 6, known.mask_id, 7, known.mask_id]])
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(again(x).logits, trainer.model(x).logits)
    decoded = denoise(
        again, x, config=DenoiseConfig(gen_length=2, soften="soft-mask", soften_args=load_head(out))
    )
    assert not (decoded.sequences == known.mask_id).any()


def test_modernbert_gets_fresh_masks_each_step(tmp_path):
    pad, mask, cls, sep, size = 50283, 50284, 50281, 50282, 50368  # as published
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    config = ModernBertConfig(
        vocab_size=size,
        pad_token_id=pad,
        cls_token_id=cls,
        sep_token_id=sep,
        bos_token_id=cls,
        eos_token_id=sep,
        **sizes,
    )
    ModernBertForMaskedLM(config).save_pretrained(tmp_path / "base")
    vocab = [f"w{i}" for i in range(mask + 1)]
    specials = {"[CLS]": cls, "[SEP]": sep, "[PAD]": pad, "[MASK]": mask}
    for token, place in specials.items():
        vocab[place] = token
    words(
        vocab,
        [*specials],
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        eos_token="[SEP]",
    ).save_pretrained(tmp_path / "base")
    options = (
        "--bf16 false --max_steps 20 --gradient_accumulation_steps 1 "
        "--per_device_train_batch_size 2 --save_strategy no"
    )
    _, args, settings = read(
        "modernbert_sft", tmp_path / "out", *options.split(), "--eval_decode_rows", "0"
    )
    assert get_peft_config(settings) is None
    model, tokenizer = load(tmp_path / "base")
    prompt, answer = "w1 w2 [SEP] ", [f"w{i}" for i in range(100, 139)]
    train = Dataset.from_dict({"prompt": [prompt] * 2, "completion": [" ".join(answer)] * 2})
    trainer = DiffusionSFTTrainer(model, args, train_dataset=train, processing_class=tokenizer)
    seen = []
    with counted_ids(model.get_input_embeddings(), seen):
        trainer.train()
    masked = torch.cat(seen) == mask
    assert masked.shape == (40, 43) and not masked[:, :3].any()  # the 39 words and what ends them
    assert len({tuple(row) for row in masked.tolist()}) == 40
    share = masked.sum(1) / 40
    assert 0.125 <= share.min() < 0.3 and 0.85 < share.max() < 0.99


@contextlib.contextmanager
def counted_ids(embedding, seen):
    hook = embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    yield
    hook.remove()


def test_the_watch_on_products_sees_one():
    table = torch.nn.Embedding(50, 4)
    weights = torch.rand(3, 50)
    with Products(table.weight) as products:
        weights @ table.weight
    assert products.found == {"aten.mm"} and products.numel == 12
