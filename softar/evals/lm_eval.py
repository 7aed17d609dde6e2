"""lm-evaluation-harness with soft decoding: the model `softar`, and the command `softar-eval`.

    softar-eval --model softar --model_args pretrained=Qwen/Qwen3-0.6B,mixer=gumbel,think_end='</think>',budget=256 \\
        --tasks gsm8k --batch_size 16
    softar-eval --model softar-diffusion --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,block_length=32 --tasks gsm8k

The command is lm-eval's own with these two models in it; importing this module is what puts `softar` there. Every
field of SoftConfig is a model_arg. Generation is soft, and what a task sees is the answer after the thought;
log-likelihoods are those of the discrete model, behind its prompt_prefix (but for rolling ones, of whole texts).
"""

import copy
import dataclasses
import hashlib
import logging
import os
import sys
from collections import Counter
from importlib import import_module

import torch
from torch import Tensor

from .. import guard
from ..config import SoftConfig, renamed
from ..decode import generate
from ..decoders.card import describe, open_model
from ..decoders.options import check_options
from ..decoders.soft import decoder_name
from ..decoders.stop import StopStrings
from ..defaults import recall
from ..evaluate import answer_ids, prefixed
from ..mixers import mk_mixer
from ..models import load
from .costs import Costs

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import simple_parse_args_string
except ImportError as error:
    raise ImportError(f"evaluation needs lm-eval: pip install softar[eval] ({error})") from error

# What of HFLM's own arguments has a meaning for a model that is already open, and what goes to
# `load`.
HARNESS_LENGTH = 256  # lm-eval's own, in tokens
HARNESS = (
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)
LOADING = "attn_implementation device device_map dtype gguf_file revision subfolder".split()
SPEED = ("batch_size", "device", "device_map", "logits_cache", "max_batch_size")
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
NO_TASKS = ("Tasks not found", "No tasks specified")  # how lm-eval's errors about --tasks begin

# kind of model -> whose log-likelihoods are given
LIKELIHOODS = {
    "autoregressive": "those of the discrete model",
    "diffusion": "the Monte-Carlo bound of the model without guidance, mixtures or schedule",
}
# kind of model -> what lm-eval calls it
LABELS = {"autoregressive": "softar", "diffusion": "softar-diffusion"}


class BadArgument(ValueError):
    """What the user gave is wrong: `softar-eval` prints the one line and no traceback."""


class LoadedLM(HFLM):
    """HFLM around a model that softar opens, by any name it knows; every model_arg is checked.

    A class of it says `settings` (what model_args say of the generation), `decoding` (all of its
    configuration, as JSON has it), `decoder` (its name) and `is_soft`; also `stated`, where
    model_args may say something of the model.
    """

    settings: dict
    stated: dict = {}  # what model_args say of the model itself
    decoding: dict
    decoder: str
    is_soft: bool

    def __init__(
        self, name: str, kind: str, opener, harness: dict, loading: dict, seed: int | None
    ):
        """kind: that the model must be of, a key of LABELS. opener: (name, **loading) -> model,
        tokenizer. seed: of every draw; None is what lm-eval's --seed set."""
        self.kind = kind
        # what else model_args say that may change an answer
        self.opened = {k: v for k, v in (harness | loading).items() if k not in SPEED}
        shared = int(os.environ.get("WORLD_SIZE", 1)) > 1
        if shared and str(loading.get("device")).startswith("cuda"):
            del loading["device"]  # each process takes its own
        try:
            loading = {"dtype": "auto"} | loading
            self.card = describe(name)
            if loading.get("kind") is not None:  # whatever its folder looks like
                self.card = dataclasses.replace(self.card, kind=kind)
            model, tokenizer = open_model(
                self.card, kind, LABELS[kind], lambda: opener(name, **loading)
            )
        except ValueError as error:
            raise BadArgument(error) from error
        # It warns that a model which is already open is not moved, split or shared by it.
        logger = logging.getLogger("lm_eval.models.huggingface")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            super().__init__(model, tokenizer=tokenizer, backend="causal", **harness)
        finally:
            logger.setLevel(level)
        self.seed, self.seen = seed, Counter()
        self.costs: dict[str, Costs] = {}  # by task
        self.asked_task = ""  # whose answers are decoded
        self.has_chosen = False  # a log-likelihood was asked for
        if shared:
            self._share()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None):
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None):
        """--model_args override lm-eval's own options; of these --device is cuda:0 by default, with
        or without a GPU, so that it counts only where it fits."""
        others = {k: v for k, v in (additional_config or {}).items() if v is not None}
        has_gpu = torch.cuda.is_available() and "device_map" not in arg_dict
        if str(others.get("device")).startswith("cuda") and not has_gpu:
            del others["device"]
        return cls(**others | arg_dict)

    def _share(self) -> None:
        """Under accelerate launch or torchrun each process takes its part of the requests."""
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank, self._world_size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Task by task, so that each has its own costs."""
        texts: list[str | None] = [None] * len(requests)
        for task in dict.fromkeys(request.task_name for request in requests):
            where = [i for i, request in enumerate(requests) if request.task_name == task]
            self.asked_task = task or ""
            answers = super().generate_until([requests[i] for i in where], disable_tqdm)
            for i, text in zip(where, answers, strict=True):
                texts[i] = text
        return texts

    def count(self, forwards: list[float], tokens: int, out) -> None:
        """Add a batch to the costs of the task. out: of the decoder."""
        cost = self.costs.setdefault(self.asked_task, Costs())
        cost.add(forwards, out.token_forwards, tokens, out.seconds)

    def note_likelihoods(self) -> None:
        """Say once that what shapes the generation leaves a log-likelihood as it is."""
        names = [name for name in self.settings if name != "prompt_prefix"]
        if not self.has_chosen and names:
            logging.getLogger("lm_eval").warning(
                f"softar: model_args {names} shape what is generated; log-likelihoods, and so "
                f"answers of multiple choice, are the same without: {LIKELIHOODS[self.kind]}"
            )
        self.has_chosen = True

    def get_model_info(self) -> dict:
        """With all that makes the numbers what they are, under "softar" in the results' config."""
        own = dict(
            model=self.card.name,
            kind=self.kind,
            device=str(self.model.device),  # lm-eval's own says what was asked for
            decoder=self.decoder,
            is_soft=self.is_soft,
            settings=self.opened | self.stated | self.settings,
            decoding=self.decoding,
            seed=self.seed,
            costs={task: cost.row() for task, cost in self.costs.items()},
        )
        if self.has_chosen:
            own["likelihoods"] = LIKELIHOODS[self.kind]
        return super().get_model_info() | {"softar": own}

    def generator(self, *key) -> torch.Generator:
        """A generator for one request, known by `key`: neither the batch size, nor the order, nor
        the number of processes changes what it draws. The second time that a request is asked it
        draws other numbers."""
        request = hashlib.sha256(repr(key).encode()).digest()
        self.seen[request] += 1
        seed = torch.initial_seed() if self.seed is None else self.seed
        digest = hashlib.sha256(repr((seed, self.seen[request])).encode() + request).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def generators(self, context: Tensor, mask: Tensor) -> list[torch.Generator]:
        """One for each row of a left-padded batch, context and mask [B, P]."""
        return [self.generator(*row[keep.bool()].tolist()) for row, keep in zip(context, mask)]

    def padded(self, context: Tensor, answers: list[list[int]]) -> Tensor:
        """The form in which HFLM takes generated text: [B, P + T], padded on the right."""
        width = max(map(len, answers))
        rows = [
            answer + [self.tokenizer.pad_token_id] * (width - len(answer)) for answer in answers
        ]
        return torch.cat(
            [context, torch.tensor(rows, dtype=context.dtype, device=context.device)], 1
        )


@register_model("softar")
class SoftarLM(LoadedLM):
    """An autoregressive model that thinks softly; as `--model_args`:

    pretrained or model: what softar.load takes (a name of softar.MODELS, a folder, an adapter, a
    GGUF file, a hub id). seed: of every draw; by default what --seed sets. Every field of
    SoftConfig; a soft_config.json beside the model says what the rest is. max_new_tokens counts
    only for tasks that set no max_gen_toks, which covers thought and answer. Arguments of HFLM in
    HARNESS, and those of `load` in LOADING.

    A task that samples (do_sample, temperature, top_p, ...) samples the discrete answer that way.
    """

    def __init__(self, pretrained=None, *, model=None, seed=None, **options):
        name = model_name(pretrained, model)
        harness, loading, changes = split_args("softar", SoftConfig, options)
        super().__init__(name, "autoregressive", load, harness, loading, seed)
        try:
            self.default = recall(self.model, self.tokenizer)
            changes = check_options(SoftConfig, "softar", renamed(changes))
            # where neither model nor task says how long, lm-eval's own default
            length = {} if self.default.kind == "own" else {"max_new_tokens": HARNESS_LENGTH}
            self.soft = self._configured(length | changes)
        except ValueError as error:
            raise BadArgument(error) from error
        self.changes = changes  # what model_args say, which overrides a task's arguments
        self.settings = {name: value for name, value in changes.items() if value != {}}
        self.decoder, self.is_soft = decoder_name(self.soft), self.soft.is_soft
        self.decoding = self.soft.as_dict()

    def _configured(self, fields: dict) -> SoftConfig:
        return self.default.changed(fields).resolve(self.tokenizer)

    @property
    def max_gen_toks(self) -> int:
        return self.soft.max_new_tokens

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, **kwargs):
        """Of contexts to go on from."""
        strings = [prefixed(string, self.soft.prompt_prefix) for string in strings]
        ids, mask = super().tok_batch_encode(strings, padding_side, left_truncate_len, **kwargs)
        is_cut = self.soft.prompt_prefix is not None and ids.shape[1] == left_truncate_len
        return self._headed(ids) if is_cut else ids, mask

    def _encode_pair(self, context, continuation) -> tuple[list[int], list[int]]:
        context = prefixed(context, self.soft.prompt_prefix)
        context, continuation = super()._encode_pair(context, continuation)
        room = self.max_length + 1 - len(continuation)
        if self.soft.prompt_prefix is not None and len(context) > room:
            context = self._headed(torch.tensor([context[-room:]]))[0].tolist()
        return context, continuation

    def _headed(self, ids: Tensor) -> Tensor:
        """Contexts [B, P] that lm-eval has cut on the left, the prefix first where it was cut off."""
        rows = guard.lacking(ids, self.soft.prompt_prefix, self.tokenizer)
        head = torch.tensor(self.tok_encode(self.soft.prompt_prefix))
        if rows and len(head) >= ids.shape[1]:
            raise BadArgument(
                f"prompt_prefix takes {len(head)} of {ids.shape[1]} tokens that a context may have: raise max_length"
            )
        ids[rows, : len(head)] = head
        return ids

    def _model_generate(self, context, max_length, stop, attention_mask=None, **asked) -> Tensor:
        """context [B, P], padded on the left -> [B, P + T]: the context and the answer."""
        config, settings = self._settings(asked, max_length - context.shape[1])
        criterion = StopStrings(self.tokenizer, stop, context.shape[1], config)
        out = generate(
            self.model,
            context,
            attention_mask,
            config=config.changed(prompt_prefix=None),  # the ids have it
            rng=self.generators(context, attention_mask),
            tokenizer=self.tokenizer,
            stopping_criteria=[criterion],
            generation_config=settings,
        )
        self.count(out.row_forwards.double().tolist(), int(out.num_tokens.sum()), out)
        # white space beside a tag would be cut at a task's "\n\n", and all behind it
        return self.padded(context, answer_ids(out, self.tokenizer, space=False))

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        self.note_likelihoods()
        if self.soft.prompt_prefix is not None:  # what has no context is not encoded as a pair
            requests = [
                (r[0], *self._encode_pair(*r[0])) if r[0] and r[0][0] == "" else r for r in requests
            ]
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _settings(self, asked: dict, max_new_tokens: int):
        """A task's generation arguments -> SoftConfig, GenerationConfig. The user's model_args
        override the task's."""
        asked = dict(asked)
        samples, how = asked.pop("do_sample", False), {k: asked.pop(k, None) for k in SAMPLING}
        try:
            config = self._configured(self.changes | {"max_new_tokens": max_new_tokens})
            if samples and how["temperature"] != 0:  # which is greedy
                how |= {"temperature": how["temperature"] or 1.0, "top_k": how["top_k"] or None}
                config = config.changed(**self._sampling(config, how))
        except ValueError as error:
            raise BadArgument(error) from error
        settings = copy.deepcopy(self.model.generation_config)
        if unknown := settings.update(**asked):
            raise BadArgument(
                f"gen_kwargs {sorted(unknown)} are unknown: give fields of GenerationConfig"
            )
        return config, settings

    def _sampling(self, config: SoftConfig, how: dict) -> dict:
        name = "answer_temperature" if config.has_answer else "temperature"
        if self.changes.get(name) == 0:  # the user's text is greedy, and has no filters
            return {}
        if config.has_answer:
            return {f"answer_{k}": v for k, v in how.items() if f"answer_{k}" not in self.changes}
        if mk_mixer(config.mixer).single:
            filters = {k: v for k, v in how.items() if k not in self.changes}
            return {"mixer_args": {"sample": True}} | filters
        raise BadArgument(
            f"gen_kwargs temperature={how['temperature']} samples a discrete answer, and with mixer={config.mixer!r} "
            "the whole text is the thought: give model_args budget= or think_end=, or --gen_kwargs do_sample=False"
        )


def model_name(pretrained: str | None, model: str | None) -> str:
    if (pretrained is None) == (model is None):
        raise BadArgument(
            f"model_args pretrained={pretrained!r}, model={model!r}: give one of them, the model"
        )
    return str(pretrained if model is None else model)


def split_args(
    label: str, config, options: dict, also: tuple[str, ...] = ()
) -> tuple[dict, dict, dict]:
    """model_args -> those of HFLM, of `load`, and fields of the dataclass `config`, together with
    those named in `also`."""
    fields = {f.name for f in dataclasses.fields(config) if f.repr} | {*also}
    names = {*HARNESS, *LOADING, *fields, "pretrained", "model", "seed"}
    if unknown := sorted(set(options) - names):
        raise BadArgument(
            f"model_args {unknown} are unknown to --model {label}; known: {', '.join(sorted(names))}"
        )
    parts = [
        {k: v for k, v in options.items() if k in names} for names in (HARNESS, LOADING, fields)
    ]
    for name in ("max_batch_size", "max_length"):
        if parts[0].get(name, 0) is None:
            del parts[0][name]
    return tuple(parts)


def with_device(argv: list[str]) -> list[str]:
    """Where there is no GPU, lm-eval's default, cuda:0, would be what the results say."""
    options = {arg.split("=")[0] for arg in argv}
    if "--model" not in options or options & {"--device", "--config"} or torch.cuda.is_available():
        return argv
    return [*argv, "--device", "cpu"]


def main():
    """lm-eval's command with softar's models. A wrong argument is one line and exit status 2."""
    sys.argv = with_device(sys.argv)
    import_module("softar.diffusion.lm_eval")  # by name: softar imports nothing of softar.diffusion
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ValueError as error:
        message = str(error)
        if message.startswith(NO_TASKS):
            message = f"{message.rstrip('.')}; `softar-eval ls tasks` lists all there are"
        elif not isinstance(error, BadArgument):
            raise
        print(f"softar-eval: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "\nsoftar-eval: interrupted; with --use_cache FILE the next call keeps what is done",
            file=sys.stderr,
        )
        sys.exit(130)
