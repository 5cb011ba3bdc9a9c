"""Methods side by side: the same network, steps, batch, augmentation and evaluation, several seeds, one table.

    python -m benchmarks.compare --dataset_name decathlon --dataset_path Task04_Hippocampus --labelnum 8 \
        --methods supervised,mean_teacher,best --full --seeds 0,1,2 --max_iteration 2000 -- --patch_size 32 40 32

The training pool is the first ``--pool`` cases, the test cases are those after it; without the flag they are the data's
own training and test list, or four fifths and the rest. Without a training list of the data's own these are the
labelled cases, and all scans without a label join the pool. The first ``--labelnum`` cases of the pool are labelled.
``supervised`` sees only these, and every patch of its batch is a labelled one, so that all rows see equally many;
``--full`` adds supervised training with all labels of the pool, the ceiling. The last checkpoint counts, no test case
chooses anything: to choose settings, ``--cases`` leaves out the last cases of the data. Orientation, flat levels, patch
and range of CT that no flag names are fitted to the fewest labelled cases, the same for all rows; but a row of its own
``--model``, ``--spacing`` or ``--orientation`` has its own flat levels. All rows are scored alike: none is mirrored at
test time, whatever its method's default (``-- --tta_flips``: all are), and all components of a prediction count
(``-- --largest_component``: the largest of each class does). Several numbers of labels (``--labelnum
2,4,8,16,all``) give a table each and a plot of Dice against labels; ``all`` is ``--full``.

``--row "NAME=FLAGS"`` adds a row with flags of its own, such as ``--row "no prototypes=--method best
--no-use_contrastive_prototype"``; steps, batch, validation and scoring are those of all rows. Everything after ``--``
goes to every training unchanged; what the bench sets itself, such as ``--seed``, is refused there.

Finished runs are kept and interrupted ones resumed, so that the same command goes on where it stopped; it also redraws
the table. A trained run whose settings differ from those asked for is refused before anything is trained; rows of
different code are named below it. A row is in the table once all its seeds are trained: one that fails is named below,
with the error, the others are trained, and the exit code is 1. Without the baseline there is no table.
Written to ``--output_dir``: ``table_N.md``, ``table_N.png`` and ``scores_N.csv`` (for ``benchmarks.kept_scores``) per
number of labels N, ``sweep.png``, and one folder, log and ``.plan.json`` per run.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.comparison_cases import choose_cases, list_files
from benchmarks.comparison_flags import (
    REFUSED_IN_ROWS,
    Flags,
    asked_config,
    check_flags,
    fitted_flags,
    read_flags,
    refuse,
)
from benchmarks.comparison_runs import ALL_PARTS, Run, check, code_note, train
from benchmarks.comparison_tables import SUPERVISED, Row, draw_rows, draw_sweep, format_rows
from benchmarks.kept_scores import KeptRow, write_rows
from myutils.build import build_source

DECIDES_FLAT_LEVELS = {"model", "spacing", "orientation"}
FULL = "supervised, all labels"


@dataclass(frozen=True)
class Plan:
    """One row of one table: its name, its number of labels and its flags."""

    name: str
    labelnum: int
    flags: Flags

    def folder_name(self, seed: int) -> str:
        """Name of a run's folder; the number of labels tells full supervision from the rest."""
        return f"{plain_name(self.name)}_{self.labelnum}labels_seed{seed}"


def plain_name(name: str) -> str:
    """The name of a row as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", name)


def main() -> None:
    """Train what is missing, then print and write the tables and plots."""
    settings = parse()
    try:
        config = asked_config(settings)
        source = build_source(config)
        cases = choose_cases(settings, source)
        lists = list_files(settings.output_dir, cases)
        plans = make_plans(settings, fitted_flags(settings, config, source, cases[0]))
        runs = make_runs(settings, plans, list(lists))
        for run in itertools.chain.from_iterable(runs.values()):
            check(run)
            if not run.finished:
                check_flags(run.flags, run.folder.name, config, source)
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        for path, content in lists.items():
            path.write_text(content, encoding="utf-8")
        rows, failed = train_all(settings, runs)
        report(settings, rows, failed)
        require_all(settings, failed, len(runs))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"compare: {error}") from error
    except KeyboardInterrupt:
        sys.stderr.write("compare: stopped; the same command goes on\n")
        raise SystemExit(130) from None


def parse() -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--dataset_path", type=Path, help="folder of the data; none for demo")
    parser.add_argument("--num_classes", type=int, help="for formats that do not store it")
    pool_help = "so many first cases are trained on, the rest is the test; else the data's own lists, or four fifths"
    parser.add_argument("--pool", type=int, help=pool_help)
    parser.add_argument("--cases", type=int, help="use the first cases only, to develop without the test cases")
    parser.add_argument("--methods", type=names, default=[SUPERVISED, "mean_teacher"], help="names, with commas")
    parser.add_argument("--row", action="append", default=[], metavar="NAME=FLAGS", help="one more row; repeatable")
    parser.add_argument("--full", action="store_true", help="add supervised training with all labels of the pool")
    parser.add_argument("--baseline", default=SUPERVISED, help="row that every other is paired with")
    parser.add_argument(
        "--labelnum", type=names, required=True, help="labelled cases, several with commas; all: --full"
    )
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="with commas")
    parser.add_argument("--max_iteration", type=int, required=True, help="training steps of every row")
    parser.add_argument("--output_dir", type=Path, help="else runs/compare_DATASET_NAME")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("flags", nargs="*", help="flags of the trainer for every row, after --")
    settings, unknown = parser.parse_known_args()
    if unknown:
        hint = "flags of the trainer go to the end, after --, such as: -- --optimizer adamw"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; {hint}")
    try:
        settings.full |= "all" in settings.labelnum
        settings.labelnum = [int(count) for count in settings.labelnum if count != "all"]
    except ValueError as error:
        parser.error(f"--labelnum: {error}; write numbers or all, with commas")
    if not settings.labelnum:
        parser.error("--labelnum: name a number of labels, such as 8, or 8,all")
    for name, least in (("seeds", 0), ("labelnum", 1)):
        given = getattr(settings, name)
        if not given or min(given) < least or len(set(given)) < len(given):
            parser.error(f"--{name} {','.join(map(str, given))}: write numbers from {least} on, each once, with commas")
    settings.output_dir = settings.output_dir or Path("runs") / f"compare_{settings.dataset_name}"
    return settings


def names(text: str) -> list[str]:
    """Names between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[int]:
    """Whole numbers between commas."""
    return [int(part) for part in names(text)]


def make_plans(settings: argparse.Namespace, fitted: Mapping[str, Flags]) -> list[Plan]:
    """All rows of all tables, the baseline and the ceiling first, with the settings that were fitted for all."""
    asked: dict[str, Flags] = {name: ("--method", name) for name in settings.methods}
    for row in settings.row:
        name, equals, flags = (part.strip() for part in row.partition("="))
        if not equals or not name:
            raise ValueError(f"--row {row!r}: write NAME=FLAGS")
        for other in (*asked, FULL):
            if plain_name(other) == plain_name(name):
                raise ValueError(
                    f"--row {row!r}: {other!r} has this folder already; names must differ in letters or digits"
                )
        asked[name] = tuple(shlex.split(flags))
        refuse(read_flags(asked[name], f"--row {name}"), REFUSED_IN_ROWS, f"in --row {row!r}")
    if settings.baseline not in asked:
        raise ValueError(f"--baseline {settings.baseline}: no such row; there are {', '.join(asked)}")
    plans = [Plan(name, count, flags) for count in settings.labelnum for name, flags in asked.items()]
    if settings.full:
        plans.insert(0, Plan(FULL, settings.labels, ("--method", SUPERVISED)))
    return [replace(plan, flags=(*_common_flags(fitted, plan), *plan.flags)) for plan in plans]


def _common_flags(fitted: Mapping[str, Flags], plan: Plan) -> list[str]:
    """All that was fitted; but a row of another network or other voxels fits the flat levels to these itself."""
    own = DECIDES_FLAT_LEVELS & read_flags(plan.flags, plan.name).keys()
    return [flag for name, flags in fitted.items() if not (own and name == "flat_levels") for flag in flags]


def make_runs(settings: argparse.Namespace, plans: Sequence[Plan], lists: Sequence[Path]) -> dict[Plan, list[Run]]:
    """The trainings of each row, one per seed."""
    common = ["--no-tta_flips", ALL_PARTS]  # best would be mirrored and the others not; later flags win
    common += ["--dataset_name", settings.dataset_name]
    common += ["--dataset_path", str(settings.dataset_path.absolute())] if settings.dataset_path else []
    common += ["--train_list", str(lists[0].absolute()), "--test_list", str(lists[1].absolute())]
    common += ["--max_iteration", str(settings.max_iteration), *settings.flags]
    if settings.num_classes:
        common += ["--num_classes", str(settings.num_classes)]
    runs: dict[Plan, list[Run]] = {plan: [] for plan in plans}
    for plan in plans:
        for seed in settings.seeds:
            flags = (*common, *plan.flags, "--labelnum", str(plan.labelnum), "--seed", str(seed))
            runs[plan].append(Run(settings.output_dir / plan.folder_name(seed), flags))
    return runs


def train_all(
    settings: argparse.Namespace, runs: Mapping[Plan, Sequence[Run]]
) -> tuple[dict[Plan, Row], dict[Plan, str]]:
    """Run, resume or skip every training, seed by seed, so that an early end leaves whole seeds.

    Returns:
        The rows with all their seeds, and why the others have none or some of them.
    """
    rows: dict[Plan, Row] = {}
    failed: dict[Plan, str] = {}
    jobs: dict[Plan, list[Future[Path]]] = {plan: [] for plan in runs}
    with ThreadPoolExecutor(settings.jobs) as pool:
        for place in range(len(settings.seeds)):
            for plan, found in runs.items():
                jobs[plan].append(pool.submit(train, found[place], settings.threads))
        try:
            for plan, begun in jobs.items():
                reasons = "; ".join(reason for job in begun if (reason := _failure(job)))
                if reasons:
                    failed[plan] = reasons
                else:
                    rows[plan] = Row(plan.name, tuple(job.result() for job in begun))
        except BaseException:  # Ctrl-C too: those at work save and end, the others must not begin
            pool.shutdown(cancel_futures=True)
            raise
    return rows, failed


def _failure(job: Future[Path]) -> str:
    """Waits for a training and says why it failed; empty if it did not."""
    try:
        job.result()
    except (ValueError, OSError, RuntimeError) as error:
        return str(error)
    return ""


def require_all(settings: argparse.Namespace, failed: Mapping[Plan, str], planned: int) -> None:
    """Raise a RuntimeError that names the rows that failed, if any did."""
    if failed:
        baseline = any(plan.name == settings.baseline for plan in failed)
        tables = ", and there is no table without the baseline" if baseline else ""
        raise RuntimeError(
            f"{len(failed)} of {planned} rows failed{tables}; the same command tries them again:\n{_listed(failed)}"
        )


def _listed(failed: Mapping[Plan, str]) -> str:
    return "".join(f"- {plan.name}: {reasons}\n" for plan, reasons in failed.items())


def report(settings: argparse.Namespace, rows: Mapping[Plan, Row], failed: Mapping[Plan, str]) -> None:
    """Print and write a table and a plot per number of labels, and the sweep over these numbers."""
    full = next((row for plan, row in rows.items() if plan.name == FULL), None)
    curves: dict[str, dict[int, Row]] = {}
    for count in settings.labelnum:
        chosen = [row for plan, row in rows.items() if plan.labelnum == count and plan.name != FULL]
        for row in chosen:
            curves.setdefault(row.name, {})[count] = row
        base = next((row for row in chosen if row.name == settings.baseline), None)
        if base is None:
            continue
        shown = [*chosen, *([full] if full else [])]
        absent = {plan: reasons for plan, reasons in failed.items() if plan.labelnum == count or plan.name == FULL}
        table = f"{format_rows(shown, base, full)}\n{code_note(shown)}"
        table += f"\nNot in the table, for a training failed:\n\n{_listed(absent)}" if absent else ""
        size = f"{count} of {settings.pool} labelled, {len(base.cases())} test cases, {settings.max_iteration} steps"
        title = f"{settings.dataset_name}: {size}"
        (settings.output_dir / f"table_{count}.md").write_text(f"{title}\n\n{table}", encoding="utf-8")
        draw_rows(settings.output_dir / f"table_{count}.png", shown, title)
        write_rows(settings.output_dir / f"scores_{count}.csv", [KeptRow.of(row, settings.seeds) for row in shown])
        sys.stdout.write(f"\n{title}\n\n{table}")
    if len(settings.labelnum) > 1 and curves:
        if full is not None:
            curves.setdefault(SUPERVISED, {})[settings.labels] = full
        draw_sweep(
            settings.output_dir / "sweep.png", curves, f"{settings.dataset_name}, {settings.max_iteration} steps"
        )


if __name__ == "__main__":
    main()
