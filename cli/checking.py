"""The decision of `fastvit check`, from all its evidence."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastvit_cli import check_cases, comparing, origins, seeing, structure
from fastvit_cli.check_cases import Case
from fastvit_cli.comparing import Finding
from fastvit_cli.console import Stage
from fastvit_cli.origins import Origin
from fastvit_cli.runners import Runner


@dataclass(frozen=True)
class Outcome:
    """Everything that was found.

    Attributes:
        how: the yardstick, in words.
        findings: one for each input.
        origin: the candidate beside the form that it should have; None if none fits.
        first: where the two differ first, if they do and it is known.
        visible: the smallest changes of one weight that the outputs would show.
        certificate: what re-verifying one showed; None if none was given.
    """

    how: str
    limit: float
    findings: tuple[Finding, ...]
    origin: Origin | None
    first: dict[str, Any] | None
    visible: dict[str, Any] | None
    seconds: dict[str, float]
    certificate: Any = None
    notes: tuple[str, ...] = field(default=())

    @property
    def decided(self) -> bool:
        """Whether the candidate's own steps and numbers were compared."""
        return self.origin is not None and self.origin.related

    @property
    def verdict(self) -> str:
        """`equal`, `different` or `not comparable`."""
        verdicts = [finding.verdict for finding in self.findings]
        if "different" in verdicts:
            return "different"
        if self.origin is not None and self.origin.related and self.origin.differences:
            return "different"
        if self.certificate is not None and not self.certificate.ok:
            return "different"
        return "equal" if "equal" in verdicts else "not comparable"

    @property
    def ok(self) -> bool:
        """Whether the two are shown to be the same function."""
        return self.verdict == "equal"

    def largest(self, name: str) -> float | None:
        """The largest of a measure over all inputs."""
        values = [getattr(finding, name) for finding in self.findings]
        return max((value for value in values if value is not None), default=None)

    def share(self, name: str) -> float | None:
        """An agreement over all rows."""
        rows = [(f.rows, getattr(f, name)) for f in self.findings]
        known = [(n, value) for n, value in rows if value is not None]
        total = sum(n for n, _ in known)
        return sum(n * value for n, value in known) / total if total else None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {
            "verdict": self.verdict,
            "ok": self.ok,
            "yardstick": self.how,
            "error_ratio": self.largest("error_ratio"),
            "max_error_ratio": self.limit,
            "max_abs": self.largest("max_abs"),
            "top1_agreement": self.share("top1"),
            "top5_agreement": self.share("top5"),
            "samples": sum(f.rows for f in self.findings if f.verdict == "equal"),
            "cases": [asdict(finding) for finding in self.findings],
            "origin": None if self.origin is None else self.origin.to_dict(),
            "first_difference": self.first,
            "visible": self.visible,
            "certificate": self.certificate and self.certificate.to_dict(),
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def ask(
    reference: Runner,
    candidate: Runner,
    *,
    samples: int,
    seed: int,
    limit: float | None = None,
    stage: Stage = lambda stage: None,
) -> Outcome:
    """What `fastvit check` does once both are loaded, with no option about inputs."""
    candidate = comparing.in_terms_of(reference, candidate)
    maker = check_cases.maker_of(reference, candidate)
    cases = check_cases.make(maker, samples, seed)
    return decide(reference, candidate, cases, limit, stage)


def _doubtful(case: Case, why: str) -> Finding:
    shape = tuple(case.inputs[0].shape)
    return Finding(case.name, shape, "not comparable", note=why)


def decide(
    reference: Runner,
    candidate: Runner,
    cases: Sequence[Case],
    limit: float | None,
    stage: Stage,
    *,
    place: bool = True,
) -> Outcome:
    """Compare on every case, lay the graphs side by side, and look for the place.

    Without `place` only outputs are compared.
    """
    from repcompiler.verify import MAX_ERROR_RATIO

    allowed = MAX_ERROR_RATIO if limit is None else limit
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    stage("float64 reference")
    models = comparing.pair(reference, candidate)
    doubt = comparing.unrepeatable(models.own, cases[0], allowed)
    findings = [_doubtful(case, doubt) for case in cases if doubt]
    for index, case in enumerate(() if doubt else cases):
        stage(f"{index + 1} of {len(cases)}: {case.name}")
        findings.append(comparing.compare(models, case, allowed))
    other = structure.other_structure(models, cases[0], allowed)
    if other and not doubt:
        named = "structure of the output"
        findings.append(Finding(named, (), "different", note=other))
    seconds["outputs"] = time.perf_counter() - start
    start = time.perf_counter()
    stage("op by op")
    place = place and not doubt
    origin = origins.trace(reference, candidate) if place else None
    seconds["origin"] = time.perf_counter() - start
    start = time.perf_counter()
    first, visible = None, None
    failing = next(
        (c for c, f in zip(cases, findings) if f.verdict == "different"), None
    )
    if origin is not None and origin.related and origin.differences:
        first = origin.differences[0]
    elif failing is not None and place:
        stage("first difference")
        first = seeing.first_difference(models, failing)
    elif place and (origin is None or not origin.related):
        stage("smallest visible change")
        visible = seeing.smallest_change(models, cases[0], allowed)
    seconds["where"] = time.perf_counter() - start
    return Outcome(
        how=models.how,
        limit=allowed,
        findings=tuple(findings),
        origin=origin,
        first=first,
        visible=visible,
        seconds=seconds,
        notes=tuple(dict.fromkeys((*reference.notes, *candidate.notes))),
    )
