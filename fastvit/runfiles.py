"""The files of a run: its state, the best weights, and its history for people.

    last.pt             everything that continues the run
    best.safetensors    the best weights so far; epoch-NNN.safetensors for the best k
    metrics.csv .jsonl  one row an epoch
    skipped.csv         images that could not be read, and why
    recipe.toml         the resolved recipe

Each is whole at any moment. The history is part of the state, so that after a kill the
tables are put back to where the state is.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from fastvit.checkpoint import BEST, LAST, write_weights, write_whole
from fastvit.engine import Engine
from fastvit.errors import ResumeError

Row = dict[str, Any]


def ranked(history: list[Row]) -> list[Row]:
    """Rows from the best to the worst: by top-1, then the lower loss, then the earlier.

    A top-1 that is not a number counts as the worst.
    """

    def key(row: Row) -> tuple[float, float, int]:
        top1, loss = row["top1"], row["val_loss"]
        return (-top1 if top1 == top1 else 1.0, loss, row["epoch"])

    return sorted(history, key=key)


def best_row(history: list[Row]) -> Row | None:
    """The row of the best epoch; None before the first."""
    return ranked(history)[0] if history else None


def keep_best(
    folder: Path, engine: Engine, history: list[Row], metadata: dict[str, str]
) -> None:
    """Write the weights of the last epoch if it is among the best k; drop the others.

    Raises:
        CheckpointError: they could not be written; the older files stay.
    """
    keep = engine.recipe.loop.keep_best
    best, row = ranked(history)[:keep], history[-1]
    if row not in best:
        return
    tensors = engine.evaluated.state_dict()
    if row is best[0]:
        write_weights(folder / BEST, tensors, metadata)
    if keep == 1:
        return
    write_weights(folder / _name(row), tensors, metadata)
    wanted = {_name(kept) for kept in best}
    for path in folder.glob("epoch-*.safetensors"):
        if path.name not in wanted:
            path.unlink()


def write_history(folder: Path, history: list[Row]) -> None:
    """`metrics.csv` and `metrics.jsonl`, whole.

    Raises:
        CheckpointError: they could not be written.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(history[0]) if history else [])
    writer.writeheader()
    writer.writerows(history)
    lines = "".join(json.dumps(row) + "\n" for row in history)
    write_whole(folder / "metrics.csv", table.getvalue().encode())
    write_whole(folder / "metrics.jsonl", lines.encode())


def write_skipped(folder: Path, problems: dict[str, str]) -> None:
    """`skipped.csv`: an image and a reason a line; no file where there is none.

    Raises:
        CheckpointError: it could not be written.
    """
    if not problems:
        return
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["image", "reason"])
    writer.writerows(sorted(problems.items()))
    write_whole(folder / "skipped.csv", table.getvalue().encode())


def check_output(folder: Path, resume: bool) -> None:
    """Make the folder of a run, and see that no other run lives there.

    Raises:
        ResumeError: it holds a run that is not to be resumed, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResumeError(
            f"{folder} cannot be made: {error.strerror}.", hint="Name another --output."
        ) from error
    if not resume and (folder / LAST).exists():
        raise ResumeError(
            f"{folder} holds a run already.",
            hint="Continue it with --resume, or name another --output.",
        )
    write_whole(folder / ".probe", b"")
    (folder / ".probe").unlink()


def _name(row: Row) -> str:
    return f"epoch-{row['epoch']:03d}.safetensors"
