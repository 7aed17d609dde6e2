"""The programs of recipes/README.md, installed as softar.recipes: `softar sft` runs sft_soft.py, and
`accelerate launch -m softar.recipes.sft_soft` does, too."""
