"""Prompt tuning in soft SFT (arXiv:2104.08691): new tokens before the prompts, and nothing else that
is trained."""

import contextlib
import copy
from functools import partial
from typing import NamedTuple

from peft import PeftConfig, TrainableTokensConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..defaults import config_of, own_config
from ..evaluate import prefixed_rows
from ..models import add_think_tokens
from ..models.think_tokens import only_rows, tables_of
from ..texts import CHATS


class Prefix(NamedTuple):
    """What stands before the prompts of a training."""

    text: str | None
    ids: tuple[
        int, ...
    ] = ()  # the rows that alone are trained; none: whatever else the options say
    adapter: PeftConfig | None = None  # that trains them; None: the tables themselves

    def before(self, rows, num_proc: int | None = None):
        """A data set, several by name, or None, with the text before each prompt of text, put there in
        num_proc processes."""
        if isinstance(rows, dict):
            return type(rows)({name: self.before(each, num_proc) for name, each in rows.items()})
        first = next(iter(rows)) if self.ids and rows is not None else {"prompt": None}
        has_chats = any(isinstance(first.get(name), list) for name in CHATS)
        if "prompt" not in first and not has_chats:
            raise ValueError(
                f"think_tokens={len(self.ids)} stand before prompts, and the rows have {[*first]}: give "
                "prompt and completion, or chats"
            )
        return prefixed_rows(rows, self.text, num_proc=num_proc)

    def adapted(
        self, model: nn.Module, is_split: bool = False
    ) -> tuple[nn.Module, list[nn.Parameter]]:
        """The model, with the adapter where there is one, of which nothing is trained but the rows;
        and the tables that have them, which must not decay. is_split: by FSDP or DeepSpeed."""
        if not self.ids:
            return model, []
        if self.adapter is None and is_split:
            raise ValueError(
                f"think_tokens={len(self.ids)}: FSDP and DeepSpeed split the tables, of which only these rows "
                "are to move: give --use_peft, in Python peft_config=TrainableTokensConfig()"
            )
        if self.adapter is None:
            return model, [module.weight for _, module in tables_of(model)]
        model = get_peft_model(model, self.adapter)
        # of a grown table PEFT would save all
        model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
        return model, []

    def alone(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """While nothing but the rows is trained; an adapter sees to that by itself."""
        has_rows = self.ids and self.adapter is None
        return only_rows(model, self.ids) if has_rows else contextlib.nullcontext()


def prefix_of(model, tokenizer, args, others: dict) -> Prefix:
    """New tokens where the options ask for them, which grow model and tokenizer; else the prefix
    that the model has been trained with.

    others: arguments of TRL's trainer. Of new tokens it does not get the peft_config, a
        TrainableTokensConfig() where the rows are to be an adapter: it takes none of an output layer,
        as its own loss would not see it.
    """
    n = args.think_tokens
    if not n:
        read = own_config if isinstance(model, str) else config_of
        own = read(model, args.soft_mixer)
        return Prefix(None if own is None else own.prompt_prefix)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"think_tokens={n}: model is a {type(model).__name__}, give one as softar.load opens it, an "
            "adapter merged"
        )
    if args.chat_template_path is not None:
        raise ValueError(
            f"chat_template_path={args.chat_template_path!r} would replace the template that has the think "
            "tokens: set tokenizer.chat_template before"
        )
    adapter = others.pop("peft_config", None)
    if adapter is not None:
        _check_adapter(model, adapter, n)
    text, ids = add_think_tokens(model, tokenizer, n, tags=args.think_tags, seed=args.seed)
    if adapter is not None:
        adapter = copy.copy(adapter)
        adapter.task_type, adapter.token_indices = "CAUSAL_LM", [*ids]
        adapter.target_modules = [name for name, _ in tables_of(model)]
    return Prefix(text, ids, adapter)


def _check_adapter(model: PreTrainedModel, adapter: PeftConfig, n: int) -> None:
    if not isinstance(adapter, TrainableTokensConfig):
        raise ValueError(
            f"think_tokens={n} trains rows alone: give peft_config=TrainableTokensConfig(), not "
            f"{type(adapter).__name__}"
        )
    outer = model.get_output_embeddings()
    if isinstance(outer, nn.Linear) and outer.bias is not None:
        raise ValueError(
            f"think_tokens={n}: the output layer of {type(model).__name__} has a bias, which PEFT's trainable "
            "tokens drop: train them without PEFT"
        )
