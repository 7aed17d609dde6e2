"""The knobs of a method: what a function takes by keyword, given beside its name as `soften_args`,
`schedule_args` or `remask_args`."""

from collections.abc import Callable, Iterable


def check_knobs(
    option: str,
    name: str,
    knobs: dict,
    takes: Iterable[str],
    ranges: dict[str, tuple[Callable, str]],
    args: str | None = None,
) -> None:
    """Raise ValueError for knobs that the method `option`=`name` does not take, and for values
    outside of their range. ranges: knob -> (is it right?, what is said if it is not)."""
    takes = sorted(takes)
    if unknown := sorted(set(knobs) - {*takes}):
        raise ValueError(
            f"{option}={name!r} does not take {unknown}: it takes {takes or 'no options'}"
        )
    for knob, value in knobs.items():
        is_right, says = ranges[knob]
        try:
            is_right = is_right(value)
        except (TypeError, ValueError):  # of another type
            is_right = False
        if not is_right:
            raise ValueError(f"{args or option + '_args'} {knob}={value!r} {says}")


def gather_knobs(options: dict, args: str, knobs: Iterable[str]) -> dict:
    """Options by name, knobs of a method among them -> the same with those knobs in the field
    `args`."""
    inside = {knob: options[knob] for knob in knobs if knob in options}
    rest = {name: value for name, value in options.items() if name not in inside}
    return rest | {args: rest.get(args, {}) | inside}


def check_allowed(allowed: dict | None) -> None:
    """Raise ValueError for what is not slots and their ids."""
    if allowed is None:
        return
    form = "give {column: ids} for all rows, or {(row, column): ids}"
    if not isinstance(allowed, dict):
        raise ValueError(f"allowed={allowed!r:.80}: {form}")
    for key, ids in allowed.items():
        numbers = key if is_pair(key) else (key,)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in numbers):
            raise ValueError(f"allowed has the slot {key!r}: {form}")
        if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ValueError(f"allowed[{key}]={ids!r:.80} must be token ids, at least one")


def is_pair(key) -> bool:
    """A row and a column, not a column."""
    return isinstance(key, tuple) and len(key) == 2
