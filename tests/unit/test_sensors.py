"""Sensors on made-up trees of kernel files, and what their readings are judged to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from runtime.conditions import Window, conditions_of, labels_of, merged, unsteady
from runtime.power import EnergyMeter, find_power, no_command, pmic_watts
from runtime.sensors import Reading, Sampler, Sensors, Throttle, decode_throttled
from targets.significance import summarise

PMIC = """     3V7_WL_SW_A current(0)=0.10000000A
     VDD_CORE_A current(7)=2.00000000A
     3V7_WL_SW_V volt(8)=3.70000000V
     VDD_CORE_V volt(15)=0.75000000V
     EXT5V_V volt(24)=5.15216000V
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def pi(root: Path, throttled: str = "0") -> Path:
    """A Raspberry Pi 5's tree."""
    return write(
        root,
        {
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "61700\n",
            "sys/class/thermal/thermal_zone1/type": "nvme\n",
            "sys/class/thermal/thermal_zone1/temp": "90000\n",
            "sys/devices/system/cpu/online": "0-1\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
            "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2400000\n",
            "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2400000\n",
            "sys/devices/system/cpu/cpu1/cpufreq/cpuinfo_max_freq": "2400000\n",
            "sys/devices/platform/soc/soc:firmware/get_throttled": f"{throttled}\n",
            "proc/stat": "cpu  1000 100 500 9000 50 10 40 300 0 0\ncpu0 1 1 1 1\nprocs_running 3\n",
            "proc/loadavg": "1.50 1.00 0.50 3/200 999\n",
            "proc/vmstat": "pgpgin 1\npswpin 42\n",
            "proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 5000000 kB\n",
            "proc/pressure/cpu": "some avg10=1.00 avg60=0.50 avg300=0.10 total=2500000\n",
        },
    )


def test_a_board_is_read(tmp_path: Path) -> None:
    sensors = Sensors(pi(tmp_path))
    reading = sensors.read()
    assert (sensors.zone, reading.temperature_c) == ("cpu-thermal", 61.7)  # not the hotter disk
    assert (reading.clock_mhz, sensors.clock_limit_mhz, sensors.governor) == (2400, 2400, "ondemand")
    assert reading.throttle == Throttle((), None)
    assert (reading.busy_s, reading.stolen_s, reading.runnable) == (16.5, 3.0, 3)
    assert (reading.load_1m, reading.swapped_in_pages, reading.available_bytes) == (1.5, 42, 5000000 * 1024)
    assert reading.pressure_s == {"cpu": 2.5}
    assert reading.energy_j is None


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    reading = Sensors(tmp_path).read(thorough=True)
    told = (reading.temperature_c, reading.clock_mhz, reading.throttle, reading.busy_s, reading.energy_j)
    assert told == (None,) * 5


@pytest.mark.parametrize(
    ("value", "now", "since"),
    [
        (0x0, (), ()),
        (0x1, ("under-voltage",), ()),
        (0x50000, (), ("under-voltage", "throttled")),
        (0x50005, ("under-voltage", "throttled"), ("under-voltage", "throttled")),
        (0xE0008, ("soft temperature limit",), ("frequency capped", "throttled", "soft temperature limit")),
        (0x2, ("frequency capped",), ()),
    ],
)
def test_throttle_bits_now_and_since_boot(value: int, now: tuple[str, ...], since: tuple[str, ...]) -> None:
    assert decode_throttled(value) == Throttle(now, since)


def test_the_firmware_tells_the_past_and_the_kernel_the_present(tmp_path: Path) -> None:
    root = pi(tmp_path, "4")
    answers = {"get_throttled": "throttled=0x50000\n"}
    reading = Sensors(root, lambda argument: answers.get(argument, "")).read()
    assert reading.throttle == Throttle(("throttled",), ("under-voltage", "throttled"))
    # The kernel clears sticky bits whenever it looks: without the firmware's tool a clear past is unknown.
    assert Sensors(root, no_command).read().throttle == Throttle(("throttled",), None)
    pi(tmp_path, "40004")
    assert Sensors(root, no_command).read().throttle == Throttle(("throttled",), ("throttled",))
    pi(tmp_path, "nonsense")
    assert Sensors(root, no_command).read().throttle is None


def test_pmic_rails_are_multiplied_and_added() -> None:
    assert pmic_watts(PMIC) == pytest.approx(0.1 * 3.7 + 2 * 0.75)
    assert pmic_watts("error=1") is None


def test_power_sources(tmp_path: Path) -> None:
    assert find_power(tmp_path / "none", no_command) == ()
    rapl = write(
        tmp_path / "rapl",
        {
            "sys/class/powercap/intel-rapl:0/name": "package-0\n",
            "sys/class/powercap/intel-rapl:0/energy_uj": "9000000\n",
            "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "10000000\n",
            "sys/class/powercap/intel-rapl:0:0/name": "core\n",
            "sys/class/powercap/intel-rapl:0:0/energy_uj": "5\n",
        },
    )
    meter = EnergyMeter(find_power(rapl, no_command))
    assert (meter.name, meter.read()) == ("rapl", 0)
    write(rapl, {"sys/class/powercap/intel-rapl:0/energy_uj": "2000000\n"})  # the counter wrapped
    assert meter.read() == pytest.approx(3.0)
    ina = write(
        tmp_path / "ina",
        {"sys/class/hwmon/hwmon2/name": "ina226\n", "sys/class/hwmon/hwmon2/power1_input": "5250000\n"},
    )
    (source,) = find_power(ina, no_command)
    assert source.watts is not None
    assert source.watts() == pytest.approx(5.25)
    jetson = {"name": "ina3221", "in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "2000"}
    jetson |= {"in2_label": "VDD_CPU", "in2_input": "5000", "curr2_input": "700"}
    (source,) = find_power(
        write(tmp_path / "jetson", {f"sys/class/hwmon/hwmon0/{key}": text for key, text in jetson.items()}), no_command
    )
    assert source.watts is not None
    assert source.watts() == pytest.approx(10.0)  # the input alone, not the rails behind it again
    battery = {"type": "Battery", "status": "Discharging", "current_now": "1500000", "voltage_now": "12000000"}
    tree = write(tmp_path / "bat", {f"sys/class/power_supply/BAT0/{key}": text for key, text in battery.items()})
    (source,) = find_power(tree, no_command)
    assert source.watts is not None
    assert source.watts() == pytest.approx(18.0)
    write(tree, {"sys/class/power_supply/BAT0/status": "Charging\n"})
    assert find_power(tree, no_command) == ()
    assert [item.source for item in find_power(tmp_path / "none", lambda _argument: PMIC)] == ["pmic"]


def test_the_sampler_keeps_reading_and_ends(tmp_path: Path) -> None:
    with Sampler(Sensors(pi(tmp_path)), 0.01) as sampler:
        start = sampler.mark()
        while len(sampler.readings) < 6:
            pass
        end = sampler.mark()
        between = sampler.between(start, end)
    count = len(sampler.readings)
    assert between[0] is start
    assert between[-1] is end
    assert [item.at_s for item in sampler.readings] == sorted(item.at_s for item in sampler.readings)
    assert len(sampler.readings) == count


QUIET = Reading(
    at_s=10.0,
    temperature_c=50.0,
    clock_mhz=2400.0,
    throttle=Throttle((), ("under-voltage",)),
    throttle_events=3,
    busy_s=100.0,
    stolen_s=5.0,
    own_cpu_s=1.0,
    runnable=2,
    load_1m=0.1,
    pressure_s={"cpu": 1.0},
    quota_held_s=2.0,
    swapped_in_pages=7,
    major_faults=5,
    available_bytes=10**9,
    energy_j=100.0,
)
AFTER = replace(QUIET, at_s=20.0, busy_s=120.5, own_cpu_s=21.0, energy_j=150.0, pressure_s={"cpu": 3.0})


def labels(after: Reading, threads: int = 2, cpus: int = 2) -> list[str]:
    return [label.kind for label in labels_of(Window([[QUIET, after]], threads, cpus))]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"busy_s": 128.0}, ["busy"]),
        ({"stolen_s": 6.0}, ["stolen"]),
        ({"quota_held_s": 4.0}, ["quota"]),
        ({"quota_held_s": 2.1}, []),
        ({"swapped_in_pages": 9}, ["swapped"]),
        ({"major_faults": 500}, ["paged"]),
        ({"throttle": Throttle(("throttled",), ("under-voltage",))}, ["throttled"]),
        ({"throttle": Throttle((), ("under-voltage", "throttled"))}, ["throttled"]),  # between two looks
        ({"throttle_events": 4}, ["throttled"]),
        ({"busy_s": None}, []),
    ],
)
def test_what_spoils_a_run(changes: dict[str, object], expected: list[str]) -> None:
    assert labels(replace(AFTER, **changes)) == expected  # type: ignore[arg-type]


def test_cores_that_nobody_measured_are_free_for_others() -> None:
    assert labels(replace(AFTER, busy_s=128.0), threads=1) == []


def test_ticks_of_the_clock_are_no_neighbours() -> None:
    short = replace(QUIET, at_s=10.01, busy_s=100.02, own_cpu_s=1.0)
    assert labels(short, threads=2) == []


def test_a_falling_clock_is_told() -> None:
    clocks = [2400.0] * 6 + [1800.0] * 6
    piece = [replace(QUIET, at_s=10.0 + index, clock_mhz=mhz, busy_s=None) for index, mhz in enumerate(clocks)]
    found = labels_of(Window([piece], 1, 1))
    assert [label.kind for label in found] == ["clock"]
    assert "2400 to 1800" in found[0].reason


def test_pieces_are_added_up_and_what_lies_between_them_does_not_count() -> None:
    pause = replace(AFTER, at_s=30.0, busy_s=300.0, swapped_in_pages=500)
    again = replace(pause, at_s=40.0, busy_s=320.5, own_cpu_s=41.0)
    assert labels_of(Window([[QUIET, AFTER], [pause, again]], 2, 2)) == ()


def test_each_trouble_is_named_once() -> None:
    busy = labels_of(Window([[QUIET, replace(AFTER, busy_s=128.0)]], 2, 2))
    busier = labels_of(Window([[QUIET, replace(AFTER, busy_s=138.0)]], 2, 2))
    assert [label.kind for label in merged([busy, busier, ()])] == ["busy"]
    both = merged([unsteady("pp8", summarise([100, 50, 101])), unsteady("tg8", summarise([100, 40, 101]))])
    assert [label.kind for label in both] == ["unsteady", "unsteady"]
    assert unsteady("tg8", summarise([100, 101, 99])) == ()


def test_conditions_sum_up_the_readings(tmp_path: Path) -> None:
    sensors = Sensors(pi(tmp_path), lambda argument: PMIC if argument == "pmic_read_adc" else "")
    record = conditions_of(Window([[QUIET, replace(AFTER, temperature_c=70.0)]], 2, 2), sensors, 0.5)
    assert record.temperature_c is not None
    assert (record.temperature_c.least, record.temperature_c.most) == (50, 70)
    assert record.pressure == {"cpu": pytest.approx(0.2)}
    assert record.throttled == ()
    assert record.throttled_since_boot == ("under-voltage",)
    assert record.power is not None
    assert (record.power.source, record.power.mean_w, record.power.energy_j) == ("pmic", 5.0, 50.0)
