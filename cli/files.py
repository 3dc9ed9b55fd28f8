"""Writing files whole or not at all, and finding out early that they cannot be."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastvit_cli.errors import BadInput

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def all_or_nothing(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Temporary names beside `paths`, renamed when the block ends well.

    The names keep their suffix, which some writers insist on. After an error, or
    Ctrl-C, nothing is left of them and `paths` are as before.

    Raises:
        OSError: a file could not be renamed, or the disk is full; that one names
            `paths`.
    """
    finals = [Path(os.path.realpath(path)) for path in paths]
    token = secrets.token_hex(4)
    temporary = [
        path.with_name(f".{path.stem}.{token}{path.suffix}") for path in finals
    ]
    try:
        yield temporary
        for source, target in zip(temporary, finals):
            source.chmod(0o666 & ~_umask())  # some writers leave theirs private
            os.replace(source, target)
    except OSError as error:
        if error.errno in _FULL:  # it names no file, or the temporary one
            error.filename = ", ".join(map(os.fspath, paths))
        raise
    finally:
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink()


def folder_for_files(text: str | None, option: str) -> Path | None:
    """The directory that an option names, in which files can appear; it may be new.

    Raises:
        BadInput: it is a file, or nothing can be written where it is or would be.
    """
    if text is None:
        return None
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise BadInput(f"{option} {text} is a file.", hint="Name a directory.")
    nearest = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    check_writable(nearest / "file", option, shown=text)
    return path


def check_writable(path: Path, option: str, shown: str | None = None) -> None:
    """Make sure that a file can appear at `path`, by making one beside it.

    `shown`: what people gave, where that is not the path itself.

    Raises:
        BadInput: it is a directory or a device, or its directory is missing or not
            writable.
    """
    if path.is_dir():
        raise BadInput(
            f"{option} {path} is a directory.", hint="Name a file inside it."
        )
    if path.exists() and not path.is_file():  # a rename would put a file in its place
        raise BadInput(f"{option} {path} is a device or a pipe.", hint="Name a file.")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise BadInput(
            f"{option} {path}: there is no directory {path.parent}.",
            hint=f"Create it (mkdir -p {path.parent}) or name another place.",
        )
    try:
        with all_or_nothing([path]) as (probe,):
            probe.touch(exist_ok=False)
            raise _Probed
    except _Probed:
        return
    except OSError as error:
        raise BadInput(
            f"{option} {shown or path} cannot be written: {error.strerror}.",
            hint="Name a place where you may create files.",
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _Probed(Exception):
    """Ends the block before the rename, so that the probe is removed."""
