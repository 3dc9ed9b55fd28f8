"""The names that MODEL can be, and those near to one that it cannot."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatch


def fastvit_names() -> list[str]:
    """The variants of this project."""
    from fastvit import VARIANTS

    return list(VARIANTS)


def timm_names() -> list[str]:
    """timm's models, with the prefix that selects them."""
    import timm

    return [f"timm:{name}" for name in timm.list_models()]


def torchvision_names() -> list[str]:
    """torchvision's models with the prefix; none where torchvision is missing."""
    try:
        from torchvision.models import list_models
    except ImportError:
        return []
    return [f"torchvision:{name}" for name in list_models()]


FAMILIES: dict[str, Callable[[], list[str]]] = {
    "fastvit": fastvit_names,
    "timm": timm_names,
    "torchvision": torchvision_names,
}


def near(text: str, families: Iterable[str] = FAMILIES) -> list[str]:
    """At most three names that look like `text`, which may lack its prefix."""
    pool = [name for family in families for name in FAMILIES[family]()]
    wanted = bare(text).lower()
    exact = [name for name in pool if bare(name) in (wanted, f"fastvit_{wanted}")]
    if exact:
        return exact[:3]
    close = difflib.get_close_matches(wanted, {bare(name) for name in pool}, n=3)
    return [name for word in close for name in pool if bare(name) == word][:3]


def bare(name: str) -> str:
    """The name without its family."""
    return name.rpartition(":")[2]


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that contain the pattern, or match it where it holds * ? or [."""
    wanted = pattern.lower()
    if any(sign in wanted for sign in "*?["):
        return [name for name in names if fnmatch(bare(name), bare(wanted))]
    return [name for name in names if wanted in name.lower()]
