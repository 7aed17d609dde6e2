"""How much a decoder gains by deciding several tokens in one forward: tokens per forward (TPF), and
accuracy under parallelism (AUP), which is one number for all of its settings."""

import math

AR_TPF = 1.005  # tokens per forward; whatever stays below decides them one by one
SHARPNESS = 3.0  # of the weight that a lower accuracy gets
LOSS = 0.05  # settings that lose more than this of the slowest one's accuracy do not count


def add_aup(rows: list[dict], by: tuple[str, ...], among: tuple[str, ...] = ()) -> None:
    """Give each row the `aup` of its decoder over all of its settings: rows alike in the columns
    `by`. The best accuracy is that of all rows alike in `among`. None where a setting has no
    accuracy, or no tokens per forward."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in by), []).append(row)
    for settings in groups.values():
        alike = [row for row in rows if all(row.get(n) == settings[0].get(n) for n in among)]
        best = max((row["accuracy"] for row in alike if row["accuracy"] is not None), default=None)
        points = [(row.get("tpf"), row["accuracy"]) for row in settings]
        for row in settings:
            row["aup"] = aup(points, best)


def aup(points: list[tuple[float | None, float | None]], best: float | None) -> float | None:
    """Accuracy under parallelism of (tokens per forward, accuracy in [0, 1]) pairs, in percent times
    tokens (d3LLM, arXiv:2601.07568, section 3; its leaderboard's aup_utils.py).

    With the pairs sorted by tokens per forward r, and y in percent: r_1 y_1, and the trapezia of y W
    between neighbours, W = min(exp(-3 (1 - y / best)), 1), best the highest accuracy of all decoders
    compared. Pairs with y below y_1 - 5 are left out.
    """
    if not best or not points or any(not r or y is None for r, y in points):
        return None
    points = sorted(points)
    points = [(r, y) for r, y in points if y >= points[0][1] - LOSS]
    weighted = [y * min(math.exp(-SHARPNESS * (1 - y / best)), 1.0) for _, y in points]
    area = points[0][0] * points[0][1]
    for i in range(1, len(points)):
        area += (points[i][0] - points[i - 1][0]) * (weighted[i] + weighted[i - 1]) / 2
    return 100 * area
