"""Fit the constants of ``targets/calibration.toml`` to published measurements, and say how well they hold.

    python benchmarks/fit_profiles.py MEASUREMENTS.csv [--own benchmarks/results/gpu_offload.jsonl ...] [-o FILE]

The model is ``targets.predict`` itself. All constants are positive and fitted as logarithms around the starting values
below: normal priors keep what no row tells, Student-t weights keep single wrong reports from pulling. A device has a
factor on bandwidth and one on arithmetic, drawn towards 1, so that a device with few rows stays close to its family.
Errors are reported in the sample, for rows left out (ten folds) and for whole devices left out; the 80 % bands come
from the left-out errors. Deterministic: the same CSV gives the same file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from random_gguf import Shape, workload_of

from exporter.mixes import mix_named
from targets.calibration import PATH, DeviceScale, Family, Spread, Unseen, parse_calibration
from targets.predict import RunSettings, decode_seconds, prefill_seconds
from targets.profile import TargetProfile
from targets.validate import Row, read_rows, row_profile

NOISE = 0.12  # log error of a careful report of one board (fan, firmware, build)
FREEDOM = 3.0  # Student-t: reports that are off by 2x exist
PRIORS = {
    "prefill": 0.4,
    "decode": 0.35,
    "bandwidth_share": 0.3,
    "per_core_gbs": 0.3,
    "parallel_loss": 0.5,
    "layer_us": 0.6,
    "token_us": 0.6,
    "weight_flops": 0.6,
    "old_layer_us": 0.5,
    "old_prefill": 0.3,
    "hidden_half": 0.5,
    "bandwidth": 0.3,
    "compute": 0.35,
}
ITERATIONS = 16
REFITS = 3
FOLDS = 10
NORM = 4.0

# Core cycles per weight: what one weight costs in an 8-bit dot product with the unpacking of each type, read off
# llama.cpp on one machine per family; the fit moves them.
CPU_PREFILL = {
    "F16": 0.16, "Q8_0": 0.10, "Q4_0": 0.07, "Q4_1": 0.15, "Q5_0": 0.13, "Q5_1": 0.18, "Q2_K": 0.13, "Q3_K": 0.15,
    "Q4_K": 0.09, "Q5_K": 0.14, "Q6_K": 0.14, "IQ4_NL": 0.08, "IQ4_XS": 0.15, "IQ3_S": 0.3, "IQ2_XXS": 0.25,
    "default": 0.2,
}  # fmt: skip
CPU_DECODE = {
    "F16": 0.12, "Q8_0": 0.18, "Q4_0": 0.12, "Q4_1": 0.2, "Q5_0": 0.25, "Q5_1": 0.3, "Q2_K": 0.18, "Q3_K": 0.22,
    "Q4_K": 0.15, "Q5_K": 0.18, "Q6_K": 0.2, "IQ4_NL": 0.2, "IQ4_XS": 0.18, "IQ3_S": 0.4, "IQ2_XXS": 0.3,
    "default": 0.3,
}  # fmt: skip
GPU_PREFILL = {
    "F16": 0.45, "Q8_0": 0.5, "Q4_0": 0.5, "Q4_K": 0.45, "Q5_K": 0.4, "Q6_K": 0.4, "Q2_K": 0.4, "Q2_0": 0.45,
    "Q1_0": 0.45, "default": 0.4,
}  # fmt: skip
GPU_DECODE = {
    "F16": 0.9, "Q8_0": 0.85, "Q4_0": 0.8, "Q4_K": 0.75, "Q5_K": 0.72, "Q6_K": 0.75, "Q2_K": 0.6, "Q2_0": 0.5,
    "Q1_0": 0.35, "default": 0.6,
}  # fmt: skip
# A layer is about ten operators, each ending in a barrier between threads of about a microsecond.
CPU_LAYER_US = 12.0
# How much slower a type without repacked kernel is in prefill on Arm, where repacking brings matrix instructions in.
UNPACKED = 1.7
# What repack.cpp of llama.cpp rearranges, by instruction set.
REPACKED = {
    "arm-neon": (),
    "arm-dotprod": ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4", "Q8_0", "Q1_0"),
    "arm-i8mm": ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4", "Q8_0", "Q1_0"),
    "arm-apple": ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4", "Q8_0", "Q1_0"),
    "x86-avx2": ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"),
    "x86-avx-vnni": ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"),
    "x86-gracemont": ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"),
    "x86-avx512-vnni": ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4", "Q2_K"),
    # amx/mmq.cpp of llama.cpp, and what repack.cpp rearranges of the rest.
    "x86-amx": ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "F16", "IQ4_NL", "MXFP4", "Q2_K"),
    "generic": (),
}
# AMX tiles carry sums beside the blocks: 4 bytes with every block of 34, 144 and 176 bytes, 2 with one of 136.
REPACKED_GROWTH = {"x86-amx": {"Q8_0": 38 / 34, "Q4_K": 148 / 144, "Q5_K": 180 / 176, "IQ4_XS": 138 / 136}}
# family -> (factor on prefill cycles, on decode cycles, bandwidth share, GB/s of one core, parallel loss)
CPU_START = {
    "arm-neon": (6.5, 4.0, 0.29, 2.7, 0.02),
    "arm-dotprod": (1.6, 2.5, 0.65, 8.0, 0.02),
    "arm-i8mm": (1.2, 2.0, 0.33, 8.0, 0.03),
    "arm-apple": (0.6, 1.0, 0.35, 30.0, 0.02),
    "x86-avx2": (1.5, 1.3, 0.58, 12.0, 0.06),
    "x86-avx-vnni": (1.0, 1.0, 0.58, 14.0, 0.06),
    "x86-gracemont": (2.5, 3.5, 0.65, 8.0, 0.03),
    "x86-avx512-vnni": (0.9, 1.0, 0.58, 22.0, 0.05),
    "x86-amx": (0.5, 0.9, 0.58, 22.0, 0.05),  # no published row tells: SmolLM2 on 2 cores of a Sapphire Rapids
    "generic": (60.0, 60.0, 0.4, 3.0, 0.03),
}
# family -> (factor on prefill shares, bandwidth share, us per layer, the same before 2025, hidden size at half speed)
GPU_START = {
    "cuda": (1.0, 1.0, 25.0, 60.0, 1500.0),
    "cuda-hbm": (0.7, 0.6, 25.0, 60.0, 1500.0),
    "cuda-hopper": (0.5, 0.8, 25.0, 60.0, 1500.0),
    "cuda-pascal": (2.0, 0.9, 90.0, 120.0, 800.0),
    "cuda-orin": (0.8, 0.8, 60.0, 100.0, 800.0),
    "rocm": (0.7, 0.6, 50.0, 80.0, 1000.0),
    "metal": (1.3, 0.9, 40.0, 60.0, 300.0),
    "vulkan": (0.5, 0.7, 40.0, 80.0, 1000.0),
    "vulkan-arc": (0.4, 0.4, 60.0, 100.0, 1000.0),
}
# What a token costs beside its layers, and a quantised weight at least, in operations of the rated arithmetic: only
# small models tell the first, only bandwidth in plenty the second, which rows of other families are not.
GPU_TOKEN_US = {"cuda-hopper": 140.0}
GPU_WEIGHT_FLOPS = {"cuda-hopper": 380.0}
# Rows of our own: shapes of benchmarks/random_gguf.py by the beginning of the file's name, devices by the driver's.
OWN_SHAPES = {
    "75m": Shape(15, 576, 1280, 9, 3, tied=True),
    "135m": Shape(30, 576, 1536, 9, 3, tied=True),
    "smol": Shape(30, 576, 1536, 9, 3, tied=True),
    "360m": Shape(32, 960, 2560, 15, 5, tied=True),
    "1b": Shape(22, 2048, 5632, 32, 4),
    "7b": Shape(),
}
OWN_DEVICES = {"NVIDIA H200": "h200-sxm-141gb"}
OWN_VOCABULARY = 49152
# Where llama-bench was not run beside: what our engine reached of it in the rows where it was (0.957, 0.968, 0.984).
OWN_SHARE = 0.97
# Prompts of narrower models are launched rather than computed: a layer costs what its kernels take to start.
LEAST_PROMPT_HIDDEN = 1024

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Observation:
    """One figure of one row, with what it depends on."""

    row: Row
    profile: TargetProfile
    what: str
    measured_log: float


def starting_families() -> dict[str, Family]:
    """The families as the priors expect them."""
    slow = {name: UNPACKED if name.startswith("arm-") and REPACKED[name] else 1.0 for name in CPU_START}
    families = {
        name: Family(
            bandwidth_share=share,
            per_core_gbs=per_core,
            parallel_loss=loss,
            layer_us=CPU_LAYER_US,
            old_layer_us=CPU_LAYER_US,
            old_prefill=0.7,
            repacked=REPACKED[name],
            repacked_growth=REPACKED_GROWTH.get(name, {}),
            prefill={
                kind: value * prefill * (1.0 if kind in (*REPACKED[name], "F16") else slow[name])
                for kind, value in CPU_PREFILL.items()
            },
            decode={kind: value * decode for kind, value in CPU_DECODE.items()},
        )
        for name, (prefill, decode, share, per_core, loss) in CPU_START.items()
    }
    # Without dotprod or repacking, all types cost about the same arithmetic: the unpacking hides behind the multiply.
    for name in ("arm-neon", "generic"):
        middle = statistics.median(CPU_PREFILL.values()) * CPU_START[name][0]
        families[name] = families[name].model_copy(
            update={"prefill": {kind: math.sqrt(middle * value) for kind, value in families[name].prefill.items()}}
        )
    for name, (prefill, share, layer_us, old_layer_us, half) in GPU_START.items():
        families[name] = Family(
            gpu=True,
            bandwidth_share=share,
            layer_us=layer_us,
            old_layer_us=old_layer_us,
            token_us=GPU_TOKEN_US.get(name, 0.0),
            weight_flops=GPU_WEIGHT_FLOPS.get(name, 0.0),
            old_prefill=0.7,
            hidden_half=half,
            prefill={kind: value * prefill for kind, value in GPU_PREFILL.items()},
            decode=dict(GPU_DECODE),
        )
    return families


def observations(rows: Iterable[Row]) -> list[Observation]:
    """Every decode and prefill figure of rows whose device has a profile."""
    found = []
    for row in rows:
        profile = row_profile(row)
        if profile is None:
            continue
        for what, measured in (("decode", row.decode_tps), ("prefill", row.prefill_tps)):
            if measured is not None:
                found.append(Observation(row, profile, what, math.log(measured)))
    return found


def own_rows(path: Path) -> list[Row]:
    """llama-bench's figures for models that were on a GPU as a whole, of ``benchmarks/gpu_offload.py``."""
    rows, device = [], ""
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        told = json.loads(text)
        device = OWN_DEVICES.get(told.get("device", ""), "") if "machine" in told else device
        name, _, quant = told.get("file", "").removesuffix(".gguf").partition("-")
        shape = OWN_SHAPES.get(name)
        if not device or shape is None or told.get("layers", 0) <= shape.layers:
            continue
        if "llama_bench_decode_tps" not in told:
            if told["part"] != "order" or "ours_decode_tps" not in told:
                continue
            told["llama_bench_prefill_tps"] = told["ours_prefill_tps"]
            told["llama_bench_decode_tps"] = told["ours_decode_tps"] / OWN_SHARE
        rows.append(
            Row(
                line=number,
                device_id=device,
                backend="cuda",
                model=name,
                quant=quant,
                workload=workload_of(shape, OWN_VOCABULARY, mix_named(quant)),
                settings=RunSettings(context=4096, depth=64),
                prefill_tps=told["llama_bench_prefill_tps"] if shape.hidden >= LEAST_PROMPT_HIDDEN else None,
                decode_tps=told["llama_bench_decode_tps"],
                source=path.name,
            )
        )
    return rows


class Fit:
    """Parameters in log space, the observations they explain, and a robust least-squares solver."""

    def __init__(self, data: list[Observation]) -> None:
        self.data = data
        self.start = starting_families()
        self.keys = self._keys()
        self.prior = np.array([PRIORS[key[2]] for key in self.keys])
        self.values = np.zeros(len(self.keys))
        self.touched = [self._touched(key) for key in self.keys]

    def _keys(self) -> list[Key]:
        keys: list[Key] = []
        for name, family in self.start.items():
            used = any(item.profile.kernels == name for item in self.data)
            for table in ("prefill", "decode") if used else ():
                keys += [("family", name, table, kind) for kind in getattr(family, table)]
            for field in (
                "bandwidth_share",
                "per_core_gbs",
                "parallel_loss",
                "layer_us",
                "old_layer_us",
                "token_us",
                "weight_flops",
                "hidden_half",
            ):
                if used and getattr(family, field) > 0:
                    keys.append(("family", name, field, ""))
            if used:
                keys.append(("family", name, "old_prefill", ""))
        for device in sorted({item.profile.id for item in self.data}):
            keys += [("device", device, "bandwidth", ""), ("device", device, "compute", "")]
        return keys

    def _touched(self, key: Key) -> list[int]:
        scope, name, field, _ = key
        decode_only = field in ("decode", "layer_us", "old_layer_us", "token_us", "weight_flops", "per_core_gbs")
        prefill_only = field in ("prefill", "parallel_loss", "old_prefill", "hidden_half")
        return [
            index
            for index, item in enumerate(self.data)
            if (item.profile.kernels if scope == "family" else item.profile.id) == name
            and not (decode_only and item.what != "decode")
            and not (prefill_only and item.what != "prefill")
        ]

    def family(self, name: str, values: np.ndarray) -> Family:
        """The family with the parameters applied. Shares stay below what is physically there."""
        changes: dict[str, object] = {}
        tables = {"prefill": dict(self.start[name].prefill), "decode": dict(self.start[name].decode)}
        for key, value in zip(self.keys, values, strict=True):
            if key[0] != "family" or key[1] != name:
                continue
            if key[2] in tables:
                tables[key[2]][key[3]] *= math.exp(value)
            else:
                changes[key[2]] = getattr(self.start[name], key[2]) * math.exp(value)
        return self.start[name].model_copy(update={**changes, **tables})

    def scale(self, device: str, values: np.ndarray) -> DeviceScale:
        """A device's factors; 1 for a device that was not fitted."""
        found = {
            key[2]: math.exp(value)
            for key, value in zip(self.keys, values, strict=True)
            if key[0] == "device" and key[1] == device
        }
        return DeviceScale(**found)

    def log_prediction(self, item: Observation, family: Family, scale: DeviceScale) -> float:
        """Log of the predicted rate."""
        arguments = (item.row.workload, item.profile, item.row.settings, family, scale)
        return -math.log(decode_seconds(*arguments, NORM) if item.what == "decode" else prefill_seconds(*arguments))

    def residuals(self, values: np.ndarray, indices: Iterable[int]) -> dict[int, float]:
        """Predicted less measured, in logs, for the observations named."""
        families: dict[str, Family] = {}
        scales: dict[str, DeviceScale] = {}
        found = {}
        for index in indices:
            item = self.data[index]
            kernels, device = item.profile.kernels, item.profile.id
            if kernels not in families:
                families[kernels] = self.family(kernels, values)
            if device not in scales:
                scales[device] = self.scale(device, values)
            found[index] = self.log_prediction(item, families[kernels], scales[device]) - item.measured_log
        return found

    def solve(self, values: np.ndarray, kept: set[int], iterations: int, only: set[int] | None = None) -> np.ndarray:
        """Gauss-Newton on weighted residuals of the observations ``kept``; ``only`` limits the parameters that move."""
        order = sorted(kept)
        place = {index: row for row, index in enumerate(order)}
        columns = [k for k in range(len(self.keys)) if only is None or k in only]
        values = values.copy()
        for iteration in range(iterations):
            # Wide first: else rows that the starting values miss would be taken for wrong reports.
            noise = NOISE * (4 if iteration < ITERATIONS // 2 and iterations == ITERATIONS else 1)
            base = self.residuals(values, order)
            residual = np.array([base[index] for index in order])
            weight = (FREEDOM + 1) / (FREEDOM + (residual / noise) ** 2) / noise**2
            jacobian = np.zeros((len(order), len(columns)))
            for column, k in enumerate(columns):
                touched = [index for index in self.touched[k] if index in kept]
                moved = values.copy()
                moved[k] += 1e-4
                for index, value in self.residuals(moved, touched).items():
                    jacobian[place[index], column] = (value - base[index]) / 1e-4
            pull = 1 / self.prior[columns] ** 2
            normal = jacobian.T @ (weight[:, None] * jacobian) + np.diag(pull)
            gradient = jacobian.T @ (weight * residual) + pull * values[columns]
            step = np.linalg.solve(normal, gradient)
            values[columns] -= np.clip(step, -0.5, 0.5)
        return values

    def neighbours(self, left_out: Iterable[int]) -> set[int]:
        """Parameters that can change when these observations are left out: their families and all devices of those."""
        kernels = {self.data[index].profile.kernels for index in left_out}
        devices = {item.profile.id for item in self.data if item.profile.kernels in kernels}
        return {k for k, key in enumerate(self.keys) if key[1] in (kernels if key[0] == "family" else devices)}


def left_out_errors(fit: Fit, values: np.ndarray, group_of: Callable[[int], object]) -> dict[int, float]:
    """Log errors of every observation predicted by a fit that did not see its group."""
    everything = set(range(len(fit.data)))
    groups: dict[object, list[int]] = {}
    for index in sorted(everything):
        groups.setdefault(group_of(index), []).append(index)
    errors: dict[int, float] = {}
    for members in groups.values():
        moving = fit.neighbours(members)
        start = values.copy()
        for k, key in enumerate(fit.keys):
            if key[0] == "device" and not set(fit.touched[k]) - set(members):
                start[k] = 0.0
        kernels = {fit.data[index].profile.kernels for index in members}
        kept = {i for i in everything - set(members) if fit.data[i].profile.kernels in kernels}
        refitted = fit.solve(start, kept, REFITS, moving) if kept else np.where(fit.prior > 0, start * 0, start)
        errors.update(fit.residuals(refitted, members))
    return errors


def summary(fit: Fit, errors: dict[int, float], what: str) -> tuple[float, float, float, float]:
    """Median absolute error in percent, share within 25 %, within 30 %, and the factor that holds 80 %."""
    logs = [error for index, error in errors.items() if fit.data[index].what == what]
    percent = [100 * abs(math.exp(error) - 1) for error in logs]
    within = [100 * sum(value <= limit for value in percent) / len(percent) for limit in (25, 30)]
    return statistics.median(percent), within[0], within[1], math.exp(float(np.quantile(np.abs(logs), 0.8)))


def inside_band(fit: Fit, errors: dict[int, float], what: str) -> float:
    """Percent of left-out errors inside an 80 % band that was taken from the errors of all other devices."""
    by_device: dict[str, list[float]] = {}
    for index, error in errors.items():
        if fit.data[index].what == what:
            by_device.setdefault(fit.data[index].profile.id, []).append(abs(error))
    inside = total = 0
    for device, own in by_device.items():
        others = [error for name, logs in by_device.items() if name != device for error in logs]
        limit = float(np.quantile(others, 0.8))
        inside += sum(error <= limit for error in own)
        total += len(own)
    return 100 * inside / total


def document(fit: Fit, values: np.ndarray, measured: tuple[Spread, dict[str, Unseen]], notes: list[str]) -> str:
    """The text of ``calibration.toml``."""
    spread, holdout = measured
    lines = ["# Made by benchmarks/fit_profiles.py from published measurements. Do not edit: fit again.", *notes, ""]
    lines += [f"norm = {NORM}", "", "[spread]"]
    lines += [f"{name} = {value:.3f}" for name, value in spread.model_dump().items()]
    for what, unseen in holdout.items():
        lines += ["", f"[holdout.{what}]", *(f"{name} = {value:.1f}" for name, value in unseen.model_dump().items())]
    for name in fit.start:
        family = fit.family(name, values)
        lines += ["", f"[families.{name}]"]
        for field, value in family.model_dump().items():
            if field == "gpu":
                lines += ["gpu = true"] if value else []
            elif isinstance(value, float):
                lines += [f"{field} = {value:.4g}"] if value else []
            elif isinstance(value, dict) and value:
                lines.append(f"{field} = {{ {', '.join(f'{kind} = {number:.4g}' for kind, number in value.items())} }}")
            elif value:
                lines.append(f"{field} = [{', '.join(f'{chr(34)}{kind}{chr(34)}' for kind in value)}]")
    for device in sorted({item.profile.id for item in fit.data}):
        scale = fit.scale(device, values)
        counts = {
            what: sum(i.profile.id == device and i.what == what for i in fit.data) for what in ("decode", "prefill")
        }
        lines += ["", f'[devices."{device}"]', f"bandwidth = {scale.bandwidth:.4g}", f"compute = {scale.compute:.4g}"]
        lines += [f"{what}_rows = {count}" for what, count in counts.items() if count]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fit, report, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=PATH)
    parser.add_argument(
        "--own",
        type=Path,
        action="append",
        default=[],
        help="rows of gpu_offload.py: llama-bench's figures of whole models",
    )
    parser.add_argument("--quick", action="store_true", help="skip the left-out errors; the bands are then in-sample")
    arguments = parser.parse_args()
    rows, unreadable = read_rows(arguments.measurements)
    for path in arguments.own:
        rows += own_rows(path)
    fit = Fit(observations(rows))
    everything = set(range(len(fit.data)))
    values = fit.solve(fit.values, everything, ITERATIONS)
    ways = {"in sample": fit.residuals(values, everything)}
    if not arguments.quick:
        ways["rows left out"] = left_out_errors(fit, values, lambda index: index % FOLDS)
        ways["device left out"] = left_out_errors(fit, values, lambda index: fit.data[index].profile.devices)
    # Our own device is alone in its family: left out, it would be judged by priors that were chosen for it.
    own = {index for index, item in enumerate(fit.data) if item.profile.id in OWN_DEVICES.values()}
    ways = {way: {i: error for i, error in errors.items() if i not in own} for way, errors in ways.items()}
    notes = [
        f"# {len(rows)} rows read, {len(unreadable)} unreadable, {len(fit.data)} figures of devices with a profile,",
        f"# {len(own)} of them our own, which are not among the errors below.",
    ]
    factors: dict[str, float] = {}
    holdout: dict[str, Unseen] = {}
    insides: dict[tuple[str, str], float] = {}
    for way, errors in ways.items():
        for what in ("decode", "prefill"):
            median, within25, within30, factor = summary(fit, errors, what)
            factors[f"{what}_{'unknown' if way == 'device left out' else 'known'}"] = factor
            # The last way wins: whole devices left out, unless that was skipped.
            insides[way, what] = inside_band(fit, errors, what)
            holdout[what] = Unseen(
                median_abs_pct_error=median,
                within_25_pct=within25,
                within_30_pct=within30,
                inside_band_pct=insides[way, what],
                rows_inside_band_pct=insides.get(("rows left out", what), insides[way, what]),
            )
            shares = f"{within25:.0f} % within 25 %, {within30:.0f} % within 30 %"
            shares += f", {insides[way, what]:.0f} % inside the 80 % band of other devices"
            notes.append(f"# {way}, {what}: median error {median:.1f} %, {shares}")
    for what in ("decode", "prefill"):
        factors.setdefault(f"{what}_unknown", factors[f"{what}_known"])
    text = document(fit, values, (Spread(**factors), holdout), notes)
    parse_calibration(text)
    arguments.output.write_text(text, encoding="utf-8")
    print("\n".join(notes))


if __name__ == "__main__":
    main()
