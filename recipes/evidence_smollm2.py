"""X2 of the evidence, of a pretrained net: SmolLM2-135M (RESULTS.md, "Evidence: rules")."""

from softar.recipes import evidence_reach
from softar.recipes.evidence_reach import measure, settings

__all__ = ["SEEDS", "SETTINGS", "facts", "measure"]

SEEDS = range(3)
SETTINGS = settings("smollm2")


def facts() -> dict[str, dict]:
    return evidence_reach.facts("smollm2")
