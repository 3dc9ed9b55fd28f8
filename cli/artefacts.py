"""Outputs of a command: checked before the long work, written after it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastvit_cli import irgraphs
from fastvit_cli.backends import BACKENDS
from fastvit_cli.errors import BadInput, JobFailed, Stop, summary
from fastvit_cli.exporters import WRITERS, Artefact, onnx_can_run
from fastvit_cli.files import check_writable

SUFFIXES = {"--output": tuple(WRITERS), "--report": (".json", ".html")}


def plan(outputs: Sequence[str], reports: Sequence[str]) -> tuple[list[Path], ...]:
    """The paths of outputs and of reports, each of which can be written.

    Raises:
        BadInput: a suffix is not known, or a place is not writable.
    """
    for option, texts in (("--output", outputs), ("--report", reports)):
        for path in map(Path, texts):
            check_writable(path, option)
            _check_suffix(path, option)
            if _is_ir(path):
                _check_ir(path, option)
    return [Path(text) for text in outputs], [Path(text) for text in reports]


def check_apart(files: Iterable[tuple[str, Path | str | None]]) -> None:
    """Refuse to write two results into one file, whatever options name it.

    Args:
        files: (option, where it writes), None or `-` where that is no file.

    Raises:
        BadInput: two of them are one file.
    """
    seen: dict[Path, str] = {}
    for option, path in files:
        if path is None or str(path) == "-":
            continue
        place = Path(path).resolve()
        first = seen.get(place)
        if first == option:
            raise BadInput(f"{option} {path} is given twice.", hint="Give it once.")
        if first is not None:
            raise BadInput(
                f"{first} and {option} both write {path}.",
                hint="Give each a file of its own.",
            )
        seen[place] = option


def companions(outputs: Iterable[Path]) -> list[Path]:
    """The files beside outputs that belong to them: the weights of an .xml."""
    return [it.with_suffix(irgraphs.WEIGHTS) for it in outputs if _is_ir(it)]


def _is_ir(path: Path) -> bool:
    return path.suffix == irgraphs.SUFFIX


def check_dtype(outputs: Sequence[Path], dtype: str) -> None:
    """Refuse early what could not be checked after it was written.

    Raises:
        BadInput: an .onnx is asked for in a dtype that onnxruntime cannot run, or an
            .xml in another than float32, which OpenVINO computes in.
    """
    graphs = list(filter(_is_ir, outputs))
    if graphs and dtype != "float32":
        raise BadInput(
            f"{graphs[0]}: OpenVINO computes in float32, so that the file could not be "
            f"checked in {dtype}.",
            hint="Use --dtype float32 for OpenVINO, which can be told to run it in "
            "bfloat16, or write a .pt2.",
        )
    onnx = [path for path in outputs if path.suffix == ".onnx"]
    if onnx and not onnx_can_run(dtype):
        raise BadInput(
            f"{onnx[0]}: onnxruntime's CPU provider cannot run convolutions in "
            f"{dtype}, so the file could not be checked.",
            hint="Use --dtype float32 for ONNX, or write a .pt2.",
        )


def write(artefact: Artefact, path: Path, temporary: Path) -> dict[str, Any]:
    """Write one output under its temporary name and say what it is.

    Raises:
        JobFailed: it could not be written, or does not compute the same.
        BadInput: see `Artefact.program`.
    """
    try:
        facts = WRITERS[path.suffix](artefact, temporary)
        content = temporary.read_bytes()
    except Stop as error:
        raise type(error)(f"{path}: {error}", hint=error.hint) from error
    except Exception as error:
        raise JobFailed(f"{path} could not be written: {summary(error)}.") from error
    digest = hashlib.sha256(content).hexdigest()
    return {"path": str(path), **facts, "bytes": len(content), "sha256": digest}


def _check_ir(path: Path, option: str) -> None:
    """See that OpenVINO is here, and that the weights overwrite nobody's file.

    Raises:
        BadInput: it is otherwise.
    """
    missing = BACKENDS["openvino"].lacks()
    if missing:
        raise BadInput(
            f"{option} {path}: an .xml is checked in OpenVINO, which is not installed.",
            hint=missing,
        )
    weights = path.with_suffix(irgraphs.WEIGHTS)
    check_writable(weights, option)
    links = [str(it) for it in (path, weights) if it.is_symlink()]
    if links:  # the two would be put into two folders, or under two names
        raise BadInput(
            f"{option} {path}: {links[0]} is a link, and OpenVINO looks for the "
            "weights beside the graph.",
            hint="Name the file that it points to.",
        )
    if weights.exists() and not irgraphs.is_graph(path):
        raise BadInput(
            f"{option} {path} comes with its weights in {weights.name}, and there is "
            "such a file already, without an OpenVINO graph that it belongs to.",
            hint="Choose another name, or move that file away.",
        )


def _check_suffix(path: Path, option: str) -> None:
    known = SUFFIXES[option]
    if path.suffix in known:
        return
    problem = f"{path.suffix!r} says no format" if path.suffix else "no suffix"
    raise BadInput(f"{option} {path}: {problem}.", hint=f"Use {' or '.join(known)}.")
