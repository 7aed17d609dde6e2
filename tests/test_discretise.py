"""What a reward may see of a soft rollout."""

import pytest
import torch
from tiny import BOS, EOS, PAD, model_of

import softar
from softar.rl.discretise import discretise, heaviest
from softar.thought import Kind, Record


@pytest.fixture
def record():
    """Two rows: think, think, </think> put in, answer, end; and one that never ends its thought."""
    soft, hard, forced, pad = Kind.SOFT, Kind.HARD, Kind.FORCED, Kind.PAD
    kind = torch.tensor(
        [[soft, soft, forced, hard, hard], [soft, soft, soft, pad, pad]], dtype=torch.int8
    )
    token = torch.tensor([[7, 8, 4, 9, EOS], [10, 11, 12, PAD, PAD]])
    ids = token[..., None].repeat(1, 1, 3)
    weights = torch.tensor([1.0, 0, 0]).repeat(2, 5, 1)
    # 20 twice outweighs the first draw
    ids[0, 0], weights[0, 0] = torch.tensor([7, 20, 20]), torch.full((3,), 1 / 3)
    # all alike: the first
    ids[1, 1], weights[1, 1] = torch.tensor([11, 21, 22]), torch.full((3,), 1 / 3)
    return Record(ids, weights, token, kind, torch.zeros(2, 5), torch.zeros(2, 5))


def test_three_ways(record):
    start = torch.tensor([3, 3])
    assert discretise(record, start) == discretise(record, start, "answer") == [[9, EOS], []]
    assert discretise(record, start, "stream") == [[7, 8, 4, 9, EOS], [10, 11, 12]]
    assert discretise(record, start, "argmax") == [[20, 8, 4, 9, EOS], [10, 11, 12]]


def test_heaviest_adds_up_repeats_and_leaves_the_record(record):
    before = record.ids.clone()
    assert heaviest(record)[0, 0] == 20 and heaviest(record)[1, 1] == 11
    assert torch.equal(record.ids, before)


def test_a_fresh_draw_is_refused_with_the_reason(record):
    with pytest.raises(ValueError, match=r"'fresh'.*not in the score.*biases"):
        discretise(record, torch.tensor([3, 3]), "fresh")
    with pytest.raises(ValueError, match=r"how='first' is unknown.*answer"):
        discretise(record, torch.tensor([3, 3]), "first")


def test_a_real_decode():
    config = softar.SoftConfig(
        "k-samples", {"k": 3}, top_k=None, budget=3, max_new_tokens=6, answer_temperature=1.0
    )
    rng = [torch.Generator().manual_seed(i) for i in range(4)]
    out = softar.generate(model_of(), torch.full((4, 2), BOS), config=config, rng=rng)
    answers = discretise(out.record, out.answer_start)
    assert answers == [row.tolist() for row in out.answers] and any(answers)
    streams = discretise(out.record, out.answer_start, "stream")
    assert [row[3:] for row in streams] == answers and all(len(row) > 3 for row in streams)
