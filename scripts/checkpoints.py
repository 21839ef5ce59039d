"""The checkpoints of the package: made by the commands that their cards print, put where `from_pretrained` looks.

    python scripts/checkpoints.py --data DIR --work DIR                          # all, a quarter of an hour on a core
    python scripts/checkpoints.py --data DIR --work DIR --only simulated-screen  # needs no file

DIR of --data holds the files that a checkpoint names, under these names: kang.h5ad and papalexi.h5ad, described in
scripts/bench/tasks, pbmc.h5ad (loadings of papalexi_unseen there) and org.Hs.eg.sqlite, of Debian's
r-bioc-org.hs.eg.db. What was made in --work before is not made again. perturbdiff/hub/registry.yaml gets their entries.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from perturbdiff.hub.metadata import parse_metadata
from perturbdiff.hub.model_folder import read_folder
from perturbdiff.hub.registry import REGISTRY
from perturbdiff.model import PerturbDiff

CHECKPOINTS = REGISTRY.parent / "checkpoints"
MAX_BYTES = 15 << 20  # of a checkpoint
REGISTERED = ("pearson_delta", "energy_distance")
LICENSE = "mit"
TITLE = "## How this checkpoint was made"  # in its card
ENTRIES = "checkpoints:"  # the line of the registry under which they stand


@dataclass(frozen=True)
class Checkpoint:
    """commands: as a user would give them, the last one trains runs/NAME. about: for the card."""

    files: tuple[str, ...]
    commands: tuple[str, ...]
    about: str


PANEL = "data.library_size_col=n_counts_panel data.target_sum=null"  # of genes, not of a transcriptome
MADE = {
    "kang-ifn-beta": Checkpoint(
        ("kang.h5ad",),
        ("perturbdiff train --screen kang.h5ad --hold-out IFN-beta:CD4T --out runs/kang-ifn-beta",),
        "Interferon-beta in cell types of blood (Kang et al. 2018, GEO GSE96583, batch 2), all 4,805 genes that were "
        "measured in common. `kang.h5ad` holds 4,502 of its cells, merged of the public files of theislab/scgen "
        "(data/valid.h5ad), immunogenomics/harmony (data/pbmc_stim.RData), hjames1/seuratTools (data/ifnb1k.rda) and "
        "HelenaLC/muscat (data/kang_se.rda, data/example_sce.rda). The same numbers need "
        "this very file (sha256 09301ba8ce02f1767283a92529a38fb1427310d994b32db373f72aea497d08c6), "
        "which is not published.",
    ),
    "papalexi-knock-outs": Checkpoint(
        ("papalexi.h5ad", "pbmc.h5ad", "org.Hs.eg.sqlite"),
        (
            "perturbdiff features build org.Hs.eg.sqlite --screen papalexi.h5ad --out go.parquet "
            "--license Artistic-2.0",
            "perturbdiff features build pbmc.h5ad --out loadings.parquet",
            "perturbdiff train --screen papalexi.h5ad --hold-out IRF1 --hold-out STAT1 --hold-out CUL3 --hold-out "
            "SMAD4 --hold-out BRD4 --out runs/papalexi-knock-outs "
            f"'data.perturbation_features=[go.parquet,loadings.parquet]' {PANEL}",
        ),
        "Knock-outs of 25 genes in THP-1 cells (Papalexi et al. 2021, GEO GSE153056), of which five were held out "
        "whole, on a random sample of 299 genes (Katsevich-Lab/sceptredata, data/lowmoi_example_data.rda). Genes "
        "that no cell lacked are described by GO annotations, but electronic ones (org.Hs.eg.db 3.16, GO of July "
        "2022, CC BY 4.0) and by loadings in blood cells (Stoeckius et al. 2018, GEO GSE108313). Few unseen knock-outs "
        "can be told: `perturbdiff predict` says of each whether it can.",
    ),
    "simulated-screen": Checkpoint(
        (),
        (
            "perturbdiff simulate screen.h5ad --seed 0",
            "perturbdiff train --screen screen.h5ad --hold-out batch=batch_1 --out runs/simulated-screen",
        ),
        "A simulated screen, whose truth is known: 6 perturbations, 4 cell types, 2 batches, of which the second was "
        "held out. Anybody can check it: `perturbdiff simulate screen.h5ad --seed 0`, then `perturbdiff hub reproduce "
        "simulated-screen --screen screen.h5ad` scores it again and compares with this card.",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(), metavar="DIR", help="folder of the files")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=MADE, default=list(MADE), metavar="NAME", help=", ".join(MADE))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        model = made(name, MADE[name], options.data, options.work)
        shutil.rmtree(CHECKPOINTS / name, ignore_errors=True)
        shutil.copytree(model, CHECKPOINTS / name)
        opened = PerturbDiff.from_pretrained(CHECKPOINTS / name, device="cpu")
        opened.training = replace(opened.training, license=LICENSE)
        opened.save_pretrained(CHECKPOINTS / name)
        n_bytes = sum(path.stat().st_size for path in (CHECKPOINTS / name).rglob("*") if path.is_file())
        if n_bytes > MAX_BYTES:
            sys.exit(f"checkpoints.py: error: {name} has {n_bytes:,} bytes; at most {MAX_BYTES:,} go into the package.")
        print(f"{name}: {n_bytes:,} bytes")
    known = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())
    comments = REGISTRY.read_text(encoding="utf-8").partition(f"\n{ENTRIES}")[0]
    entries = {known_name: registered(known_name) for known_name in known}
    text = yaml.safe_dump({ENTRIES.rstrip(":"): entries}, sort_keys=False, allow_unicode=True)
    REGISTRY.write_text(f"{comments}\n{text}", encoding="utf-8")


def made(name: str, checkpoint: Checkpoint, data: Path, work: Path) -> Path:
    """The model folder of its commands, with what is said about it in its card."""
    for file in checkpoint.files:
        if not (data / file).is_file():
            sys.exit(f"checkpoints.py: error: {name} needs {file}, which is not in --data {data}.")
        if not (work / file).exists():
            (work / file).symlink_to((data / file).resolve())
    model = work / "runs" / name / "model"
    if not (model / "evaluation.json").is_file():
        for command in checkpoint.commands:
            subprocess.run([sys.executable, "-m", *shlex.split(command)], cwd=work, check=True)
    card = model / "README.md"
    own = card.read_text(encoding="utf-8").partition(f"\n{TITLE}")[0].rstrip()
    commands = "\n".join(checkpoint.commands)
    card.write_text(f"{own}\n\n{TITLE}\n\n{checkpoint.about}\n\n```bash\n{commands}\n```\n", encoding="utf-8")
    return model


def registered(name: str) -> dict[str, Any]:
    """Its entry."""
    folder = read_folder(CHECKPOINTS / name)
    evaluation = parse_metadata(folder).evaluation
    metrics = {metric: round(evaluation.scores[metric], 4) for metric in REGISTERED} if evaluation else {}
    return {"repo": f"checkpoints/{name}", "sha256": folder.sha256, "metrics": metrics}


if __name__ == "__main__":
    main()
