"""The measurements of bench_diffusion.py on the tiny nets: a training step, the mask of a doubled
row, and soft masks without training."""

from tempfile import TemporaryDirectory

import torch

from softar.diffusion import DenoiseConfig, load
from softar.diffusion.doubled import doubled
from softar.diffusion.evaluate import evaluate
from softar.recipes.bench_tools import console, largest, show, spread
from softar.tasks import load_task

STEPS = 20
# share of the steps that read a row twice
WAYS = {"hard": 0.0, "two passes in .8 of the steps": 0.8, "two passes always": 1.0}
FLAT = dict(centre=-100.0, steepness=1.0, k=5)  # lambda = scale, whatever the entropy
SOFTENERS = [
    ("hard", {}),
    *(("soft-token", dict(bias=bias)) for bias in (0.5, 5.0, 50.0)),
    *(("soft-mask", FLAT | dict(scale=scale)) for scale in (0.3, 0.1, 0.03, 0.01)),
    ("soft-mask", FLAT | dict(scale=0.3, k=1)),
    ("soft-mask", dict(scale=0.3, centre=-0.3, steepness=20.0, k=5)),
    *(("slerp", dict(strength=strength)) for strength in (0.3, 0.1, 0.03)),
]


def training(args) -> list[dict]:
    """A step of DiffusionSFTTrainer, hard and two-pass: time, and memory at its peak and held for
    the backward pass."""
    data = load_task("latin", size=512).train
    with TemporaryDirectory() as folder:

        def seconds(twice):
            trainer = trainer_of(folder, data, twice)
            start = args.clock()
            trainer.train()
            return (args.clock() - start) / STEPS

        memory = {
            way: memory_of(trainer_of(folder, data, WAYS[way]))
            for way in ("hard", "two passes always")
        }
        seconds(0.0)  # warm-up
        taken = {way: [] for way in WAYS}
        for _ in range(args.repeats):
            for way, twice in WAYS.items():
                taken[way].append(seconds(twice))
    rows = []
    for way, times in taken.items():
        ratio, lowest, highest = spread(t / h for t, h in zip(times, taken["hard"], strict=True))
        row = dict(bench="training", way=way, ms=1000 * spread(times)[0], ratio=ratio)
        row |= dict(lowest=lowest, highest=highest)
        rows.append(row | memory.get(way, dict(held_mb=None, peak_mb=None)))
    columns = ("way", "ms", "ratio", "lowest", "highest", "held_mb", "peak_mb")
    show("a training step, 128 rows of 26 tokens", rows, columns)
    return rows


def trainer_of(folder: str, data, twice: float):
    from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer  # slow to import

    model, tokenizer = load("latin-diffusion-tiny", seed=0)
    config = DiffusionSFTConfig(
        output_dir=folder,
        per_device_train_batch_size=128,
        max_steps=STEPS,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        logging_steps=1000,
        softmasking_prob=twice,
        head_scale=0.5,
    )
    return DiffusionSFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)


def memory_of(trainer) -> dict:
    """Of one training step: megabytes held for the backward pass, and at the peak."""
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    sizes = {}

    def keep(tensor):  # views of one storage count once
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def loss():
        trainer.restart_micro()
        return trainer.compute_loss(trainer.model, batch)

    def step():
        with torch.enable_grad():
            loss().backward()

    parameters = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive = loss()  # so that no storage is used again
    held = sum(size for pointer, size in sizes.items() if pointer not in parameters)
    del alive
    return dict(held_mb=held / 1e6, peak_mb=largest(step) / 1e6)


def doubled_row(args) -> list[dict]:
    """Memory of the mask of a doubled row, and of a layer's attention under it, forward and
    backward: 8 heads of 64."""
    rows = []
    for length in (512, 1024, 2048):
        documents = torch.zeros(1, length, dtype=torch.long)
        _, sees = doubled(documents, args.block_length)
        row = dict(bench="doubled-row", T=length, mask_mb=sees.numel() / 1e6)
        row["making_it_mb"] = largest(lambda d=documents: doubled(d, args.block_length)) / 1e6
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [torch.randn(1, 8, 2 * length, 64, dtype=dtype) for _ in range(3)]
            for name, mask in (("no mask", None), ("mask", sees)):
                peak = largest(lambda i=inputs, m=mask: attend(i, m)) / 1e6
                row[f"{name}, {str(dtype).removeprefix('torch.')}"] = peak
        rows.append(row)
    show("peak beyond what was there, MB", rows, tuple(rows[0])[1:])
    return rows


@torch.enable_grad()
def attend(inputs: list[torch.Tensor], mask: torch.Tensor | None) -> None:
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()


def softeners(args) -> list[dict]:
    """Accuracy of a trained model under soft masks that it may not have been trained for."""
    model, tokenizer = load(args.model)
    task = load_task(args.task)
    rows = []
    for name, knobs in SOFTENERS:
        row = dict(
            bench="softeners", model=args.model, task=args.task, soften=name, knobs=str(knobs)
        )
        for steps in (8, 12):
            config = DenoiseConfig(steps=steps, soften=name, soften_args=knobs)
            row[f"nfe {steps}"] = evaluate(model, tokenizer, task.test, task.score, config)[
                "accuracy"
            ]
        rows.append(row)
    table = model.get_input_embeddings().weight.detach()
    cells = tokenizer.convert_tokens_to_ids(["1", "2", "3", "4", "5"])
    tokens = table[cells] if args.task == "latin" else table
    norms = dict(
        mask=table[tokenizer.mask_token_id].norm(),
        token=tokens.norm(dim=-1).mean(),
        mean_of_tokens=tokens.mean(0).norm(),
    )
    knobs = str({name: round(float(norm), 2) for name, norm in norms.items()})
    show("accuracy", rows, ("soften", "knobs", "nfe 8", "nfe 12"))
    console.print("norms of embeddings:", knobs)
    return [*rows, dict(bench="softeners", soften="norms", knobs=knobs)]
