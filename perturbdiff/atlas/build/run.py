"""Building an atlas: plan, partition, merge, and a name at the very end.

All work is done in a hidden folder beside the atlas, `.NAME.building`, and goes on there when it was interrupted:
`settings.json` (what is built of what), `moments/` (of genes, where they choose the genes), `plan/`, `spill/`,
`shards/` and `atlas/`, which is renamed when it is whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from perturbdiff._version import __version__
from perturbdiff.atlas.build.genes import GeneSpace, n_selected
from perturbdiff.atlas.build.plan import (
    GROUP_TIMES,
    Inputs,
    Plan,
    density,
    make_plan,
    row_bytes,
    share_memory,
)
from perturbdiff.atlas.build.repeats import find_repeats
from perturbdiff.atlas.build.sort import Sort, merge_bucket, spill_chunk
from perturbdiff.atlas.build.sources.atlas import OtherAtlas
from perturbdiff.atlas.build.sources.base import Source, open_source
from perturbdiff.atlas.card import atlas_card
from perturbdiff.atlas.format import (
    CONDITIONS_SCHEMA,
    CONTROL_LABEL,
    PREPROCESSING,
    SHARD_BYTES,
    AtlasInfo,
    AtlasSource,
    Shard,
    shard_name,
    write_manifest,
)
from perturbdiff.atlas.store import Atlas
from perturbdiff.config import BuildConfig
from perturbdiff.data.labels import label_notes
from perturbdiff.data.notation import Notation
from perturbdiff.files import progress, sha256, to_disk, write_json
from perturbdiff.workers import Crew


def build(
    config: BuildConfig,
    max_memory: int = 4 << 30,
    workers: int | None = None,
    task: tuple[int, int] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Atlas | None:
    """Build an atlas; the same call again goes on where an interrupted one was.

    Parameters
    ----------
    max_memory
        Bytes that all processes may take together.
    workers
        Processes; None: one a CPU. Neither this nor `max_memory` changes a byte of the atlas.
    task
        (i, n), i from 1: only the i-th of n parts of the reading, so that n machines can share it. A call without it
        does what is missing and ends the build.
    shard_bytes
        Genes and values of a shard, in memory.

    Returns
    -------
    The atlas; None after a task.

    Raises
    ------
    FileNotFoundError, KeyError, ValueError
        A source or setting is not as it must be; the folder exists; an interrupted build had other settings.
    OSError
        The disk is full; a worker process was killed. What was done stays done.
    """
    out = Path(config.out)
    if task is not None and not 1 <= task[0] <= task[1]:
        raise ValueError(f"task ({task[0]}/{task[1]}) must be i/n with i from 1 to n.")
    if workers is not None and workers < 1:
        raise ValueError(f"workers ({workers}) must be at least 1.")
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists; choose another --out, or remove it to build it anew.")
    inputs = Inputs(out.parent / f".{out.name}.building", config, _opened(config), shard_bytes)
    try:
        inputs.folder.mkdir(parents=True, exist_ok=True)
        _check_settings(inputs)
        known = inputs.plan if (inputs.folder / "plan").is_dir() else None
        densities = [density(source) for source in inputs.sources] if known is None else []
        cell_bytes = known.cell_bytes if known else row_bytes(inputs, densities)
        n_workers, memory, max_values = share_memory(
            max_memory, workers or os.cpu_count() or 1, cell_bytes, known.max_values if known else None
        )
        with Crew(inputs, n_workers) as crew:
            if known is None:
                make_plan(crew, densities, max_values, task).write()
            plan = inputs.plan
            _report(plan)
            if not all(plan.sort.bucket_file(i).exists() for i in range(plan.sort.conditions.n_buckets)):
                _partition(crew, plan, task)
            if task is not None:
                print(f"task {task[0]}/{task[1]} is done; the same command without a task ends the build.", flush=True)
                return None
            _merge(crew, plan, memory)
        _finish(inputs, plan, out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        plan_is_there = (inputs.folder / "plan").is_dir()
        need = f", which needs about {inputs.plan.disk_bytes / 1e9:.2g} GB there" if plan_is_there else ""
        raise OSError(
            error.errno,
            f"no space left on the disk of {inputs.folder} for this build{need}; make room and run the same command "
            "again: it goes on where it was",
        ) from error
    finally:
        if inputs.folder.is_dir() and os.listdir(inputs.folder) == ["settings.json"]:  # refused before it began
            shutil.rmtree(inputs.folder)
    atlas = Atlas.open(out)
    print(atlas.summary(), flush=True)
    return atlas


# ------------------------------------------------------------------------------------------------ inputs


def _opened(config: BuildConfig) -> tuple[Source, ...]:
    """The sources, seen to go together."""
    if not config.sources:
        raise ValueError("sources ([]) is empty; give at least one .h5ad, folder or data set.")
    sources = tuple(open_source(source) for source in config.sources)
    twice = [name for name, n in Counter(source.name for source in sources).items() if n > 1]
    if twice:
        raise ValueError(f"two sources are called {twice[0]!r}; give one of them another name.")
    for i, source in enumerate(sources):
        for other in sources[:i]:
            if _same_cells(source, other):
                raise ValueError(
                    f"sources {other.name!r} ({other.config.path}) and {source.name!r} ({source.config.path}) are the "
                    "same file; give it once, or select other cells of it in each."
                )
    first = sources[0]
    for other in sources[1:]:
        if other.input_kind != first.input_kind:
            raise ValueError(
                f"source {first.name!r} holds {_kind(first)} and source {other.name!r} {_kind(other)}; an atlas holds "
                "one kind: give the raw counts of both, or build two atlases."
            )
    return sources


def _same_cells(a: Source, b: Source) -> bool:
    selections = [(s.config.cells, list(s.config.keep), list(s.config.drop)) for s in (a, b)]
    if selections[0] != selections[1]:
        return False
    if "files_sha256" in a.fingerprint or "files_sha256" in b.fingerprint:  # of many files
        return a.fingerprint.get("files_sha256") == b.fingerprint.get("files_sha256")
    first, second = Path(a.config.path), Path(b.config.path)
    if not (first.is_file() and second.is_file()):  # on the Hub
        return a.fingerprint == b.fingerprint
    return first.samefile(second) or (first.stat().st_size == second.stat().st_size and sha256(first) == sha256(second))


def _kind(source: Source) -> str:
    return "raw counts" if source.input_kind == "counts" else "log1p values"


def _check_settings(inputs: Inputs) -> None:
    """Keep what is built of what; refuse to go on with the work of other settings or inputs. Raises ValueError."""
    config = inputs.config
    settings = {  # without paths: a file may move
        **{key: value for key, value in asdict(config).items() if key not in ("out", "sources")},
        "sources": [
            {**{key: value for key, value in asdict(s.config).items() if key != "path"}, "input": s.fingerprint}
            for s in inputs.sources
        ],
        "files": [sha256(Path(path)) for path in (config.gene_table, config.genes) if path and Path(path).is_file()],
        "shard_bytes": inputs.shard_bytes,
        "versions": [__version__, pa.__version__],
    }
    path = inputs.folder / "settings.json"
    if not (inputs.folder / "plan").is_dir() and not (inputs.folder / "moments").is_dir():  # there is no work to keep
        write_json(path, settings)
    found = json.loads(path.read_bytes())
    different = [key for key, value in json.loads(json.dumps(settings)).items() if found.get(key) != value]
    if different:
        raise ValueError(
            f"{inputs.folder} holds an interrupted build with other {', '.join(different)}; give what it was begun "
            "with, delete that folder to begin anew, or choose another --out."
        )


def _report(plan: Plan) -> None:
    measured = _measured(plan)
    for i, source in enumerate(plan.sort.sources):
        n_kept = GeneSpace(plan.genes, plan.sort.columns).n_kept(i)
        print(
            f"source      {source.name}: {plan.source_cells[i]:,} of {source.n_cells:,} cells, {n_kept:,} of "
            f"{len(source.genes):,} genes are among the atlas's {len(plan.genes):,}, library sizes: "
            f"{source.library_size}; {source.values}",
            flush=True,
        )
        labels = plan.sort.perturbations[i].values()
        notation = Notation.learned(labels, "+", plan.sort.dose_separator, (CONTROL_LABEL,), plan.genes.names)
        for note in label_notes(set(labels), notation, "source"):
            print(f"note        {note}", flush=True)
        if n_left := n_kept - int(measured[i].sum()):
            print(
                f"note        {n_left:,} genes of {source.name} were not measured in all of its own "
                "sources: they count as not measured in any of its cells; build from those sources to keep them.",
                flush=True,
            )


# ------------------------------------------------------------------------------------ partition and merge


def _spill(inputs: Inputs, chunk: int) -> int:
    return spill_chunk(inputs.plan.sort, chunk)


def _merged(inputs: Inputs, item: tuple[int, int]) -> int:
    return merge_bucket(inputs.plan.sort, *item)


def _partition(crew: Crew[Inputs], plan: Plan, task: tuple[int, int] | None) -> None:
    sort = plan.sort
    part = range(len(sort.chunks)) if task is None else range(task[0] - 1, len(sort.chunks), task[1])
    missing = [chunk for chunk in part if not sort.chunk_file(chunk).exists()]
    total = int(sort.chunks[list(part), 1].sum())
    with progress(total, "partition", "cell", initial=total - int(sort.chunks[missing, 1].sum())) as bar:
        for _, n in crew.run(_spill, missing):
            bar.update(n)


def _merge(crew: Crew[Inputs], plan: Plan, memory: int) -> None:
    sort = plan.sort
    done = {i: _bucket(sort, i)["n_cells"] for i in range(sort.conditions.n_buckets) if sort.bucket_file(i).exists()}
    # What is read together is the small part: the rest is for a row group and what Parquet makes of it.
    missing = [(i, memory // GROUP_TIMES) for i in range(sort.conditions.n_buckets) if i not in done]
    with progress(sum(plan.source_cells), "merge", "cell", initial=sum(done.values())) as bar:
        for _, n in crew.run(_merged, missing):
            bar.update(n)


def _bucket(sort: Sort, i: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(sort.bucket_file(i).read_bytes())
    return content


def _source_lists(sources: np.ndarray) -> pa.Array:
    condition, source = np.nonzero(sources)
    starts = np.searchsorted(condition, np.arange(len(sources) + 1))
    return pa.ListArray.from_arrays(starts.astype(np.int32), source.astype(np.int32))


def _shared_lists(pairs: np.ndarray, n_conditions: int) -> tuple[pa.Array, pa.Array]:
    """Of each condition, those that it shares cells with, and how many."""
    both = np.concatenate([pairs, pairs[:, [1, 0, 2]]])
    both = both[np.lexsort((both[:, 1], both[:, 0]))]
    starts = np.searchsorted(both[:, 0], np.arange(n_conditions + 1)).astype(np.int32)
    others, numbers = both[:, 1].astype(np.int32), both[:, 2].copy()
    return pa.ListArray.from_arrays(starts, others), pa.ListArray.from_arrays(starts, numbers)


def _measured(plan: Plan) -> np.ndarray:
    """(n_sources, G) the genes of the atlas that each source measured; of another atlas, all of its sources."""
    measured = np.zeros((len(plan.sort.sources), len(plan.genes)), dtype=bool)
    for row, source, columns in zip(measured, plan.sort.sources, plan.sort.columns, strict=True):
        own = columns >= 0
        if isinstance(source, OtherAtlas):
            own &= source.atlas.measured.all(axis=0)
        row[columns[own]] = True
    return measured


def _finish(inputs: Inputs, plan: Plan, out: Path) -> None:
    """Give the shards their names, write what goes with them, and let the atlas appear."""
    sort, conditions, config = plan.sort, plan.sort.conditions, inputs.config
    folder = inputs.folder / "atlas"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    digests: dict[str, tuple[str, int]] = {}
    buckets = [_bucket(sort, i) for i in range(conditions.n_buckets)]
    for shard in (shard for bucket in buckets for shard in bucket["shards"]):
        name = shard_name(len(shards))
        if (made := sort.folder / "shards" / shard["file"]).exists():
            made.replace(folder / name)
        shards.append(Shard(name, shard["n_cells"]))
        digests[name] = (shard["sha256"], shard["size"])
    firsts = np.cumsum([0, *(shard.n_cells for shard in shards)])
    if firsts[-1] != sum(plan.source_cells):
        raise ValueError(
            f"{firsts[-1]} cells were sorted of {sum(plan.source_cells)}; an input changed while it was read. Delete "
            f"{inputs.folder} and build again."
        )
    hashed = [sort.hash_file(i) for i, bucket in enumerate(buckets) if bucket["n_compared"]]
    repeats = find_repeats(hashed, int(firsts[-1]))
    row = np.cumsum(conditions.n_cells) - conditions.n_cells
    position = np.searchsorted(firsts, row, side="right") - 1
    cell_type, batch, perturbation = conditions.labels(np.arange(len(conditions)))
    is_control = np.array(perturbation) == CONTROL_LABEL
    table = pa.Table.from_arrays(
        [
            pa.array(cell_type), pa.array(batch), pa.array(perturbation), pa.array(is_control),
            pa.array(conditions.n_cells), pa.array([shards[i].file for i in position.tolist()]),
            pa.array(row - firsts[position]), _source_lists(conditions.sources),
            *_shared_lists(repeats.pairs, len(conditions)),
        ],
        schema=CONDITIONS_SCHEMA,
    )  # fmt: skip
    space = GeneSpace(plan.genes, sort.columns)
    kind = inputs.sources[0].input_kind
    target_sums = {source.target_sum for source in inputs.sources}
    info = AtlasInfo(
        library_version=__version__,
        input_kind=kind,
        normalisation="Models read "
        + (f"log1p(count * {PREPROCESSING.target_sum:g} / library_size)" if kind == "counts" else "value")
        + f" / {PREPROCESSING.scale:g}, or as they were told.",
        n_cells=int(firsts[-1]),
        n_genes=len(plan.genes),
        n_conditions=len(conditions),
        n_perturbations=len(set(perturbation) - {CONTROL_LABEL}),
        n_cell_types=len(set(cell_type)),
        n_batches=len(set(batch)),
        gene_type=sort.gene_type,
        value_type=sort.value_type,
        control_label=CONTROL_LABEL,
        dose_separator=sort.dose_separator,
        license=config.license,
        seed=config.seed,
        target_sum=target_sums.pop() if len(target_sums) == 1 else None,
        genes_rule=config.genes if config.genes in ("union", "intersection") or n_selected(config.genes) else "file",
        sources=tuple(
            AtlasSource(
                s.name, s.fingerprint["file"], s.config.license, plan.source_cells[i], len(s.genes), space.n_kept(i),
                s.library_size,
            )
            for i, s in enumerate(inputs.sources)
        ),
        shards=tuple(shards),
        repeats_within=repeats.within,
        repeats_across=repeats.across,
        dose_unit=sort.dose_unit,
    )  # fmt: skip
    write_manifest(folder, info, plan.genes, table, digests, atlas_card(info), _measured(plan))
    for path in (*folder.iterdir(), folder / "data", folder):
        to_disk(path)
    shutil.rmtree(inputs.folder / "spill", ignore_errors=True)
    folder.rename(out)
    to_disk(out.parent)
    shutil.rmtree(inputs.folder, ignore_errors=True)
