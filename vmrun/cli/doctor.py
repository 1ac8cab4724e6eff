"""`vmrun doctor`: what this host can do, what is missing, and what that means. User side of the VMM
process.
"""

import sys
from typing import TYPE_CHECKING, Annotated

from vmrun.cli.declare import Option
from vmrun.errors import EXIT_NO_KVM

if TYPE_CHECKING:
    from vmrun.host.check import Check

MARKS = {
    "ok": "[green]ok[/]",
    "info": "[dim]-[/]",
    "warning": "[yellow]warning[/]",
    "error": "[red]no[/]",
}


def doctor(
    as_json: Annotated[bool, Option("--json", help="Print JSON, for programs.")] = False,
) -> int:
    """Tell what this host can do for vmrun. Exits with 0 if machines can run here."""
    from vmrun.host import check

    checks = check.all_checks()
    runs = check.can_run(checks)
    if as_json:
        _print_json(checks, runs)
    else:
        _print_table(checks, runs)
    return 0 if runs else EXIT_NO_KVM


def _print_json(checks: "list[Check]", runs: bool) -> None:
    import json
    from dataclasses import asdict

    from vmrun.host.check import kvm_flavour

    found = {"can_run": runs, "kvm_flavour": kvm_flavour(), "checks": [asdict(check) for check in checks]}
    json.dump(found, sys.stdout, indent=2)
    print()


def _print_table(checks: "list[Check]", runs: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        text = escape(check.detail)
        if check.advice:
            text += (
                f"[dim]: {escape(check.advice)}[/]"
                if len(check.advice) < 60
                else f"\n[dim]{escape(check.advice)}[/]"
            )
        table.add_row(MARKS[check.level], escape(check.name), text)
    console = Console(highlight=False)
    console.print(table)
    console.print("\nMachines can run here." if runs else "\n[red]No machine can run here.[/]")
