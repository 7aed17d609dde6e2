"""Which noise a model was trained to undo, masks or tokens drawn uniformly, and which token ended its
rows. The checkpoint says it.

A model's config.json holds `diffusion_process`; an adapter, which has no configuration of its own,
brings the same in a file. Without either it is a model of masks.
"""

import json
from pathlib import Path
from typing import NamedTuple

from softar.results import write_whole

NOISE_FILE = "diffusion_process.json"
FIELDS = {"kind", "eps", "left_out"}
MASKED = {"kind": "masked"}
END = "rows_end"  # of both kinds, and may be missing


class UniformNoise(NamedTuple):
    """Tokens decay to uniformly random ones along `duo.log_linear`."""

    eps: float  # in [0, 1): alpha at t = 1
    left_out: tuple[int, ...]  # ids that it neither draws nor predicts, the mask token among them

    def settings(self) -> dict:
        return {"kind": "uniform", "eps": self.eps, "left_out": list(self.left_out)}


def read_noise(named: dict | None, mask_id: int, vocab_size: int) -> UniformNoise | None:
    """None is a model of masks. Raises ValueError naming what is unknown, missing or out of
    range."""
    if named is None:
        return None
    what = f"diffusion_process={named!r}"
    said = {k: v for k, v in named.items() if k != END} if isinstance(named, dict) else {}
    if said != MASKED and (said.get("kind") != "uniform" or set(said) != FIELDS):
        raise ValueError(
            f"{what} is unknown: it is {MASKED}, or of kind 'uniform' with {sorted(FIELDS)}; both may name {END}"
        )
    if said == MASKED:
        return None
    eps, left_out = named["eps"], named["left_out"]
    if not isinstance(eps, (int, float)) or not 0 <= eps < 1:
        raise ValueError(f"{what}: eps must be in [0, 1)")
    if not isinstance(left_out, list) or not all(
        isinstance(i, int) and 0 <= i < vocab_size for i in left_out
    ):
        raise ValueError(
            f"{what}: left_out must be a list of ids below {vocab_size}, the vocabulary"
        )
    if mask_id not in left_out or vocab_size - len(set(left_out)) < 2:
        raise ValueError(
            f"{what}: left_out must hold the mask token (id {mask_id}) and leave 2 tokens or more"
        )
    return UniformNoise(float(eps), tuple(sorted(set(left_out))))


def read_end(named: dict | None, vocab_size: int) -> int | None:
    """The token that ended the rows of the training; None: none is known to have. Of what `read_noise`
    takes, and raises ValueError for an id outside the vocabulary."""
    end = None if named is None else named.get(END)
    if end is not None and not (type(end) is int and 0 <= end < vocab_size):
        raise ValueError(
            f"diffusion_process={named!r}: {END} must be an id below {vocab_size}, the vocabulary"
        )
    return end


def process_of(noise: UniformNoise | None, rows_end: int | None) -> dict:
    """What config.json and the adapter's file hold."""
    settings = MASKED if noise is None else noise.settings()
    return dict(settings) if rows_end is None else settings | {END: rows_end}


def save_noise(process: dict, folder: str | Path) -> None:
    """Write diffusion_process.json."""
    write_whole(Path(folder, NOISE_FILE), json.dumps(process) + "\n")


def load_noise(folder: str | Path) -> dict | None:
    """What a folder's diffusion_process.json holds, for `read_noise`; None where there is no such
    file."""
    file = Path(folder) / NOISE_FILE
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
