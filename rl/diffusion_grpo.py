"""GRPO and RLOO on a masked-diffusion policy, hard or soft: the action of a forward is the tokens that
it commits, in slots that the belief alone decides, or that are drawn by it and so are actions, too;
their log-probability is exact.

A rollout is decoded by `softar.diffusion.denoise`, which records what each forward read and
committed, and replayed piece by piece.

Shapes: B rows, P prompt length, L columns of the canvas.
"""

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from trl.trainer.utils import use_adapter

from softar.diffusion.config import DenoiseConfig
from softar.diffusion.evaluate import check_masks
from softar.diffusion.head import HEAD_FILE, save_reading
from softar.diffusion.loop import DenoiseOutput, denoise, first_end, longest_prompt
from softar.diffusion.models import load_original
from softar.diffusion.net import facts
from softar.diffusion.noise import NOISE_FILE
from softar.diffusion.record import Trajectory, check_recordable
from softar.diffusion.replay import Piece, log_probs, prompt_masks, replay
from softar.model_card import changes_of, decode_command
from softar.models import plain, room_of
from softar.results import write_whole
from softar.specs import format_options
from softar.training import inside_forward

from . import guards
from .base import LeaveOneOut, RolloutGRPO
from .diffusion_config import DiffusionGRPOConfig, DiffusionRLOOConfig
from .metrics import ratio_metrics
from .pieces import Clip, Losses, summed
from .rollout import switch_off_dropout

POLICY_FILE = "denoise_config.json"
PREFIX = "trajectory_"
# of TRL's batch, what the loss reads of each row
ROW_PARTS = (
    *(PREFIX + name for name in Trajectory._fields),
    *("advantages", "loss_mask", "old_per_token_logps", "hidden", "rollout_prob"),
)


@dataclass
class Decoded:
    """A rollout."""

    out: DenoiseOutput
    prompt_mask: Tensor  # [B, P]
    hidden: Tensor | None  # [B, L] bool, what "one-step" masks of the prompt
    rewards: Tensor | None = None  # [rows of all processes], NaN for a row without a score
    # [rows of all processes, n], what advantages are made of: the rewards, or those of each function
    compared: Tensor | None = None


class DiffusionGRPOTrainer(RolloutGRPO):
    """TRL's GRPOTrainer for a model of masks from `softar.diffusion.load`.

    Prompts get `gen_length` masks behind them, or hold masks themselves (gen_length=0). A reward
    function gets as `completions` the answers up to the first end token, or the filled templates,
    without special tokens; `completion_ids` with them. Dropout stays off, in rollout and replay. With
    beta > 0 the reference is the model as it was given (a frozen copy), or under PEFT the model
    without its new adapter. Each checkpoint holds denoise_config.json, the policy as a way to decode.

    Without a KL or an entropy in the loss, rows with an advantage of 0, as in a group of equal rewards,
    have no gradient and are not replayed by the updates; what is logged of these, the entropy too, is
    of the others, and nothing where there are none. Evaluations, and the old log-probabilities that
    num_iterations > 1 needs, are of all rows.

    Logged, at no forward of its own: `agreement/greedy`, the share of committed tokens that are the
    likeliest of their belief, as all are that temperature 0 commits in their place: the further it is
    below 1, the less the policy that is trained is the one that greedy decoding follows. Of slots that
    are drawn, where that takes the surest, it says nothing.
    `agreement/soft`, of soft policies, is the share of tokens that the slot, soft when it committed,
    had led with in its mixture: near 1, soft masks anticipate what a hard decode puts there; the
    rest is where another forward changed the model's mind, or the draw was another.
    """

    _tag_names = ["trl", "grpo", "softar", "masked-diffusion"]
    _config = DiffusionGRPOConfig
    card_method = "that fills masks, trained by reinforcement learning"
    beside = (HEAD_FILE, NOISE_FILE)

    def _check_policy(self, model, args, tokenizer):
        name = type(self).__name__
        if not isinstance(model, nn.Module):
            raise ValueError(f"model={model!r}: {name} needs one from softar.diffusion.load")
        self._facts = facts(model)
        self.decoding = args.decoding().as_trained(self._facts)
        check_recordable(self.decoding, self._facts)
        if args.replay == "grouped" and self._facts.block_length is None:
            raise ValueError(
                f"replay='grouped' is for block-causal models, and {type(plain(model)).__name__} reads the whole "
                f"canvas: give 'exact'"
            )
        if not plain(model).can_generate():  # a masked LM has no settings, and TRL writes into them
            plain(model).generation_config = GenerationConfig()

    def _check_model(self, aux_loss_coef):
        guards.check_trainable(type(self).__name__, self.model, aux_loss_coef)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"{type(self).__name__} takes gradients piece by piece, which FSDP and DeepSpeed do not: leave them out"
            )

    def _check_room(self, rows, name):
        room = room_of(self.model, trained=True)  # as `denoise` takes it
        longest = room and longest_prompt(self._facts, self.decoding, room)
        guards.check_prompt_room(self, "gen_length", longest, rows, name)
        for _, part in guards.parts_of(rows, name) if not self.args.gen_length else ():
            check_masks(self.processing_class, part["prompt"], self._facts.mask_id)

    def _check_same_policy(self, folder):
        check_same_policy(folder, self.args.decoding())

    # -- rollout

    def _decode(self, prompts, ids, mask, rng):
        model = self.accelerator.unwrap_model(self.model_wrapped)
        with self.accelerator.autocast():
            out = denoise(model, ids, mask, config=self.decoding, rng=rng, record=True)
        hidden, share = None, self.args.hide_prompt
        if share:
            steps = [out.trajectory.rows(slice(r, r + 1)) for r in range(len(rng))]
            hidden = torch.cat([prompt_masks(s, share, g) for s, g in zip(steps, rng, strict=True)])
        return Decoded(out, mask, hidden)

    def _answers(self, rollout: Decoded, *, ends: bool) -> list[list[int]]:
        """The filled templates, or answers up to the first end token, which `ends` keeps."""
        out, rows = rollout.out, []
        end_ids = self._facts.end_ids if self.decoding.end_ids is None else self.decoding.end_ids
        for ids, pads in zip(out.sequences.tolist(), (rollout.prompt_mask == 0).sum(1).tolist()):
            row = ids[out.prompt_length :] if self.args.gen_length else ids[pads:]
            rows.append(row[: first_end(row, end_ids) + ends] if self.args.gen_length else row)
        return rows

    def _completions(self, rollout):
        return self._answers(rollout, ends=True)

    def _seen_by_rewards(self, rollout):
        ids = self._answers(rollout, ends=False)
        return ids, self._tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _payload(self, rollout, batch):
        steps = rollout.out.trajectory
        tensors = {PREFIX + name: part for name, part in steps._asdict().items()}
        if rollout.hidden is not None:
            tensors["hidden"] = rollout.hidden
        # at others it is of a belief that nothing was drawn from; of drawn slots it says nothing
        if self.args.temperature == 1 and not self.args.alg_temp:
            then = rollout.out.confidence
            more = steps.after.shape[1] - then.shape[1]  # which a block has behind the answer
            tensors["rollout_prob"] = nn.functional.pad(then, (0, more), value=torch.nan)
        return tensors | {"loss_mask": (steps.committed_at >= 0).float()}

    def _rollout_metrics(self, rollout):
        out = rollout.out
        committed = out.committed_at >= 0
        # up to an answer's end; of templates, whose prompt_length is the whole width, all
        stops = [out.prompt_length + len(row) for row in self._completions(rollout)]
        made = sum(row[:stop].sum() for row, stop in zip(committed, stops, strict=True))
        sums = {
            "nfe": (out.row_forwards.sum(), committed.new_ones(len(committed)).sum()),
            "tokens_per_forward": (made, out.row_forwards.sum()),
            "confidence": (out.confidence[committed].sum(), committed.sum()),
        }
        pairs = [torch.stack([part.float() for part in pair]) for pair in sums.values()]
        total = self.accelerator.reduce(torch.stack(pairs)).tolist()
        means = {
            f"diffusion/{name}": value / max(count, 1)
            for name, (value, count) in zip(sums, total, strict=True)
        }
        if self.decoding.soften == "hard":
            return means
        same, counts = agreement(out.trajectory, self._facts.mask_id)
        return means | {"agreement/soft": self._mean(same, counts)}

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **options
    ):
        """The rollout's log-probabilities [B, L] by replay, asked for where they will be needed."""
        out, hidden = self._rollout.out, self._rollout.hidden
        return self._log_probs(model, out.trajectory, hidden), None, None

    # -- replay and loss

    @property
    def _how(self) -> dict:
        args = self.args
        return dict(method=args.replay, chunk=args.replay_chunk, embedding_grad=args.embedding_grad)

    @torch.no_grad()
    def _log_probs(self, model, steps: Trajectory, hidden: Tensor | None) -> Tensor:
        def forward(_) -> Tensor:
            unwrapped = self._unwrapped(model)
            with self.accelerator.autocast():
                return log_probs(unwrapped, steps, self.decoding, hidden=hidden, **self._how)

        return inside_forward(model, self._unwrapped(model), forward, steps.after)

    def _unwrapped(self, model) -> nn.Module:
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if unwrapped.training:
            switch_off_dropout(unwrapped)
        return unwrapped

    def _reference(self, model, steps: Trajectory, hidden: Tensor | None) -> Iterator[Piece | None]:
        """The reference's logits in the same pieces; None where there is no reference."""
        if not self.args.beta:
            while True:
                yield None
        if self.ref_model is not None:
            net, without = self.accelerator.unwrap_model(self.ref_model), contextlib.nullcontext
        else:
            net = self.accelerator.unwrap_model(model)
            name = "ref" if "ref" in net.peft_config else None

            def without():
                return use_adapter(net, adapter_name=name)

        pieces = replay(net, steps, self.decoding, hidden=hidden, **self._how)
        while True:
            with torch.no_grad(), without():
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _compute_loss(self, model, inputs):
        args, mask = self.args, inputs["loss_mask"]
        # what a slot weighs in the loss, which adds them up
        with torch.enable_grad():
            ones = torch.zeros_like(mask, requires_grad=True)
            total = self._normalised(ones, mask, inputs["num_items_in_batch"])
            (weights,) = torch.autograd.grad(total, ones)
        inputs = {name: inputs.get(name) for name in ROW_PARTS} | {"weights": weights}
        for name in ("opened_at", "drawn_as"):  # a checkpoint may hold rollouts from before these
            if inputs[PREFIX + name] is None:
                inputs[PREFIX + name] = torch.full_like(inputs[PREFIX + "after"], -1)
        # an evaluation logs the entropy of all rows, and so reads them
        skips = self.model.training and not (args.beta or args.entropy_coef)
        if skips:
            rows = teaching(inputs["advantages"])
            inputs = {name: part if part is None else part[rows] for name, part in inputs.items()}
        mask, weights = inputs["loss_mask"], inputs["weights"]
        counts = mask * (inputs["advantages"] != 0)[:, None] if skips else mask
        steps = Trajectory(*(inputs[PREFIX + name] for name in Trajectory._fields))
        old, hidden = inputs["old_per_token_logps"], inputs["hidden"]
        clip = Clip(self.epsilon_low, self.epsilon_high, args.delta, args.ratio)
        by_row = args.ratio == "trajectory" and old is not None
        losses = Losses(
            steps,
            weights,
            inputs["advantages"],
            clip,
            old=old,
            now=self._log_probs(model, steps, hidden) if by_row else None,
            beta=args.beta,
            entropy_weight=args.entropy_coef / float(mask.sum().clamp(min=1)) / self._accumulation,
        )
        unwrapped = self._unwrapped(model)

        def each() -> Iterator[Tensor]:
            pieces = zip(
                replay(unwrapped, steps, self.decoding, hidden=hidden, **self._how),
                self._reference(model, steps, hidden),
            )
            while True:
                with self.accelerator.autocast():  # the backward, between two pieces, is not in it
                    pair = next(pieces, None)
                    loss = None if pair is None else losses(*pair)
                if pair is None:
                    return
                yield loss

        def forward(_) -> Tensor:
            learnt = [p for p in unwrapped.parameters() if p.requires_grad]
            return summed(each, learnt)

        loss = inside_forward(model, unwrapped, forward, steps.after)
        self._note_update(losses, inputs["rollout_prob"], counts, clip)
        return loss

    def _note_update(self, losses: Losses, then: Tensor | None, mask: Tensor, clip: Clip) -> None:
        """then: [B, L] probabilities that the rollout itself gave what it committed, NaN where they are
        not known. mask: [B, L], what counts; where nothing does in any process nothing is noted."""
        if not self._mean(mask, torch.ones_like(mask)):
            return
        new, advantages = losses.new, losses.advantages
        old = new if losses.old is None else losses.old
        self._note({"entropy": self._mean(losses.entropy, mask)})
        self._note({"agreement/greedy": self._mean(losses.is_top, mask)})
        if then is not None:
            off = (old - then.clamp_min(torch.finfo(then.dtype).tiny).log()).expm1().abs()
            known = mask * then.isfinite()
            self._note({"ratio/replay_deviation": self._mean(off.nan_to_num(), known)})
        if self.args.beta:
            self._note({"kl": self._mean(losses.kl, mask)})
        if clip.ratio == "trajectory":
            new, old = ((part * mask).sum(1, keepdim=True) for part in (new, old))
            mask = mask.amax(1, keepdim=True)
        bounds = advantages, clip.low, clip.high
        parts = new[..., None], old[..., None], bounds, mask[..., None]
        self._note(ratio_metrics(*parts, self._mean, self.accelerator.gather))

    # -- checkpoints

    def card_command(self, folder: str | Path) -> str:
        mask, origin, changes = self.processing_class.mask_token, self.origin, self.card_config()[1]
        length = changes.pop("gen_length", DenoiseConfig.gen_length)
        knobs = changes.pop("soften_args", {}) | changes.pop("schedule_args", {})
        how = shlex.quote(f"denoise:{format_options(changes | knobs)}")
        if not length and mask:
            origin = dataclasses.replace(origin, prompt=origin.prompt.replace(mask, "_"))
        return decode_command("fill", folder, origin, f" --gen-length {length} -d {how}")

    def card_config(self) -> tuple[str | None, dict]:
        return POLICY_FILE, changes_of(self.args.decoding())

    def _save(self, output_dir: str | None = None, state_dict=None):
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        save_reading(self.model, folder)
        write_whole(folder / POLICY_FILE, _as_json(self.args.decoding()))

    @property
    def _has_original_names(self) -> bool:
        """Has a checkpoint's model.safetensors other names of weights than the model here?"""
        return plain(self.model) is self.model and self._facts.family != "masked_lm"

    def _load_weights(self, folder, model):
        if self._has_original_names:
            load_original(self.model, folder)
        else:
            super()._load_weights(folder, model)

    def _load_best_model(self):
        if self._has_original_names:
            load_original(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


def teaching(advantages: Tensor) -> Tensor:
    """[B] bool, the rows that have a gradient: not those with an advantage of 0, as in a group of equal
    rewards. One row at least, so that no parameter is left without."""
    rows = advantages != 0
    rows[0] |= ~rows.any()
    return rows


def agreement(steps: Trajectory, mask_id: int) -> tuple[Tensor, Tensor]:
    """Of each soft slot [B, M]: is the token that it committed the one that led its mixture, the mask
    left aside; and does it count: did the slot show that mixture when it committed? Both 0 or 1."""
    weights = steps.soft_weights.masked_fill(steps.soft_ids == mask_id, -1.0)
    led = steps.soft_ids.gather(-1, weights.argmax(-1, keepdim=True))[..., 0]
    at, token = (part.gather(1, steps.soft_column) for part in (steps.committed_at, steps.after))
    counts = (steps.soft_at == at) & (at >= 0)
    return (counts & (led == token)).float(), counts.float()


def check_same_policy(folder: str, decoding: DenoiseConfig) -> None:
    """Raise ValueError for a checkpoint that was not trained as the policy that decodes like this."""
    path = Path(folder, POLICY_FILE)
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint={folder!r} holds no {POLICY_FILE}: it is of another trainer"
        )
    theirs, ours = json.loads(path.read_text()), json.loads(_as_json(decoding))
    names = sorted(k for k in theirs | ours if theirs.get(k) != ours.get(k))
    if names:
        other = "; ".join(f"{k}={ours.get(k)!r}, not {theirs.get(k)!r}" for k in names)
        raise ValueError(
            f"resume_from_checkpoint={folder!r} was trained as another policy: now {other}. Give the same options, "
            f"or start a new run from its weights"
        )


def _as_json(config: DenoiseConfig) -> str:
    return json.dumps(changes_of(config), indent=1)


class DiffusionRLOOTrainer(LeaveOneOut, DiffusionGRPOTrainer):
    """DiffusionGRPOTrainer with leave-one-out advantages."""

    _tag_names = ["trl", "rloo", "softar", "masked-diffusion"]
    _config = DiffusionRLOOConfig
