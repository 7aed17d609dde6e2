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
        if not is_right(value):
            raise ValueError(f"{args or option + '_args'} {knob}={value!r} {says}")


def gather_knobs(options: dict, args: str, knobs: Iterable[str]) -> dict:
    """Options by name, knobs of a method among them -> the same with those knobs in the field
    `args`."""
    inside = {knob: options[knob] for knob in knobs if knob in options}
    rest = {name: value for name, value in options.items() if name not in inside}
    return rest | {args: rest.get(args, {}) | inside}
