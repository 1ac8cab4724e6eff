"""What a run was like: a JSON object for programs, a table and a picture for people. Owner's process."""

import html
import json
from pathlib import Path
from typing import Any

from vmrun.run.command import Outcome
from vmrun.run.phases import Phases

WIDTH, ROW, LEFT = 760, 26, 190  # of the picture, in pixels: its width, a row's height, where bars begin
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")


def describe(outcome: Outcome, phases: Phases, usage: dict[str, Any], console: Path | None) -> str:
    """One line of JSON: `code`, `reason`, `own` (whether the code is vmrun's own), `seconds`, `phases`,
    `usage` and where the `console` log is, if it was kept."""
    return json.dumps(
        {
            "code": outcome.code,
            "reason": outcome.reason,
            "own": outcome.own,
            "seconds": round(phases.total, 6),
            "phases": [
                {"name": phase.name, "start": round(phase.start, 6), "end": round(phase.end, 6)}
                for phase in phases.list
            ],
            "usage": usage,
            "console": None if console is None else str(console),
        }
    )


def table(phases: Phases) -> str:
    """A line for each phase: milliseconds it took, and when it began."""
    lines = [f"{'phase':<24}{'ms':>9}{'began':>9}"]
    for phase in phases.list:
        lines.append(f"{phase.name:<24}{(phase.end - phase.start) * 1000:>9.1f}{phase.start * 1000:>9.1f}")
    return "\n".join([*lines, f"{'all':<24}{phases.total * 1000:>9.1f}"])


def timeline(phases: Phases) -> str:
    """The phases as bars, in SVG 1.1."""
    total = max(phases.total, 1e-6)
    height = ROW * (len(phases.list) + 1) + 12
    scale = (WIDTH - LEFT - 80) / total
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for row, phase in enumerate(phases.list):
        top = 6 + row * ROW
        start, length = LEFT + phase.start * scale, max(1.0, (phase.end - phase.start) * scale)
        colour = COLOURS[row % len(COLOURS)]
        took = f"{(phase.end - phase.start) * 1000:.0f} ms"
        parts += (
            f'<text x="{LEFT - 8}" y="{top + 17}" text-anchor="end">{html.escape(phase.name)}</text>',
            f'<rect x="{start:.1f}" y="{top + 4}" width="{length:.1f}" height="{ROW - 8}" fill="{colour}"/>',
            f'<text x="{start + length + 5:.1f}" y="{top + 17}">{took}</text>',
        )
    bottom = 6 + len(phases.list) * ROW + 17
    parts.append(f'<text x="{LEFT}" y="{bottom}" fill="#555">{total * 1000:.0f} ms in all</text></svg>')
    return "\n".join(parts) + "\n"
