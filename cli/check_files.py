"""What `fastvit check` leaves for machines and for whoever looks into a difference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from fastvit_cli.card import package_version
from fastvit_cli.console import to_json
from fastvit_cli.errors import Stop
from fastvit_cli.files import all_or_nothing

if TYPE_CHECKING:
    from fastvit_cli.check import Job
    from fastvit_cli.check_cases import Case
    from fastvit_cli.checking import Outcome

SARIF = "https://json.schemastore.org/sarif-2.1.0.json"
RULES = {
    "different": "The candidate is not the same function as the reference.",
    "not-comparable": "The two models cannot be compared on these inputs.",
    "refused": "The check cannot be made.",
    "kept": "An affine op stays in the fused model.",
}


def write(job: Job, outcome: Outcome, cases: Sequence[Case]) -> list[str]:
    """JUnit and SARIF where asked for, and the reproduction of a difference.

    Returns:
        The paths that were written.

    Raises:
        OSError: a file could not be written.
    """
    texts: dict[Path, str] = {}
    if job.junit:
        texts[job.junit] = junit(job, outcome)
    if job.sarif:
        texts[job.sarif] = sarif(job, results(job, outcome))
    _write_texts(texts)
    written = [str(path) for path in texts]
    if job.repro and not outcome.ok:
        written += _reproduction(job, outcome, cases)
    return written


def write_refusal(job: Job, error: Stop) -> None:
    """The same two files for a check that could not be made."""
    texts: dict[Path, str] = {}
    if job.junit:
        suite = _suite(job, [("check", "error", error.line)])
        texts[job.junit] = suite
    if job.sarif:
        texts[job.sarif] = sarif(job, [_result(job, "refused", "error", error.line)])
    _write_texts(texts)


def _write_texts(texts: dict[Path, str]) -> None:
    with all_or_nothing(list(texts)) as temporary:
        for place, text in zip(temporary, texts.values()):
            place.write_text(text, encoding="utf-8")


# ---- JUnit -------------------------------------------------------------------------


def junit(job: Job, outcome: Outcome) -> str:
    """One test case for each input, one for the ops, one for the certificate."""
    rows: list[tuple[str, str, str]] = []
    states = {"different": "failure", "not comparable": "failure", "skipped": "skipped"}
    for finding in outcome.findings:
        ratio = finding.error_ratio
        said = finding.note or f"error ratio {ratio:.3g}, allowed {outcome.limit:g}"
        rows.append((finding.case, states.get(finding.verdict, ""), said))
    if outcome.decided and outcome.origin is not None:
        said = "; ".join(
            f"{row['region']}: {row['detail']}" for row in outcome.origin.differences
        )
        rows.append(("op by op", "failure" if said else "", said))
    if outcome.certificate is not None:
        said = "; ".join(outcome.certificate.problems)
        rows.append(("certificate", "failure" if said else "", said))
    return _suite(job, rows)


def _suite(job: Job, rows: Sequence[tuple[str, str, str]]) -> str:
    counts = {
        plural: str(sum(state == one for _, state, _ in rows))
        for one, plural in (
            ("failure", "failures"),
            ("error", "errors"),
            ("skipped", "skipped"),
        )
    }
    name = f"{job.reference} = {job.candidate}"
    suites = ElementTree.Element("testsuites", name="fastvit check")
    suite = ElementTree.SubElement(
        suites, "testsuite", name=name, tests=str(len(rows)), **counts
    )
    for case, state, said in rows:
        entry = ElementTree.SubElement(suite, "testcase", classname=name, name=case)
        if state:
            ElementTree.SubElement(entry, state, message=said).text = said
    ElementTree.indent(suites)
    text = ElementTree.tostring(suites, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


# ---- SARIF -------------------------------------------------------------------------


def results(job: Job, outcome: Outcome) -> list[dict[str, Any]]:
    """What a pull request is annotated with: a difference, and ops that stayed."""
    from fastvit_cli.check_view import in_one_line

    rows: list[dict[str, Any]] = []
    if not outcome.ok:
        rule = outcome.verdict.replace(" ", "-")
        rows.append(_result(job, rule, "error", in_one_line(job, outcome)))
    for kept in outcome.origin.kept if outcome.decided and outcome.origin else ():
        text = f"{kept['name']}: {kept['op']} stays ({kept['reason']}): "
        rows.append(_result(job, "kept", "note", text + kept["detail"]))
    return rows


def _result(job: Job, rule: str, level: str, text: str) -> dict[str, Any]:
    place = {"artifactLocation": {"uri": _uri(job)}, "region": {"startLine": 1}}
    return {
        "ruleId": rule,
        "level": level,
        "message": {"text": text},
        "locations": [{"physicalLocation": place}],
    }


def _uri(job: Job) -> str:
    """A file of the repository that the two models have to do with."""
    from fastvit_cli.sources import split_weights

    for text in (job.candidate, job.reference):
        bare, _ = split_weights(text, job.options)
        path = bare.rpartition(":")[0] if ".py:" in bare else bare
        if Path(path).is_file():
            inside = Path(path).resolve()
            root = Path.cwd().resolve()
            known = inside.is_relative_to(root)
            return (inside.relative_to(root) if known else inside).as_posix()
    return "."


def sarif(job: Job, rows: Sequence[dict[str, Any]]) -> str:
    """SARIF 2.1.0 with one run."""
    rules = [{"id": k, "shortDescription": {"text": v}} for k, v in RULES.items()]
    driver = {
        "name": "fastvit check",
        "version": package_version(),
        "rules": rules,
    }
    run = {"tool": {"driver": driver}, "results": list(rows)}
    return to_json({"$schema": SARIF, "version": "2.1.0", "runs": [run]})


# ---- reproduction ------------------------------------------------------------------

SCRIPT = '''"""{title}

Found by `fastvit check`: {found}
Run it where the check was run: python {name}
"""

import torch
from fastvit_cli import runners
from fastvit_cli.builders import ModelOptions
from safetensors.torch import load_file

{options}
reference = runners.load({reference!r}, options)
candidate = runners.load({candidate!r}, options)
inputs = load_file({inputs!r})
cases = sorted({{int(key.split(".")[0]) for key in inputs}})
for case in cases:
    x = [v for k, v in sorted(inputs.items()) if k.startswith(f"{{case}}.")]
    outputs = zip(reference.tensors(*x), candidate.tensors(*x))
    for index, (a, b) in enumerate(outputs):
        size = a.double().norm()
        print(f"case {{case}}, output {{index}}: ‖difference‖ / ‖reference‖ =",
              float((a.double() - b.double()).norm() / size))
{region}'''

REGION = """
# The region at fault by itself: its constant as it should be, and as it is.
name = {place!r}
numbers = load_file({numbers!r})
expected, found = numbers["expected"], numbers["found"]
error = (found.double() - expected.double()).abs()
worst = torch.unravel_index(error.argmax(), error.shape)
print(name, "differs most at", [int(i) for i in worst], "from", float(expected[worst]),
      "to", float(found[worst]))
"""


def _reproduction(job: Job, outcome: Outcome, cases: Sequence[Case]) -> list[str]:
    """The inputs that failed, or the first one, and a script that shows it."""
    from fastvit_cli import check_cases
    from fastvit_cli.check_view import in_one_line

    assert job.repro is not None
    job.repro.mkdir(parents=True, exist_ok=True)
    failed = [
        case
        for case, finding in zip(cases, outcome.findings)
        if finding.verdict == "different"
    ]
    about = {
        "reference": job.reference,
        "candidate": job.candidate,
        "seed": job.options.seed,
    }
    inputs = job.repro / "inputs.safetensors"
    check_cases.save(inputs, failed or cases[:1], about)
    numbers = _numbers(job.repro, outcome)
    script = job.repro / "repro.py"
    options = {
        key: value
        for key, value in vars(job.options).items()
        if value not in (None, {}, False, 0, "cpu")
    }
    text = SCRIPT.format(
        title=f"{job.reference} and {job.candidate} are not the same function.",
        found=in_one_line(job, outcome),
        name=script,
        options=f"options = ModelOptions(**{options!r})",
        reference=job.reference,
        candidate=job.candidate,
        inputs=str(inputs),
        region=REGION.format(place=numbers[0], numbers=str(numbers[1]))
        if numbers
        else "",
    )
    script.write_text(text, encoding="utf-8")
    return [str(inputs), *([str(numbers[1])] if numbers else []), str(script)]


def _numbers(folder: Path, outcome: Outcome) -> tuple[str, Path] | None:
    """The constant that differs first, as it should be and as it is."""
    from safetensors.torch import save_file

    pair = outcome.origin.numbers if outcome.decided and outcome.origin else None
    if pair is None:
        return None
    name, expected, found = pair
    path = folder / "region.safetensors"
    tensors = {"expected": expected.contiguous(), "found": found.contiguous()}
    save_file(tensors, path, metadata={"name": json.dumps(name)})
    return name, path
