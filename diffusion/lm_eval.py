"""lm-evaluation-harness with masked diffusion: the model `softar-diffusion`. Importing this module
registers it.

Generation is `denoise`; log-likelihoods are the Monte-Carlo bound of
`softar.diffusion.losses.log_likelihood`.
"""

import dataclasses

import torch
from lm_eval.api.registry import register_model
from torch import Tensor
from tqdm import tqdm

from softar.checks import check_least, check_values
from softar.decoders.options import check_options
from softar.evals.lm_eval import SAMPLING, BadArgument, LoadedLM, model_name, split_args
from softar.mixers import Rng
from softar.models import room_of

from .config import DenoiseConfig
from .decoders import forwards_of, name_of
from .folder import STATED, split_stated
from .knobs import gather_knobs
from .loop import denoise, first_end, longest_prompt
from .losses import log_likelihood
from .models import load
from .net import facts
from .schedules import SCHEDULE_KNOBS


@dataclasses.dataclass(frozen=True)
class Bound:
    """How a log-likelihood is estimated."""

    samples: int = 128  # Monte-Carlo samples
    samples_batch: int = 32  # of them in a forward
    # Whether to find out if greedy decoding (the surest token in each forward, as LLaDA's) gives
    # the continuation; False saves its forwards, one a token, where no metric asks
    check_greedy: bool = True

    def __post_init__(self):
        check_least(self, samples=1, samples_batch=1)


BOUND = tuple(field.name for field in dataclasses.fields(Bound))


@register_model("softar-diffusion")
class SoftarDiffusionLM(LoadedLM):
    """A masked-diffusion model; as `--model_args`:

    pretrained or model: what softar.diffusion.load takes. seed: of every draw, by default what
    --seed sets; with parity= a batch has one generator, elsewhere each row its own. Every field of
    DenoiseConfig, and the knobs of schedules. Without gen_length a task's max_gen_toks is how many
    tokens are generated, rounded up to whole blocks and cut again; with it, it is gen_length. Every
    field of Bound. What a folder does not say of its model, by the names in STATED. Arguments of
    HFLM and of `load` as for `softar`; there is no batch_size=auto.
    """

    def __init__(self, pretrained=None, *, model=None, seed=None, batch_size=1, **options):
        name = model_name(pretrained, model)
        also = (*BOUND, *SCHEDULE_KNOBS, *STATED)
        harness, loading, options = split_args("softar-diffusion", DenoiseConfig, options, also)
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise BadArgument(
                f"batch_size={batch_size!r}: softar-diffusion finds none by itself; give a number"
            )
        bound = {k: options.pop(k) for k in BOUND if k in options}
        self.stated = {k: v for k, v in options.items() if k in STATED}
        stated, options = split_stated(options)
        try:
            options = check_options(DenoiseConfig, "softar-diffusion", options, also=SCHEDULE_KNOBS)
            options = gather_knobs(options, "schedule_args", SCHEDULE_KNOBS)
            self.settings = {name: value for name, value in options.items() if value != {}}
            self.how = DenoiseConfig(**({"gen_length": 0} | options))
            self.bound = Bound(**check_options(Bound, "softar-diffusion", bound))
            check_values(load, **stated)
        except ValueError as error:
            raise BadArgument(error) from error
        harness["batch_size"] = int(batch_size)
        super().__init__(name, "diffusion", load, harness, loading | stated, seed)
        self.known = facts(self.model)
        self.decoder = name_of(self.how.as_trained(self.known))
        self.is_soft = self.decoder != "hard"
        fields = {f.name: getattr(self.how, f.name) for f in dataclasses.fields(self.how)}
        self.decoding = fields | {"soften": self.decoder} | dataclasses.asdict(self.bound)

    @property
    def max_gen_toks(self) -> int:
        return self.how.gen_length or 256

    def _of_length(self, asked: int) -> DenoiseConfig:
        """asked: tokens that a task wants at most."""
        block = self.how.block_length or 1
        length = self.how.gen_length or -(-asked // block) * block
        return dataclasses.replace(self.how, gen_length=length)

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, **kwargs):
        """Of contexts to go on from, cut on the left to what the tokens that are decoded leave:
        whole blocks, or gen_length, where lm-eval counts those that the task asks for."""
        if left_truncate_len is not None:
            most = min(self.max_length, room_of(self.model, trained=True) or self.max_length)
            try:
                how = self._of_length(self.max_length - left_truncate_len)
            except ValueError as error:
                raise BadArgument(error) from error
            left_truncate_len = longest_prompt(self.known, how, most)
            if left_truncate_len < 1:
                raise BadArgument(
                    f"gen_length={how.gen_length} leaves no room for a context in the model's {most} positions: give "
                    f"a smaller one, or the task a smaller max_gen_toks"
                )
        return super().tok_batch_encode(strings, padding_side, left_truncate_len, **kwargs)

    def _model_generate(self, context, max_length, stop, attention_mask=None, **asked) -> Tensor:
        """context [B, P], padded on the left -> [B, P + T]: the context and what was generated, up
        to its end."""
        self._check_asked(asked)
        room = max_length - context.shape[1]
        try:
            out = denoise(
                self.model,
                context,
                attention_mask,
                config=self._of_length(room),
                rng=self._rng(context, attention_mask),
            )
        except ValueError as error:
            raise BadArgument(error) from error
        keep = self.how.gen_length or room
        # HFLM decodes without special tokens, so that it would not see these in the text
        special = self.tokenizer.convert_tokens_to_ids(
            [s for s in stop if s in self.tokenizer.all_special_tokens]
        )
        own = facts(self.model).end_ids if self.how.end_ids is None else self.how.end_ids
        ends = {*own, *special}
        answers = [row[: first_end(row[:keep], ends)] for row in out.completions.tolist()]
        self.count(forwards_of(out), sum(map(len, answers)), out)
        return self.padded(context, answers)

    def _rng(self, context: Tensor, mask: Tensor | None) -> Rng:
        """One generator for each row; for a public sampler, whose rows share their draws, for the
        batch."""
        if self.how.parity is None:
            return self.generators(context, mask)
        return self.generator(*context.flatten().tolist())

    def _check_asked(self, asked: dict) -> None:
        """Raise BadArgument for what a task asks of a sampler: here model_args say how to denoise."""
        is_greedy = not self.how.temperature and self.known.mask_id is not None
        if asked.get("do_sample") and asked.get("temperature") != 0 and is_greedy:
            raise BadArgument(
                f"gen_kwargs do_sample=True, and the model is denoised greedily: give model_args temperature=, or "
                f"--gen_kwargs do_sample=False (asked: {asked})"
            )
        if unknown := sorted(set(asked) - {*SAMPLING, "do_sample"}):
            raise BadArgument(
                f"gen_kwargs {unknown} mean nothing to softar-diffusion: give model_args"
            )

    def _loglikelihood_tokens(
        self, requests, disable_tqdm=False, override_bs=None
    ) -> list[tuple[float, bool]]:
        """(texts, context tokens, continuation tokens) -> (bound of its log-probability in nats, is
        it greedy)."""
        if self.known.mask_id is None:
            raise BadArgument(
                f"{self.known.family} has no mask token, and log-likelihoods are a bound by masks: "
                "choose tasks that generate"
            )
        self.note_likelihoods()
        out = []
        for texts, context, continuation in tqdm(
            requests, disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests"
        ):
            ids = torch.tensor(
                (context + continuation)[-self.max_length :], device=self.model.device
            )
            answer = torch.zeros_like(ids, dtype=torch.bool)
            answer[-len(continuation) :] = True
            try:
                bound = log_likelihood(
                    self.model,
                    ids,
                    answer,
                    samples=self.bound.samples,
                    batch_size=self.bound.samples_batch,
                    rng=self.generator(len(context), *context, *continuation),
                )
            except ValueError as error:
                raise BadArgument(error) from error
            scored = (bound, self.bound.check_greedy and self._is_greedy(ids, answer))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, scored)
            out.append(scored)
        return out

    def _is_greedy(self, ids: Tensor, answer: Tensor) -> bool:
        masked = ids.masked_fill(answer, self.known.mask_id)[None]
        out = denoise(self.model, masked, config=DenoiseConfig(gen_length=0, soften="hard"))
        return bool((out.sequences[0] == ids).all())
