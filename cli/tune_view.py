"""What people see of `--tune`: what was measured, what was chosen, what it gains."""

from __future__ import annotations

from typing import Any

from fastvit_cli.render import new_table
from rich.console import Console
from rich.text import Text

SHOWN = 8  # convs, regions
AGAIN = "the time for it was up, and the next run goes on from there"


def show(out: Console, tune: dict[str, Any]) -> None:
    """Show the `tune` field of a result."""
    if tune["plans"]:
        table = new_table("Plan", "Time, x default", title="Plans timed in one run")
        for row in tune["plans"]:
            table.add_row(row["plan"], f"{row['ratio']:.2f}")
        out.print(table)
    if tune.get("confirmed"):
        table = new_table("Plan", "Time, x default", title="Timed once more")
        for row in tune["confirmed"]:
            table.add_row(row["plan"], f"{row['ratio']:.2f}")
        out.print(table)
    if tune["kept"] == "tuned":
        _forms(out, tune["plan"]["forms"])
        _regions(out, "Merged as well", tune["plan"]["merged"])
        _regions(out, "Not merged", tune["plan"]["not_merged"])
    style = "bold green" if tune["kept"] == "tuned" else "bold"
    out.print(Text(sentence(tune), style))
    for row in tune["left_out"]:
        out.print(Text(f"Not timed: {row['plan'].replace('_', ' ')}: {row['why']}."))
    measured = f"{tune['ops_measured']} times of ops were measured"
    cached = f"{tune['ops_from_cache']} came from the cache of this device"
    out.print(Text(f"{measured}, {cached}.", "dim"))
    if tune["ops_not_timed"]:
        out.print(Text(f"{tune['ops_not_timed']} were not: {AGAIN}.", "dim"))
    out.print()


def sentence(tune: dict[str, Any]) -> str:
    """How it ended, in one line."""
    runtime = tune["backend"]
    where = f"batch {tune['batch']}, {tune['dtype']}, {threads(tune)}, {runtime}"
    if "ratio" not in tune:
        return f"Tuned for {where}: the default plan stays: {tune['why']}."
    times = tune["milliseconds"]
    figures = (
        f"{times['tuned']:.4g} ms against {times['default']:.4g} ms, "
        f"{tune['ratio']:.2f}x (noise {tune['noise']:.1%})"
    )
    if tune["kept"] == "tuned":
        return f"Tuned for {where}: {tune['plan']['name']}: {figures}."
    why = tune["why"]
    return f"Tuned for {where}: the default plan stays: {why}; at best {figures}."


def threads(tune: dict[str, Any]) -> str:
    """`2 threads`."""
    return f"{tune['threads']} thread{'s' if tune['threads'] != 1 else ''}"


def _forms(out: Console, forms: list[dict[str, Any]]) -> None:
    if not forms:
        return
    table = new_table("Conv", "Form", "µs", "as one conv", title="Convs written anew")
    for row in forms[:SHOWN]:
        times = row["microseconds"]
        figures = (f"{times[k]:.3g}" for k in (row["form"], "as one conv"))
        table.add_row(row["name"], row["form"].replace("_", " "), *figures)
    out.print(table)
    if len(forms) > SHOWN:
        out.print(Text(f"{len(forms) - SHOWN} more: --json lists them.", "dim"))


def _regions(out: Console, title: str, names: list[str]) -> None:
    if names:
        rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        out.print(f"{title}: {'; '.join(names[:SHOWN])}{rest}.")
