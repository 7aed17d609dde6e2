"""Which noise a model was trained to undo: masks, or tokens drawn uniformly. The checkpoint says
it.

A model's config.json holds `diffusion_process`; an adapter, which has no configuration of its own,
brings the same in a file. Without either it is a model of masks.
"""

import json
from pathlib import Path
from typing import NamedTuple

from softar.results import write_whole

NOISE_FILE = "diffusion_process.json"
FIELDS = {"kind", "eps", "left_out"}


class UniformNoise(NamedTuple):
    """Tokens decay to uniformly random ones along `duo.log_linear`."""

    eps: float  # in [0, 1): alpha at t = 1
    left_out: tuple[int, ...]  # ids that it neither draws nor predicts, the mask token among them

    def settings(self) -> dict:
        """As config.json and the adapter's file hold it."""
        return {"kind": "uniform", "eps": self.eps, "left_out": list(self.left_out)}


def read_noise(named: dict | None, mask_id: int, vocab_size: int) -> UniformNoise | None:
    """None is a model of masks. Raises ValueError naming what is unknown, missing or out of
    range."""
    if named is None or named == {"kind": "masked"}:
        return None
    what = f"diffusion_process={named!r}"
    if not isinstance(named, dict) or named.get("kind") != "uniform" or set(named) != FIELDS:
        raise ValueError(
            f"{what} is unknown: it is {{'kind': 'masked'}}, or of kind 'uniform' with {sorted(FIELDS)}"
        )
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


def save_noise(noise: UniformNoise | None, folder: str | Path) -> None:
    """Write diffusion_process.json."""
    settings = {"kind": "masked"} if noise is None else noise.settings()
    write_whole(Path(folder, NOISE_FILE), json.dumps(settings) + "\n")


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
