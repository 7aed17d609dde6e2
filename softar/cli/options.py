"""Options that several commands have, for typer."""

from collections.abc import Iterable
from typing import Annotated

import typer

from . import inputs


def starting(incomplete: str, names: Iterable[str]) -> list[str]:
    """For the shell's completion."""
    return [name for name in names if name.startswith(incomplete)]


Text = Annotated[
    str | None, typer.Argument(metavar="TEXT", help="Left out, or -: read from the pipe (stdin).")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A name of `softar models`, a folder, a .gguf file or a hub id.",
        autocompletion=lambda incomplete: starting(incomplete, inputs.MODELS),
    ),
]
Spec = Annotated[
    str | None,
    typer.Option(
        "--decoder",
        "-d",
        metavar="SPEC",
        help="Decoder and its options: NAME:key=value,key=value, e.g. gumbel:top_k=10,budget=24.",
    ),
]
Specs = Annotated[
    list[str] | None,
    typer.Option(
        "--decoder",
        "-d",
        metavar="SPEC",
        help="Decoder and its options: MODEL=NAME:key=value,key=value; repeat for several.",
    ),
]
Length = Annotated[
    int | None,
    typer.Option(help="Tokens of thought and answer together; for diffusion, masks to append."),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat", help="Use the model's chat template.", show_default="where it has one"
    ),
]
System = Annotated[str | None, typer.Option(help="The chat's system message.")]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Seed of all that is drawn, but by decoders with seed= in their spec; 0 if not said.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str, typer.Option(help="Type of the weights: auto (as stored), float32, bfloat16, float16.")
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="a GPU where there is one"),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else.")]
