"""What a cache does not allow, said by each who decodes before the work starts; and whose a cache
and a compiled call are."""

import pytest
import torch
from test_caches import IDS, net, plugged
from tiny import EOS, Forced, counted
from transformers import DynamicCache, LogitsProcessorList, StaticCache

from softar.looks import EVERY, every_of


@pytest.fixture(scope="module")
def llama():
    return net()


# -- a cache of the caller's


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_of_the_callers_holds_the_steps_and_no_more(llama, kind):
    """Rows end together before the length, where a late look would have gone on."""
    ends = LogitsProcessorList([Forced(IDS.shape[1], [[None, None, EOS]] * 3)])

    def cache():
        return kind(llama.config, max_cache_len=40) if kind is StaticCache else kind()

    own = cache()
    out = plugged(llama, past_key_values=own, logits_processor=ends)
    assert out.shape[1] == IDS.shape[1] + 3 and own.get_seq_length() == out.shape[1] - 1
    with counted(llama) as calls, pytest.raises(ValueError, match="a cache of the caller's"):
        plugged(llama, past_key_values=cache(), logits_processor=ends, look_every=2)
    assert not calls


def test_what_needs_each_step_gets_it_on_an_accelerator():
    gpu = torch.device("cuda")
    assert (
        every_of(None, gpu, "a cache of the caller's") == 1 and every_of(None, gpu, None) == EVERY
    )
