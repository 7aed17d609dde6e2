"""
Watch masks turn into text: a masked-diffusion model at work in the terminal.

# The embedded tiny model on its task
python recipes/denoise.py

# Any checkpoint; every field of DenoiseConfig is an option
python recipes/denoise.py --model GSAI-ML/LLaDA-8B-Instruct --chat --prompt "Why is the sky blue?" \
    --gen_length 128 --block_length 32 --threshold 0.9 --cache dual --soften soft-token

# Infilling: the mask token, or a run of underscores, is filled
python recipes/denoise.py --model answerdotai/ModernBERT-large --gen_length 0 \
    --prompt "Paris is the _ of France."

A token's colour is the probability it had when it was committed, red to green. A mask is a dot; a
soft slot shows the likeliest token of its mixture, in italics, and below are the mixtures of the
first few.
"""

import argparse
import dataclasses
import sys
import time

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from softar.cli.inputs import with_masks
from softar.diffusion import DenoiseConfig, denoise, load
from softar.diffusion.folder import STATED, split_stated
from softar.diffusion.knobs import gather_knobs
from softar.diffusion.loop import DenoiseOutput
from softar.diffusion.net import facts
from softar.diffusion.schedules import SCHEDULE_KNOBS
from softar.show.terminal import colour_of, harmless
from softar.specs import json_or_text

DEMO = dict(gen_length=5, soften="soft-mask")  # what the embedded model answers in
SLOTS = 4  # soft slots whose mixtures are listed


def main(args, config, stated):
    """stated: what args say of the model, as arguments of `load`."""
    model, tokenizer = load(args.model, **stated)
    if tokenizer is None:
        raise ValueError(f"model={args.model!r} holds no tokenizer, so there is no text to show")
    known = facts(model)
    # before the template, whose special tokens may hold underscores, too
    prompt = with_masks(args.prompt or "<bos> D1 D1 D1 D2 ->", tokenizer.mask_token)
    if args.chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not args.chat).to(
        model.device
    )
    # without a mask, what is not decided yet is shown by an id that no token has
    mask_id = known.vocab_size if known.mask_id is None else known.mask_id
    view = View(tokenizer, mask_id, inputs.input_ids, config, args.delay)
    console = Console()
    rng = torch.Generator().manual_seed(args.seed)
    with Live(console=console, refresh_per_second=30, transient=False) as live:
        live.update(view.frame())
        output = denoise(
            model,
            inputs.input_ids,
            inputs.get("attention_mask"),
            config=config,
            rng=rng,
            callback=lambda step: live.update(view.frame(step)),
        )
        live.update(view.last(output))
    tokens = int((output.committed_at >= 0).sum())
    console.print(
        f"{tokens} tokens in {output.num_forwards} forwards ({output.token_forwards} positions computed), "
        f"{view.seconds:.2f} s, {tokens / max(view.seconds, 1e-9):.1f} tokens/s"
    )


class View:
    """The picture of a canvas, kept up to date by the loop's callback."""

    def __init__(self, tokenizer, mask_id: int, prompt, config: DenoiseConfig, delay: float):
        self.tokenizer, self.mask_id, self.delay = tokenizer, mask_id, delay
        self.canvas = torch.cat([prompt[0], prompt.new_full((config.gen_length,), mask_id)])
        self.is_prompt = self.canvas != mask_id
        self.confidence = torch.zeros(len(self.canvas))
        self.seconds, self.forwards, self.since = 0.0, 0, time.perf_counter()

    def frame(self, step: dict | None = None) -> Group:
        """One row of the canvas after a forward; the time spent drawing does not count."""
        self.seconds += time.perf_counter() - self.since if step else 0.0
        slots = {}
        if step is not None:
            self.forwards = step["step"] + 1
            new = step["committed"][0].cpu()
            self.widen(len(new))
            waits = self.canvas == self.mask_id
            self.canvas = torch.where(waits & ~new, self.mask_id, step["sequences"][0].cpu())
            self.confidence = torch.where(new, step["confidence"][0].cpu(), self.confidence)
            if step["soft"] is not None:
                at = step["where"].nonzero()
                slots = {
                    int(col): (ids.tolist(), weights.tolist())
                    for (row, col), ids, weights in zip(at, *step["soft"], strict=False)
                    if row == 0
                }
        picture = self.picture(slots)
        if step is not None:
            time.sleep(self.delay)
        self.since = time.perf_counter()
        return picture

    def widen(self, length: int) -> None:
        """Some models read whole blocks: the canvas may end behind gen_length."""
        more = length - len(self.canvas)
        self.canvas = torch.nn.functional.pad(self.canvas, (0, more), value=self.mask_id)
        self.is_prompt = torch.nn.functional.pad(self.is_prompt, (0, more), value=False)
        self.confidence = torch.nn.functional.pad(self.confidence, (0, more))

    def last(self, output: DenoiseOutput) -> Group:
        """The result, with what a rule filled in behind an end token."""
        self.canvas = output.sequences[0].cpu()
        return self.picture({})

    def picture(self, slots: dict) -> Group:
        left = int((self.canvas == self.mask_id).sum())
        done = len(self.canvas) - left - int(self.is_prompt.sum())
        status = f"forward {self.forwards}   committed {done}   masks {left}"
        if self.seconds:
            status += f"   {done / self.seconds:.1f} tokens/s"
        panel = Panel(self.text(slots), title="canvas", subtitle=status)
        return Group(panel, self.mixtures(slots))

    def text(self, slots: dict) -> Text:
        """Tokens are decoded one by one: a character split over several tokens is shown when all
        are there."""
        out = Text()
        for col, token in enumerate(self.canvas.tolist()):
            if self.is_prompt[col]:
                out.append(self.word(token), style="bold")
            elif token != self.mask_id:
                out.append(self.word(token), style=colour_of(float(self.confidence[col])))
            elif col in slots:
                ids, weights = slots[col]
                best = max(
                    zip(weights, ids, strict=True),
                    key=lambda pair: pair[0] * (pair[1] != self.mask_id),
                )
                out.append(self.word(best[1]), style="italic grey50")
            else:
                out.append(" ·", style="grey35")
        return out

    def mixtures(self, slots: dict) -> Table | Text:
        if not slots:
            return Text("")
        table = Table("slot", "shows next", box=None)
        for col, (ids, weights) in sorted(slots.items())[:SLOTS]:
            ranked = sorted(zip(weights, ids, strict=True), reverse=True)[:5]
            names = ["mask" if i == self.mask_id else self.word(i).strip() for _, i in ranked]
            parts = zip(names, ranked, strict=True)
            # Text, as a token may look like rich's markup
            shown = Text("  ".join(f"{n} {w:.2f}" for n, (w, _) in parts if w > 0.005))
            table.add_row(str(col), shown)
        return table

    def word(self, token: int) -> str:
        """A token as it may stand on a terminal."""
        return harmless(self._word(token))

    def _word(self, token: int) -> str:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        text = self.tokenizer.convert_tokens_to_string([piece]) if piece is not None else ""
        # Where the tokenizer marks word starts, that mark is the space; else every token is a word.
        starts = piece is not None and piece[:1] in ("Ġ", "▁", "Ċ")
        if text.startswith((" ", "\n")) or (self.splits_words and not starts):
            return text
        return " " + text

    @property
    def splits_words(self) -> bool:
        return self.tokenizer.backend_tokenizer.decoder is not None


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="mnns-diffusion-tiny", help="a model that softar.diffusion.load opens"
    )
    parser.add_argument("--prompt", help="the text; underscores are masks to fill")
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    parser.add_argument(
        "--delay", type=float, default=0.0, help="seconds to wait after each forward"
    )
    names = [*(f.name for f in dataclasses.fields(DenoiseConfig)), *SCHEDULE_KNOBS]
    for name in names:
        parser.add_argument(
            f"--{name}",
            type=json_or_text,
            default=argparse.SUPPRESS,
            help="this field of softar.diffusion.DenoiseConfig, or knob of a schedule",
        )
    for name in STATED:
        parser.add_argument(
            f"--{name}",
            type=json_or_text,
            default=argparse.SUPPRESS,
            help="what the model's folder does not say, see softar.diffusion.load",
        )
    args = parser.parse_args(argv)
    chosen = {name: vars(args)[name] for name in names if name in args}
    chosen = gather_knobs(chosen, "schedule_args", SCHEDULE_KNOBS)
    is_demo = args.model == "mnns-diffusion-tiny" and args.prompt is None
    stated, _ = split_stated(vars(args))
    return args, DenoiseConfig(**((DEMO if is_demo else {}) | chosen)), stated


if __name__ == "__main__":
    try:
        main(*parse())
    except ValueError as error:
        print(f"denoise.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
