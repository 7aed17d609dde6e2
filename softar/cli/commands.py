"""The commands of `softar` that decode: generate, fill, trace, compare."""

from pathlib import Path
from typing import Annotated

import typer

from . import inputs as work
from . import output as fmt

Text = Annotated[
    str | None, typer.Argument(metavar="TEXT", help="- or nothing: what comes through a pipe.")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="A name of `softar models`, a folder, a .gguf file or a hub id."
    ),
]
Spec = Annotated[
    str | None,
    typer.Option(
        "--decoder",
        "-d",
        metavar="SPEC",
        help="NAME:key=value,key=value, as gumbel:top_k=10,budget=24.",
    ),
]
Specs = Annotated[
    list[str] | None,
    typer.Option(
        "--decoder",
        "-d",
        metavar="SPEC",
        help="MODEL=NAME:key=value,key=value; once for each decoder.",
    ),
]
Length = Annotated[
    int | None, typer.Option(help="Thought and answer together; of diffusion the masks.")
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat", help="Use the model's chat template.  [default: where it has one]"
    ),
]
System = Annotated[str | None, typer.Option(help="The chat's system message.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn.")]
Dtype = Annotated[
    str, typer.Option(help="Of the weights: auto (as stored), float32, bfloat16, float16.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps.  [default: a GPU where there is one]")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else.")]


def generate(
    prompt: Text = None,
    model: Model = None,
    decoder: Spec = None,
    max_new_tokens: Length = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the thought; 0 is the argmax.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Tokens kept in a mixture.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Mass kept in a mixture.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Least share of the likeliest token's.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Share of the mixture in what is fed back; 0 is hard.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Soft steps at most, before a discrete answer.")
    ] = None,
    think_end: Annotated[
        str | None, typer.Option(help="Text that ends the thought, e.g. </think>.")
    ] = None,
    answer_temperature: Annotated[
        float | None, typer.Option(help="Of a separate answer; 0 is greedy.")
    ] = None,
    chat: Chat = None,
    system: System = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt.

    Without --decoder a model is decoded as its soft_config.json says, one that has none with
    narrow, noisy mixtures. Every field of SoftConfig goes into --decoder. On a terminal tokens
    appear as they come, a thought dimmed.

    \b
    Examples:
      softar generate "Why is the sky blue?" --max-new-tokens 60
      softar generate "<bos> D4 D8 D1 D3 ->" --model mnns-soft-tiny --json
      softar generate "Name three birds." -d discrete
      softar generate "Name three birds." -d soft:temperature=0.6,top_k=10 --budget 16
      echo "<bos> D4 D8 D1 D3 ->" | softar generate -m mnns-soft-tiny
    """
    text = fmt.read_text(prompt)
    options = dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        alpha=alpha,
        budget=budget,
        think_end=think_end,
        answer_temperature=answer_temperature,
    )
    with fmt.only_results():
        made = work.open_decoder(
            decoder,
            model,
            options,
            max_new_tokens=max_new_tokens,
            seed=seed,
            dtype=dtype,
            device=device,
        )
        given = work.as_prompt(work.tokenizer_of(made), text, chat, system)
    work.answer(made, text, given, as_json)


def fill(
    text: Text = None,
    model: Model = "mnns-diffusion-tiny",
    decoder: Spec = None,
    gen_length: Annotated[int, typer.Option(help="Masks put behind the text.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Forwards.  [default: one for each mask]")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Commit what is surer than this, in (0, 1].")
    ] = None,
    block_length: Annotated[
        int | None, typer.Option(help="Masks of a block; blocks go from left to right.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the proposals; 0 is the argmax.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    system: System = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Fill the holes of a text with a masked-diffusion model.

    A hole is a run of underscores, or the model's mask token; each is one token. Decoders: hard,
    soft-token, soft-mask, evolving, slerp; without --decoder, what the model was trained for. Every
    field of DenoiseConfig goes into it.

    \b
    Examples:
      softar fill "<bos> D4 D8 _ D3 -> _ _ _ S0"
      softar fill "<bos> D4 D8 D1 D3 ->" --gen-length 5 --steps 2
      softar fill "<bos> D4 D8 _ D3 -> _ _ _ S0" -d hard:threshold=0.9 --json
      softar fill "Paris is the _ of France." -m answerdotai/ModernBERT-base
    """
    text = fmt.read_text(text)
    options = dict(
        steps=steps, threshold=threshold, block_length=block_length, temperature=temperature
    )
    with fmt.only_results():
        work.check_fills(decoder, model)
        made = work.open_decoder(
            decoder,
            model,
            options,
            max_new_tokens=gen_length,
            seed=seed,
            dtype=dtype,
            device=device,
        )
        tokenizer = work.tokenizer_of(made)
        holes = work.with_masks(text, tokenizer.mask_token)
        if tokenizer.mask_token not in holes and made.config.gen_length == 0:
            raise ValueError(
                "there is nothing to fill: put underscores into the text, or give --gen-length"
            )
        given = work.as_prompt(tokenizer, holes, chat, system)
    work.answer(made, text, given, as_json)


def trace(
    prompt: Text = None,
    model: Model = None,
    decoder: Specs = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page instead: open it in a browser.")
    ] = None,
    max_new_tokens: Length = None,
    chat: Chat = None,
    system: System = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """What a model believed at each step: the mixtures that it read, with their entropy; of
    diffusion the canvas.

    Several decoders give several traces; on a page they stand behind tabs. JSON is one line for
    each.

    \b
    Examples:
      softar trace "<bos> D4 D8 D1 D3 ->" --model mnns-soft-tiny softar trace "<bos> D4 D8 D1 D3 ->"
      -d mnns-soft-tiny=soft -d mnns-diffusion-tiny=soft-mask --html belief.html softar trace "<bos>
      D4 D8 _ D3 -> _ _ _ S0" -m mnns-diffusion-tiny --max-new-tokens 0 softar trace "<bos> D4 D8 D1
      D3 ->" -m mnns-soft-tiny --json
    """
    text, traces = fmt.read_text(prompt), []
    with fmt.only_results():
        for spec in work.distinct(decoder or []) or [None]:
            made = work.open_decoder(
                spec,
                model,
                {},
                max_new_tokens=max_new_tokens,
                seed=seed,
                dtype=dtype,
                device=device,
                trace=True,
            )
            tokenizer = work.tokenizer_of(made)
            holes = text
            if made.columns["family"] == "diffusion":
                holes = work.with_masks(text, tokenizer.mask_token)
            traces.append(made.decode([work.as_prompt(tokenizer, holes, chat, system)])[0].trace)
    from ..show.page import write_page
    from ..show.terminal import view
    from ..show.trace import to_json

    if html is not None:
        fmt.say(f"wrote {write_page(html, traces, text)}")
    if as_json:
        for found in traces:
            print(to_json(found))
    elif html is None:
        for found in traces:
            fmt.console().print(view(found))


def compare(
    task: Annotated[str, typer.Option("--task", "-t", help="A name of `softar tasks`.")] = "mnns",
    decoder: Specs = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Of decoders that name none.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Held-out rows, the first ones.  [default: all]")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Passes over the rows, for the spread.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for results.json and more.")
    ] = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Also plot.png there.  [folder: runs/compare-TASK]")
    ] = False,
    baseline: Annotated[
        str | None, typer.Option(help="Decoder held against the others.  [default: the first]")
    ] = None,
    nfe: Annotated[
        float | None, typer.Option(help="Match budgets: at most so many forwards an answer.")
    ] = None,
    token_forwards: Annotated[
        float | None, typer.Option(help="The same, of positions computed.")
    ] = None,
    max_new_tokens: Length = None,
    batch_size: Annotated[int, typer.Option(help="Rows decoded together.")] = 64,
    chat: Chat = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Decoders side by side on a task: accuracy, what it costs, and how sure the difference is.

    Autoregressive decoders: discrete, sampled, soft, gumbel, k-samples, mixture-of-inputs,
    dirichlet, beam, self-consistency. Diffusion: hard, soft-token, soft-mask, evolving, slerp.
    vLLM: vllm-greedy, vllm-sampled, vllm-self-consistency, vllm-beam, vllm-soft. Options behind the
    colon are fields of SoftConfig, DenoiseConfig, or vLLM's.

    \b
    Examples:
      softar compare --task mnns --limit 200
      softar compare -d mnns-soft-tiny=soft -d mnns-soft-tiny=soft:alpha=0.5 --limit 200
      softar compare -m mnns-discrete-tiny -d discrete -d self-consistency:votes=4 --repeats 3
      softar compare --task latin --limit 100 --plot --output runs/latin
      softar compare --task latin --limit 100 --nfe 10
    """
    from ..evals.compare import compare as run
    from ..tasks import load_task

    budgets = [
        (by, budget)
        for by, budget in (("nfe", nfe), ("token_forwards", token_forwards))
        if budget is not None
    ]
    if len(budgets) > 1:
        raise ValueError(
            f"--nfe {nfe:g} and --token-forwards {token_forwards:g}: match one budget at a time"
        )
    if budgets and not budgets[0][1] > 0:
        raise ValueError(f"--{budgets[0][0].replace('_', '-')} {budgets[0][1]:g} must be > 0")
    folder = output or (Path("runs", f"compare-{task.replace(':', '-')}") if plot else None)
    with fmt.only_results():
        work.quiet()
        found = load_task(task)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        rows = work.first(found.test, limit)
        specs = work.distinct(decoder or work.compared(task, model))
        made = [
            work.open_decoder(
                spec,
                model,
                {},
                max_new_tokens=work.answer_length(rows, spec, max_new_tokens),
                seed=seed,
                dtype=dtype,
                device=device,
            )
            for spec in specs
        ]
        rows = work.with_chat(rows, made, chat)
        comparison = run(
            made,
            rows,
            found.score,
            baseline=baseline or made[0].name,
            repeats=repeats,
            batch_size=batch_size,
            seed=seed,
            task=found.name,
            extract=found.extract,
        )
        if folder is not None:
            comparison.save(folder)
            fmt.say(f"saved in {folder}")
            if plot and comparison.rows:
                comparison.plot(folder / "plot.png")
        for by, budget in budgets:
            comparison = comparison.matched(by, budget)
    raise typer.Exit(fmt.report(comparison, as_json))
