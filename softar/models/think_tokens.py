"""New tokens that say "now softly": they stand before a prompt, and their rows of the embeddings are
trained while all else is frozen.

That is prompt tuning (arXiv:2104.08691) with words of the vocabulary in the place of virtual ones,
so that whatever reads tokens reads them. Prefix tuning (arXiv:2101.00190) trains as many positions
of every layer, for which no token could stand.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import check_least, check_values

WORD = "<|think_{}|>"
TAGS = ("<think>", "</think>")  # as Qwen3 and DeepSeek-R1 have them
# What a chat template gets in front: the words go before what each user says. There is no loop over
# the parts of a message, by which vLLM would take the template for one of pictures. It ends with a
# line break, which transformers' Jinja drops behind a block, so that the template begins on a line
# of its own.
BEFORE_USERS = """\
{%- set softar = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.role == 'user' and message.content is string and 'WORDS' not in message.content -%}
{%- set message = dict(message, content='WORDS' + message.content) -%}
{%- elif message.role == 'user' and message.content and message.content is not string -%}
{%- set message = dict(message, content=[{'type': 'text', 'text': 'WORDS'}] + message.content) -%}
{%- endif -%}
{%- set softar.messages = softar.messages + [message] -%}
{%- endfor -%}
{%- set messages = softar.messages %}
"""


class ThinkTokens(NamedTuple):
    text: str  # what stands before a prompt
    ids: tuple[int, ...]  # of all new tokens, those of the tags last


def add_think_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    *,
    tags: bool = False,
    seed: int = 0,
) -> ThinkTokens:
    """Grow the vocabulary of model and tokenizer, in place, by n tokens that stand before prompts.

    A chat template puts them before the content of each user's message from now on. Before a prompt
    of text whoever decodes puts them, as `prompt_prefix` of a SoftConfig says. Between a prompt and
    its answer they would push apart what a frozen model reads together.

    A new row of an input embedding is that of another token; one of an output layer, tied or not,
    is the mean of the others, so that its token is less likely than the average one.

    Args:
        model: as `softar.load` opens it, not wrapped by PEFT.
        tags: `<think>` and `</think>` become tokens, too.
        seed: chooses the tokens whose rows are taken; the global random state stays as it is.

    Raises:
        ValueError: for a tokenizer that has such tokens, and n < 1.
    """
    check_values(add_think_tokens, model=model, tokenizer=tokenizer, n=n, tags=tags, seed=seed)
    check_least({"n": n, "seed": seed}, n=1, seed=0)
    words = [WORD.format(i) for i in range(1, n + 1)]
    own = tokenizer.get_vocab()
    if words[0] in own:
        raise ValueError(
            f"think_tokens={n}: the tokenizer has {words[0]!r} already, of an earlier training: load its "
            "folder without think_tokens, or start from its base"
        )
    if tags and (there := [tag for tag in TAGS if tag in own]):
        raise ValueError(
            f"think_tags=True: the tokenizer has {' and '.join(there)} already; leave it out"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    ordinary = sorted(i for i in {*own.values()} - {*tokenizer.all_special_ids} if i < rows)
    tokenizer.add_tokens([_token(word, special=True) for word in words])
    tokenizer.add_tokens([_token(tag, special=False) for tag in TAGS] if tags else [])
    ids = tokenizer.convert_tokens_to_ids([*words, *(TAGS if tags else ())])
    assert not {*ids} & {*own.values()}
    if max(ids) >= rows:  # else the tables have rows to spare
        with torch.random.fork_rng():
            model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    _set_rows(model, ordinary, ids, torch.Generator().manual_seed(seed))
    text, templates = "".join(words), tokenizer.chat_template
    if isinstance(templates, dict):  # by name
        templates = {name: before_users(each, text) for name, each in templates.items()}
    elif templates is not None:
        templates = before_users(templates, text)
    tokenizer.chat_template = templates
    return ThinkTokens(text, tuple(ids))


def before_users(template: str, text: str) -> str:
    """The chat template, with `text` before each user's message that does not hold it."""
    return BEFORE_USERS.replace("WORDS", text) + template


def tables_of(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Name and module of the input embedding and, where it has a table of its own, of the output
    layer."""
    names = {id(module): name for name, module in model.named_modules()}
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    has_own = outer is not None and outer.weight is not inner.weight
    return [(names[id(module)], module) for module in ([inner, outer] if has_own else [inner])]


@contextlib.contextmanager
def only_rows(model: PreTrainedModel, ids: tuple[int, ...]) -> Iterator[None]:
    """Freeze all of a model but these rows of its tables meanwhile: the other rows of those get a
    gradient of 0, so that an optimiser without weight decay leaves them to the bit."""
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    rows = torch.tensor(ids)

    def of_rows(gradient: Tensor) -> Tensor:
        here = rows.to(gradient.device)
        return torch.zeros_like(gradient).index_copy(0, here, gradient[here])

    tables = [module.weight.requires_grad_(True) for _, module in tables_of(model)]
    hooks = [table.register_hook(of_rows) for table in tables]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.requires_grad_(False)
        for parameter in learns:
            parameter.requires_grad_(True)


def _token(word: str, *, special: bool) -> AddedToken:
    return AddedToken(word, lstrip=False, rstrip=False, normalized=False, special=special)


@torch.no_grad()
def _set_rows(model, ordinary: list[int], ids: list[int], rng: torch.Generator) -> None:
    chosen = torch.randint(len(ordinary), (len(ids),), generator=rng).tolist()
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    inner.weight[ids] = inner.weight[[ordinary[i] for i in chosen]]
    for tensor in _per_token(outer):  # that of the input, where they are tied
        tensor[ids] = tensor[ordinary].float().mean(0).to(tensor.dtype)


def _per_token(layer: nn.Module | None) -> Iterator[Tensor]:
    if layer is not None:
        yield layer.weight
    if isinstance(layer, nn.Linear) and layer.bias is not None:
        yield layer.bias
