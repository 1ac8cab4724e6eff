"""Machine files: what they mean, and that every mistake is told with its line and key. Nothing is started."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmrun import cli
from vmrun.cli.boot import boot
from vmrun.cli.declare import parameters
from vmrun.control import machine_file, preflight
from vmrun.control.machine_drafts import TYPES
from vmrun.control.machine_file import BridgeEntry, MachineFile, Outline
from vmrun.control.toml_document import DocumentError
from vmrun.errors import EXIT_IMAGE, EXIT_USAGE, UserError
from vmrun.machine.config import DiskConfig, MachineConfig, NicConfig, VhostUserDisk

Load = Callable[[str], MachineFile]


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VMRUN_RUNTIME", str(tmp_path / "run"))


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def do(text: str) -> MachineFile:
        (tmp_path / "vm.toml").write_text(text)
        return machine_file.load(tmp_path / "vm.toml")

    return do


@pytest.fixture
def problems(load: Load, tmp_path: Path) -> Callable[[str], list[str]]:
    """What is wrong with a file: LINE: KEY: TEXT."""

    def do(text: str) -> list[str]:
        with pytest.raises(DocumentError) as caught:
            load(text)
        assert caught.value.code == EXIT_USAGE
        return [line.removeprefix(f"{tmp_path}/vm.toml:") for line in caught.value.lines]

    return do


Problems = Callable[[str], list[str]]


def test_everything_a_machine_can_have(load: Load, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    loaded = load(
        """
        [machines.web]
        mem = "1.5G"
        cpus = 2
        kernel = "vmlinux"
        initrd = "/boot/initrd"
        append = "quiet {{x}}"
        cdrom = "../cd.iso"
        disks = [
            "a,,b.raw,ro",
            { path = "c,d", format = "qcow2", serial = "s,t", backing = ["base", "."] },
            "vhost-user:disk.sock",
            { path = "t.raw", throwaway = true },
            "t.raw,backing=base:.",
        ]
        legacy-virtio = true
        verbose = true
        timeout = "2m"
        autostart = false
        [[machines.web.nics]]
        tap = "tap0"
        mac = "52:54:00:12:34:56"
        bridge = "br0"
        ip = "10.0.0.1/24"
        mtu = 9000
        locked = true
        local = false
        [[machines.web.nics]]
        tap = "tap1"
        local = true
        boot = "file"

        [machines.bios]
        firmware = "bios.bin"
        timeout = 1.5
        nics = ["tap2,rom=x.rom"]

        [bridges.br0]
        address = "10.0.0.1/24"
        [bridges.br1]

        [start]
        parallel = 3
        delay = "500ms"
        """
    )
    web, bios = loaded.machines
    assert web.config == MachineConfig(
        memory=3 << 29,
        cpus=2,
        kernel=tmp_path / "vmlinux",
        initrd=Path("/boot/initrd"),
        cmdline="quiet {x}",
        cdrom=tmp_path / "../cd.iso",
        disks=(
            DiskConfig(tmp_path / "a,b.raw", "raw", True),
            DiskConfig(tmp_path / "c,d", "qcow2", serial="s,t", backing=(tmp_path / "base", tmp_path)),
            VhostUserDisk(tmp_path / "disk.sock"),
            DiskConfig(tmp_path / "t.raw", "raw", throw_away=True),
            DiskConfig(tmp_path / "t.raw", "raw", backing=(tmp_path / "base", tmp_path)),
        ),
        nics=(
            NicConfig("tap0", bytes.fromhex("525400123456"), "10.0.0.1/24", 9000, True, False, "br0"),
            NicConfig("tap1", local=True, boot_file="file"),
        ),
        legacy_virtio=True,
        verbose=True,
    )
    assert (web.name, web.timeout, web.autostart) == ("web", 120, False)
    assert bios.config.firmware == tmp_path / "bios.bin" and bios.config.nics[0].rom == tmp_path / "x.rom"
    assert (bios.timeout, bios.autostart) == (1.5, True)
    assert loaded.bridges == (BridgeEntry("br0", "10.0.0.1/24"), BridgeEntry("br1", None))
    assert (loaded.start.parallel, loaded.start.delay) == (3, 0.5)
    assert [machine.name for machine in loaded.choose([])] == ["bios"]
    assert [machine.name for machine in loaded.choose(["bios", "web"])] == ["web", "bios"]


def test_an_empty_table_is_what_boot_would_start(load: Load) -> None:
    (machine,) = load("[machines.vm]").machines
    assert machine.config == MachineConfig() and machine.autostart and machine.timeout is None


def test_templates(load: Load) -> None:
    loaded = load(
        """
        [machines.web]
        template = "big"
        disks = ["own.raw"]
        [machines.db]
        template = "base"
        mem = "64M"
        [templates.big]
        template = "base"
        mem = "1G"
        [templates.base]
        cpus = 2
        mem = "256M"
        disks = ["{name}.raw", "common.raw,ro"]
        autostart = false
        """
    )
    web, db = loaded.machines
    assert (web.config.memory, web.config.cpus, len(web.config.disks)) == (1 << 30, 2, 1)
    assert db.config.memory == 64 << 20
    assert [Path(disk.path).name for disk in db.config.disks] == ["db.raw", "common.raw"]
    assert not db.autostart


def test_instances(load: Load) -> None:
    loaded = load(
        """
        [templates.t]
        disks = [{ path = "{name}/{instance}.raw", serial = "{index}" }]
        nics = ["t{index:03},mac=52:54:00:00:00:{index:02x}"]
        [machines.w]
        instances = 12
        template = "t"
        [machines.n]
        instances = ["red", "blue"]
        template = "t"
        """
    )
    assert [machine.name for machine in loaded.machines] == [f"w-{n}" for n in range(1, 13)] + [
        "n-red",
        "n-blue",
    ]
    last = loaded.machines[11].config
    assert isinstance(last.disks[0], DiskConfig)
    assert last.disks[0].path.parts[-2:] == ("w-12", "12.raw") and last.disks[0].serial == "12"
    assert last.nics[0] == NicConfig("t012", bytes.fromhex("52540000000c"))
    blue = loaded.machines[13].config
    assert blue.disks[0].path.parts[-2:] == ("n-blue", "blue.raw") and blue.nics[0].tap == "t002"
    assert [machine.name for machine in loaded.choose(["n", "w-3"])] == ["w-3", "n-red", "n-blue"]
    with pytest.raises(UserError, match="no machine 'n-read' in the file; did you mean n-red"):
        loaded.choose(["n-read"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "1: no machines: [machines.NAME] is one"),
        ("x = 1\n[machines.a]", "1: x: unknown key; there are machines, templates, bridges, start"),
        ("[machine.a]\n[machines.b]", "1: machine: unknown key; did you mean machines?"),
        ("machines = 3", "1: machines: give a table"),
        ("[machines]\n\na = 3", "3: machines.a: give a table"),
        ('[machines."a b"]', "1: machines.\"a b\": 'a b': a machine's name is"),
        ("[machines.a]\nmemory = '1G'", "2: machines.a.memory: unknown key; did you mean mem?"),
        ("[machines.a]\nmem = 128", "2: machines.a.mem: say the unit: 128M?"),
        ("[machines.a]\nmem = '1M'", "2: machines.a.mem: give at least 2M"),
        ("[machines.a]\nmem = '9999T'", "2: machines.a.mem: more memory than this host has"),
        ("[machines.a]\ncpus = 65", "2: machines.a.cpus: give 1 to 64"),
        ("[machines.a]\ncpus = true", "2: machines.a.cpus: give a whole number"),
        ("[machines.a]\ntimeout = '1x'", "2: machines.a.timeout: not a time"),
        ("[machines.a]\nautostart = 'no'", "2: machines.a.autostart: give true or false"),
        ("[machines.a]\nkernel = 1979-05-27", "2: machines.a.kernel: give a string"),
        ("[machines.a]\nfirmware = 'x'\nkernel = 'y'", "2: machines.a.firmware: --firmware finds what"),
        ("[machines.a]\ndisks = 'x.raw'", "2: machines.a.disks: give an array"),
        ("[machines.a]\ndisks = [\n3]", "3: machines.a.disks[0]: give a string or a table"),
        (
            "[machines.a]\ndisks = [\n{path='x', formt='raw'}]",
            "3: machines.a.disks[0].formt: unknown key; did you mean format?",
        ),
        ("[[machines.a.disks]]\nformat = 'raw'", "1: machines.a.disks[0]: path is missing"),
        ("[[machines.a.disks]]\npath='x.raw'\nro = 'yes'", "3: machines.a.disks[0].ro: give true or false"),
        ("[[machines.a.disks]]\nro=true\npath='x.foo'", "3: machines.a.disks[0].path: the suffix does not"),
        ("[[machines.a.disks]]\npath='x'\nformat='vmdk'", "3: machines.a.disks[0].format: format=vmdk: give"),
        ("[[machines.a.disks]]\npath='x'\nbacking=[1]", "3: machines.a.disks[0].backing[0]: give a string"),
        ("[machines.a]\ndisks = ['x.raw,ro,throwaway']", "2: machines.a.disks[0].ro: throwaway is for"),
        ("[machines.a]\ndisks = ['x.raw,rw']", "2: machines.a.disks[0]: unknown key 'rw'"),
        ("[machines.a]\ndisks = ['x']", "2: machines.a.disks[0].path: the suffix does not tell"),
        ("[machines.a]\ndisks = [\n'x.raw,backing=no']", "3: machines.a.disks[0].backing: backing="),
        ("[[machines.a.nics]]\ntap='t'\n\nmtu=1", "4: machines.a.nics[0].mtu: mtu=1: give 68 to 65521"),
        ("[[machines.a.nics]]\nmac='x'\ntap='t'", "2: machines.a.nics[0].mac: mac=x: a MAC address is"),
        ("[machines.a]\nnics=['a/b']", "2: machines.a.nics[0].tap: not an interface name"),
        ("[machines.a]\nnics=['t,rom=x']", "2: machines.a.nics: --nic rom= is an option ROM"),
        ("[machines.a]\ntemplate='x'", "2: machines.a.template: there is no template 'x'; there are none"),
        ("[machines.a]\n[templates.a]\ntemplate='a'", "3: templates.a.template: templates use each other"),
        ("[machines.a]\n[templates.a]\ninstances=2", "3: templates.a.instances: instances are for machines"),
        ("[machines.a]\n[templates.a]\nx=2", "3: templates.a.x: unknown key"),
        ("[machines.a]\ninstances=0", "2: machines.a.instances: give how many, 1 to 1000"),
        ("[machines.a]\ninstances=[]", "2: machines.a.instances: give how many"),
        ("[machines.a]\ninstances=['x', 'x']", "1: machines.a: there is a machine a-x already"),
        ("[machines.a]\ninstances='x'", "2: machines.a.instances: give a whole number or an array"),
        ("[machines.a-1]\n[machines.a]\ninstances=1", "2: machines.a: there is a machine a-1 already"),
        ("[machines.a]\nkernel='{index}'", "2: machines.a.kernel: {index} is for machines with instances"),
        ("[machines.a]\nkernel='{nam}'", "2: machines.a.kernel: {nam}: no such placeholder; did you mean"),
        ("[machines.a]\nkernel='{name:2}'", "2: machines.a.kernel: {name:2}: only an index has a format"),
        (
            "[machines.a]\ninstances=1\nappend='{index:999999999}'",
            "3: machines.a.append: {index:999999999}: only an index has a format",
        ),
        ("[machines.a]\n[bridges.a_bridge_too_long]", "2: bridges.a_bridge_too_long: a_bridge_too_long: an"),
        ("[machines.a]\n[bridges.b]\naddress='10.0.0.0/24'", "3: bridges.b.address: ip=10.0.0.0/24: this is"),
        ("[machines.a]\n[start]\nparallel=0", "3: start.parallel: give how many"),
        ("[machines.a]\n[start]\ndelay='2d'", "3: start.delay: not a time"),
        ("[machines.a]\n[start]\nstagger='2s'", "3: start.stagger: unknown key; did you mean delay?"),
    ],
)  # fmt: skip
def test_mistakes(problems: Problems, text: str, told: str) -> None:
    (line,) = problems(text)
    assert line.startswith(told)


def test_all_mistakes_are_told_at_once_and_once(problems: Problems) -> None:
    """In the order of the file; those of a template not for each machine that uses it."""
    told = problems(
        """
        [templates.t]
        cpus = 99
        disks = [{ path = "x.raw", format = "vmdk", serial = "ssssssssssssssssssssssssss" }]
        [machines.a]
        template = "t"
        instances = 3
        mem = "7"
        [machines.b]
        template = "t"
        kernal = "x"
        """
    )
    assert [line.split(": ")[:2] for line in told] == [
        ["3", "templates.t.cpus"],
        ["4", "templates.t.disks[0].format"],
        ["4", "templates.t.disks[0].serial"],
        ["8", "machines.a.mem"],
        ["11", "machines.b.kernal"],
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[machines.a]\nx = \n", "2: not TOML: Invalid value"),
        (b"[machines.a]\nx = 1\nx = 2", "3: not TOML: Cannot overwrite a value"),
        (b"[machines.a]\n\n[machines", "3: not TOML: "),
        (b"# \xc3\xa4\n# \xff", "2: not UTF-8"),
        (b"x = " + b"[" * 100_000, "1: not TOML that can be read: nested too deeply"),
    ],
)
def test_what_is_not_toml(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "vm.toml"
    path.write_bytes(content)
    with pytest.raises(DocumentError) as caught:
        machine_file.load(path)
    (line,) = caught.value.lines
    assert line.startswith(f"{path}:{told}")


def test_the_outline_needs_no_good_machines(tmp_path: Path) -> None:
    """`down` works when a disk is gone or a key is not understood any more."""
    path = tmp_path / "vm.toml"
    path.write_text("[machines.a]\ninstances=2\nx=1\ntemplate='no'\n[machines.b]\n[bridges.br0]\nx=1")
    found = machine_file.outline(path)
    assert found == Outline({"a-1": "a", "a-2": "a", "b": "b"}, ("br0",))
    assert found.choose([]) == ["a-1", "a-2", "b"] and found.choose(["a", "b"]) == ["a-1", "a-2", "b"]
    assert found.choose(["a-2"]) == ["a-2"]
    with pytest.raises(UserError, match="did you mean a-2"):
        found.choose(["a-22"])


def test_machines_that_cannot_run_together(load: Load, tmp_path: Path) -> None:
    (tmp_path / "link.raw").symlink_to("x.raw")
    loaded = load(
        """
        [machines.a]
        disks = ["x.raw", "shared.raw,ro"]
        nics = ["tap0,mac=52:54:00:00:00:01"]
        [machines.b]
        disks = ["shared.raw,ro", "link.raw,ro"]
        nics = ["tap0"]
        [machines.c]
        nics = ["tap1,mac=52-54-00-00-00-01"]
        """
    )
    preflight.check_together(loaded.document, [loaded.machines[0]])
    preflight.check_together(loaded.document, loaded.machines[1:])
    loaded.document.check()
    preflight.check_together(loaded.document, loaded.machines)
    with pytest.raises(DocumentError) as caught:
        loaded.document.check()
    assert [line.removeprefix(f"{tmp_path}/vm.toml:") for line in caught.value.lines] == [
        f"6: machines.b.disks[1]: disk {tmp_path}/x.raw is machines.a's too",
        "7: machines.b.nics[0]: tap tap0 is machines.a's too",
        "9: machines.c.nics[0]: mac 52:54:00:00:00:01 is machines.a's too",
    ]


def test_files_that_are_missing(load: Load, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    loaded = load(
        """
        [machines.a]
        kernel = "there"
        initrd = "no"
        cdrom = "."
        disks = ["no.raw", "vhost-user:there"]
        """
    )
    preflight.check_files(loaded.document, loaded.machines[0])
    with pytest.raises(DocumentError) as caught:
        loaded.document.check()
    assert caught.value.code == EXIT_IMAGE
    assert [line.removeprefix(f"{tmp_path}/vm.toml:") for line in caught.value.lines] == [
        f"4: machines.a.initrd: {tmp_path}/no: no such file or directory",
        f"5: machines.a.cdrom: {tmp_path}: not a file",
        f"6: machines.a.disks[0]: disk {tmp_path}/no.raw: no such file",
        f"6: machines.a.disks[1]: {tmp_path}/there: no such socket",
    ]


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vm.toml").write_text(
        "[machines.a]\ncpus = 2\ntimeout = 5\n[bridges.br0]\n[start]\nparallel = 2"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.run(["up", "--dry-run"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["machines"]["a"]["cpus"] == 2 and found["machines"]["a"]["timeout"] == 5
    assert found["bridges"] == {"br0": {"address": None}} and found["start"] == {"parallel": 2, "delay": 0}
    assert not (tmp_path / "run").exists()


def test_the_commands_tell_every_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vm.toml").write_text('[machines.a]\ncpu = 2\n"\\u001b[2J" = 1\n[machines.a.b]')
    monkeypatch.chdir(tmp_path)
    assert cli.run(["up", "vm.toml"]) == EXIT_USAGE
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[1] for line in told] == [
        "vm.toml:2:",
        "vm.toml:3:",
        "vm.toml:4:",
    ]
    assert told[0].startswith("vmrun: vm.toml:2: machines.a.cpu: unknown key; did you mean cpus?")
    assert "\x1b" not in "".join(told)
    assert cli.run(["up", "no.toml"]) == EXIT_USAGE
    assert capsys.readouterr().err == "vmrun: no.toml: no such file or directory\n"
    assert cli.run(["down", "vm.toml", "c"]) == EXIT_USAGE
    assert "no machine 'c' in the file; there are a" in capsys.readouterr().err
    assert cli.run(["down"]) == 0
    assert capsys.readouterr().out == "a: does not run\n"


def test_a_machine_can_have_all_that_boot_can() -> None:
    options = {parameter.names[0].removeprefix("--") for parameter in parameters(boot)}
    lists = {"disk": "disks", "nic": "nics"}
    # A machine is named by its table, and always detached.
    expected = {lists.get(option, option) for option in options} - {"name", "detach"}
    assert TYPES.keys() == expected | {"template", "instances", "autostart"}
