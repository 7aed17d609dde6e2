# %% [markdown]
"""
A tour of softar in some twenty seconds: nothing is downloaded, every model comes with the package.

python recipes/tour.py

Cells begin with `# %%`, so an editor with notebooks opens this file as one.
"""

# %% A belief
# At each step a language model has a distribution over the next token. Ordinary decoding draws one
# token and forgets the rest. MNNS asks for a sign for each digit so that the sum is the smallest one
# not below 0; after the digits 4 8 1 3 the first partial sum is 4 (S4) or -4 (S-4).
import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

import softar
from softar import diffusion
from softar.mixers import Mixed, mk_mixer
from softar.show import terminal, trace

console = Console(width=100)
disable_progress_bar()
torch.manual_seed(0)
PROMPT = "<bos> D4 D8 D1 D3 ->"
model, tokenizer = softar.load("mnns-soft-tiny")
inputs = tokenizer(PROMPT, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[0, -1]


def words(belief: softar.Soft) -> str:
    pairs = zip(belief.ids.tolist(), belief.weights.tolist(), strict=True)
    return "  ".join(f"{tokenizer.decode(token)} {weight:.2f}" for token, weight in pairs)


belief = softar.mk_proba_dist(logits, top_k=4)
print("the belief after the prompt:", words(belief))

# %% What the model reads next
# A soft token is that belief as an input: the weighted sum of the tokens' embeddings.
soft_token = softar.soft_embed(belief, model.get_input_embeddings())
print("a soft token is a vector of", len(soft_token), "numbers, made of", len(belief.ids), "tokens")

# %% Mixers
# What is fed back is up to a mixer: the belief itself, a noisy draw of it, the mean of a few samples.
rng = torch.Generator().manual_seed(0)
for name in ("soft", "gumbel", "k-samples"):
    mixed = mk_mixer(name)(belief, rng=rng)
    print(f"{name:>9}:", words(mixed.soft))

# %% A mixer by hand
# A mixer is a function. This one keeps the two likeliest tokens, at equal weights.


def two_of_a_kind(dist: softar.Soft, *, rng=None) -> Mixed:
    ids = dist.ids[..., :2]
    weights = torch.full(ids.shape, 0.5)
    return Mixed(softar.Soft(ids, weights), token=ids[..., 0], logp=None)


config = softar.SoftConfig(mixer=two_of_a_kind, budget=3, max_new_tokens=6)
out = softar.generate(model, **inputs, config=config)
print("by hand:", tokenizer.decode(out.completions[0]))

# %% A trace
# Three soft steps, then a discrete answer. Step 2 holds all four partial sums at once.
out = softar.generate(model, **inputs, config=softar.SoftConfig(budget=3, max_new_tokens=6))
console.print(terminal.view(trace.thought(out, tokenizer, top=4)))

# %% A Latin square
# Masked diffusion fills masks, several in each forward. Every row and every column of the square
# needs each of 1 to 5 once; five cells are given. With soft masks an open cell shows what the model
# believes of it so far, which helps where there are fewer forwards than cells.
filler, cell_tokenizer = diffusion.load("latin-diffusion-tiny")
squares = softar.load_task("latin", size=1)
rows = squares.test.select(range(100)).to_list()
templates = cell_tokenizer([row["template"] for row in rows], return_tensors="pt")
for soften in ("hard", "soft-mask"):
    config = diffusion.DenoiseConfig(gen_length=0, steps=12, soften=soften)
    filled = diffusion.denoise(filler, **templates, config=config)
    texts = cell_tokenizer.batch_decode(filled.sequences, skip_special_tokens=True)
    valid = [squares.score(text, row) == 1 for text, row in zip(texts, rows, strict=True)]
    print(
        f"{soften:>9}: {sum(valid)} of 100 squares are valid after {filled.num_forwards} forwards"
    )

first = valid.index(True)
holes, cells = rows[first]["template"].replace("<mask>", ".").split()[1:-1], texts[first].split()
for start in range(0, 25, 5):
    print(" ".join(holes[start : start + 5]), "  ->  ", " ".join(cells[start : start + 5]))

# %% Two decoders compared
# The same held-out rows, decoded by a model trained on discrete thoughts and by one trained on soft
# ones: accuracy with a 95 % interval, the gain, and the forwards per answer (NFE).
task = softar.load_task("mnns")
decoders = [
    softar.make_decoder(spec, max_new_tokens=6)
    for spec in ("mnns-discrete-tiny=discrete", "mnns-soft-tiny=soft")
]
result = softar.compare(
    decoders, task.test.select(range(128)), task.score, extract=task.extract, task=task.name
)
console.print(result.table())

# %% [markdown]
# Next: softar/README.md is the guide, recipes/README.md lists the programs that train.
