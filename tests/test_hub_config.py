"""The soft_config.json of a model on the hub. A cache as huggingface_hub lays it out stands in for
the network."""

import pytest
from huggingface_hub import constants

import softar
from softar import SoftConfig, make_decoder
from softar.cli import app as cli
from softar.decoders.card import describe, with_config
from softar.defaults import recall
from softar.models import beside

NAME, PROMPT = "softar-tests/mine", "<bos> D4 D8 D1 D3 ->"
MAIN, OTHER, BARE, UNKNOWN = ("a" * 40, "b" * 40, "c" * 40, "d" * 40)
CONFIGS = {
    MAIN: SoftConfig(mixer="k-samples", mixer_args={"k": 2}, top_k=5, budget=3, max_new_tokens=8),
    OTHER: SoftConfig(mixer="dirichlet", budget=2, max_new_tokens=7),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Revisions: two with a configuration, one without that is known to have none, one of which
    that is not known."""
    cache = tmp_path_factory.mktemp("hub")
    repo = cache / ("models--" + NAME.replace("/", "--"))
    (repo / "refs").mkdir(parents=True)
    revisions = {"main": MAIN, "other": OTHER, "bare": BARE, "unknown": UNKNOWN}
    for revision, commit in revisions.items():
        (repo / "refs" / revision).write_text(commit)
        for part in softar.load("mnns-tiny"):
            part.save_pretrained(repo / "snapshots" / commit)
        if commit in CONFIGS:
            CONFIGS[commit].save(repo / "snapshots" / commit)
    (repo / ".no_exist" / BARE).mkdir(parents=True)
    (repo / ".no_exist" / BARE / "soft_config.json").touch()
    return cache


@pytest.fixture
def cached(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("revision", "commit"),
    [({}, MAIN), ({"revision": "main"}, MAIN), ({"revision": "other"}, OTHER)],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_model_is_decoded_by_the_file_of_its_revision(
    hub, monkeypatch, request, revision, commit, elsewhere
):
    if not elsewhere:
        request.getfixturevalue("cached")
    where = dict(cache_dir=str(hub), local_files_only=True) if elsewhere else {}
    model, tokenizer = softar.load(NAME, **revision, **where)
    assert recall(model).config == CONFIGS[commit] and recall(model).kind == "own"
    inputs = tokenizer(PROMPT, return_tensors="pt")
    assert softar.generate(model, **inputs).config == CONFIGS[commit]


@pytest.mark.parametrize("revision", ["bare", "unknown"])
def test_a_revision_without_one_has_no_other_ones(cached, revision):
    assert recall(softar.load(NAME, revision=revision)[0]).kind == "plain"


def test_nobody_is_asked_for_what_the_cache_knows(cached, monkeypatch):
    asked = []
    monkeypatch.setattr(beside, "cached_file", lambda *args, **_: asked.append(args))
    for revision in ("main", "other", "bare"):
        softar.load(NAME, revision=revision)
    assert not asked
    softar.load(NAME, revision="unknown")
    assert asked == [(NAME, "soft_config.json")]


def test_decoders_and_commands_follow_it(cached, capsys):
    for spec in ("k-samples", "discrete"):
        decoder = make_decoder(f"{NAME}={spec}")
        assert (decoder.config.budget, decoder.config.max_new_tokens) == (3, 8)
    assert describe(NAME).config == with_config(describe(NAME)).config == CONFIGS[MAIN]
    with pytest.raises(SystemExit) as left:
        cli.main(["generate", PROMPT, "-m", NAME])
    assert left.value.code == 0
    assert f"{NAME} is decoded as its soft_config.json says" in capsys.readouterr().err


def test_names_of_no_hub_are_not_looked_for(monkeypatch):
    monkeypatch.setattr(beside, "cached_file", lambda *_, **__: pytest.fail("asked"))
    for name in ("mnns-tiny", "latin-diffusion-tiny", "./some", "/some/folder", "a/b.gguf", "some"):
        assert with_config(describe(name)).config is None
