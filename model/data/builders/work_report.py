"""Report of a build: a JSON file and a short text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from model.data.builders.work_files import Tally

_SHOWN = 12


@dataclass
class BuildReport:
    """Outcome of a build.

    Attributes:
        name: of the builder.
        out: folder of the results.
        settings: what it was made with.
        counts: group (modality, split …) → label → number.
        findings: kind → number and first messages.
        files: name → records and bytes.
        unit: what ``counts`` mostly count.
        pieces: how many it was cut into.
        seconds: of this run.
        worker_seconds: of work on all pieces, over all runs and processes.
        did_nothing: all was there already.
    """

    name: str
    out: str
    settings: dict[str, Any]
    counts: dict[str, dict[str, int]]
    findings: dict[str, dict[str, Any]]
    unit: str = "piece"
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    pieces: int = 0
    seconds: float = 0.0
    worker_seconds: float = 0.0
    did_nothing: bool = False

    @classmethod
    def of(cls, name: str, settings: dict[str, Any], tally: Tally, out: str, unit: str = "piece") -> BuildReport:
        """The report that a tally comes to."""
        findings = {
            kind: {"count": number, "examples": tally.examples.get(kind, [])} for kind, number in tally.found.items()
        }
        return cls(name, out, settings, tally.counts, findings, unit, worker_seconds=tally.seconds)

    @property
    def findings_file(self) -> str:
        """The list of all findings."""
        return f"{self.out}/findings_{self.name}.jsonl"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the report file."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> BuildReport:
        known = {one.name for one in fields(cls)}
        return cls(**{key: value for key, value in stored.items() if key in known})

    def format(self) -> str:
        """The report as text: counts, what was dropped or mended and why, files, time, and what to do next."""
        lines = [f"{group}: {_listed(labels)}" for group, labels in self.counts.items()]
        if self.findings:
            lines += ["", "found on the way:"]
            for kind, facts in self.findings.items():
                lines.append(f"  {kind} {facts['count']}, such as: {facts['examples'][0]}")
            lines.append(f"  all of them: {self.findings_file}")
        lines += [""] if lines else []
        for name, facts in self.files.items():
            lines.append(f"{self.out}/{name}: {facts['records']:,} records, {facts['bytes'] / 1e6:,.1f} MB")
        lines.append(self._verdict())
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.did_nothing:
            return f"{self.name}: all of it was there already; nothing was done (--overwrite makes it anew)"
        time = f"{self.seconds:,.1f} s ({self.worker_seconds:,.1f} s of work over all runs and processes)"
        return f"{self.name}: done in {time}"


def _listed(labels: dict[str, int]) -> str:
    """The most frequent labels, and how many more there are."""
    order = sorted(labels.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = ", ".join(f"{label} {number:,}" for label, number in order[:_SHOWN])
    rest = order[_SHOWN:]
    return shown + (f" and {len(rest)} more ({sum(number for _, number in rest):,})" if rest else "")
