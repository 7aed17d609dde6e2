"""The soft policies that RL trains, by the name of their mixer: which options are whose, and why
others are not there."""

# option of a configuration -> knob of the mixer
KNOBS: dict[str, dict[str, str]] = {
    "k-samples": {"soft_k": "k"},
    "hard": {},
    "gumbel": {"soft_candidates": "candidates", "soft_tau": "tau"},
    "mixture-of-inputs": {"soft_candidates": "candidates", "soft_beta": "beta"},
    "hybrid": {"soft_candidates": "candidates", "soft_share": "share"},
}
# what an option is where its mixer has it and it is left out
LEFT_OUT = {
    "soft_k": 3,
    "soft_candidates": 10,
    "soft_tau": 0.1,
    "soft_beta": 1.0,
    "soft_share": 0.5,
}
# the option that says how many draws, with a ratio of its own each, a step of this mixer has
DRAWS = {"k-samples": "soft_k", "gumbel": "soft_candidates"}
NO_PROBABILITY = {
    "soft": "it draws nothing, so that a thought has no probability to train on",
    "hidden": "it draws nothing, so that a thought has no probability to train on",
    "dirichlet": "what it draws are weights of the whole vocabulary, whose density is not scored",
}
NOT_ON_VLLM = {"gumbel": "vLLM's answers do not hold the noise of a draw, which its density is of"}


def check_policy(mixer: str) -> None:
    """Raise ValueError for a mixer whose draws have no probability that is known here."""
    if isinstance(mixer, str) and mixer in NO_PROBABILITY:
        raise ValueError(
            f"soft_mixer={mixer!r} cannot be trained by RL: {NO_PROBABILITY[mixer]}; choose one of "
            f"{[*KNOBS]}"
        )


def draws_of(config) -> int:
    """Draws of a think step, each with a ratio of its own."""
    return getattr(config, DRAWS[config.soft_mixer]) if config.soft_mixer in DRAWS else 1


def knobs_of(config) -> dict:
    """What its options say to its mixer."""
    if config.soft_mixer == "hard":
        return {"sample": True}
    said = {option: getattr(config, option) for option in KNOBS[config.soft_mixer]}
    return {  # None is an option that was left out and does nothing
        KNOBS[config.soft_mixer][option]: LEFT_OUT[option] if value is None else value
        for option, value in said.items()
    }
