"""What the soft policy adds to TRL's GRPO where both do the same: one draw a step. A table and a
rl.json.

# Rollout beside TRL's model.generate, and update (loss and backward) beside TRL's, interleaved
python recipes/bench_rl.py

# On a busy machine: processor time, one thread
OMP_NUM_THREADS=1 python recipes/bench_rl.py --cpu_time --threads 1 --repeats 15
"""

import tempfile
import time

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from softar.models import word_tokenizer
from softar.recipes.bench_tools import interleaved, parser_of, run_bench, show, spread
from softar.rl import SoftGRPOConfig, SoftGRPOTrainer

# of the model; <eos> lies beyond them, so that every completion runs to its full length
WORDS = 512
SHAPE = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
)


def trainers(args, folder: str) -> dict:
    """TRL's GRPO and ours with one draw and with three, on equal models."""
    tokenizer = word_tokenizer([*(f"w{i}" for i in range(WORDS - 1)), "<pad>", "<bos>", "<eos>"])
    rows = Dataset.from_list(
        [{"prompt": " ".join(f"w{(i * j) % 500}" for j in range(8))} for i in range(64)]
    )
    options = dict(
        per_device_train_batch_size=args.batch,
        num_generations=args.batch,
        report_to="none",
        max_completion_length=args.length,
        gradient_checkpointing=False,
    )

    def model():
        torch.manual_seed(0)
        net = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=4096, **SHAPE))
        net.generation_config.eos_token_id = net.config.eos_token_id = None
        return net

    def reward(completions, **columns):
        return [float(len(set(text.split()))) for text in completions]

    cpu = {} if torch.accelerator.is_available() else dict(use_cpu=True, bf16=False)
    made = {
        "trl": GRPOTrainer(
            model(), reward, GRPOConfig(folder, **options, **cpu), rows, processing_class=tokenizer
        )
    }
    for name, k in (("k = 1", 1), ("k = 3", 3)):
        config = SoftGRPOConfig(folder, soft_k=k, **options)
        made[name] = SoftGRPOTrainer(model(), reward, config, rows, processing_class=tokenizer)
    for trainer in made.values():
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
    return made


def cost(args) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        made = trainers(args, folder)
        rows = [made["trl"].train_dataset[0]] * args.batch
        prompts = made["trl"]._tokenizer([row["prompt"] for row in rows])["input_ids"]
        batches = {
            name: trainer._generate_and_score_completions(rows) for name, trainer in made.items()
        }
        for batch in batches.values():
            assert batch["completion_mask"].all(), (
                "a completion ended early: they would be compared at other lengths"
            )

        def rollout(name):
            return lambda: made[name]._generate_single_turn(prompts, None, {}, args.batch)

        def update(name):
            def run():
                made[name].model.zero_grad()
                made[name]._compute_loss(made[name].model, batches[name]).backward()

            return run

        lines = []
        for what, of in (("rollout", rollout), ("update", update)):
            clock = time.process_time if args.cpu_time else time.perf_counter
            seconds = interleaved({name: of(name) for name in made}, args.repeats, clock=clock)
            for name, took in seconds.items():
                ratio, low, high = spread(b / a for a, b in zip(seconds["trl"], took, strict=True))
                lines.append(
                    dict(
                        bench="rl",
                        what=what,
                        policy=name,
                        batch=args.batch,
                        length=args.length,
                        seconds=spread(took)[0],
                        ratio=ratio,
                        ratio_low=low,
                        ratio_high=high,
                        repeats=args.repeats,
                    )
                )
    show(
        "GRPO: seconds, and their ratio to TRL's",
        lines,
        ("what", "policy", "seconds", "ratio", "ratio_low", "ratio_high"),
    )
    return lines


def main() -> None:
    parser = parser_of(__doc__, repeats=9)
    parser.add_argument(
        "--batch", type=int, default=16, help="number of completions, all of one prompt"
    )
    parser.add_argument("--length", type=int, default=64, help="number of steps of a completion")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    run_bench("rl", cost, args)


if __name__ == "__main__":
    main()
