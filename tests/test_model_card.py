"""The README.md of a trained folder: what it says follows the run."""

import dataclasses
import re
import shlex
from types import SimpleNamespace

import pytest
import yaml
from datasets import Dataset
from peft import LoraConfig
from trl import SFTTrainer

import softar
from softar.cli.app import main
from softar.config import CONFIG_FILE, STEP_TEMPERATURE_FILE, SoftConfig
from softar.diffusion.head import HEAD_FILE
from softar.diffusion.models import load
from softar.diffusion.noise import NOISE_FILE
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer
from softar.model_card import (
    PROMPT,
    Origin,
    changes_of,
    command_of,
    decode_command,
    example_of,
    rows_of,
)
from softar.sft.config import SoftSFTConfig
from softar.sft.trainer import SoftSFTTrainer
from softar.tasks import load_task

TASK = load_task("mnns", size=8)


def read(folder):
    """The front matter, and the rows of the table."""
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    for foreign in ("time machine", "pipeline", "Model Card for", "More Information Needed"):
        assert foreign not in text
    return yaml.safe_load(front), dict(re.findall(r"^\| (.+?) \| (.+) \|$", body, re.MULTILINE))


def settings(folder, cls, **changes):
    common = dict(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=1,
        disable_tqdm=True,
        report_to="none",
    )
    return cls(**common | changes)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_card_of_a_soft_model_follows_the_run(tmp_path, adapter, capsys):
    model, tokenizer = softar.load("mnns-tiny")
    args = settings(tmp_path / "mine", SoftSFTConfig, think_steps=3, soft_top_k=5, seed=7)
    trainer = SoftSFTTrainer(
        model,
        args,
        train_dataset=TASK.train,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if adapter else None,
    )
    trainer.origin = example_of(TASK, tokenizer)
    trainer.train()
    trainer.save_model()
    for folder, step in ((tmp_path / "mine", 2), (tmp_path / "mine" / "checkpoint-1", 1)):
        front, facts = read(folder)
        assert front["library_name"] == ("peft" if adapter else "transformers")
        assert "softar" in front["tags"] and "base_model" not in front  # mnns-tiny is no hub id
        assert facts["trained from"] == "mnns-tiny" and facts["data"] == "mnns, 8 rows"
        assert ("adapter" in facts["what was trained"]) == adapter
        assert f"SoftSFT, step {step} of 2, 4 rows a step" in facts["by"]
        assert facts["learning rate, seed"] == "2e-05, 7" and float(facts["loss"]) > 0
        text = (folder / "README.md").read_text()
        assert str(changes_of(SoftConfig.load(folder))).replace("'", '"') in text
        assert '"top_k": 5, "max_new_tokens": 5, "budget": 3' in text
    command = shlex.split(command_of(tmp_path / "mine"))
    assert command == ["softar", "generate", TASK.test["prompt"][0], "-m", str(tmp_path / "mine")]
    with pytest.raises(SystemExit) as end:
        main(command[1:])
    assert end.value.code == 0 and capsys.readouterr().out.strip()


@pytest.mark.parametrize("kind", ["soft", "diffusion"])
def test_the_card_is_of_the_step_whose_weights_are_saved(tmp_path, kind):
    """With load_best_model_at_end those are of another step than the last; checkpoints have their own."""
    cls, trainer_of, model, metric = {
        "soft": (SoftSFTConfig, SoftSFTTrainer, softar.load("mnns-tiny"), "eval_gold_loss"),
        "diffusion": (DiffusionSFTConfig, DiffusionSFTTrainer, load("mnns-diffusion-tiny"), "loss"),
    }[kind]
    best = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_steps=1)
    # asked so, the first step is the best: untrained nets learn
    best |= dict(metric_for_best_model=metric, greater_is_better=True)
    how = dict(think_steps=3, alpha_start=0.0, alpha_schedule="constant") if kind == "soft" else {}
    args = settings(tmp_path, cls, max_steps=3, learning_rate=1e-3, **best, **how)
    trainer = trainer_of(
        *(model[0], args),
        train_dataset=TASK.train,
        eval_dataset=TASK.test.select(range(8)),
        processing_class=model[1],
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    step = trainer.state.best_global_step
    assert step < 3
    logged = {e["step"]: e["eval_loss"] for e in trainer.state.log_history[:-1] if "eval_loss" in e}
    for folder, of, told in (
        (tmp_path, step, f"step {step} of 3 (the best by {args.metric_for_best_model})"),
        (tmp_path / "checkpoint-3", 3, "step 3 of 3, "),
    ):
        facts = read(folder)[1]
        assert told in facts["by"] and facts["eval_loss"] == f"{logged[of]:.4g}"


def test_rows_are_counted_before_they_are_packed(tmp_path):
    model, tokenizer = softar.load("mnns-tiny")
    args = settings(tmp_path, SoftSFTConfig, think_steps=3, packing=True, max_length=40)
    trainer = SoftSFTTrainer(model, args, train_dataset=TASK.train, processing_class=tokenizer)
    assert rows_of(trainer) == f"{len(trainer.train_dataset)} packed rows" != "8 packed rows"
    trainer.origin = example_of(TASK, tokenizer)
    assert rows_of(trainer) == "8 rows, packed"


def test_a_template_is_shown_with_its_holes(tmp_path):
    task = load_task("latin", size=4)
    model, tokenizer = load("latin-diffusion-tiny", seed=0)
    args = settings(tmp_path, DiffusionSFTConfig, max_steps=1)
    trainer = DiffusionSFTTrainer(model, args, train_dataset=task.train, processing_class=tokenizer)
    trainer.origin = example_of(task, tokenizer)
    words = shlex.split(trainer.card_command("a folder"))
    assert words[:2] == ["softar", "fill"] and words[3:] == ["-m", "a folder"]
    template = task.test["template"][0]
    assert words[2].replace("_", "<mask>") == template and template.endswith(" <eos>")
    # that of own rows may lack the end that training puts behind what it reads
    for own, shown in (("<mask> 1", "_ 1 <eos>"), ("1 <mask>", "1 _"), ("<mask> <eos>", "_ <eos>")):
        trainer.origin = dataclasses.replace(trainer.origin, prompt=f"<bos> <mask> {own}")
        assert shlex.split(trainer.card_command("a folder"))[2] == f"<bos> _ {shown}"


@pytest.mark.parametrize("soft", [False, True])
def test_the_card_of_a_diffusion_model_follows_the_run(tmp_path, soft, capsys):
    model, tokenizer = load("mnns-diffusion-tiny", seed=0)
    args = settings(
        tmp_path / "mine", DiffusionSFTConfig, max_steps=1, softmasking_prob=0.5 if soft else 0.0
    )
    trainer = DiffusionSFTTrainer(model, args, train_dataset=TASK.train, processing_class=tokenizer)
    trainer.origin = example_of(TASK, tokenizer)
    trainer.train()
    trainer.save_model()
    _, facts = read(tmp_path / "mine")
    text = (tmp_path / "mine" / "README.md").read_text()
    assert (HEAD_FILE in text) == soft == (tmp_path / "mine" / HEAD_FILE).is_file()
    assert "DiffusionSFT" in facts["by"]
    command = shlex.split(command_of(tmp_path / "mine"))
    assert command[:2] == ["softar", "fill"] and command[-2:] == ["--gen-length", "5"]
    with pytest.raises(SystemExit) as end:
        main(command[1:])
    assert end.value.code == 0 and capsys.readouterr().out.strip()


def test_the_example_is_a_prompt_that_stands_on_a_line():
    tokenizer = softar.load("mnns-tiny")[1]
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    for row, prompt in (
        ({"prompt": "it's <bos>"}, "it's <bos>"),
        ({"prompt": chat, "completion": [{"role": "assistant", "content": "So."}]}, "Why?"),
        ({"prompt": "two\nlines"}, PROMPT),
        ({"prompt": "long " * 99}, PROMPT),
        ({"text": "no prompt at all"}, PROMPT),
    ):
        task = SimpleNamespace(name="mine", train=Dataset.from_list([row]), test=None)
        origin = example_of(task, tokenizer)
        assert (origin.data, origin.prompt) == ("mine", prompt)
        command = decode_command("generate", "a folder", origin)
        assert shlex.split(command) == ["softar", "generate", prompt, "-m", "a folder"]
    stream = SimpleNamespace(name="s", train=TASK.train.to_iterable_dataset(), test=None)
    assert example_of(stream, tokenizer) == Origin("s", TASK.train[0]["prompt"], 5)


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}"])
@pytest.mark.parametrize("tool", ["generate", "fill"])
@pytest.mark.parametrize(
    ("row", "is_chat"),
    [
        ({"prompt": "Why?", "completion": "S0"}, False),
        ({"text": "Why? So."}, False),
        ({"prompt": [{"role": "user", "content": "Why?"}]}, True),
        ({"messages": [{"role": "user", "content": "Why?"}]}, True),
    ],
)
def test_the_command_gives_the_model_prompts_as_it_was_trained_on(row, is_chat, tool, template):
    tokenizer = softar.load("mnns-tiny")[1]
    tokenizer.chat_template = template
    task = SimpleNamespace(name="mine", train=Dataset.from_list([row]), test=None)
    options = shlex.split(decode_command(tool, "a folder", example_of(task, tokenizer)))[5:]
    by_default = template is not None and tool == "generate"
    assert options in ([], ["--chat"], ["--no-chat"])
    assert (options != ["--no-chat"] and (by_default or options == ["--chat"])) == (
        is_chat and template is not None
    )
    assert template is not None or not options


def squared(dist, *, rng=None, power=1):
    weights = dist.weights**power
    weights = weights / weights.sum(-1, keepdim=True)
    return softar.Mixed(softar.Soft(dist.ids, weights), dist.ids[..., 0], None)


def test_the_command_names_a_mixer_of_ones_own(tmp_path, monkeypatch, capsys):
    """In a new process nobody has named it, and a file may not say what is run."""
    model, tokenizer = softar.load("mnns-tiny")
    mixer = f"{__name__}:squared"
    own = dict(soft_mixer=mixer, soft_mixer_args={"power": 2}, think_steps=3, soft_top_k=5)
    args = settings(tmp_path / "mine", SoftSFTConfig, **own)
    trainer = SoftSFTTrainer(model, args, train_dataset=TASK.train, processing_class=tokenizer)
    trainer.origin = example_of(TASK, tokenizer)
    trainer.save_model()
    monkeypatch.setattr("softar.names.NAMED", set())
    assert "follows it" not in (card := (tmp_path / "mine" / "README.md").read_text())
    assert "a folder's is not run unasked" in card
    command = shlex.split(command_of(tmp_path / "mine"))
    with pytest.raises(SystemExit) as end:
        main([*command[1:], "--max-new-tokens", "5"])
    assert end.value.code == 0 and "(3 soft)" in capsys.readouterr().err
    folder = str(tmp_path / "mine")
    decoder = softar.make_decoder(command[-1], model=folder, max_new_tokens=args.eval_new_tokens)
    assert decoder.config == trainer.decoding()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "end"])
@pytest.mark.parametrize(
    ("kind", "config", "names"),
    [
        (SoftSFTTrainer, SoftSFTConfig, {CONFIG_FILE, STEP_TEMPERATURE_FILE}),
        (DiffusionSFTTrainer, DiffusionSFTConfig, {HEAD_FILE, NOISE_FILE}),
        (DiffusionSFTTrainer, DiffusionSFTConfig, {NOISE_FILE}),
    ],
)
def test_a_push_takes_what_says_how_it_is_decoded(
    tmp_path, monkeypatch, strategy, kind, config, names
):
    """In place of what a training before has left."""
    pushed = []
    monkeypatch.setattr(
        SFTTrainer,
        "_push_from_checkpoint",
        lambda self, folder: pushed.append({p.name for p in tmp_path.iterdir() if p.is_file()}),
    )
    trainer = object.__new__(kind)
    trainer.args = config(str(tmp_path), hub_strategy=strategy)
    trainer.push_in_progress = None
    file = CONFIG_FILE if kind is SoftSFTTrainer else None
    monkeypatch.setattr(kind, "is_world_process_zero", lambda self: True)
    monkeypatch.setattr(kind, "card_config", lambda self: (file, {}))
    old = {HEAD_FILE} if kind is DiffusionSFTTrainer else set()
    for name in old:
        (tmp_path / name).write_text("old")
    (tmp_path / "checkpoint-1").mkdir()
    for name in names:
        (tmp_path / "checkpoint-1" / name).write_text("")
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert pushed == [old if strategy == "end" else names]
