"""devices.platform.pvpanic: only its one bit ends a machine."""

from devices.platform.pvpanic import PvPanic


def test_a_panic_is_told_and_nothing_else() -> None:
    panics: list[int] = []
    device = PvPanic(lambda: panics.append(1))
    assert device.read(0, 1) & 1
    device.write(0, 1, 2)
    device.write(1, 1, 1)
    device.write(0, 4, 0xFFFFFFFE)
    assert not panics
    device.write(0, 1, 1)
    assert panics == [1]
