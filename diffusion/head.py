"""The learnt part of soft-masking: how much of its belief a masked slot shows, as four numbers
(arXiv:2510.17206).

Saved beside a checkpoint or an adapter as transparency_config.json, with the published field names.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from softar.checks import check_choice, check_least
from softar.results import write_whole
from softar.soft import Soft, soft_embed

from .losses import forward_masked
from .net import Facts, Parts, facts, plain
from .noise import NOISE_FILE, process_of, save_noise
from .select import Belief
from .soften import SCALE_SCHEDULES, Slots, mk_softener, soft_mask

HEAD_FILE = "transparency_config.json"
HARD = "none"  # the published name of no algorithm
ALGORITHMS = {"top-k": "mixinputs_with_topk", "temperature": "mixinputs_with_temp"}
FIELDS = {
    "scale": "transparency_scale",
    "centre": "transparency_centre",
    "steepness": "transparency_steepness",
    "k": "mixinputs_k",
    "temperature": "mixture_temp",
    "scheduling": "transparency_scheduling",
}


class SoftMaskHead(nn.Module):
    """lambda = scale sigmoid(steepness (-H - centre)) with learnt scale in (0, 1), centre < 0,
    steepness > 0 and, for algorithm "temperature", temperature > 0. With scale near 0 training
    starts as that of the hard model."""

    def __init__(
        self,
        *,
        k: int = 3,
        scale: float = 1e-6,
        centre: float = -0.75,
        steepness: float = 20 / 3,
        temperature: float = 1.0,
        algorithm: str = "top-k",
    ):
        super().__init__()
        if not 0 < scale < 1 or not centre < 0 or not steepness > 0 or not temperature > 0:
            raise ValueError(
                f"scale={scale}, centre={centre}, steepness={steepness}, temperature={temperature}: start inside "
                f"(0, 1), below 0, above 0 and above 0"
            )
        check_choice("algorithm", algorithm, sorted(ALGORITHMS))
        check_least({"k": k}, k=1)
        self.k, self.algorithm = k, algorithm
        raw = dict(
            scale=math.log(scale / (1 - scale)),
            centre=_unsoftplus(-centre),
            steepness=_unsoftplus(steepness),
            temperature=_unsoftplus(temperature),
        )
        self.raw = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(value)) for name, value in raw.items()}
        )
        self.raw["temperature"].requires_grad_(algorithm == "temperature")

    def values(self) -> dict[str, Tensor]:
        """The four numbers, each in its range, with gradients."""
        softplus = nn.functional.softplus
        return {
            "scale": self.raw["scale"].sigmoid(),
            "centre": -softplus(self.raw["centre"]) - 1e-6,
            "steepness": softplus(self.raw["steepness"]) + 1e-6,
            "temperature": softplus(self.raw["temperature"]) + 1e-6,
        }

    def forward(self, slots: Slots) -> Soft:
        return soft_mask(slots, k=self.k, algorithm=self.algorithm, **self.values())

    def settings(self) -> dict:
        """What `soften_args` of soft-mask decoding takes."""
        numbers = {name: value.item() for name, value in self.values().items()}
        return numbers | {"k": self.k, "algorithm": self.algorithm}


def mix_belief(
    head: SoftMaskHead,
    net: Parts,
    facts: Facts,
    embeds: Tensor,
    attention_mask: Tensor | None,
    masked: Tensor,
    clean: Tensor,
) -> Tensor:
    """What masked slots show in training: the belief of a forward without gradient, mixed by the
    head with one. embeds [B, T, D], masked [B, T] bool, n of them, clean [B, T] ids -> [n, D]."""
    with torch.no_grad():
        rows, logits = forward_masked(net, facts, embeds, attention_mask, masked, clean)
        logits = logits.float()
        logits[:, facts.mask_id] = torch.finfo(logits.dtype).min
        belief = Belief(logits, with_entropy=True)
    n = len(rows)
    ids = torch.full((n,), facts.mask_id, device=logits.device)
    is_mask, share = torch.ones_like(ids, dtype=torch.bool), torch.ones(n, device=logits.device)
    slots = Slots(belief, ids, is_mask, share, facts.mask_id, net.embedding)
    return soft_embed(head(slots), net.embedding)


def save_reading(model: nn.Module, folder: str | Path) -> None:
    """Say beside saved weights with which soft masks, of which noise and on rows of which end the model
    was trained, in place of what an earlier training left in the folder. An adapter of a model of masks
    says it when it is a hard one, too: it would be decoded as its base."""
    known, is_adapter = facts(model), plain(model) is not model
    says = is_adapter and known.mask_id is not None
    (Path(folder) / HEAD_FILE).unlink(missing_ok=True)
    (Path(folder) / NOISE_FILE).unlink(missing_ok=True)
    if says or known.soft_mask:
        save_head(known.soft_mask or {}, folder)
    if says:
        save_noise(process_of(known.uniform, known.rows_end), folder)


def save_head(settings: dict, folder: str | Path) -> None:
    """Write transparency_config.json: settings as `SoftMaskHead.settings` gives them, {} of a hard
    model."""
    named = {"transparency_alg": HARD}
    if settings:
        named = {"transparency_alg": ALGORITHMS[settings["algorithm"]]}
        named |= {field: settings[name] for name, field in FIELDS.items() if name in settings}
        named.setdefault("transparency_scheduling", "none")
    write_whole(Path(folder) / HEAD_FILE, json.dumps(named, indent=1) + "\n")


def load_head(folder: str | Path) -> dict | None:
    """The `soften_args` that a folder's transparency_config.json holds, {} where it says that the
    model is a hard one; None where there is no such file. Raises ValueError naming what is missing,
    unknown or out of range."""
    file = Path(folder) / HEAD_FILE
    if not file.is_file():
        return None
    try:
        named = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    fields = {"transparency_alg", *FIELDS.values()}
    if not isinstance(named, dict) or (unknown := sorted(set(named) - fields)):
        raise ValueError(
            f"{file} holds {unknown if isinstance(named, dict) else type(named).__name__}: known are {sorted(fields)}"
        )
    if named.get("transparency_alg") == HARD:
        return {}
    needed = {"transparency_alg", *(FIELDS[name] for name in ("scale", "centre", "steepness"))}
    if missing := sorted(needed - set(named)):
        raise ValueError(f"{file} lacks {missing}")
    algorithms = {public: name for name, public in ALGORITHMS.items()}
    settings = {name: named[field] for name, field in FIELDS.items() if field in named}
    try:
        check_choice("transparency_alg", named["transparency_alg"], sorted(algorithms))
        for name in ("scale", "centre", "steepness", "temperature"):
            if name in settings and not isinstance(settings[name], (int, float)):
                raise ValueError(f"{FIELDS[name]}={settings[name]!r} must be a number")
        if "scheduling" in settings:
            check_choice("transparency_scheduling", settings["scheduling"], SCALE_SCHEDULES)
        settings["algorithm"] = algorithms[named["transparency_alg"]]
        mk_softener("soft-mask", **settings)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return settings


def _unsoftplus(x: float) -> float:
    return x + math.log(-math.expm1(-x))


def learn_head(model: nn.Module, settings: dict | None) -> None:
    """Let a model know the soft-mask head that it was trained with (`load_head`), {} none; None
    leaves what it knows."""
    if settings is None:
        return
    config = plain(model).config
    k = settings.get("k", 1)
    if settings and settings["algorithm"] == "top-k" and k > config.vocab_size:
        raise ValueError(
            f"{HEAD_FILE} is of another model: mixinputs_k={k}, the vocabulary has {config.vocab_size}"
        )
    config.soft_mask = settings or None
