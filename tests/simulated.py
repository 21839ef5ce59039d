"""A small simulated screen and settings that train on it in a second."""

from __future__ import annotations

from pathlib import Path

from perturbdiff.config import Config, load_config
from perturbdiff.data.simulate import SimulationConfig, simulate

SIMULATION = SimulationConfig(
    n_genes=40,
    n_cell_types=2,
    n_batches=2,
    n_perturbations=3,
    cells_per_condition=20,
    control_cells_per_context=30,
    n_effect_genes=10,
)
TINY = [
    "training.device=cpu",
    "training.n_steps=6",
    "training.log_every=1",
    "training.validate_every=2",
    "training.save_every=100",
    "training.save_minutes=0",
    "data.set_size=8",
    "data.sets_per_batch=4",
    "denoiser.width=16",
    "denoiser.depth=2",
    "denoiser.n_heads=2",
    "sampling.n_steps=3",
]
DEFAULTS = str(Path(__file__).with_name("defaults.yaml"))
"""A recipe of nothing: no other one is chosen."""


def write_screen(folder: Path) -> Path:
    path = folder / "screen.h5ad"
    simulate(SIMULATION, path)
    return path


def tiny_config(screen: Path, out: Path, *words: str, hold_out: tuple[str, ...] = ("pert_0:type_0",)) -> Config:
    given = {"out": str(out), "data": {"screen": str(screen)}, "split": {"hold_out": list(hold_out)}}
    return load_config(None, [*TINY, *words], given)
