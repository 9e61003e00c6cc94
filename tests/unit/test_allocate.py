"""The solver against brute force, under one limit and under several."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from exporter.allocate import Limits, Option, cheapest, front, solve


def _options(seed: int, tensors: int = 7) -> dict[str, list[Option]]:
    random = np.random.default_rng(seed)
    found = {}
    for tensor in range(tensors):
        size, weight = random.integers(50, 500), random.lognormal(0, 1)
        found[f"t{tensor}"] = [
            Option(
                f"Q{bits}",
                damage=float(weight * 4.0**-bits * random.uniform(0.7, 1.4)),
                size_bytes=int(size * bits),
                ram_bytes=int(size * bits * random.uniform(1, 2)),
                decode_s=float(size * random.uniform(0.5, 1.5)),
                prefill_s=float(size * random.uniform(0.5, 1.5)),
            )
            for bits in (3, 4, 5, 8)
        ]
    return found


def _brute(options: dict[str, list[Option]], limits: Limits) -> float:
    best = np.inf
    for combination in itertools.product(*options.values()):
        sums = [sum(getattr(item, name) for item in combination) for name in ("size_bytes", "decode_s", "prefill_s")]
        if sums[0] <= limits.size_bytes and sums[1] <= limits.decode_s and sums[2] <= limits.prefill_s:
            best = min(best, sum(item.damage for item in combination))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_solution_is_close_to_the_best_of_all(seed: int) -> None:
    options = _options(seed)
    middle = {name: np.median([sum(getattr(o, name) for o in row) / 4 for row in options.values()]) * 7
              for name in ("size_bytes", "decode_s", "prefill_s")}  # fmt: skip
    for limits in (
        Limits(size_bytes=middle["size_bytes"]),
        Limits(size_bytes=middle["size_bytes"] * 1.2, decode_s=middle["decode_s"]),
        Limits(middle["size_bytes"] * 1.3, decode_s=middle["decode_s"], prefill_s=middle["prefill_s"]),
    ):
        best = _brute(options, limits)
        found = solve(options, limits)
        if found is None:
            assert best == np.inf or limits.prefill_s < np.inf  # several limits at once may hide the only corner
            continue
        assert found.size_bytes <= limits.size_bytes
        assert found.decode_s <= limits.decode_s * (1 + 1e-9)
        assert found.prefill_s <= limits.prefill_s * (1 + 1e-9)
        assert best <= found.damage * (1 + 1e-9)
        assert found.damage <= best * 1.25


def test_no_limits_give_the_least_damage_and_impossible_ones_give_none() -> None:
    options = _options(1)
    free = solve(options, Limits())
    assert free is not None
    assert free.damage == pytest.approx(sum(min(item.damage for item in row) for row in options.values()))
    least = cheapest(options, "size_bytes").size_bytes
    assert solve(options, Limits(size_bytes=least)) is not None
    assert solve(options, Limits(size_bytes=least - 1)) is None


def test_front_rises_in_size_and_falls_in_damage() -> None:
    points = front(_options(2, tensors=40), Limits(), 12)
    assert len(points) >= 8
    sizes, damages = [point.size_bytes for point in points], [point.damage for point in points]
    assert sizes == sorted(sizes)
    assert damages == sorted(damages, reverse=True)
    assert points[0].size_bytes == cheapest(_options(2, tensors=40), "size_bytes").size_bytes


def test_front_keeps_other_limits() -> None:
    options = _options(3, tensors=30)
    free = solve(options, Limits())
    assert free is not None
    for point in front(options, Limits(decode_s=free.decode_s * 0.9), 8):
        assert point.decode_s <= free.decode_s * 0.9 * (1 + 1e-9)
