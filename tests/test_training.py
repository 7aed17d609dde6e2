"""What all trainers share: they stop at NaN, sum their losses over resumes and know a damaged
checkpoint."""

import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import test_rl_diffusion as rl_diffusion
import test_rl_trainers as rl
import test_sft as sft
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file

from softar.checks import one_line_errors
from softar.diffusion.sft import DiffusionSFTTrainer
from softar.diffusion.sft_config import DiffusionSFTConfig
from softar.models.adapter import wrap
from softar.recipe import fit
from softar.resume import changes, checkpoint_of, damage, last_checkpoint, last_whole
from softar.rl.config import SoftGRPOConfig, SoftRLOOConfig
from softar.rl.diffusion_config import DiffusionRLOOConfig
from softar.sft.config import SoftSFTConfig
from softar.training import LOSSES

SAVING = dict(save_strategy="steps", save_steps=1, max_steps=4, gradient_accumulation_steps=2)
KINDS = {
    "sft": lambda folder, **kw: sft.trainer_of(folder, **kw),
    "grpo": lambda folder, **kw: rl.trainer(folder, "grpo", **kw),
    "rloo": lambda folder, **kw: rl.trainer(folder, "rloo", **kw),
    "ppo": lambda folder, **kw: rl.trainer(folder, "ppo", **kw),
}


def poison(trainer, step, loss=1.0, gradient=1.0):
    """Multiply loss or gradients of the second micro-batch of this step."""
    compute, calls = trainer.compute_loss, []

    def poisoned(*args, **kwargs):
        calls.append(None)
        value = compute(*args, **kwargs)
        if len(calls) == 2 * step:
            value = value * loss
            value.register_hook(lambda grad: grad * gradient)
        return value

    trainer.compute_loss = poisoned
    return trainer


@pytest.mark.parametrize(
    "factor", [dict(loss=math.nan), dict(loss=math.inf), dict(gradient=math.nan)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_training_stops_before_a_bad_loss_reaches_the_weights(tmp_path, kind, factor):
    trainer = poison(KINDS[kind](tmp_path, **SAVING), 3, **factor)
    with pytest.raises(
        FloatingPointError, match=r"^step 3: the loss is .*checkpoint-2' is the last"
    ):
        trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    held = dict(trainer.model.named_parameters())
    assert all(torch.equal(held[name], value) for name, value in saved.items() if name in held)


def test_too_large_a_learning_rate_names_the_step_of_the_rollout(tmp_path):
    options = dict(max_steps=4, learning_rate=1e30, max_grad_norm=0.0, optim="sgd")
    with pytest.raises(FloatingPointError, match=r"^step \d: .*there is no checkpoint yet"):
        rl.trainer(tmp_path, **options).train()


@pytest.mark.parametrize(("scale", "stops"), [(65536.0, False), (1.0, True)])
def test_gradients_of_float16_may_overflow_while_the_scale_comes_down(tmp_path, scale, stops):
    trainer = poison(sft.trainer_of(tmp_path, **SAVING), 3, gradient=math.inf)
    trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda: scale)
    trainer._step_loss, calm = 1.0, torch.tensor(math.inf)
    check = trainer._get_grad_norm
    if not stops:
        assert check(trainer.model, calm) == math.inf
        return
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is 1 and the norm .* inf"):
        check(trainer.model, calm)


def test_the_filter_of_transformers_is_off_and_stays_off(tmp_path):
    assert not sft.config_of(tmp_path).logging_nan_inf_filter
    for make in (sft.config_of, rl.config):
        with pytest.raises(ValueError, match="logging_nan_inf_filter=True hides NaN"):
            make(tmp_path, logging_nan_inf_filter=True)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_train_loss_is_of_all_steps_whenever_it_was_resumed(tmp_path, kind):
    """Losses that were not logged yet when the checkpoint was written count too."""
    options = dict(save_strategy="steps", save_steps=3, logging_steps=2, max_steps=5)
    unbroken = KINDS[kind](tmp_path / "a", **options)
    whole = unbroken.train().training_loss
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    resumed = KINDS[kind](tmp_path / "b", **options)
    assert resumed.train(resume_from_checkpoint=True).training_loss == pytest.approx(
        whole, rel=1e-6
    )
    logs = [e["loss"] for e in unbroken.state.log_history if "loss" in e]
    assert min(logs) < whole < max(logs)
    assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(whole, rel=1e-6)


def test_seconds_are_of_the_whole_training_whenever_it_was_resumed(tmp_path, monkeypatch):
    """Unknown where the checkpoint was written by a version that did not keep them."""
    options = dict(save_strategy="steps", save_steps=2, max_steps=2)
    first = sft.trainer_of(tmp_path, **options)
    fit(first, first.args, "x")
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    content = json.loads(state.read_text())
    kept = content["stateful_callbacks"][LOSSES]
    assert 0 < kept["seconds"] < 60
    for seconds in (1000.0, None):
        kept["seconds"] = seconds
        state.write_text(json.dumps(content))
        again = sft.trainer_of(tmp_path, **options | dict(max_steps=4))
        again.args.resume_from_checkpoint = str(tmp_path / "checkpoint-2")
        found = fit(again, again.args, "x")
        assert found is None if seconds is None else 1000 < found < 1060
        later = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
        passed_on = later["stateful_callbacks"][LOSSES]["seconds"]
        assert passed_on is None if seconds is None else 1000 < passed_on <= found
    del kept["seconds"]
    state.write_text(json.dumps(content))
    assert fit(again, again.args, "x") is None


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    sft.trained(folder, **SAVING | dict(max_steps=2), **sft.ADAM)
    return folder


OTHERS = {
    "nothing": ({}, None),
    "length": (dict(max_steps=3), "max_steps=3, not 2 (schedules go on as if it had been so"),
    "rows": (
        dict(per_device_train_batch_size=2, lr_scheduler_type="linear"),
        "lr_scheduler_type='linear', not 'constant' (schedules go on as if it had been so from the start); "
        "per_device_train_batch_size=2, not 4 (of this epoch some rows come twice",
    ),
    "epochs": (dict(num_train_epochs=9), None),  # max_steps counts
    "cut": (dict(max_length=7), "max_length=7, not 1024 (rows are made so from here on, and the"),
    "packed": (
        dict(max_length=20, packing=True),
        "max_length=20, not 1024, packing=True, not False (rows are made so",
    ),
    "clipped": (dict(max_grad_norm=0.5), "max_grad_norm=0.5, not 1.0 (from here on)"),
    "order": (
        dict(train_sampling_strategy="sequential"),
        "train_sampling_strategy='sequential', not 'random' (of this epoch some rows come twice",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_going_on_with_other_arguments_says_what_becomes_different(
    tmp_path, two_checkpoints, capsys, name
):
    others, says = OTHERS[name]
    made = sft.trainer_of(tmp_path, **SAVING | dict(max_steps=2) | sft.ADAM | others)
    checkpoint = two_checkpoints / "checkpoint-1"
    found = changes(checkpoint, made.args)
    if says is None:
        assert found is None
    else:
        assert found.startswith(f"goes on from {checkpoint} with ") and says in found
    made.train(resume_from_checkpoint=str(checkpoint))
    assert ("goes on from" in capsys.readouterr().out) == (says is not None)


def test_what_a_checkpoints_optimiser_has_of_its_own_is_not_given_anew(tmp_path, two_checkpoints):
    """It would do nothing: transformers loads the rate with the optimiser and the schedule."""
    checkpoint, how = two_checkpoints / "checkpoint-1", SAVING | dict(max_steps=2) | sft.ADAM
    for others in (
        *(dict(optim="sgd"), dict(optim_args="amsgrad=True")),
        *(dict(learning_rate=0.5), dict(weight_decay=0.5), dict(adam_beta2=0.5)),
    ):
        ((name, value),) = others.items()
        made = sft.trainer_of(tmp_path, **how | others)
        says = f"{name}={value!r} does nothing, as .*checkpoint-1' goes on with its optimiser's"
        with pytest.raises(ValueError, match=says):
            made.train(resume_from_checkpoint=str(checkpoint))
        made.args.output_dir, made.args.resume_from_checkpoint = str(two_checkpoints), "true"
        with pytest.raises(ValueError, match=says.replace("-1", "-2")):
            checkpoint_of(made.args)  # in a recipe, before a model is opened
    shutil.copytree(checkpoint, tmp_path / "weights")
    for file in ("optimizer.pt", "scheduler.pt"):  # as with save_only_model
        (tmp_path / "weights" / file).unlink()
    says = (
        "with adam_beta2=0.5, not 0.999 (the checkpoint has no optimiser, so that it begins anew)"
    )
    assert changes(tmp_path / "weights", made.args) == f"goes on from {tmp_path / 'weights'} {says}"
    (tmp_path / "weights" / "trainer_state.json").unlink()
    assert changes(tmp_path / "weights", made.args) is None


def test_arguments_say_what_to_go_on_from(tmp_path):
    how = dict(save_strategy="steps", save_steps=2, max_steps=4, resume_from_checkpoint="true")
    first = sft.trained(tmp_path, **how)
    assert [entry["step"] for entry in first.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    again = sft.trainer_of(tmp_path, **how | dict(max_steps=6))
    seen, step = [], again.training_step
    again.training_step = lambda *args: seen.append(again.state.global_step) or step(*args)
    again.train()
    assert seen == [4, 5]
    again.train(resume_from_checkpoint=False)
    assert seen[2:] == [*range(6)]


HARM = {
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "a byte short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "junk": lambda file: file.write_bytes(b"\0\xff" * 50),
}
FILES = ["model.safetensors", "optimizer.pt", "trainer_state.json", "scheduler.pt", "rng_state.pth"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_names_itself_and_the_whole_one_before(
    tmp_path, two_checkpoints, file, harm
):
    if (file, harm) == ("trainer_state.json", "a byte short"):
        return  # its last byte is a line's end
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    assert damage(tmp_path / "checkpoint-2") is None
    HARM[harm](tmp_path / "checkpoint-2" / file)
    how = dict(resume_from_checkpoint="true", max_steps=2)
    training = SimpleNamespace(output_dir=str(tmp_path), **how)
    says = rf"checkpoint-2' is damaged: {file} .*checkpoint-1' is whole.*='whole'"
    with pytest.raises(ValueError, match=says):
        checkpoint_of(training)
    training.resume_from_checkpoint = "whole"
    before = str(tmp_path / "checkpoint-1")
    assert checkpoint_of(training) == last_whole(tmp_path) == before


def test_trainers_refuse_a_damaged_checkpoint_in_one_line(tmp_path, two_checkpoints):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    for name in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / name / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is damaged: it holds no weights; there is no other"):
        sft.trainer_of(tmp_path, **SAVING).train(resume_from_checkpoint=True)


def test_a_training_that_stopped_is_one_line_of_the_recipe(capsys):
    with pytest.raises(SystemExit) as end, one_line_errors("some.py", FloatingPointError, code=1):
        raise FloatingPointError("step 3: the loss is nan")
    assert (
        end.value.code == 1
        and capsys.readouterr().err == "some.py: error: step 3: the loss is nan\n"
    )


@pytest.mark.parametrize("config", [SoftSFTConfig, DiffusionSFTConfig, SoftGRPOConfig])
@pytest.mark.parametrize(
    "option", [dict(torch_compile=True), dict(torch_compile_backend="eager")], ids=str
)
def test_options_that_compile_the_parts_of_a_trainer_are_refused(tmp_path, config, option):
    name = next(iter(option))
    with pytest.raises(ValueError, match=rf"{name}=.* model.forward = torch.compile\(model.forw"):
        config(str(tmp_path), **option)
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ


def test_a_model_whose_forward_is_compiled_trains_as_any_other(tmp_path):
    torch._dynamo.reset()
    graphs, calls = [], []

    def backend(graph, examples):
        graphs.append(graph)
        return lambda *inputs: calls.append(None) or graph.forward(*inputs)

    plain, compiled = (tiny.model_of(num_hidden_layers=1, initializer_range=0.1) for _ in range(2))
    forward, forwards = plain.forward, []
    plain.forward = lambda *args, **kwargs: forwards.append(None) or forward(*args, **kwargs)
    compiled.forward = torch.compile(compiled.forward, backend=backend)
    options = dict(max_steps=2, save_strategy="no")
    losses = []
    for i, model in enumerate((plain, compiled)):
        trainer = sft.trainer_of(tmp_path / str(i), model=model, **options)
        trainer.train()
        losses.append(rl.logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert 0 < len(graphs) < len(calls) <= len(forwards)


# -- what is trained


def masked_sft(folder, model, **options):
    args = DiffusionSFTConfig(str(folder), **tiny.QUIET | options)
    rows = Dataset.from_list([{"prompt": "w5 w6", "completion": " w7 w8"}] * 4)
    tokenizer = tiny.tokenizer_of(rl_diffusion.VOCAB)
    return DiffusionSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)


def of_masks(kind):
    return lambda folder, model, **kw: rl_diffusion.trainer(folder, kind, model=model, **kw)


MASKED = {
    "masked sft": masked_sft,
    "masked grpo": of_masks("grpo"),
    "masked rloo": of_masks("rloo"),
}
ALL_KINDS = KINDS | MASKED


def bare(kind):
    return rl_diffusion.net() if kind in MASKED else tiny.model_of()


@pytest.mark.parametrize("options", [{}, dict(learn_temperature=True), dict(beta=0.1)])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_saved_adapter_is_trained_on(tmp_path, kind, options):
    """It comes frozen from PEFT: some trainers ended in autograd's error, PPO and learnt filters changed
    nothing of it without a word."""
    of_sft = "sft" in kind
    if ("beta" in options and of_sft) or ("learn_temperature" in options and kind != "sft"):
        pytest.skip("no such option")
    tiny.with_lora(bare(kind)).save_pretrained(tmp_path / "adapter")
    model = wrap(bare(kind), tmp_path / "adapter")
    assert not any(p.requires_grad for p in model.parameters())
    made = ALL_KINDS[kind](tmp_path, model=model, max_steps=2, save_strategy="no", **options)
    before = rl.weights(made.model)
    made.train()
    moved = {name for name, p in made.model.named_parameters() if not p.equal(before[name])}
    lora = {name for name in before if "lora_" in name and ".default." in name}
    more = {name for name in before if "v_head" in name or "soft_log_temperature" in name}
    assert moved - more and moved <= lora | more


def test_what_of_an_adapter_is_set_by_hand_stays(tmp_path):
    tiny.with_lora(tiny.model_of()).save_pretrained(tmp_path)
    model = wrap(tiny.model_of(), tmp_path)
    some = [name for name, _ in model.named_parameters() if "layers.0" in name and "lora_B" in name]
    for name in some:
        model.get_parameter(name).requires_grad_(True)
    sft.trainer_of(tmp_path / "run", model=model)
    assert some == [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path, kind):
    frozen = bare(kind).requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter .*requires_grad.*train nothing"):
        ALL_KINDS[kind](tmp_path, model=frozen, max_steps=1)


@pytest.mark.parametrize("make", [SoftRLOOConfig, DiffusionRLOOConfig])
def test_an_evaluation_of_rloo_compares_answers(tmp_path, make):
    """One answer to a prompt ended the training at its first evaluation."""
    folder, few = str(tmp_path), dict(num_generations=2, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="num_generations_eval=1 must be at least 2"):
        make(folder, **few, num_generations_eval=1)
    make(folder, **few, num_generations_eval=2)
    SoftGRPOConfig(folder, **few, num_generations_eval=1)


def left_on(model):
    """What a training could leave on a model: names of weights, what of it learns, hooks of gradients."""
    found = {name: p.requires_grad for name, p in model.named_parameters()}
    return found, [*model.state_dict()], [p for p in model.parameters() if p._backward_hooks]


FILTERS = dict(learn_temperature=True, learn_step_temperature=True, learn_top_k=True, soft_top_k=5)
LEFT = {kind: (kind, {}) for kind in ALL_KINDS if kind != "ppo"}  # it needs its value head again
LEFT |= {
    "learnt filters": ("sft", FILTERS | dict(alpha_schedule="constant", alpha_start=0.5)),
    "think tokens": ("sft", dict(think_tokens=2)),
    "soft masks": ("masked sft", dict(softmasking_prob=0.5)),
}


@pytest.mark.parametrize("case", LEFT)
def test_nothing_of_a_training_is_left_on_the_model(tmp_path, case):
    kind, options = LEFT[case]
    model = bare(kind)
    before = left_on(model)
    made = ALL_KINDS[kind](tmp_path, model=model, max_steps=2, save_strategy="no", **options)
    for _ in range(2):
        made.train()
        assert left_on(model) == before


def test_a_full_training_behind_think_tokens_moves_every_table(tmp_path):
    model, options = tiny.model_of(), dict(max_steps=1, save_strategy="no", learning_rate=0.1)
    ALL_KINDS["sft"](tmp_path / "rows", model=model, think_tokens=2, **options).train()
    before = rl.weights(model)
    ALL_KINDS["sft"](tmp_path / "all", model=model, **options).train()
    assert not [name for name, p in model.named_parameters() if p.equal(before[name])]
    read = (model.get_input_embeddings().weight != before["model.embed_tokens.weight"]).any(1)
    assert read.sum() > 2
