"""Which templates a new one takes the place of."""

from pathlib import Path
from typing import Any

import pytest

from vmrun.run.templates import Template, _replaces

FACTS: dict[str, Any] = {
    "image": "kit",
    "kernel": "kit",
    "memory": 512 << 20,
    "cpus": 1,
    "nics": 0,
    "mounts": [],
    "home": "/somewhere",
    "created": 1.0,
}


def template(**facts: object) -> Template:
    return Template("key", Path("/nowhere"), {**FACTS, **facts})


def test_the_same_options_mean_something_else_now() -> None:
    assert _replaces(template(created=2.0), template())


@pytest.mark.parametrize("other", [{"image": "/other"}, {"memory": 1 << 30}, {"mounts": [True]}])
def test_other_options_have_their_own(other: dict[str, object]) -> None:
    assert not _replaces(template(created=2.0), template(**other))


def test_another_installation_keeps_its_own_while_it_is_there(tmp_path: Path) -> None:
    made = template(created=2.0)
    assert not _replaces(made, template(home=str(tmp_path)))
    assert _replaces(made, template(home=str(tmp_path / "gone")))
    old = template()
    del old.facts["home"]
    assert _replaces(made, old)
