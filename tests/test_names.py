"""Methods of one's own by "module:name" or entry point, wherever a name goes; what a mixer must keep
to, and what a checkpoint may not say."""

import functools
import json
import re
import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from test_sft import trainer_of
from tiny import PROMPTS, left_padded, model_of, seeded, tokenizer_of

import softar
from softar import Decoded, Mixed, Mixer, Soft, SoftConfig, make_decoder, names
from softar.decoders.card import describe
from softar.decoders.registry import card_of, parse_spec
from softar.diffusion import DenoiseConfig
from softar.diffusion.schedules import mk_schedule
from softar.diffusion.soften import mk_softener
from softar.mixers import mk_mixer
from softar.models.origin import note_origin
from softar.tasks import Task, load_task, mnns

MNNS = ["<bos> D4 D8 D1 D3 ->"]


def flat(dist, *, rng=None, power=0.5):
    weights = dist.weights**power
    return Mixed(Soft(dist.ids, weights / weights.sum(-1, keepdim=True)), dist.ids[..., 0], None)


def second(slots, *, k=1):
    values, ids = slots.belief.top(k)
    return Soft(ids, values.softmax(-1))


def all_at_once(block, config, draws):
    from softar.diffusion.schedules import Quota

    return Quota(lambda i, n: n)


def few(*, digits: int = 2, seed=0, size=None):
    task = mnns(digits=digits, seed=seed, size=size)
    return Task("few", task.train, task.test, task.score, None)


class Parrot:
    def __init__(self, word):
        self.word = word

    def decode(self, prompts):
        return [Decoded(self.word, (1,), 1.0, 1.0, 0.001) for _ in prompts]


def parrot(model, *, max_new_tokens, seed, word="S0"):
    return Parrot(word)


def parroting(model, **options):
    return parrot(model, **options).decode  # a function, as softar.compare takes it


def dumb(model, *, max_new_tokens, seed):
    return object()


HERE = __name__


def generate(mixer, model=None, **changes):
    ids, mask = left_padded(PROMPTS)
    config = SoftConfig(mixer=mixer, **{"max_new_tokens": 4, "top_k": 5} | changes)
    return softar.generate(model or model_of(), ids, mask, config=config, rng=seeded(3))


# wherever a name goes


def test_a_mixer_by_name_is_the_function():
    by_name, by_function = generate(f"{HERE}:flat"), generate(flat)
    assert torch.equal(by_name.record.weights, by_function.record.weights)
    decoders = [
        make_decoder(f"mnns-soft-tiny={spec}", max_new_tokens=5)
        for spec in (f"soft:mixer={HERE}:flat,power=0.25", "soft:mixer=hard", "discrete")
    ]
    assert decoders[0].config.mixer_args == {"power": 0.25}
    assert decoders[0].name == f"mnns-soft-tiny=soft mixer={HERE}:flat power=0.25"
    answers = [decoder.decode(MNNS)[0] for decoder in decoders]
    assert answers[1].tokens == answers[2].tokens  # hard, under the name of soft
    with pytest.raises(ValueError, match="takes no 'powr', did you mean 'power'"):
        make_decoder(f"mnns-soft-tiny=soft:mixer={HERE}:flat,powr=1", max_new_tokens=5)


def test_softeners_and_schedules():
    assert mk_softener(f"{HERE}:second").fn is second
    assert mk_schedule(f"{HERE}:all_at_once").fn is all_at_once
    DenoiseConfig(soften=f"{HERE}:second", schedule=f"{HERE}:all_at_once", soften_args={"k": 2})
    spec = f"mnns-diffusion-tiny=denoise:soften={HERE}:second,k=2,schedule={HERE}:all_at_once"
    decoder = make_decoder(spec, max_new_tokens=5)
    assert decoder.config.soften_args == {"k": 2} and decoder.decode(MNNS)[0].num_forwards == 1
    plain, trained = (
        make_decoder(f"mnns-diffusion-tiny={name}", max_new_tokens=5).decode(MNNS)[0].tokens
        for name in ("denoise", "soft-mask")
    )
    assert plain == trained  # denoise is as the model was trained


def test_tasks_and_decoders():
    task = load_task(f"{HERE}:few", size=7)
    assert (task.name, len(task.train)) == ("few", 7)
    three = load_task(f"{HERE}:few:digits=3", size=7)
    assert (three.name, len(three.train)) == (f"{HERE}:few:digits=3", 7)
    assert all(row.count("D") == 3 for row in three.test["prompt"])
    for options, says in (("digit=3", "did you mean 'digits'"), ("digits=a", "must be a whole")):
        with pytest.raises(ValueError, match=says):
            load_task(f"{HERE}:few:{options}")
    for spec, model, word in (
        (f"{HERE}:parrot", None, "S0"),
        (f"some/model={HERE}:parrot:word=S5", "some/model", "S5"),
        (f"{HERE}:parroting:word=S5", None, "S5"),
    ):
        decoder = make_decoder(spec, max_new_tokens=3)
        assert decoder.columns["model"] == model and decoder.decode(MNNS)[0].text == word
        assert softar.compare([decoder], task.test.select(range(4)), task.score, warmup=0).rows
    with pytest.raises(ValueError, match=r"gave a object, which has no decode"):
        make_decoder(f"{HERE}:dumb", max_new_tokens=3)
    with pytest.raises(ValueError, match=r"cannot be made .*unexpected keyword argument 'wrd'"):
        make_decoder(f"{HERE}:parrot:wrd=1", max_new_tokens=3)
    with pytest.raises(ValueError, match=r"gave a Parrot, and not a softar.tasks.Task"):
        load_task(f"{HERE}:parrot_task")


def parrot_task(*, seed=0, size=None):
    return Parrot("S0")


def test_entry_points(monkeypatch):
    """What a package registers is known by its name, as softar's own are."""
    points = {
        "softar.mixers": {"flat": f"{HERE}:flat", "gone": "no_such_package:flat"},
        "softar.softeners": {"second": f"{HERE}:second"},
        "softar.schedules": {"all": f"{HERE}:all_at_once"},
        "softar.tasks": {"few": f"{HERE}:few"},
        "softar.decoders": {"parrot": f"{HERE}:parrot"},
    }

    def entry_points(group):
        return [EntryPoint(name, value, group) for name, value in points.get(group, {}).items()]

    names.registered.cache_clear()
    monkeypatch.setattr(names, "entry_points", entry_points)
    try:
        assert mk_mixer("flat").fn is flat and mk_softener("second").fn is second
        assert mk_schedule("all").fn is all_at_once and load_task("few", size=2).name == "few"
        assert load_task("few:digits=3", size=2).name == "few:digits=3"
        for spec in ("mnns-soft-tiny=flat:power=2", "mnns-diffusion-tiny=second", "x=parrot"):
            assert make_decoder(spec, max_new_tokens=5).decode(MNNS)[0].tokens
        with pytest.raises(
            ValueError, match="registered as no_such_package:flat, cannot be loaded"
        ):
            mk_mixer("gone")
        with pytest.raises(
            ValueError, match=r"choose one of \['dirichlet', 'flat', 'gone', 'gumbel'"
        ):
            mk_mixer("fla")
    finally:
        names.registered.cache_clear()


def test_a_mixer_put_into_the_table(monkeypatch):
    monkeypatch.setitem(softar.MIXERS, "flat", flat)
    assert make_decoder("mnns-soft-tiny=flat:top_k=4", max_new_tokens=5).decode(MNNS)[0].tokens


@pytest.mark.parametrize(
    "name, says",
    [
        ("no_such_module:flat", "module 'no_such_module' cannot be imported (ModuleNotFoundError"),
        (f"{HERE}:nothing", "there is no 'nothing' in it, but "),
        (f"{HERE}:MNNS", "is a list, and no function"),
        ("gumbl", "did you mean 'gumbel'?"),
    ],
)
def test_what_cannot_be_found_is_named(name, says):
    for make in (lambda: SoftConfig(mixer=name), lambda: mk_mixer(name)):
        with pytest.raises(ValueError, match=re.escape(says)):
            make()


def test_modules_of_the_working_folder(tmp_path, monkeypatch):
    """A console script does not have it on its path, and what breaks there is said in one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "mixers_of_mine.py").write_text("value = 3\ndef mine(dist, *, rng=None): pass\n")
    assert mk_mixer("mixers_of_mine:mine").fn.__name__ == "mine"
    (tmp_path / "broken_of_mine.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=r"cannot be imported .ZeroDivisionError"):
        mk_mixer("broken_of_mine:mine")


@pytest.mark.parametrize("path", ["late", "Heir.mine", "Heir.late.real"])
def test_a_name_is_what_python_imports(tmp_path, monkeypatch, path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lazy_of_mine.py").write_text(
        "class Base:\n    late = 1\n    @staticmethod\n    def mine(dist): pass\n"
        "class Heir(Base): pass\n"
        "def __getattr__(name):\n"
        "    if name == 'late': return Base.mine\n"
        "    if name == 'broken': import no_such_module\n"
        "    raise AttributeError(name)\n"
    )
    import lazy_of_mine

    value = names.load_code("mixer", f"lazy_of_mine:{path}")
    assert value == {"late": lazy_of_mine.Base.mine, "Heir.mine": lazy_of_mine.Base.mine}.get(
        path, 1
    )
    for missing, says in (
        ("nothing", "there is no 'nothing' in it, but .*Heir"),
        ("Heir.nothing", "there is no 'nothing' in it, but late, mine"),
        ("Heir.late.nothing", "there is no 'nothing' in it, but "),
        ("broken", "'broken' cannot be imported .ModuleNotFoundError"),
    ):
        with pytest.raises(ValueError, match=says):
            names.load_code("mixer", f"lazy_of_mine:{missing}")


def test_a_checkpoint_does_not_say_what_is_run(tmp_path):
    """Unless the user has named the same."""
    (tmp_path / "soft_config.json").write_text(json.dumps({"mixer": f"{HERE}:only_in_a_file"}))
    with pytest.raises(ValueError, match=r"names code, .*a file does not say what is run"):
        SoftConfig.load(tmp_path)
    SoftConfig(mixer=f"{HERE}:flat").save(tmp_path)
    assert SoftConfig.load(tmp_path).mixer == f"{HERE}:flat"


def test_a_decoder_that_says_how_needs_no_code_of_the_file(tmp_path, monkeypatch):
    """Where nobody says how, one line names the code and the remedy."""
    model = model_of()
    model.save_pretrained(tmp_path)
    tokenizer_of().save_pretrained(tmp_path)
    saved = {"mixer": f"{HERE}:flat", "mixer_args": {"power": 0.25}, "budget": 2}
    (tmp_path / "soft_config.json").write_text(json.dumps(saved))
    monkeypatch.setattr(names, "NAMED", set())
    says = (
        "discrete",
        "sampled",
        "gumbel",
        "soft:mixer=soft",
        "swi:mixer=soft",
        "beam:num_beams=2",
    )
    for spec in (*says, "vllm-greedy"):
        asked = parse_spec(f"{tmp_path}={spec}")
        told = card_of(asked, None).config
        assert told.budget == 2 and told.mixer == (spec if spec == "gumbel" else "soft")
    for spec in ("discrete", "gumbel", "beam:num_beams=2"):
        make_decoder(spec, model=str(tmp_path), max_new_tokens=4).decode(["w9"])
    with pytest.raises(ValueError, match=f"names code, mixer='{HERE}:flat'.*name it yourself"):
        card_of(parse_spec(f"{tmp_path}=vllm-soft"), None)
    with pytest.raises(ValueError, match="name it yourself"):
        describe(str(tmp_path))
    # "soft" took the mixer soft, which the model was not trained with, without a word
    for spec in ("soft", "soft:budget=1", "swi"):
        with pytest.raises(ValueError, match=f"-d soft:mixer={HERE}:flat in a spec"):
            make_decoder(spec, model=str(tmp_path), max_new_tokens=4)
    decoder = make_decoder(f"soft:mixer={HERE}:flat", model=str(tmp_path), max_new_tokens=4)
    assert decoder.config.mixer == f"{HERE}:flat"
    for name in ("soft", "swi"):  # by now it has been named
        with pytest.raises(ValueError, match=f"name one of them, {name}:mixer={HERE}:flat or"):
            make_decoder(name, model=str(tmp_path), max_new_tokens=4)
    assert make_decoder("soft:mixer=soft", model=str(tmp_path)).config.mixer == "soft"


@pytest.mark.parametrize(
    "how",
    [
        dict(mixer=f"{HERE}:flat"),
        dict(mixer=flat),
        dict(mixer=Mixer(flat)),
        dict(mixer=functools.partial(flat, power=0.5)),
        dict(mixer="gumbel"),
        dict(config={"mixer": f"{HERE}:flat", "max_new_tokens": 3}),
    ],
)
def test_the_caller_in_python_may_name_what_the_file_names(tmp_path, monkeypatch, how):
    saved = {"mixer": f"{HERE}:flat", "mixer_args": {"power": 0.25}, "max_new_tokens": 3}
    (tmp_path / "soft_config.json").write_text(json.dumps(saved))
    monkeypatch.setattr(names, "NAMED", set())
    model, ids = model_of(), torch.tensor([[1, 9]])
    note_origin(model, str(tmp_path), None)
    with pytest.raises(ValueError, match="names code"):
        softar.generate(model, ids)
    config = softar.generate(model, ids, **how).config
    assert config.max_new_tokens == 3
    assert config.mixer == (how["mixer"] if "mixer" in how else how["config"]["mixer"])


def only_in_a_file(dist, *, rng=None):
    raise AssertionError("never called")


# what a mixer keeps to


def returns(change):
    def mixer(dist, *, rng=None):
        return change(dist.ids, dist.weights)

    return mixer


BROKEN = [
    (lambda i, w: Soft(i, w), "gave a Soft: give softar.Mixed(softar.Soft(ids, weights)"),
    (lambda i, w: Mixed(Soft(i, w * 7), i[:, 0], None), "weights that do not sum to 1"),
    (lambda i, w: Mixed(Soft(i, w - 0.3), i[:, 0], None), "negative weights"),
    (lambda i, w: Mixed(Soft(i + 99, w), i[:, 0], None), "ids outside the vocabulary of 64"),
    (lambda i, w: Mixed(Soft(i, w), i[:, 0] - 99, None), "a token outside the vocabulary"),
    (lambda i, w: Mixed(Soft(i, w[:, :1]), i[:, 0], None), "of shapes [(3, 5), (3, 1), (3,)"),
    (lambda i, w: Mixed(Soft(i, w), i[:, 0], w), "and [rows] or None"),
    (lambda i, w: Mixed(Soft(i.int(), w), i[:, 0], None), "gave ids, weights and token of"),
]


@pytest.mark.parametrize("change, says", BROKEN)
def test_a_mixers_contract(change, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        generate(returns(change))


def test_a_mixer_may_ask_for_hidden_states():
    """It gets the state that the step's logits were made from, for each row."""
    model, seen = model_of(), []

    def look(dist, *, rng=None, hidden):
        seen.append((hidden, dist))
        return Mixed(dist, dist.ids[..., 0], None)

    out = generate(Mixer(look, hidden=True), model)
    assert len(seen) == out.num_forwards
    for hidden, dist in seen:
        logits = model.lm_head(hidden)
        again = softar.mk_proba_dist(logits.float(), top_k=5)
        assert torch.equal(again.ids, dist.ids)
        assert torch.allclose(again.weights, dist.weights, atol=1e-5)
    assert torch.equal(out.sequences, generate("soft", model).sequences)


def test_soft_sft_trains_through_a_mixer_by_name(tmp_path):
    """And refuses one that wants what training does not have."""
    config = softar.SoftSFTConfig(
        output_dir=str(tmp_path),
        soft_mixer=f"{HERE}:flat",
        soft_mixer_args={"power": 2},
        think_steps=3,
    )
    assert config.soft_mixer == f"{HERE}:flat"
    with pytest.raises(
        ValueError, match="asks for hidden states, which training does not hand out"
    ):
        softar.SoftSFTConfig(output_dir=str(tmp_path), soft_mixer=f"{HERE}:gated", think_steps=3)


@pytest.mark.parametrize(
    "change, says", [*BROKEN, (lambda i, w: Mixed(Soft(i, w), i[:, 0], None), None)]
)
def test_soft_sft_holds_a_mixer_to_its_contract_before_it_starts(
    tmp_path, monkeypatch, change, says
):
    """It trained on what it gave, whatever that was; decoding refused it then."""
    monkeypatch.setattr(sys.modules[HERE], "broken", returns(change), raising=False)
    how = dict(soft_mixer=f"{HERE}:broken", soft_top_k=5, think_steps=1)
    if says is None:
        trainer_of(tmp_path, **how)
    else:
        with pytest.raises(ValueError, match=re.escape(says.replace("(3", "(2"))):
            trainer_of(tmp_path, **how)


def test_a_request_names_no_code():
    """What comes over HTTP decides neither what is imported nor what is run, but for what the
    server was started with."""
    from softar.vllm.request import check_mixer
    from softar.vllm.switches import Switches

    for name in (f"{HERE}:never_asked_for", "os:system"):
        with pytest.raises(ValueError, match=r"is unknown here.*choose one of.*--allow-mixer"):
            check_mixer(name, [])
        assert name not in names.NAMED
    allow = Switches(soft=True, mixers=[f"{HERE}:flat", f"{HERE}:gated"]).mixers
    check_mixer(f"{HERE}:flat", allow)
    check_mixer("gumbel", [])
    with pytest.raises(ValueError, match="asks for hidden states, which vLLM does not hand out"):
        check_mixer(f"{HERE}:gated", allow)
    for wrong in ("os", ["os"], "os:system", [3]):
        with pytest.raises(ValueError, match="must be a list of 'module:function'"):
            Switches(soft=True, mixers=wrong)


gated = Mixer(flat, hidden=True)
