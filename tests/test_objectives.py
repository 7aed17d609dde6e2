"""What diffusion SFT draws and minimises, beside sums over all masks and rows one by one: levels of
documents and blocks, complements, packed documents, on-policy guesses; and the trainer with them."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_block_causal import block_model
from test_denoise import MASK, denoiser
from tiny import QUIET

import softar
from softar.diffusion.convert import convert
from softar.diffusion.doubled import apart, documents_of, positions_of
from softar.diffusion.losses import divisor, forward_masked, masked_ce, weights_of
from softar.diffusion.masking import at_least_one, even_levels, mask_share, units_of
from softar.diffusion.models import load
from softar.diffusion.net import facts, parts
from softar.diffusion.objectives import Masked, Place, Rows
from softar.diffusion.rows import filled
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer
from softar.tasks import load_task

PLACE = Place(step=0, rows=[0, 1, 2], of=3, training=True, progress=0.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(lengths, width):
    """The attention mask [B, T] of packed documents of these lengths."""
    rows = [[n + 1 for n, length in enumerate(row) for _ in range(length)] for row in lengths]
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


# -- levels


@pytest.mark.parametrize("b", [None, 1, 2, 3, 5])
def test_units_are_documents_or_their_blocks(b):
    lengths = [[3, 1, 4], [9], [2, 2]]
    units = units_of(documents_of(numbered(lengths, 9)), b)
    for row, each in zip(units.tolist(), lengths, strict=True):
        want = [
            (n, 0 if b is None else i // b) for n, length in enumerate(each) for i in range(length)
        ]
        order = {unit: number for number, unit in enumerate(dict.fromkeys(want))}
        assert row[: len(want)] == [order[unit] for unit in want]


@pytest.mark.parametrize("counts", [[1] * 8, [3] * 4, [2, 2], [1, 4, 2]])
def test_even_levels_lie_evenly_and_each_is_uniform(counts):
    units = torch.tensor([[min(j, n - 1) for j in range(max(counts))] for n in counts])
    draws = [
        even_levels((k + 0.5) / 200, [*range(len(counts))], len(counts), units, units >= 0)
        for k in range(200)
    ]
    for row, n in enumerate(counts):
        for j in range(n):
            each = sorted(float(draw[row, j]) for draw in draws)
            assert np.allclose(each, (np.arange(200) + 0.5) / 200, atol=0.01), (row, j)
    if len({*counts}) == 1:
        total = sum(counts)
        for draw in draws[::20]:
            each = np.sort(draw[:, : counts[0]].flatten().numpy())
            assert np.allclose(np.diff(each), 1 / total, atol=1e-5)


@pytest.mark.parametrize("prompts", [[3] * 8, [0, 1, 2, 5], [8, 0, 8, 0]])
@pytest.mark.parametrize("answer", [1, 2, 3])
def test_blocks_of_a_prompt_push_no_levels_together(prompts, answer):
    """The levels of the answers' blocks lie evenly over the step, however long the prompts are."""
    width = max(prompts) + answer
    units = torch.arange(width).expand(len(prompts), -1)
    before = torch.tensor(prompts)[:, None]
    maskable = (units >= before) & (units < before + answer)
    each = even_levels(0.3, [*range(len(prompts))], len(prompts), units, maskable)[maskable]
    assert np.allclose(np.diff(np.sort(each.numpy())), 1 / (len(prompts) * answer), atol=1e-5)


def objective(model=None, **options):
    model = model or block_model(1)
    args = DiffusionSFTConfig(output_dir="runs", report_to="none", **options)
    return Masked(args, facts(model), None)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("level", ["document", "block"])
def test_a_unit_has_one_level_of_its_own(level, antithetic):
    mask = numbered([[5, 6], [11], [4]], 11)
    rows = Rows(mask, mask > 0, mask, documents_of(mask))
    drawn = objective(noise_level=level, antithetic=antithetic, packing=True).draw(rows, PLACE)
    units = units_of(rows.documents, 4 if level == "block" else None)
    for row, here, real in zip(drawn["rate"], units, mask > 0, strict=True):
        pairs = {*zip(here[real].tolist(), row[real].tolist(), strict=True)}
        assert len(pairs) == len({unit for unit, _ in pairs}) == len({rate for _, rate in pairs})
    # the row alone, in another batch and wider, has the same
    wider = torch.nn.functional.pad(mask[1:2], (0, 3))
    alone = objective(noise_level=level, antithetic=antithetic, packing=True).draw(
        Rows(wider, wider > 0, wider, documents_of(wider)), PLACE._replace(rows=[1])
    )
    for name in ("rate", "masked"):
        assert torch.equal(alone[name][0, :11], drawn[name][1])


@pytest.mark.parametrize("noise", ["share", "rate"])
def test_each_document_has_its_share_and_one_mask_at_least(noise):
    mask = numbered([[5, 6], [11], [2, 1, 4]], 11)
    documents, maskable = documents_of(mask), mask > 0
    maskable[:, 0] = False
    rate = torch.where(documents == 0, 0.5, 0.0) * torch.ones(3, 11)
    numbers = torch.rand(3, 11, generator=seeded())
    units = units_of(documents, None)
    if noise == "share":
        masked = mask_share(maskable, rate, numbers, units)
    else:
        masked = at_least_one(maskable & (numbers < rate), maskable, numbers, documents)
    assert not (masked & ~maskable).any()
    for row in range(3):
        for n in range(int(documents[row].max()) + 1):
            here = (documents[row] == n) & maskable[row]
            many = max(1, int(here.sum() * (0.5 if n == 0 else 0.0)))
            count, at = int(masked[row][here].sum()), numbers[row][here]
            assert count == many if noise == "share" else count >= 1
            if count == 1:
                assert masked[row][here][at.argmin()]


def all_masks(A, prompt):
    chosen = torch.tensor([*itertools.product([False, True], repeat=A)])
    return torch.cat([torch.zeros(len(chosen), prompt, dtype=torch.bool), chosen], 1)


@torch.no_grad()
@pytest.mark.parametrize("shift", [0, 1])
def test_levels_of_blocks_bound_the_same_likelihood_as_one_of_the_document(shift):
    """The expected loss, by the sum over all masks and the exact integral over the rates of both
    blocks, is that of each block with its k masks of n evenly likely in k."""
    model, ids = block_model(shift, 3), torch.tensor([[3, 4, 5, 6, 7, 8]])
    masks = all_masks(5, 1)  # of blocks with 2 and 3 tokens to mask
    net, known, N = parts(model), facts(model), len(masks)
    embeds = net.embedding(ids.expand(N, -1).masked_fill(masks, MASK))
    _, logits = forward_masked(net, known, embeds, None, masks, ids.expand(N, -1))
    ce = torch.zeros(masks.shape, dtype=torch.float64)
    ce[masks] = masked_ce(logits, ids.expand(N, -1)[masks]).double()

    bound = 0.0
    for lo, hi in ((1, 3), (3, 6)):
        for k in range(1, hi - lo + 1):
            here = masks[:, lo:hi].sum(1) == k
            bound += float(ce[here][:, lo:hi].sum(1).mean()) * (1 / k)  # n / k, each k 1 / n

    maskable, documents = torch.arange(6)[None] >= 1, torch.zeros(1, 6, dtype=torch.long)
    points, weights = np.polynomial.legendre.leggauss(5)
    points, weights = (points + 1) / 2, weights / 2
    for together in (False, True):
        expected = 0.0
        for (p, wp), (q, wq) in itertools.product(zip(points, weights, strict=True), repeat=2):
            if together:  # one level for both
                if p != q:
                    continue
                wq = 1.0
            rate = torch.tensor([[p] * 3 + [q] * 3], dtype=torch.float64)
            chance = torch.where(masks, rate, 1 - rate)[:, 1:].prod(1)
            each = ce * weights_of(rate, maskable, documents, "tokens")
            loss = each.sum(1) / divisor(maskable, maskable, documents, "tokens")
            expected += wp * wq * float((chance * loss).sum())
        assert expected == pytest.approx(bound / 5, rel=1e-6)


# -- losses


def loss_of(model, rows, masked, guesses=False, **options):
    """The objective's loss and the gradients, with these masks."""
    which = objective(model, **options)
    drawn = {"rate": 0.3 + 0.5 * (rows.ids % 3) / 3, "masked": masked}
    drawn["guesses"] = torch.full((len(masked),), guesses)
    loss = which.loss(model, model, rows, drawn, PLACE)
    mean = loss.total / which.count(rows, drawn)
    model.zero_grad()
    mean.backward()
    return mean.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def ragged(seed=0, lengths=(7, 3, 5)):
    rng = seeded(seed)
    mask = numbered([[n] for n in lengths], max(lengths))
    ids = torch.randint(3, 30, mask.shape, generator=rng).masked_fill(mask == 0, 0)
    maskable = (mask > 0) & (torch.arange(mask.shape[1]) > 0)
    masked = maskable & (torch.rand(mask.shape, generator=rng) < 0.5)
    return Rows(ids, maskable, mask, documents_of(mask)), masked


MODELS = {
    "both ways": lambda: denoiser(dtype=torch.float64),
    "shifted": lambda: load("tests/golden/checkpoints/dream_gqa")[0].double(),
    "blocks": lambda: block_model(0),
    "blocks, shifted": lambda: block_model(1),
}


@pytest.mark.parametrize("normalise", ["answer", "tokens", "masks"])
@pytest.mark.parametrize("kind", MODELS)
def test_packed_documents_have_the_loss_and_gradients_of_rows_of_their_own(kind, normalise):
    model = MODELS[kind]()
    rows, masked = ragged()
    mask = numbered([[5, 7], [3]], 13)

    def pack(values):
        """Documents 2 and 0 in a row, 1 in another."""
        out = torch.zeros(2, 13, dtype=values.dtype)
        out[0, :5], out[0, 5:12], out[1, :3] = values[2, :5], values[0, :7], values[1, :3]
        return out

    both = Rows(pack(rows.ids), pack(rows.maskable), mask, documents_of(mask))
    options = dict(normalise=normalise)
    want = loss_of(model, rows, masked, **options)
    got = loss_of(model, both, pack(masked), packing=True, **options)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_documents_see_themselves_alone_and_positions_begin_anew():
    documents = documents_of(numbered([[2, 3], [4]], 6))
    assert positions_of(documents).tolist()[0][:5] == [0, 1, 0, 1, 2]
    sees = apart(documents)[:, 0]
    for row, i, j in itertools.product(range(2), range(6), range(6)):
        one, other = documents[row, i], documents[row, j]
        assert bool(sees[row, i, j]) == (i == j or bool(one == other >= 0)), (row, i, j)


@pytest.mark.parametrize("kind", ["both ways", "blocks, shifted"])
def test_complementary_masks_yield_loss_for_each_token_once(kind):
    model = MODELS[kind]()
    rows, masked = ragged()
    got, _ = loss_of(model, rows, masked, complementary=True, normalise="masks")
    total = 0.0
    for each in (masked, rows.maskable & ~masked):
        net = parts(model)
        embeds = net.embedding(rows.ids.masked_fill(each, facts(model).mask_id))
        _, logits = forward_masked(net, facts(model), embeds, rows.mask, each, rows.ids)
        total += float(masked_ce(logits, rows.ids[each]).sum())
    assert float(got) == pytest.approx(total / int(rows.maskable.sum()), rel=1e-6)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["both ways", "blocks, shifted"])
def test_on_policy_rows_show_the_models_own_most_likely_tokens(kind, whole):
    model = MODELS[kind]()
    rows, masked = ragged()
    options = dict(on_policy_prob=0.5, whole_answer=whole, normalise="masks")
    net, known = parts(model), facts(model)
    asked = rows.maskable if whole else masked
    for guesses in (False, True):
        got, _ = loss_of(model, rows, masked, guesses, **options)
        ids = rows.ids.masked_fill(masked, known.mask_id)
        with torch.no_grad():
            if guesses:
                _, logits = forward_masked(
                    net, known, net.embedding(ids), rows.mask, masked, rows.ids
                )
                logits[:, known.mask_id] = -torch.inf
                ids = ids.masked_scatter(masked, logits.argmax(-1))
                assert not (ids == known.mask_id).any()
            _, logits = forward_masked(net, known, net.embedding(ids), rows.mask, asked, rows.ids)
            want = masked_ce(logits, rows.ids[asked]).mean()
        assert float(got) == pytest.approx(float(want), rel=1e-6)


def test_the_share_of_on_policy_rows_and_none_in_an_evaluation():
    rows, _ = ragged(lengths=(3,) * 400)
    place = PLACE._replace(rows=[*range(400)])
    which = objective(on_policy_prob=0.3)
    share = float(which.draw(rows, place)["guesses"].float().mean())
    assert abs(share - 0.3) < 5 * (0.21 / 400) ** 0.5
    assert not which.draw(rows, place._replace(training=False))["guesses"].any()


# -- the trainer


def trainer_of(folder, blocks=True, peft_config=None, **changes):
    options = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        **QUIET,
        eval_decode_rows=0,
    )
    made = convert(*softar.load("mnns-tiny", seed=0), block_length=4 if blocks else None)
    if peft_config is not None:  # its folder names a base that can be opened
        for part in made:
            part.save_pretrained(folder / "base")
        made = load(str(folder / "base"))
    args = DiffusionSFTConfig(**(options | changes))
    rows = load_task("mnns", size=64).train
    return DiffusionSFTTrainer(
        made[0], args, train_dataset=rows, processing_class=made[1], peft_config=peft_config
    )


def losses_of(trainer):
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


WAYS = {
    "blocks": dict(noise_level="block", antithetic=True, normalise="tokens"),
    "complementary": dict(noise_level="block", complementary=True, normalise="masks"),
    "packing": dict(packing=True, max_length=40),
    "on policy": dict(
        on_policy_prob=0.5, whole_answer=True, normalise="masks", time_low=0.75, time_high=0.75
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_learns_and_a_resumed_run_goes_on_to_the_bit(tmp_path, way):
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=None)
    saving = dict(save_strategy="steps", save_steps=2)
    whole = trainer_of(tmp_path, peft_config=lora, **WAYS[way], **saving)
    before = whole.evaluate(whole.train_dataset)["eval_loss"]
    whole.train()
    assert whole.evaluate(whole.train_dataset)["eval_loss"] < before
    again = trainer_of(tmp_path, peft_config=lora, **WAYS[way])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(again) == losses_of(whole)


def test_rows_are_packed_whole_and_trained_by_documents(tmp_path):
    trainer = trainer_of(tmp_path, **WAYS["packing"])
    plain_rows = trainer_of(tmp_path / "plain").train_dataset
    split = [
        tuple(row["input_ids"][lo : lo + n])
        for row in trainer.train_dataset
        for n, lo in zip(
            row["seq_lengths"], np.cumsum([0, *row["seq_lengths"]])[:-1].tolist(), strict=True
        )
    ]
    assert sorted(split) == sorted(tuple(row["input_ids"]) for row in plain_rows)
    assert len(trainer.train_dataset) < len(plain_rows) / 2
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["documents"].max() > 1
    rows = trainer._rows(batch)
    drawn = trainer.objective.draw(rows, PLACE._replace(rows=[0, 1, 2, 3]))
    assert int(trainer.objective.count(rows, drawn)) == int(rows.documents.amax(1).add(1).sum())
    assert dataclasses.replace(trainer.args, max_steps=3).packing, "it can be a configuration again"


@pytest.mark.parametrize("way", ["packing", None])
def test_tokens_that_are_seen_are_counted_without_padding(tmp_path, way):
    how = dict(max_steps=1, include_num_input_tokens_seen="non_padding")
    trainer = trainer_of(tmp_path, **WAYS["packing"] | how if way else how)
    collate, sizes = trainer.data_collator, []

    def counted(rows):
        sizes.append(sum(len(row["input_ids"]) for row in rows))
        return collate(rows)

    trainer.data_collator = counted
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sizes[0]


@pytest.mark.parametrize("packing", [False, True])
def test_last_blocks_are_filled_with_end_tokens_that_are_trained(tmp_path, packing):
    options = dict(WAYS["packing"] if packing else {}, train_padding=True)
    filled = trainer_of(tmp_path, **options)
    plain_rows = trainer_of(tmp_path / "plain").train_dataset
    end, got, want = filled.processing_class.eos_token_id, [], []
    for row in filled.train_dataset:
        ends = np.cumsum([0, *row.get("seq_lengths", [len(row["input_ids"])])])
        assert not (ends % 4).any()
        for lo, hi in itertools.pairwise(ends.tolist()):
            got.append((row["input_ids"][lo:hi], row["labels"][lo:hi]))
    for row in plain_rows:
        more = [end] * (-len(row["input_ids"]) % 4)
        want.append((row["input_ids"] + more, row["labels"] + more))
    assert sorted(got) == sorted(want)


@pytest.mark.parametrize("max_length", [None, 9, 8, 7])
def test_only_answers_that_end_are_filled(max_length):
    """A row of max_length tokens may have been cut, and one that ends in a prompt has no answer there."""
    rows = [dict(input_ids=[5] * n, labels=[5] * n) for n in range(1, (max_length or 9) + 1)]
    rows += [dict(input_ids=[5, 5], labels=[5, -100])]
    got = filled(Dataset.from_list(rows), 4, 2, max_length)
    for row, new in zip(rows, got, strict=True):
        n = len(row["input_ids"])
        want = 0 if row["labels"][-1] == -100 else -n % 4
        want = min(want, (max_length or 99) - n)
        assert new == {name: tokens + [2] * want for name, tokens in row.items()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(noise_level="row"), "noise_level='row' is unknown"),
        (dict(noise_level="block", blocks=False), "noise_level='block' needs a block-causal model"),
        (dict(complementary=True), "complementary=True does not go with normalise='answer'"),
        (dict(whole_answer=True, normalise="tokens"), "whole_answer=True does not go with norm"),
        (dict(on_policy_prob=1.5), r"on_policy_prob=1.5 must lie in \[0, 1\]"),
        (dict(on_policy_prob=0.5, softmasking_prob=0.5), "on_policy_prob=0.5 shows tokens where"),
        (dict(packing=True, packing_strategy="wrapped"), "packing_strategy='wrapped' cuts examp"),
        (dict(packing_strategy="bfd_split"), "packing_strategy='bfd_split' does nothing without"),
        (dict(packing=True, max_length=None), "packing=True needs a max_length"),
        (
            dict(packing=True, train_padding=True, blocks=False),
            "train_padding=True does not go with packing=True",
        ),
        (dict(eval_packing=True), "eval_packing=True does nothing here"),
        (dict(padding_free=True), "padding_free=True"),
        *(
            (
                dict(objective="uniform", normalise="tokens") | {name: value},
                f"{name}=.* does not go",
            )
            for name, value in (
                ("complementary", True),
                ("whole_answer", True),
                ("on_policy_prob", 0.5),
                ("noise_level", "block"),
                ("packing", True),
            )
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_work(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, **options)
