"""Ways in which a folder of a model can be damaged: each a function of the folder, by name.

After any of them a loader either gives the model with the same logits or raises a ValueError of one
line that names the folder. Those of WEIGHTS take the folder's tensors out of tune with its
config.json: there the line names tensors.

    for name, damage in (FILES | WEIGHTS).items():
        shutil.copytree(whole, folder := tmp_path / name)
        damage(folder)
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def edit(file: str, **fields):
    """Fields of a JSON file set anew."""

    def damage(folder: Path):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | fields))

    return damage


def write(file: str, content: str | bytes):
    def damage(folder: Path):
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def cut(size: int):
    """The weights' file ends there."""

    def damage(folder: Path):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])

    return damage


def loop(file: str):
    """A link to itself."""

    def damage(folder: Path):
        (folder / file).unlink()
        (folder / file).symlink_to(folder / file)

    return damage


def become_folder(file: str):
    def damage(folder: Path):
        (folder / file).unlink()
        (folder / file).mkdir()

    return damage


def tensors(change):
    """The weights' file holds what `change` makes of its tensors."""

    def damage(folder: Path):
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return damage


def without(place: int):
    """One tensor fewer, the n-th by its name."""
    return tensors(lambda state: {k: state[k] for k in sorted(state) if k != sorted(state)[place]})


def layers(more: int):
    """So many more than are stored, by what the configuration calls them."""

    def damage(folder: Path):
        settings = json.loads((folder / "config.json").read_text())
        name = next(name for name in ("num_hidden_layers", "n_layers") if name in settings)
        edit("config.json", **{name: settings[name] + more})(folder)

    return damage


def only_pickled(folder: Path):
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()


def index(content: str):
    """An index of shards in place of the one file."""

    def damage(folder: Path):
        (folder / "model.safetensors").rename(folder / "away.safetensors")
        (folder / "model.safetensors.index.json").write_text(content)

    return damage


def adapter(settings: str):
    """A folder that calls itself an adapter as well."""

    def damage(folder: Path):
        text = settings.replace("FOLDER", str(folder))
        (folder / "adapter_config.json").write_text(text)
        shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")

    return damage


def remote_code(folder: Path):
    edit("config.json", auto_map={"AutoModelForCausalLM": "code.Model"}, model_type="other")(folder)
    (folder / "code.py").write_text("raise SystemExit('this ran')")


TEXTS = {
    "empty": "",
    "open": "{",
    "null": "null",
    "list": "[]",
    "number": "3",
    "binary": b"\xff\xfe\x00\x80",
    "deep": "[" * 100_000,
}
FIELDS = {
    "model_type": [5, ["llama"], "../../etc", None, {}],
    "architectures": ["x", [3], 5],
    "hidden_size": ["x", -3, 0, 2.5, None],
    "num_attention_heads": [0, 5, -2],
    "num_key_value_heads": [0, 3],
    "num_hidden_layers": [-1, "2"],
    "vocab_size": [-1, "x"],
    "rope_parameters": [{"rope_type": "zzz"}, "zzz"],
    "eos_token_id": ["x", {}],
    "pad_token_id": [10**9, "x"],
    "dtype": ["float3", 7],
    "hidden_act": ["zzz", 3],
    "quantization_config": [{"quant_method": "zzz"}, "zzz"],
    "rms_norm_eps": ["x"],
    "tie_word_embeddings": ["x"],
}
FILES = {
    **{f"config {name}": write("config.json", text) for name, text in TEXTS.items()},
    **{
        f"{field}={value!r}": edit("config.json", **{field: value})
        for field, values in FIELDS.items()
        for value in values
    },
    **{
        f"{file} {name}": write(f"{file}.json", TEXTS[name])
        for file in ("tokenizer", "tokenizer_config", "generation_config", "adapter_config")
        for name in ("open", "null", "list", "binary", "deep")
    },
    "generation eos": write("generation_config.json", '{"eos_token_id": "x"}'),
    "generation temperature": write(
        "generation_config.json", '{"temperature": -1, "do_sample": true}'
    ),
    "no tokenizer": lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "weights empty": cut(0),
    "weights of 4 bytes": cut(4),
    "weights half": cut(5000),
    "weights but the last byte": cut(-1),
    "weights junk": write("model.safetensors", b"\xff" * 8 + b"{}"),
    "only pickled": only_pickled,
    **{f"{file} is a loop": loop(file) for file in ("config.json", "model.safetensors")},
    **{f"{file} is a folder": become_folder(file) for file in ("config.json", "model.safetensors")},
    "index open": index("{"),
    "index to nothing": index('{"metadata": {}, "weight_map": {"a": "none.safetensors"}}'),
    "index null": index("null"),
    "remote code": remote_code,
    "adapter of nothing": adapter("{}"),
    "adapter of itself": adapter('{"peft_type": "LORA", "base_model_name_or_path": "FOLDER"}'),
    "adapter junk": adapter('{"peft_type": "ZZZ", "base_model_name_or_path": "mnns-tiny"}'),
    "adapter of others": adapter(
        '{"peft_type": "LORA", "base_model_name_or_path": "mnns-tiny", "target_modules": ["q_proj"]}'
    ),
}
WEIGHTS = {
    "renamed": tensors(lambda state: {f"{name}.x": value for name, value in state.items()}),
    "prefixed": tensors(lambda state: {f"other.{name}": value for name, value in state.items()}),
    **{f"without tensor {place}": without(place) for place in range(-3, 6)},
    "other shapes": tensors(lambda state: {k: v[..., :-1].clone() for k, v in state.items()}),
    "one layer fewer": layers(-1),
    "one layer more": layers(1),
    "other vocabulary": edit("config.json", vocab_size=70),
}
