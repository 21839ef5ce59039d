"""The data set card of an atlas: README.md, generated from atlas.json."""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped]

from perturbdiff.atlas.format import AtlasInfo
from perturbdiff.cards import CITATION, MAX_LISTED, card_text, escaped, front_text, license_fields

TAGS = ["single-cell", "perturbation", "transcriptomics", "biology", "perturbdiff"]
SIZES = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B",
         "10B<n<100B", "100B<n<1T", "n>1T"]  # fmt: skip


def size_category(n_cells: int) -> str:
    """The Hub's word for so many rows."""
    return next((word for i, word in enumerate(SIZES[:-1]) if n_cells < 10 ** (i + 3)), SIZES[-1])


def atlas_card(info: AtlasInfo, name: str = ".") -> str:
    """Markdown whose front matter makes `datasets` and the Hub show cells, genes and conditions, and nothing else.

    `name` is what the snippets open: a repo id, or the folder where the card lies. The same arguments give the same
    bytes.
    """
    names = ", ".join(source.name for source in info.sources[:3])
    license = _license(info)
    head: dict[str, Any] = {
        **license_fields(license),
        "pretty_name": front_text(f"{names}{', ...' if len(info.sources) > 3 else ''}: {info.n_cells:,} cells"),
        "size_categories": [size_category(info.n_cells)],
        "tags": TAGS,
        "configs": [
            {"config_name": "default", "data_files": "data/*.parquet"},
            {"config_name": "genes", "data_files": "genes.parquet"},
            {"config_name": "conditions", "data_files": "conditions.parquet"},
        ],
    }
    kinds = {"perturbation": info.n_perturbations, "cell type": info.n_cell_types, "gene": info.n_genes}
    counts = {kind: f"{n:,} {kind}{'s' * (n != 1)}" for kind, n in kinds.items()}
    counts["batch"] = f"{info.n_batches:,} batch{'es' * (info.n_batches != 1)}"
    parts = {
        "Summary": f"""\
# Cells for PerturbDiff

{info.n_cells:,} cells of {counts["perturbation"]}, {counts["cell type"]} and {counts["batch"]}; {counts["gene"]}.
License: {escaped(license or "not stated of all sources", 400)}.""",
        "How to read it": f"""\
## How to read it

```python
from perturbdiff import Atlas

atlas = Atlas.open("{name}")
print(atlas.summary())
```

```python
import datasets

cells = datasets.load_dataset("{name}", split="train", streaming=True)  # nothing is kept on disk
print(next(iter(cells)))
genes = datasets.load_dataset("{name}", "genes", split="train")  # and "conditions"
```

A model is trained on it with `perturbdiff train --atlas {name}`; with `data.streamed=true` nothing is kept on disk.""",
        "What is in it": f"""\
## What is in it

One row a cell, sorted by cell type, batch and perturbation.

| column | what |
|---|---|
| `genes` | rows of `genes.parquet`, counted from 0, of the genes that have a value; {info.gene_type} |
| `{info.value_column}` | the values of these genes; {info.value_type} |
| `library_size` | total of the cell's values before genes were left out, or what its source stated |
| `perturbation` | `{info.control_label}` for unperturbed cells |
| `cell_type`, `batch` | the context: unperturbed cells of the same cell type and batch are a cell's controls |
| `source`, `cell` | which source it comes from, and its name there |

The values: {escaped(info.normalisation, 2000)}

| file | what |
|---|---|
| `data/cells-*.parquet` | the cells |
| `genes.parquet` | names and Ensembl ids of the genes, in the order of the indices, and which source measured them |
| `conditions.parquet` | each condition's number of cells, its shard and its first row there, its sources |
| `atlas.json` | sizes, sources, license, what a reader must do with the values |
| `checksums.json` | sha256 and size of every file |

Rule for the genes: {escaped(info.genes_rule)}. Seed of the order of cells within a condition: {info.seed}.""",
        "Sources": f"""\
## Sources

| name | file | cells | genes kept | library size | license |
|---|---|---|---|---|---|
{_sources(info)}""",
        "Citation": f"## Citation\n\nCite the sources above.\n\n{CITATION}",
    }
    return card_text(yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1 << 20), parts)


def _license(info: AtlasInfo) -> str | None:
    """What was said of the whole, else what all sources say; None where one of them says nothing."""
    stated = dict.fromkeys(source.license for source in info.sources)
    if info.license is not None or None in stated:
        return info.license
    return " and ".join(str(license) for license in stated) or None


def _sources(info: AtlasInfo) -> str:
    rows = [
        f"| {escaped(s.name)} | {escaped(s.file)} | {s.n_cells:,} | {s.n_genes_kept:,} of {s.n_genes:,} "
        f"| {escaped(s.library_size)} | {escaped(s.license or 'not stated', 400)} |"
        for s in info.sources[: MAX_LISTED * 10]
    ]
    if len(info.sources) > len(rows):
        rows.append(f"| and {len(info.sources) - len(rows):,} more in `atlas.json` | | | | | |")
    return "\n".join(rows)
