"""`fastvit audit`: what other fusers make of a model, and which of them keep it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from fastvit_cli import options as common
from fastvit_cli.audit_peers import PEERS
from fastvit_cli.builders import ModelOptions
from fastvit_cli.card import versions
from fastvit_cli.console import Stage, open_screen
from fastvit_cli.errors import BadInput
from fastvit_cli.render import new_table
from rich.console import Console
from rich.text import Text

EXAMPLES = """[bold]Examples[/bold]

fastvit audit fastvit_t8

fastvit audit timm:repvgg_a0 --peer timm --peer onnxruntime

fastvit audit net.py:build --json audit.json
"""

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Any MODEL but an ONNX graph.")
]
Peer = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help=f"One of {', '.join(PEERS)}; repeatable."),
]
TimeLimit = Annotated[
    int, typer.Option(min=1, metavar="SECONDS", help="For each peer.")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of each peer.")]
STYLES = {"equal": "green", "different": "bold red"}


def audit(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Any MODEL of PyTorch.")
    ],
    peer: Peer = None,
    time_limit: TimeLimit = 300,
    threads: Threads = 1,
    weights: common.Weights = None,
    model_arg: common.ModelArg = None,
    pretrained: common.Pretrained = False,
    input_size: common.InputSize = None,
    seed: common.Seed = 0,
    dtype: common.Dtype = None,
    json_target: common.Json = None,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
    version: common.Version = False,
) -> None:
    """Run other fusers on MODEL, each in a process of its own, and compare.

    Says which keep the function, which change it and where, and which merge nothing.
    """
    from fastvit_cli import sources

    screen = open_screen(json_target, quiet=quiet, debug=debug)
    chosen = peer or list(PEERS)
    for name in chosen:
        if name not in PEERS:
            raise BadInput(f"--peer {name} is not known.", hint=f"{', '.join(PEERS)}.")
    options = common.parse_model(
        model_arg,
        weights=weights,
        pretrained=pretrained,
        input_size=input_size,
        seed=seed,
        dtype=dtype,
    )
    with screen.working(model) as stage:
        stage("load")
        loaded = sources.load(model, options)
        rows = [
            _row(name, model, options, (time_limit, threads), stage) for name in chosen
        ]
    _show(screen.people, loaded.name, rows)
    screen.emit({"schema": 1, "model": model, "peers": rows, "versions": versions()})


def _row(
    peer: str,
    model: str,
    options: ModelOptions,
    limits: tuple[int, int],
    stage: Stage,
) -> dict[str, Any]:
    """What one peer makes of the model, from a process of its own."""
    stage(peer)
    seconds, threads = limits
    request = {
        "peer": peer,
        "model": model,
        "options": asdict(options),
        "samples": 2,
        "threads": threads,
    }
    with tempfile.TemporaryDirectory(prefix="fastvit-audit-") as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "fastvit_cli.audit_peers"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        try:
            subprocess.run(
                [*command, str(asked), str(answer)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return {"peer": peer, "verdict": "too slow", "note": f"over {seconds} s"}
        if not answer.is_file():
            return {"peer": peer, "verdict": "crashed", "note": "its process died"}
        row = json.loads(answer.read_text(encoding="utf-8"))
    return {"peer": peer, **row, "merged": _merged(row)}


def _merged(row: dict[str, Any]) -> bool | None:
    """Whether fewer ops are left; None where they cannot be counted."""
    before, after = row.get("ops_before"), row.get("ops")
    return None if before is None or after is None else after < before


def _show(out: Console, name: str, rows: list[dict[str, Any]]) -> None:
    table = new_table(
        "Peer", "Ops", "Latency", "Error ratio", "Verdict", "Where", title=name
    )
    for row in rows:
        verdict = Text(row["verdict"], STYLES.get(row["verdict"], "yellow"))
        ratio = row.get("error_ratio")
        ops = "" if row.get("ops") is None else f"{row['ops_before']} → {row['ops']}"
        if row.get("merged") is False:
            verdict.append(", merges nothing", "dim")
        times = (row.get("milliseconds_before"), row.get("milliseconds"))
        latency = "" if None in times else "{:.3g} → {:.3g} ms".format(*times)
        where = row.get("where") or row.get("note") or ""
        shown = "" if ratio is None else f"{ratio:.2g}"
        table.add_row(row["peer"], ops, latency, shown, verdict, where)
    out.print(table)
