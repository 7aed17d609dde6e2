"""What only a GPU shows. Skipped with a reason where there is none."""

import pytest
import torch
from tiny import PROMPTS, left_padded, model_of

import softar
from softar import SoftConfig

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_equals_generate(dtype):
    model = model_of("llama", dtype=dtype).cuda()
    ids, mask = (x.cuda() for x in left_padded(PROMPTS))
    expected = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False
    )
    out = softar.generate(model, ids, mask, config=SoftConfig(mixer="hard", max_new_tokens=12))
    assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize("mixer", ["soft", "gumbel", "k-samples"])
def test_a_cpu_generator_draws_the_same_on_the_gpu(mixer):
    ids, mask = left_padded(PROMPTS)
    config = SoftConfig(mixer=mixer, max_new_tokens=4)
    here = softar.generate(
        model_of("llama"), ids, mask, config=config, rng=torch.Generator().manual_seed(0)
    )
    model = model_of("llama").cuda()
    there = softar.generate(
        model, ids.cuda(), mask.cuda(), config=config, rng=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(
        there.record.weights.cpu(), here.record.weights, rtol=1e-3, atol=1e-4
    )


def test_a_step_synchronises_once():
    """Anything beyond the one look at the flags would stall the launch of the next forward."""
    model = model_of("llama").cuda()
    ids, mask = (x.cuda() for x in left_padded(PROMPTS))
    config = SoftConfig(max_new_tokens=8, budget=4)

    def syncs(steps):
        settings = dict(config=SoftConfig(**{**vars(config), "max_new_tokens": steps}))
        softar.generate(model, ids, mask, **settings)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            softar.generate(model, ids, mask, **settings)
        return sum(e.count for e in profiler.key_averages() if e.key == "aten::_local_scalar_dense")

    assert syncs(8) == syncs(4)  # tolist() of the flags is a copy; no .item() besides
