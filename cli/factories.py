"""A user's factory, found and run: `package.module:callable`, `path/file.py:callable`.

Everything here runs code of somebody else, so every exception can come out of it; each
becomes one line that names the file and, for a syntax error, the line in it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fastvit_cli.errors import BadInput, summary


def find(text: str) -> Any:
    """The object that `module:name` or `file.py:name` names.

    Raises:
        BadInput: there is no such file, module or name, or importing it fails.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise BadInput(
            f"{text!r} does not name a callable.",
            hint="Write package.module:callable or path/file.py:callable.",
        )
    module = _from_file(Path(place)) if place.endswith(".py") else _from_name(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise BadInput(f"{place} has no {name!r}.", hint=_nearest(module, name))
        found = getattr(found, part)
    if not callable(found):
        kind = type(found).__name__
        raise BadInput(
            f"{text} is of type {kind}, not a callable.",
            hint="Name a function or a class that returns the model.",
        )
    return found


def call(
    text: str,
    factory: Callable[..., Any],
    args: dict[str, Any],
    hint: str = "Check the arguments (--model-arg key=value), or see --debug.",
) -> Any:
    """What the factory returns; `hint` says what to do if it fails.

    Raises:
        BadInput: it raised, or does not take these arguments.
    """
    try:
        return factory(**args)
    except BadInput:
        raise
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in args.items())
        raise BadInput(
            f"{text} called with ({given}) raised {summary(error)}.",
            hint=hint,
        ) from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise BadInput(
            f"there is no file {path}.", hint="Check the path before the colon."
        )
    spec = importlib.util.spec_from_file_location(f"_fastvit_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As `python file.py` would have it: the file's neighbours can be imported, and its
    # classes found again by their module's name (dataclasses, pickle).
    _prepend(str(path.parent.resolve()))
    sys.modules[spec.name] = module
    loader = spec.loader
    return _importing(str(path), lambda: loader.exec_module(module) or module)


def _from_name(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise BadInput(
            f"{name!r} is not the name of a Python module.",
            hint="Write package.module:callable or path/file.py:callable.",
        )
    _prepend(os.getcwd())
    try:
        return _importing(name, lambda: importlib.import_module(name))
    except BadInput as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and _is_part(missing.name, name):
            raise BadInput(
                f"there is no Python module {missing.name!r}.",
                hint="Install its package, run from its folder, or name a .py file.",
            ) from missing
        raise


def _importing(name: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except SyntaxError as error:
        where = f"{error.filename or name}, line {error.lineno}"
        raise BadInput(
            f"{name} cannot be imported: syntax error ({where}): {error.msg}.",
            hint="Mend the file.",
        ) from error
    except (Exception, SystemExit) as error:
        raise BadInput(
            f"{name} cannot be imported: {summary(error)}.",
            hint="Importing it must work on its own; see --debug.",
        ) from error


def _prepend(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _is_part(missing: str | None, name: str) -> bool:
    return missing is not None and f"{name}.".startswith(f"{missing}.")


def _nearest(module: ModuleType, name: str) -> str:
    public = [
        key
        for key, value in vars(module).items()
        if callable(value) and not key.startswith("_")
    ]
    own = [key for key in public if _defined_in(module, key)]
    listed = difflib.get_close_matches(name, public, n=3) or own[:5]
    return f"It has: {', '.join(listed)}." if listed else "It defines no callable."


def _defined_in(module: ModuleType, key: str) -> bool:
    return getattr(vars(module)[key], "__module__", None) == module.__name__
