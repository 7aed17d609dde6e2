"""The commands of `softar` that decode: generate, fill, trace, compare."""

from pathlib import Path
from typing import Annotated

import typer

from . import inputs, streams
from .options import Chat, Device, Dtype, Json, Length, Model, Seed, Spec, Specs, System, Text


# Long and wide because each parameter is an option of the command, with its help.
def generate(
    prompt: Text = None,
    model: Model = None,
    decoder: Spec = None,
    max_new_tokens: Length = None,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of the thought; 0 takes the likeliest token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Most tokens in a mixture.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Probability that the tokens of a mixture make up together."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Least probability in a mixture, as a share of the likeliest token's."),
    ] = None,
    softness: Annotated[
        float | None,
        typer.Option(help="Share of the mixture in what is fed back; 0 is hard decoding."),
    ] = None,
    # softness's old name
    alpha: Annotated[float | None, typer.Option(hidden=True)] = None,
    budget: Annotated[
        int | None, typer.Option(help="Most soft steps before the discrete answer.")
    ] = None,
    think_end: Annotated[
        str | None, typer.Option(help="Text that ends the thought, e.g. </think>.")
    ] = None,
    switch: Annotated[
        str | None,
        typer.Option(
            help="Mixtures and single tokens by turns: below this entropy single tokens, in nats, or "
            "block, that at which the block began."
        ),
    ] = None,
    switch_dwell: Annotated[
        int | None,
        typer.Option(
            help="Steps at least from the switch to single tokens, that one included, until it mixes again."
        ),
    ] = None,
    switch_budget: Annotated[
        int | None, typer.Option(help="Switches to single tokens, until the answer is asked for.")
    ] = None,
    answer_temperature: Annotated[
        float | None, typer.Option(help="Temperature of the answer after the thought; 0 is greedy.")
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="Where keys and values are held: dynamic, static, offloaded, ..."),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile a step, over --cache static: takes a minute.")
    ] = False,
    chat: Chat = None,
    system: System = None,
    seed: Seed = None,
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
      softar generate "Name three birds." --switch block --switch-dwell 8
      echo "<bos> D4 D8 D1 D3 ->" | softar generate -m mnns-soft-tiny
    """
    from ..specs import json_or_text

    text = streams.read_text(prompt)
    options = dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        softness=softness,
        alpha=alpha,
        budget=budget,
        think_end=think_end,
        switch=json_or_text(switch),
        switch_dwell=switch_dwell,
        switch_budget=switch_budget,
        answer_temperature=answer_temperature,
        cache_implementation=cache,
        compile=compile or None,
    )
    with streams.only_results():
        inputs.check_lengths([decoder] if decoder else [], "--max-new-tokens", max_new_tokens)
        seed = inputs.seed_of([decoder] if decoder else [], seed)
        common = dict(max_new_tokens=max_new_tokens, seed=seed, dtype=dtype, device=device)
        opened = inputs.open_decoder(decoder, model, options, fills=False, **common)
        messages = inputs.as_prompt(opened, text, chat, system)
        inputs.check_length(opened, messages)
    if decoder is None and not as_json:
        inputs.tell_default(opened)
    inputs.answer(opened, text, messages, as_json)


# Long and wide because each parameter is an option of the command, with its help.
def fill(
    text: Text = None,
    model: Model = "mnns-diffusion-tiny",
    decoder: Spec = None,
    gen_length: Annotated[int, typer.Option(help="Masks to append to the text.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Forward passes.", show_default="one for each mask")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Commit tokens of more probability than this, in (0, 1].")
    ] = None,
    block_length: Annotated[
        int | None, typer.Option(help="Masks in a block; blocks are filled from left to right.")
    ] = None,
    sub_block_length: Annotated[
        int | None, typer.Option(help="Of block-causal models: masks of a block filled together.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Temperature of the proposals; 0 takes the likeliest token."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="The model's family, where its folder looks like its causal base."),
    ] = None,
    mask_token_id: Annotated[
        int | None, typer.Option(help="The model's mask token, where its folder names none.")
    ] = None,
    eos_token_id: Annotated[
        int | None, typer.Option(help="The model's end token, where its folder names none.")
    ] = None,
    model_block_length: Annotated[
        int | None, typer.Option(help="The blocks it was trained with, where its folder is silent.")
    ] = None,
    shift: Annotated[
        int | None, typer.Option(help="1 where its logits are about the next position.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    system: System = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Fill the holes of a text with a masked-diffusion model.

    A hole is a run of underscores, or the model's mask token; each is one token. A text that is
    whole wants the model's end token, <eos> here, behind it, as training ends its rows. Decoders:
    hard, soft-token, soft-mask, evolving, slerp, soft-decoded; without --decoder, what the model was
    trained for. Every field of DenoiseConfig goes into it, and what a folder does not say of its
    model: kind, mask_token_id, eos_token_id, model_block_length, shift.

    \b
    Examples:
      softar fill "<bos> D4 D8 D1 D3 -> _ _ _ S0 <eos>"
      softar fill "<bos> D4 D8 D1 D3 ->" --gen-length 5 --steps 2
      softar fill "<bos> D4 D8 D1 D3 -> _ _ _ S0 <eos>" -d hard:threshold=0.9 --json
      softar fill "Write a haiku." -m ./my-sdar --chat --gen-length 64 --threshold 0.9
      softar fill "Paris is the _ of France." -m answerdotai/ModernBERT-base
    """
    text = streams.read_text(text)
    options = dict(
        steps=steps,
        threshold=threshold,
        block_length=block_length,
        sub_block_length=sub_block_length,
        temperature=temperature,
        kind=kind,
        mask_token_id=mask_token_id,
        eos_token_id=eos_token_id,
        model_block_length=model_block_length,
        shift=shift,
    )
    with streams.only_results():
        inputs.check_lengths([decoder] if decoder else [], "--gen-length", gen_length or None)
        seed = inputs.seed_of([decoder] if decoder else [], seed)
        common = dict(max_new_tokens=gen_length, seed=seed, dtype=dtype, device=device)
        opened = inputs.open_decoder(decoder, model, options, fills=True, **common)
        tokenizer = inputs.tokenizer_of(opened)
        template = inputs.with_masks(text, tokenizer.mask_token)
        if opened.config.gen_length == 0 and tokenizer.mask_token not in template:
            raise ValueError(
                "there is nothing to fill: put underscores into the text, or give --gen-length"
            )
        messages = inputs.as_prompt(opened, template, chat, system)
    inputs.answer(opened, text, messages, as_json)


# Wide because each parameter is an option of the command.
def trace(
    prompt: Text = None,
    model: Model = None,
    decoder: Specs = None,
    html: Annotated[Path | None, typer.Option(help="Write a page for the browser instead.")] = None,
    max_new_tokens: Length = None,
    chat: Chat = None,
    system: System = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show what a model believed at each step: the mixtures that it read, with their entropy; of
    diffusion the canvas.

    Several decoders give several traces; on a page they stand behind tabs. JSON is one line for
    each.

    \b
    Examples:
      softar trace "<bos> D4 D8 D1 D3 ->" --model mnns-soft-tiny
      softar trace "<bos> D4 D8 D1 D3 ->" -d mnns-soft-tiny=soft -d mnns-diffusion-tiny=soft-mask --html belief.html
      softar trace "<bos> D4 D8 D1 D3 -> _ _ _ S0 <eos>" -m mnns-diffusion-tiny --max-new-tokens 0
      softar trace "<bos> D4 D8 D1 D3 ->" -m mnns-soft-tiny --json
    """
    text, traces = streams.read_text(prompt), []
    if html is not None and (html.is_dir() or not html.parent.is_dir()):
        why = "is a folder" if html.is_dir() else "is in no folder that is there"
        raise ValueError(f"--html {str(html)!r} {why}: name a file in one")
    with streams.only_results():
        inputs.check_lengths(decoder or [], "--max-new-tokens", max_new_tokens)
        common = dict(max_new_tokens=max_new_tokens, dtype=dtype, device=device)
        common["seed"] = inputs.seed_of(decoder or [], seed)
        for spec in inputs.distinct(decoder or []) or [None]:
            opened = inputs.open_decoder(spec, model, {}, trace=True, **common)
            tokenizer, template = inputs.tokenizer_of(opened), text
            if opened.columns["family"] == "diffusion":
                template = inputs.with_masks(text, tokenizer.mask_token)
            messages = inputs.as_prompt(opened, template, chat, system)
            inputs.check_length(opened, messages)
            traces.append(inputs.trace_of(opened, messages))
    from ..show.page import write_page
    from ..show.terminal import view
    from ..show.trace import to_json

    if html is not None:
        streams.say(f"wrote {write_page(html, traces, text)}")
    if as_json:
        for each in traces:
            print(to_json(each))
    elif html is None:
        for each in traces:
            streams.console().print(view(each))
    if not decoder and not as_json:
        inputs.tell_default(opened)


# Long and wide because each parameter is an option of the command, with its help.
def compare(
    task: Annotated[
        str,
        typer.Option(
            "--task", "-t", help="A name of `softar tasks`, or rows.jsonl:score=number of your own."
        ),
    ] = "mnns",
    decoder: Specs = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model of the decoders that name none.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Use only the first held-out rows, so many.", show_default="all"),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Passes over the rows, to measure the spread.")] = 1,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for results.json, results.csv and rows.jsonl."),
    ] = None,
    plot: Annotated[
        bool,
        typer.Option(
            "--plot", help="Also write plot.png there, without --output in runs/compare-TASK."
        ),
    ] = False,
    baseline: Annotated[
        str | None,
        typer.Option(help="Decoder that gains are measured against.", show_default="the first"),
    ] = None,
    nfe: Annotated[
        float | None,
        typer.Option(help="Compare at equal cost: at most so many forward passes per answer."),
    ] = None,
    token_forwards: Annotated[
        float | None, typer.Option(help="The same, counted in positions computed.")
    ] = None,
    max_new_tokens: Length = None,
    batch_size: Annotated[int, typer.Option(help="Rows decoded together.")] = 64,
    chat: Chat = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare decoders on a task: accuracy, cost, and how sure the difference is.

    Autoregressive decoders: discrete, sampled, soft, swi, gumbel, k-samples, mixture-of-inputs,
    dirichlet, hybrid, hidden, beam, soft-beam, beam-collapse, self-consistency. Diffusion: hard,
    soft-token, soft-mask, evolving, slerp, soft-decoded, denoise. vLLM: vllm-greedy, vllm-sampled,
    vllm-self-consistency, vllm-beam, vllm-soft. Any OpenAI-compatible server: openai. Options
    behind the colon are fields of SoftConfig, DenoiseConfig, or the server's. Code of your own is
    module:name: soft:mixer=my_code:flat, denoise:soften=my_code:fn, or my_code:decoder.

    \b
    Examples:
      softar compare --task mnns --limit 200
      softar compare -d mnns-soft-tiny=soft -d mnns-soft-tiny=soft:softness=0.5 --limit 200
      softar compare -m mnns-discrete-tiny -d discrete -d self-consistency:votes=4 --repeats 3
      softar compare --task latin --limit 100 --plot --output runs/latin
      softar compare --task latin --limit 100 --nfe 10
      softar compare -t rows.jsonl:score=number -d smollm2-135m=discrete -d openai:url=http://127.0.0.1:8000
      softar compare --task rows.jsonl:score=number -m smollm2-135m -d discrete -d gumbel:budget=16
    """
    from ..checks import check_writable
    from ..evals.chats import asked_as_chats
    from ..evals.compare import compare as run
    from ..results import as_name
    from ..tasks import load_task

    budget = _budget(nfe=nfe, token_forwards=token_forwards)
    folder = output or (
        Path("runs", as_name(f"compare-{as_name(task).strip('-')}")) if plot else None
    )
    with streams.only_results():
        inputs.quiet()
        seed = seed or 0  # a spec may have another, and the intervals are drawn by this one
        inputs.check_lengths(decoder or [], "--max-new-tokens", max_new_tokens)
        loaded = load_task(task)
        if folder is not None:
            check_writable(folder, "--output")
        rows = inputs.first(loaded.test, limit)
        decoders = []
        for spec in inputs.distinct(decoder or inputs.compared(task, model, dtype, device)):
            length = inputs.answer_length(loaded, spec, max_new_tokens)
            common = dict(max_new_tokens=length, seed=seed, dtype=dtype, device=device)
            common |= dict(stop=loaded.stop, extract=loaded.extract)
            its = model or inputs.model_of_task(loaded, spec)
            decoders.append(inputs.open_decoder(spec, its, {}, **common))
        chats = asked_as_chats(rows, decoders, chat)
        if texts := [d.name for d in decoders if d.name not in chats] if chats else []:
            streams.say(f"no chat template, so texts as they stand: {', '.join(texts)}")
        comparison = run(
            decoders,
            rows,
            loaded.score,
            baseline=baseline or decoders[0].name,
            repeats=repeats,
            batch_size=batch_size,
            seed=seed,
            task=loaded.name,
            extract=loaded.extract,
            chats=chats,
        )
        if folder is not None:
            comparison.save(folder)
            streams.say(f"saved in {folder}")
        shown = comparison if budget is None else comparison.matched(*budget)
    code = streams.report(shown, as_json)
    if plot and comparison.rows:  # last, as a plot that fails should hide no number
        comparison.plot(folder / "plot.png")
    raise typer.Exit(code)


def _budget(**budgets: float | None) -> tuple[str, float] | None:
    """The cost that is limited, and to how much; None: none is. Raises ValueError for two, or for
    one that is not above 0."""
    options = {by: f"--{by.replace('_', '-')} {n:g}" for by, n in budgets.items() if n is not None}
    if len(options) > 1:
        raise ValueError(f"{' and '.join(options.values())}: match one budget at a time")
    for by, option in options.items():
        if not budgets[by] > 0:
            raise ValueError(f"{option} must be > 0")
        return by, budgets[by]
    return None
