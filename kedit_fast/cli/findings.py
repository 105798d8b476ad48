"""What linting has found, as `requests lint` prints it and as `edit` heeds it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kedit_fast.cli.console import notices, output
from kedit_fast.errors import RequestError
from kedit_fast.requests.lint import SEVERITIES, Finding, counts_by_severity
from kedit_fast.requests.problems import OnError, require_no_problems
from kedit_fast.requests.reading import RequestList

if TYPE_CHECKING:
    from kedit_fast.reports.lint import LintReport

_SAID_BY_READING = {"unreadable", "subject-missing", "subject-twice", "subject-case", "surrogate", "duplicate-id"}


def print_findings(report: LintReport, file: str, verbose: bool) -> None:
    """One line for each finding, one for each rule that has some with what to do, and the counts.

    Args:
        report: the findings.
        file: what lines begin with.
        verbose: whether notes are printed, too.
    """
    shown = [finding for finding in report.findings if verbose or finding.severity != "note"]
    for finding in shown:
        line = f"{file}:{finding.place}: {finding.severity} {finding.rule}: {finding.message}"
        output.print(" ".join(line.split()), markup=False, soft_wrap=True)
    for rule, findings in _by_rule(shown).items():
        advice = next((finding.advice for finding in findings if finding.advice), "")
        output.print(f"{rule}: {_counted(findings)}{': ' if advice else ''}{advice}", markup=False, soft_wrap=True)
    hidden = "" if verbose or not report.counts["note"] else " (--verbose shows them)"
    records = f"{report.records} record{'s' if report.records != 1 else ''}"
    output.print(f"{records}: {_counted(report.findings)}{hidden}", markup=False, soft_wrap=True)
    reasons: dict[str, list[str]] = {}
    for rule, why in report.not_run.items():
        reasons.setdefault(why, []).append(rule)
    for why, rules in reasons.items():
        output.print(f"not run ({why}): {', '.join(rules)}", markup=False, soft_wrap=True)


def usable_requests(
    requests: RequestList, findings: Iterable[Finding], file: str, on_error: OnError, force: bool, say: bool = True
) -> RequestList:
    """The requests that `edit` writes after what linting has found; warnings go to stderr, one line for each rule.

    Args:
        requests: what was linted.
        findings: what was found.
        file: of the requests, for messages.
        on_error: "raise" at errors, or "skip" the requests that cause them.
        force: write them all the same.
        say: whether this process prints.

    Raises:
        RequestError: errors, unless they are skipped or `force` is set; at most 20 are named.
    """
    new = [finding for finding in findings if finding.rule not in _SAID_BY_READING]
    errors = [finding for finding in new if finding.severity == "error"]
    if errors and not force and on_error == "raise":
        lines = {i: f"record {one.place}: {one.rule}: {one.message}" for i, one in enumerate(errors)}
        remedy = "--on-error skip leaves out what causes them, --force writes it all the same"
        require_no_problems(lines, f"{file}: {_counted(errors)} ({remedy})")
    warned = [finding for finding in new if finding.severity == "warning" or (finding.severity == "error" and force)]
    for rule, same in _by_rule(warned).items() if say else ():
        count = f" and {len(same) - 1} more" if len(same) > 1 else ""
        notices.print(f"kedit-fast: {rule}, record {same[0].place}{count}: {same[0].message}", markup=False)
    if warned and say:
        notices.print(f"kedit-fast: `kedit-fast requests lint {file}` lists all findings", markup=False)
    if not errors or force:
        return requests
    skipped = dict(requests.skipped)
    for finding in reversed(errors):
        for i in finding.unusable:
            place = requests.places[i]
            skipped[place] = f"{file}, record {finding.place}: {finding.rule}: {finding.message}"
    left = [i for i, place in enumerate(requests.places) if place not in skipped]
    if not left:
        raise RequestError(f"{file}: no request is without errors; `kedit-fast requests lint {file}` lists them")
    return RequestList(
        (requests[i] for i in left),
        (requests.places[i] for i in left),
        dict(sorted(skipped.items())),
        (requests.records[i] for i in left),
        requests.form,
    )


def _by_rule(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    grouped: dict[str, list[Finding]] = {}
    for finding in findings:
        grouped.setdefault(finding.rule, []).append(finding)
    return grouped


def _counted(findings: Sequence[Finding]) -> str:
    """Findings in numbers: "1 error, 3 warnings"."""
    counts = counts_by_severity(findings)
    parts = [f"{counts[name]} {name}{'s' if counts[name] != 1 else ''}" for name in SEVERITIES if counts[name]]
    return ", ".join(parts) or "no findings"
