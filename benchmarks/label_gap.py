"""How much of the gap between few labels and all labels the unlabelled cases close, over several seeds.

Three rows with the same network, steps, batch and augmentation: ``supervised`` on the first ``--labelnum`` cases of
the pool, ``mean_teacher`` with the prototype term on these plus the rest of the pool without labels, and
``supervised`` with all labels of the pool. Every patch of a supervised step is a labelled one, so that all rows see
equally many patches. The test cases are those after the pool; the last checkpoint counts. Finished runs are kept,
interrupted ones are resumed::

    python -m benchmarks.label_gap --dataset_name decathlon --dataset_path Task04_Hippocampus --pool 160 --labelnum 8 \
        --seeds 0 1 2 --output_dir runs/hippocampus -- --patch_size 32 48 32 --max_iteration 1000

Everything after ``--`` goes to the trainer unchanged.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from dataloaders.base import SOURCES, SourceOptions

ROOT = Path(__file__).resolve().parents[1]
SUPERVISED, OURS, FULL = "supervised", "mean teacher + prototypes", "supervised, all labels"


def write_lists(settings: argparse.Namespace) -> tuple[Path, Path]:
    """Two list files in the output folder: the first ``--pool`` cases, and the rest."""
    options = SourceOptions(root=settings.dataset_path, num_classes=settings.num_classes)
    source = SOURCES.get(settings.dataset_name).from_options(options)
    ids = list(source.official_train() or source.labeled_ids())
    if not 0 < settings.pool < len(ids):
        raise SystemExit(f"--pool {settings.pool}: the data set has {len(ids)} labelled cases; leave some for the test")
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    paths = settings.output_dir / "train.txt", settings.output_dir / "test.txt"
    for path, part in zip(paths, (ids[: settings.pool], ids[settings.pool :]), strict=True):
        path.write_text("\n".join(part) + "\n", encoding="utf-8")
    return paths


def train(settings: argparse.Namespace, name: str, flags: list[str]) -> Path:
    """Run, resume or skip one training; returns its folder."""
    folder: Path = settings.output_dir / name
    if (folder / "test" / "summary.json").exists():
        return folder
    command = [sys.executable, str(ROOT / "train_cov_dfp_3d.py"), "--output_dir", str(settings.output_dir)]
    command += ["--exp", name] + (["--resume"] if (folder / "last.pt").exists() else flags)
    environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads)}
    with (settings.output_dir / f"{name}.log").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code != 0:
        raise SystemExit(f"{name} ended with exit code {code}; see {settings.output_dir / name}.log")
    return folder


def case_scores(folder: Path, metric: str) -> dict[str, float]:
    """Mean of a metric over the classes, per case; infinite distances are left out."""
    values: dict[str, list[float]] = {}
    with (folder / "test" / "cases.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values.setdefault(row["case"], []).append(float(row[metric]))
    finite = {case: [v for v in found if np.isfinite(v)] for case, found in values.items()}
    return {case: float(np.mean(found)) for case, found in finite.items() if found}


def summarise_rows(folders: dict[str, list[Path]]) -> str:
    """Markdown table of all rows, the share of the gap, and the paired difference over cases."""
    lines = ["| row | Dice % | Jaccard % | HD95 mm | ASSD mm | Dice per seed |", "|---|---|---|---|---|---|"]
    dice: dict[str, np.ndarray] = {}
    for row, paths in folders.items():
        cells = []
        for metric, scale in (("dice", 100), ("jaccard", 100), ("hd95_mm", 1), ("assd_mm", 1)):
            seeds = scale * np.array([np.mean(list(case_scores(path, metric).values())) for path in paths])
            spread = f" ± {seeds.std(ddof=1):.2f}" if len(seeds) > 1 else ""
            cells.append(f"{seeds.mean():.2f}{spread}")
            if metric == "dice":
                dice[row] = seeds
        lines.append(f"| {row} | {' | '.join(cells)} | {', '.join(f'{value:.2f}' for value in dice[row])} |")
    gap = (dice[OURS].mean() - dice[SUPERVISED].mean()) / (dice[FULL].mean() - dice[SUPERVISED].mean())
    per_seed = (dice[OURS] - dice[SUPERVISED]) / (dice[FULL] - dice[SUPERVISED])
    lines += ["", f"Share of the gap closed: {gap:.0%} (per seed: {', '.join(f'{s:.0%}' for s in per_seed)})"]
    ours, base = (pooled_cases(folders[row]) for row in (OURS, SUPERVISED))
    difference = 100 * np.array([ours[case] - base[case] for case in sorted(base)])
    rng = np.random.default_rng(0)
    means = rng.choice(difference, (10_000, len(difference))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    p_value = stats.wilcoxon(difference).pvalue
    lines.append(
        f"Gain in Dice over supervised, paired over {len(difference)} cases (mean of the seeds): "
        f"{difference.mean():+.2f}, 95 % bootstrap interval {low:+.2f} to {high:+.2f}, Wilcoxon p = {p_value:.2g}"
    )
    return "\n".join(lines)


def pooled_cases(paths: list[Path]) -> dict[str, float]:
    """Dice per case, averaged over the seeds."""
    scores = [case_scores(path, "dice") for path in paths]
    return {case: float(np.mean([score[case] for score in scores])) for case in scores[0]}


def main() -> None:
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--dataset_path", type=Path, required=True)
    parser.add_argument("--num_classes", type=int)
    parser.add_argument("--pool", type=int, required=True, help="the first cases, for training")
    parser.add_argument("--labelnum", type=int, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("flags", nargs="*", help="flags of the trainer, after --")
    settings = parser.parse_args()
    train_list, test_list = write_lists(settings)
    common = ["--dataset_name", settings.dataset_name, "--dataset_path", str(settings.dataset_path)]
    common += ["--train_list", str(train_list), "--test_list", str(test_list), *settings.flags]
    if settings.num_classes:
        common += ["--num_classes", str(settings.num_classes)]
    few, full = ["--labelnum", str(settings.labelnum)], ["--labelnum", str(settings.pool)]
    rows: dict[str, tuple[str, list[str]]] = {
        SUPERVISED: ("sup", ["--method", "supervised", *few]),
        OURS: ("ours", few),
        FULL: ("full", ["--method", "supervised", *full]),
    }
    jobs: dict[str, list[Any]] = {row: [] for row in rows}
    with ThreadPoolExecutor(settings.jobs) as pool:
        for seed in settings.seeds:
            for row, (name, flags) in rows.items():
                arguments = [*common, *flags, "--seed", str(seed)]
                jobs[row].append(pool.submit(train, settings, f"{name}_seed{seed}", arguments))
        folders = {row: [job.result() for job in submitted] for row, submitted in jobs.items()}
    table = summarise_rows(folders)
    (settings.output_dir / "table.md").write_text(table + "\n", encoding="utf-8")
    first = json.loads((folders[OURS][0] / "config.json").read_text(encoding="utf-8"))
    print(f"{settings.dataset_name}: {settings.labelnum} of {settings.pool} labelled, {first['max_iteration']} steps\n")
    print(table)


if __name__ == "__main__":
    main()
