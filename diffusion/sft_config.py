"""The options of diffusion SFT."""

from dataclasses import dataclass, fields

from trl import SFTConfig

from softar.checks import (
    Idle,
    check_choice,
    check_idle,
    check_least,
    check_types,
    fill,
    idle_options,
)
from softar.training import PlainSFTConfig, opt

from .duo import GaussianToDiscrete, tau_at
from .head import ALGORITHMS, SoftMaskHead
from .losses import NORMALISATIONS
from .masking import NOISES
from .net import Facts
from .uniform import UNIFORM_LOSSES

OBJECTIVES = ("masked", "uniform", "canvas")
# What options that act in some modes only are where they are left out
LEFT_OUT = dict(
    tau_start=1e-3,
    tau_end=1e-3,
    gamma_min=-3.5,
    gamma_max=-1.75,
    eval_steps_decoded=8,
    self_conditioning_prob=0.5,
)
# Of a head where neither an option nor the model says it
HEAD = dict(k=3, algorithm="top-k", scale=1e-6, centre=-0.75, steepness=20 / 3, temperature=1.0)
OF_MASKS = "softmasking_prob noise noise_level complementary on_policy_prob whole_answer packing"
OF_UNIFORM = "uniform_loss curriculum view_scale"
# what another objective has, and what to do about it
OF_OTHERS = {
    "masked": (OF_UNIFORM, "set objective='uniform', or leave it at"),
    "uniform": (OF_MASKS, "there are no masks to show or count, set it to"),
    "canvas": (
        f"{OF_MASKS} {OF_UNIFORM} normalise train_padding gradient_checkpointing",
        "a canvas has no masks, is filled with end tokens and reads what its encoder keeps; leave it at",
    ),
}
LEVELS = ("document", "block")

HEADLESS = Idle(
    "head_k head_algorithm head_scale head_centre head_steepness head_temperature head_learning_rate",
    lambda c: not c.softmasking_prob,
    "with softmasking_prob=0",
    "give a softmasking_prob",
)
IDLE = (
    Idle(
        "self_conditioning_prob",
        lambda c: c.objective != "canvas",
        "without a canvas",
        "set objective='canvas'",
    ),
    Idle(
        "tau_start tau_end gamma_min gamma_max",
        lambda c: not c.curriculum,
        "without a curriculum",
        "give one",
    ),
    Idle(
        "head_temperature",
        lambda c: c.softmasking_prob and c.head_algorithm == "top-k",
        "with head_algorithm='top-k'",
        "choose 'temperature'",
    ),
    Idle(
        "head_temperature",
        lambda c: c.softmasking_prob and c.head_algorithm is None and c.head_k is not None,
        "beside head_k, which is of another algorithm",
        "name a head_algorithm and drop one",
    ),
    Idle(
        "head_k",
        lambda c: c.softmasking_prob and c.head_algorithm == "temperature",
        "with head_algorithm='temperature', which mixes the whole vocabulary",
        "choose 'top-k'",
    ),
    Idle(
        "eval_steps_decoded",
        lambda c: c.eval_decode_rows == 0,
        "with eval_decode_rows=0, where nothing is decoded",
        "raise eval_decode_rows",
    ),
    Idle(
        "neftune_noise_alpha",
        lambda c: c.softmasking_prob or c.curriculum,
        "to the mixtures that are read in the place of tokens",
        "set softmasking_prob and curriculum to 0",
    ),
    Idle(
        "eos_token",
        lambda c: True,
        "to the model's facts, which are read before",
        "set the tokenizer's and the model's own",
    ),
    Idle(
        "average_tokens_across_devices",
        lambda c: True,
        "here, where targets are counted in all processes",
        "drop it",
    ),
)


@dataclass
class DiffusionSFTConfig(PlainSFTConfig):
    """TRL's SFTConfig plus the noise and the head. Without an accelerator it trains on the CPU in
    float32 by itself. With `packing` several documents stand in a row of `max_length` and do not see
    each other."""

    gradient_checkpointing: bool | None = opt(None, "Recompute activations to save memory.")
    objective: str = opt(
        "masked",
        "Noise to undo: 'masked' tokens, 'uniform'ly random ones (Duo), or a 'canvas' of these, of DiffusionGemma.",
    )
    self_conditioning_prob: float | None = opt(
        None,
        "Canvas: share of the rows that read what a first pass without gradient believed. Default: 0.5.",
    )
    uniform_loss: str = opt(
        "nelbo",
        "Uniform: 'nelbo', a bound on the likelihood (Duo), or 'symmetric_kl': no bound, and it trains the belief "
        "given the noisy token too, which the sampler then counts twice, so that samples are not quite the data's.",
    )
    view_scale: bool = opt(
        False,
        "Symmetric KL: weigh a row by (1 - alpha) / (V alpha + 1 - alpha), the share of noise in what is right, so "
        "that rows which copying solves count little.",
    )
    curriculum: float = opt(
        0.0, "Uniform: share of the training, from its start, on Gaussian soft tokens."
    )
    tau_start: float | None = opt(
        None, "Curriculum: temperature of the soft tokens at the start. Default: 0.001."
    )
    tau_end: float | None = opt(
        None,
        "Curriculum: temperature at its end, down to 1e-8; then the tokens are hard. Default: 0.001.",
    )
    gamma_min: float | None = opt(
        None,
        "Curriculum: log noise-to-signal ratio at t = 0. Default: -3.5, Duo's, for 30,000 tokens.",
    )
    gamma_max: float | None = opt(
        None,
        "Curriculum: the same at t = 1; the smaller the vocabulary the larger, see duo.py. Default: "
        "-1.75.",
    )
    noise: str = opt(
        "rate",
        "'rate': each token masked with probability t (LLaDA). 'share': t of the tokens (BERT).",
    )
    time_low: float = opt(0.0, "Least t.")
    time_high: float = opt(1.0, "Largest t.")
    noise_eps: float = opt(1e-3, "The rate is (1 - eps) t + eps; of 'uniform' it is (1 - eps) t.")
    noise_level: str = opt(
        "document",
        "What t is drawn for: each 'document', or each 'block' of it (Fast-dLLM v2, BD3LM), of block-causal models.",
    )
    antithetic: bool = opt(
        False,
        "Spread the t of a step evenly over their range, each uniform by itself (MDLM, BD3LM). An evaluation draws "
        "them one by one.",
    )
    complementary: bool = opt(
        False,
        "Read each row twice, with its masks and with masks where there were none, so that every token yields loss "
        "once (Fast-dLLM v2); with normalise='masks'.",
    )
    on_policy_prob: float = opt(
        0.0,
        "Share of the rows whose masks show the model's own most likely tokens, of a first pass without gradient "
        "(DMax's OPUT; 0.5 there).",
    )
    whole_answer: bool = opt(
        False,
        "Every token of the answer yields loss, those that show themselves too (DMax); with normalise='masks'.",
    )
    normalise: str = opt(
        "answer", "Weights of the loss: 'answer' (LLaDA's SFT), 'tokens' (pre-training), 'masks'."
    )
    train_padding: bool = opt(
        False,
        "Pad with end-of-text and train it as part of the answer: as LLaDA does, where how much of it there is depends "
        "on the longest row of a micro-batch; of block-causal models to the end of a row's last block (dllm's BD3LM).",
    )
    softmasking_prob: float = opt(
        0.0, "Share of the steps that read their rows twice; 0 is hard training."
    )
    head_algorithm: str | None = opt(
        None,
        "Soft masks: 'top-k', or 'temperature' over the whole vocabulary. Default, here and of the head's other "
        "numbers: those that the model was trained with; of a hard model top-k.",
    )
    head_k: int | None = opt(
        None, "Soft masks: tokens in a mixture, of 'top-k'. Default: the model's, else 3."
    )
    head_scale: float | None = opt(
        None, "Soft masks: scale at the start, in (0, 1). Default: the model's, else 1e-6."
    )
    head_centre: float | None = opt(
        None, "Soft masks: centre at the start, nats below 0. Default: the model's, else -0.75."
    )
    head_steepness: float | None = opt(
        None, "Soft masks: steepness at the start. Default: the model's, else 6.67."
    )
    head_temperature: float | None = opt(
        None,
        "Soft masks: temperature at the start, of 'temperature'. Default: the model's, else 1.",
    )
    head_learning_rate: float = opt(
        1e-2, "Soft masks: learning rate of the head, without weight decay."
    )
    eval_decode_rows: int = opt(
        256, "Held-out rows decoded for the accuracy of an evaluation; 0 for none."
    )
    eval_steps_decoded: int | None = opt(
        None,
        "Forwards in which an evaluation decodes a row, and as many more as its blocks take, or its canvases. "
        "Default: 8.",
    )

    def __post_init__(self):
        super().__post_init__()
        check_types(self, besides=SFTConfig)
        left_out = fill(self, LEFT_OUT)
        check_choice("noise", self.noise, NOISES)
        check_choice("noise_level", self.noise_level, LEVELS)
        check_choice("normalise", self.normalise, NORMALISATIONS)
        check_choice("head_algorithm", self.head_algorithm, (None, *ALGORITHMS))
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("uniform_loss", self.uniform_loss, UNIFORM_LOSSES)
        if not 0 <= self.time_low <= self.time_high <= 1:
            raise ValueError(
                f"time_low={self.time_low}, time_high={self.time_high}: need 0 <= low <= high <= 1"
            )
        if not 0 < self.noise_eps < 1:
            raise ValueError(f"noise_eps={self.noise_eps} must lie in (0, 1)")
        for name in ("softmasking_prob", "on_policy_prob", "self_conditioning_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        check_least(self, head_learning_rate=0, eval_decode_rows=0, eval_steps_decoded=1)
        self._check_template()
        self._check_objective()
        self._check_uniform()
        self._check_masks()
        check_idle(self, IDLE, left_out)
        if self.softmasking_prob:
            # which algorithm the model has is not known yet
            self.head(
                learnt=None if self.head_temperature is None else {"algorithm": "temperature"}
            )

    @property
    def idle_head(self) -> list[str]:
        """The options of a head that is not there. A file shared by rows with and without one may
        name them, so that they are no error but told of when training begins."""
        return [name for name, *_ in idle_options(self, [HEADLESS])]

    def _check_template(self):
        path = self.chat_template_path
        if path is not None and not str(path).endswith((".jinja", ".j2")):
            raise ValueError(
                f"chat_template_path={path!r}: tokens of another tokenizer are not there, give a .jinja file"
            )

    def _check_objective(self):
        """Raise ValueError for options of another objective."""
        default = {field.name: field.default for field in fields(self)}
        names, remedy = OF_OTHERS[self.objective]
        for name in names.split():
            if getattr(self, name) != default[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not go with objective={self.objective!r}: {remedy} "
                    f"{default[name]!r}"
                )

    def _check_uniform(self):
        if not 0 <= self.curriculum <= 1:
            raise ValueError(
                f"curriculum={self.curriculum} must lie in [0, 1]: a share of the training"
            )
        if self.objective == "masked" and self.noise == "share" and self.normalise != "masks":
            raise ValueError(
                f"noise='share' does not go with normalise={self.normalise!r}, which weighs by the rate: set "
                f"normalise='masks', or noise='rate'"
            )
        if self.objective == "uniform" and self.normalise == "masks":
            raise ValueError(
                "normalise='masks' does not go with objective='uniform': set it to 'tokens' or 'answer'"
            )
        if self.view_scale and self.uniform_loss == "nelbo":
            raise ValueError(
                "view_scale=True does not go with uniform_loss='nelbo', which has its own weights: set "
                "uniform_loss='symmetric_kl'"
            )
        if self.curriculum:
            tau_at(0.0, self.tau_start, self.tau_end, self.curriculum)
            self.gaussian(2)

    def _check_masks(self):
        if self.on_policy_prob and self.softmasking_prob:
            raise ValueError(
                f"on_policy_prob={self.on_policy_prob} shows tokens where softmasking_prob={self.softmasking_prob} "
                f"shows mixtures: set one of them to 0"
            )
        for name in ("complementary", "whole_answer"):
            if getattr(self, name) and self.normalise != "masks":
                raise ValueError(
                    f"{name}=True does not go with normalise={self.normalise!r}, which weighs by the rate: set "
                    f"normalise='masks'"
                )

    def gaussian(self, vocab_size: int) -> GaussianToDiscrete:
        """The schedule of the curriculum."""
        return GaussianToDiscrete(vocab_size, self.gamma_min, self.gamma_max)

    def head(
        self, make: type[SoftMaskHead] = SoftMaskHead, learnt: dict | None = None
    ) -> SoftMaskHead:
        """The head at the start. learnt: the `soften_args` that the model was trained with, which hold
        where no option says otherwise, and not for another algorithm. Raises ValueError for numbers
        that nothing can be learnt from, or that do nothing with the model's algorithm."""
        named = {name: getattr(self, f"head_{name}") for name in HEAD}
        named = {name: value for name, value in named.items() if value is not None}
        learnt = learnt or {}
        algorithm = named.get("algorithm", learnt.get("algorithm", HEAD["algorithm"]))
        idle = {"top-k": "temperature", "temperature": "k"}[algorithm]
        if idle in named:
            raise ValueError(
                f"head_{idle}={named[idle]} does nothing with the model's head, or that of a hard model, of "
                f"{algorithm!r}: leave it out, or give head_algorithm"
            )
        if learnt.get("algorithm") != algorithm:
            learnt = {}
        learnt = {name: value for name, value in learnt.items() if name in HEAD}
        try:
            return make(**HEAD | learnt | named)
        except ValueError as error:
            if not learnt.keys() - {"algorithm"}:
                raise
            raise ValueError(
                f"{error}. The model was trained with {learnt}: name other numbers, as head_scale="
            ) from None


def check_fits(args: DiffusionSFTConfig, facts: Facts) -> Facts:
    """The facts of the model that is trained. Raises ValueError for what does not go with them."""
    if (facts.mask_id is None) != (args.objective == "canvas"):
        needs = "canvases, as DiffusionGemma has" if args.objective == "canvas" else "a mask token"
        remedy = "'masked' or 'uniform'" if args.objective == "canvas" else "'canvas'"
        raise ValueError(
            f"objective={args.objective!r} needs {needs}, and the model is of family {facts.family!r}: set it to "
            f"{remedy}"
        )
    if args.objective == "canvas" and facts.eos_id is None:
        raise ValueError(
            "objective='canvas' fills canvases with end tokens, and the model names none"
        )
    if args.noise_level == "block" and facts.block_length is None:
        raise ValueError(
            "noise_level='block' needs a block-causal model, and this one reads the whole canvas: leave it at "
            "'document'"
        )
    if args.packing and facts.family == "masked_lm":
        raise ValueError(
            "packing=True needs a model that is told which tokens see each other, and masked language models of "
            "transformers have ways of their own: leave it at False"
        )
    if args.packing and args.train_padding and facts.block_length is None:
        raise ValueError(
            "train_padding=True does not go with packing=True, which leaves no padding to train: set one to False"
        )
    return facts
