"""The model card: README.md of a model folder, generated from what the folder says."""

from __future__ import annotations

from types import NoneType
from typing import Any


def write_card(config: dict[str, Any], json_files: dict[str, dict[str, Any]], n_parameters: int) -> str:
    """Markdown with the Hub's front matter."""
    how = json_files["preprocessing.json"]
    training = json_files["training.json"]
    genes, perturbations = json_files["genes.json"]["names"], json_files["perturbations.json"]["names"]
    expects = (
        f"raw counts; log1p(count * {how['target_sum']:g} / library size) / {how['scale']:g} is done for you, with the "
        + (f"library size of obs column `{how['library_size_col']}`" if how["library_size_col"] else "row sums of X")
        if how["input_kind"] == "counts"
        else "log1p values, normalised as the training data were"
    )
    use = (
        f"""controls = anndata.read_h5ad("controls.h5ad")  # control cells of the context to predict
predicted = model.predict(controls, perturbation={perturbations[0]!r})"""
        if perturbations
        else "# trained without perturbations (marginal cell sets): a start for training; it predicts no response"
    )
    rows = "\n".join(
        f"- {name}: {value}" for name, value in training.items() if not isinstance(value, (dict, list, NoneType))
    )
    return f"""---
library_name: perturbdiff
tags:
- single-cell
- perturbation
- diffusion
---
# PerturbDiff model

Predicts the distribution of single-cell responses to a perturbation from unperturbed control cells.

## Use

```python
import anndata
from perturbdiff import PerturbDiff

model = PerturbDiff.from_pretrained("THIS_FOLDER")
{use}
```

## What it expects

- X: {expects}
- genes: {len(genes):,}, matched by name (`genes.json`)
- perturbations: {len(perturbations)} (`perturbations.json`); combinations are written A{
        json_files["perturbations.json"]["combination_separator"] or "+"
    }B
- cell types seen with a perturbation: {len(json_files["cell_types.json"]["names"])}; others are predicted from their
  control cells alone

## Training

{rows}
- parameters: {n_parameters:,} ({config["denoiser"]["attention"]} attention, {config["denoiser"]["output"]} output)

## Method

Yuan et al. 2026, arXiv:2602.19685.
"""
