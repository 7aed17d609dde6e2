"""recipes/sft_soft.py with bad input: one line that names it, before any training."""

import json
import re
import subprocess
from importlib import import_module
from types import SimpleNamespace

import pytest
from launched import ENV, PYTHON, ROOT, assert_fails, run, run_here
from test_recipes import RECIPE, options
from tiny import model_of, tokenizer_of, with_lora
from trl import ModelConfig

import softar
from softar.recipe import supervised


def test_bad_input_ends_with_one_line_and_code_2(tmp_path):
    done = subprocess.run(
        [*PYTHON, RECIPE, *options(tmp_path / "out", alpha_start=1.5)],
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    lines = [
        line for line in done.stderr.splitlines() if "error" in line.lower() or "Traceback" in line
    ]
    assert lines == ["sft_soft.py: error: alpha_start=1.5 must lie in [0, 1]"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(rows="demo,fo"), "'fo' is unknown.*trace-soft"),
        (dict(rows=""), "'' is unknown"),
        (dict(task="mnnns"), "task='mnnns' is unknown.*'mnns'"),
        (dict(task="reasoning_gym:chain_summ"), "chain_sum'"),
        (dict(task="mnns", task_size=0), "size=0"),
        (dict(task="mnns", dataset_name="x"), "exactly one of --task"),
        (dict(model_name_or_path="mnns-tinny", task="mnns"), "model='mnns-tinny'.*'mnns-tiny'"),
        (dict(model_name_or_path="no/such", task="mnns"), "model='no/such' is not there"),
        (dict(model_name_or_path="/no/such", task="mnns"), "model='/no/such' is not there"),
        (dict(model_name_or_path="no.gguf", task="mnns"), "model='no.gguf': there is no such file"),
        (dict(model_name_or_path=ROOT, task="mnns"), "folder holds no config.json"),
        (
            dict(model_name_or_path="mnns-diffusion-tiny", task="mnns"),
            "it fills masks: `softar diffusion-sft`",
        ),
        (dict(dataset_name="/no/such", model_name_or_path="mnns-tiny"), "/no/such"),
        (dict(dataset_name="no/such"), "no/such"),
        (dict(config="/no/such.yaml"), "config='/no/such.yaml'"),
        (dict(bogus=1), "'--bogus'"),
        (dict(report_to="tensorbord"), "report_to='tensorbord' is unknown, did you mean 'tensorb"),
        (dict(report_to="clearml"), "report_to='clearml' is not installed: pip install clearml"),
        (dict(num_seeds=0), "num_seeds=0"),
        (dict(padding_free="true"), "padding_free=True"),
        (dict(lora_r=4), "lora_r=4 does nothing without an adapter: give --use_peft"),
        (dict(load_in_4bit="true", use_peft="true"), "load_in_4bit=True: softar trains no quant"),
        (dict(bnb_4bit_quant_type="fp4"), "bnb_4bit_quant_type='fp4': softar trains no quantised"),
        (dict(ignore_bias_buffers="true"), "ignore_bias_buffers=True does nothing here"),
        (
            dict(gradient_checkpointing="true", soft_mode="sequential"),
            "gradient_checkpointing=True",
        ),
        (dict(soft_mixer="sofft"), "sofft.*gumbel"),
        (
            dict(
                rows="guided-soft,scheduled-sampling",
                soft_mixer="gumbel",
                soft_mixer_args='{"tau": 1}',
            ),
            "'hard'.*tau",
        ),
        (dict(soft_min_p=1.5), r"min_p=1\.5"),
        (
            dict(rows="discrete,trace-soft", latents_per_step=2),
            "latents_per_step=2 does nothing with these rows: add 'coconut'",
        ),
        (
            dict(rows=None, task="mnns", latents_per_step=2),
            "latents_per_step=2 does nothing without latent_stages",
        ),
        (
            dict(rows="trace-soft", alpha_start=0.7),
            "alpha_start=0.7 does nothing with the rows trace",
        ),
        (
            dict(rows="trace-soft", targets="gold"),
            "targets='gold' does nothing with the rows trace",
        ),
        (
            dict(rows="no-cot,discrete", soft_passes=3),
            "soft_passes=3 does nothing with the rows no-",
        ),
        (dict(rows="no-cot", think_steps=2), "think_steps=2 does nothing with the rows no-cot"),
        (
            dict(rows="oracle-soft", **{"soft-mode": "sequential"}),
            "soft_mode='sequential' does nothing",
        ),
        (dict(think_tokens=4), "think_tokens=4 would freeze 'mnns-tiny'.*name a trained model"),
        (dict(rows="no-cot", soft_top_k=90), "top_k=90"),
        (dict(rows="no-cot", freeze_layers=3), "freeze_layers=3"),
        (dict(rows=None, task="mnns", think_end="</think>"), "'</think>'"),
        (
            dict(rows="no-cot", task="mnns", think_end="</think>"),
            "error: row 'no-cot': think_end='</think>' and think_steps=0: give one of them",
        ),
        (dict(resume_from_checkpoint="/no/such"), "resume_from_checkpoint='/no/such'"),
        (
            dict(rows=None, task="mnns", resume_from_checkpoint="/no/such"),
            "'/no/such' holds no whole checkpoint",
        ),
    ],
)
def test_bad_input_is_named_before_any_training(tmp_path, monkeypatch, capsys, changes, says):
    """The recipe's own main, in this process to save the imports."""
    if changes.get("task", "").startswith("reasoning_gym"):
        pytest.importorskip("reasoning_gym")
    if changes.get("dataset_name") and "task" not in changes:
        changes = changes | {"task_size": None}
    before = tmp_path / "out" / "checkpoint-2"
    before.mkdir(parents=True)
    assert_fails(monkeypatch, capsys, RECIPE, options(tmp_path / "out", **changes), says)
    # not among the earlier ones, but for what the row itself finds out
    assert before.is_dir() or "think_end" in changes
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("results.json"))


def test_an_unwritable_folder_and_an_unknown_key(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert_fails(
        monkeypatch,
        capsys,
        RECIPE,
        options(tmp_path / "file" / "out"),
        "output_dir='.*/file/out' cannot be written",
    )
    (tmp_path / "c.yaml").write_text("task: mnns\nmax_stepz: 3\n")
    assert_fails(monkeypatch, capsys, RECIPE, ["--config", str(tmp_path / "c.yaml")], "max_stepz")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(eval_strategy="steps", eval_steps=1), "eval_strategy='steps' needs held-out rows"),
        (
            dict(eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end="true"),
            "eval_strategy='epoch' needs held-out rows",
        ),
        (dict(eval_on_start="true"), "eval_on_start=True needs held-out rows"),
    ],
)
def test_evaluations_without_rows_are_named_before_a_model_is_opened(
    tmp_path, monkeypatch, capsys, changes, says
):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "<bos> w5", "completion": " w6"}\n')
    monkeypatch.setattr(softar, "load", None)
    changes |= dict(rows=None, task_size=None, dataset_name=file, model_name_or_path="mnns-tiny")
    says += ".*rows.jsonl' has none: leave it out, or give a folder with train and test files"
    assert_fails(monkeypatch, capsys, RECIPE, options(tmp_path / "out", **changes), says)


def test_no_cot_needs_to_know_what_to_cut(tmp_path, monkeypatch, capsys):
    """Rows of one's own were left as they are: no-cot was discrete, whatever --think_steps said."""
    row = {"prompt": "<bos> D4 D8 ->", "completion": " S4 S0", "answer": "S0"}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    for how in ("task", "dataset_name"):
        changes = dict(rows="no-cot,discrete", think_steps=1, task_size=None)
        changes |= {how: tmp_path, "model_name_or_path": "mnns-tiny"}
        says = f"row 'no-cot' cuts thoughts .*{tmp_path}' does not say how long they are"
        assert_fails(monkeypatch, capsys, RECIPE, options(tmp_path / "out", **changes), says)


def test_hyphens_in_names_of_options_are_underscores(tmp_path):
    """TRL's parser takes both; what looks for a name in the words has to find either."""
    made = import_module("softar.recipes.sft_soft").RECIPE
    argv = options(tmp_path, rows="discrete", task="mnns", model_name_or_path="mnns-tiny")
    argv += ["--run-name=my-run"]
    plain = [word.replace("-run-", "-run_") for word in argv]
    for words in (argv, [w.replace("_", "-") if w.startswith("--") else w for w in argv], plain):
        inputs = softar.recipe.read(made, words)
        assert "--config" not in inputs.argv and inputs.training.run_name == "my-run"
        assert inputs.argv[:-1] == argv[:-1] and inputs.argv[-1] == "--run_name=my-run"


def test_an_evaluation_at_the_start_has_the_held_out_rows(monkeypatch):
    monkeypatch.setattr("softar.model_card.example_of", lambda task, tokenizer: None)
    task, inputs = softar.load_task("mnns", size=8), SimpleNamespace(model_args=ModelConfig())
    for start, rows in ((True, task.test), (False, None)):
        args = SimpleNamespace(eval_strategy="no", eval_on_start=start)
        made = supervised(lambda *_, **kw: SimpleNamespace(**kw), None, None, inputs, task, args)
        assert made.eval_dataset is rows


def test_an_adapter_takes_no_other_and_an_unknown_type_names_its_option(monkeypatch):
    monkeypatch.setattr("softar.model_card.example_of", lambda task, tokenizer: None)
    adapter, odd = with_lora(model_of()), model_of()
    odd.config.model_type = "odd"
    for model, says in (
        (adapter, "use_peft=True: .* without that"),
        (odd, "lora_target_mod.*type 'odd'"),
    ):
        inputs = SimpleNamespace(model_args=ModelConfig(use_peft=True))
        with pytest.raises(ValueError, match=says):
            args = SimpleNamespace(eval_strategy="no", eval_on_start=False)
            supervised(lambda *_, **kw: None, model, None, inputs, softar.load_task("mnns"), args)


def test_rows_that_need_traces_say_so_before_the_first_is_trained(tmp_path, monkeypatch, capsys):
    pytest.importorskip("reasoning_gym")
    model = tmp_path / "model"
    model_of().save_pretrained(model)
    tokenizer_of().save_pretrained(model)
    changes = dict(
        task="reasoning_gym:chain_sum",
        task_size=8,
        model_name_or_path=model,
        rows="discrete,trace-soft",
    )
    assert_fails(
        monkeypatch,
        capsys,
        RECIPE,
        options(tmp_path / "out", **changes),
        "'trace-soft' needs a column 'traces'",
    )


@pytest.mark.parametrize("where", ["softar.sft.trainer.soft_loss", "softar.evaluate.evaluate"])
def test_an_error_of_the_training_keeps_its_traceback(tmp_path, monkeypatch, where):
    def fail(*args, **kw):
        raise ValueError("a bug")

    monkeypatch.setattr(where, fail)
    with pytest.raises(ValueError, match="a bug"):
        run_here(monkeypatch, RECIPE, *options(tmp_path, rows="no-cot", max_steps=1))


@pytest.mark.slow
@pytest.mark.parametrize("bad_input", [False, True])
def test_rows_in_processes_of_their_own_say_what_went_wrong(tmp_path, bad_input):
    broken = tmp_path / "no-cot-seed42" / "checkpoint-2"
    broken.mkdir(parents=True)
    # whole files of another make: the training itself finds out
    (broken / "trainer_state.json").write_text('{"bogus": 1}')
    (broken / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    changes = dict(freeze_layers=3) if bad_input else dict(resume_from_checkpoint="true")
    args = options(tmp_path, rows="no-cot,discrete", jobs=2, **changes)
    done = run(*PYTHON, RECIPE, *args, code=2 if bad_input else 1)
    assert re.search(r"^sft_soft.py: error: row '.*', seed 42, failed:$", done.stderr, re.M), (
        done.stderr
    )
    assert ("Traceback" in done.stderr) != bad_input
    says = "freeze_layers=3 but" if bad_input else "unexpected keyword argument 'bogus'"
    assert says in done.stderr.strip().splitlines()[-1]
