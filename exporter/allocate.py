"""Chooses the storage type of every tensor: least damage under any mix of limits, and the front of what is possible.

Each tensor has options, each option adds its damage and its costs (bytes, memory, decode and prefill seconds). A
Lagrangian relaxation finds multipliers that make the costs keep their limits; then a search over single changes and
pairs of changes uses up what the relaxation leaves. Knows numbers; does not know where damages and costs come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
COSTS = ("size_bytes", "ram_bytes", "decode_s", "prefill_s")
_CYCLES = 12
_BISECTIONS = 40
_MOVES = 400
_ROUNDS = 200


@dataclass(frozen=True, slots=True)
class Option:
    """One tensor in one type. ``damage`` in nats per token, seconds per token."""

    type: str
    damage: float
    size_bytes: int
    ram_bytes: int = 0
    decode_s: float = 0.0
    prefill_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper limits on the sums over all tensors; infinity is none."""

    size_bytes: float = math.inf
    ram_bytes: float = math.inf
    decode_s: float = math.inf
    prefill_s: float = math.inf


@dataclass(frozen=True)
class Allocation:
    """A type for every tensor, and the sums that follow."""

    types: Mapping[str, str]
    damage: float
    size_bytes: int
    ram_bytes: int
    decode_s: float
    prefill_s: float


class _Table:
    """Options as arrays: a row per tensor, padded with options of infinite damage that are never taken."""

    def __init__(self, options: Mapping[str, Sequence[Option]]) -> None:
        self.names = list(options)
        self.options = [list(options[name]) for name in self.names]
        width = max(len(row) for row in self.options)
        self.damage = np.full((len(self.names), width), np.inf)
        self.costs = np.zeros((len(COSTS), len(self.names), width))
        for row, items in enumerate(self.options):
            for column, item in enumerate(items):
                self.damage[row, column] = item.damage
                self.costs[:, row, column] = [getattr(item, name) for name in COSTS]
        self.rows = np.arange(len(self.names))
        # In units of the dearest choice, so that multipliers of all costs are alike.
        self.scale = np.maximum(self.costs.max(axis=2).sum(axis=1), 1e-300)

    def pick(self, multipliers: Doubles) -> npt.NDArray[np.intp]:
        weighted = np.tensordot(multipliers / self.scale, self.costs, axes=1)
        return np.asarray(np.argmin(self.damage + weighted, axis=1))

    def sums(self, chosen: npt.NDArray[np.intp]) -> tuple[float, Doubles]:
        return float(self.damage[self.rows, chosen].sum()), self.costs[:, self.rows, chosen].sum(axis=1)

    def allocation(self, chosen: npt.NDArray[np.intp]) -> Allocation:
        damage, sums = self.sums(chosen)
        types = {name: row[index].type for name, row, index in zip(self.names, self.options, chosen, strict=True)}
        size_bytes, ram_bytes, decode_s, prefill_s = sums
        return Allocation(types, damage, round(size_bytes), round(ram_bytes), float(decode_s), float(prefill_s))


def solve(options: Mapping[str, Sequence[Option]], limits: Limits) -> Allocation | None:
    """The least damage found under all limits; None when no choice of options keeps them."""
    table = _Table(options)
    bounds = np.array([getattr(limits, name) for name in COSTS])
    best = _relax(table, bounds)
    return None if best is None else table.allocation(_improve(table, best, bounds))


def cheapest(options: Mapping[str, Sequence[Option]], cost: str) -> Allocation:
    """The choice with the least of one cost, whatever the damage: what a limit can at best be."""
    table = _Table(options)
    costs = np.where(np.isfinite(table.damage), table.costs[COSTS.index(cost)], np.inf)
    return table.allocation(np.asarray(np.argmin(costs, axis=1)))


def front(options: Mapping[str, Sequence[Option]], limits: Limits, points: int) -> list[Allocation]:
    """Allocations from the smallest to the least damaged that keep the limits, each the best of its size.

    Sizes are spread evenly on a logarithmic scale; a point that a smaller one beats is left out.
    """
    least = cheapest(options, "size_bytes").size_bytes
    free = solve(options, limits)
    if free is None:
        return []
    most = max(free.size_bytes, least)
    found: list[Allocation] = []
    for size in np.geomspace(least, most, points) if most > least else [most]:
        bounded = Limits(min(round(size), limits.size_bytes), limits.ram_bytes, limits.decode_s, limits.prefill_s)
        point = solve(options, bounded)
        if point is not None and (not found or point.damage < found[-1].damage):
            found.append(point)
    return found


def _keeps(sums: Doubles, bounds: Doubles) -> bool:
    return bool(np.all(sums <= bounds * (1 + 1e-12)))


def _relax(table: _Table, bounds: Doubles) -> npt.NDArray[np.intp] | None:
    """Cycle over the limits, finding for each the least multiplier that keeps it, given those of the others."""
    multipliers = np.zeros(len(COSTS))
    best, best_damage = None, math.inf
    active = [index for index in range(len(COSTS)) if math.isfinite(bounds[index])]
    starts = [table.pick(multipliers)]
    for index in active:  # extreme corners: when only they are feasible, no multiplier in between finds them
        only = np.zeros(len(COSTS))
        only[index] = 1e12
        starts.append(table.pick(only))
    for chosen in starts:
        damage, sums = table.sums(chosen)
        if _keeps(sums, bounds) and damage < best_damage:
            best, best_damage = chosen, damage
    for _ in range(_CYCLES if active else 0):
        before = multipliers.copy()
        for index in active:
            low, high = -40.0, 40.0  # natural logarithms
            for _ in range(_BISECTIONS):
                multipliers[index] = math.exp((low + high) / 2)
                chosen = table.pick(multipliers)
                damage, sums = table.sums(chosen)
                if _keeps(sums, bounds) and damage < best_damage:
                    best, best_damage = chosen, damage
                if sums[index] <= bounds[index]:
                    high = (low + high) / 2
                else:
                    low = (low + high) / 2
            multipliers[index] = math.exp(high) if high > -39 else 0.0
        if np.allclose(before, multipliers, rtol=1e-3):
            break
    return best


def _improve(table: _Table, chosen: npt.NDArray[np.intp], bounds: Doubles) -> npt.NDArray[np.intp]:
    """Take the best change, or pair of changes, that keeps the limits and lessens the damage, until none does."""
    chosen = chosen.copy()
    for _ in range(_ROUNDS):
        _, sums = table.sums(chosen)
        gain = table.damage[table.rows, chosen][:, None] - table.damage
        extra = table.costs - table.costs[:, table.rows, chosen][:, :, None]
        room = np.where(np.isfinite(bounds), bounds - sums, np.inf)
        move = _best_move(gain, extra, room)
        if move is None:
            return chosen
        for row, column in move:
            chosen[row] = column
    return chosen


def _best_move(gain: Doubles, extra: Doubles, room: Doubles) -> list[tuple[int, int]] | None:
    """The rows and columns of the best change or pair of changes; ``extra`` (costs, rows, columns) beside ``room``."""
    finite = np.isfinite(gain)
    rows, columns = np.nonzero(finite & ((gain != 0) | (np.abs(extra).sum(axis=0) > 0)))
    if not len(rows):
        return None
    gains, costs = gain[rows, columns], extra[:, rows, columns]
    tolerance = 1e-12
    fits = np.all(costs <= room[:, None], axis=0) & (gains > tolerance)
    best_gain, best = tolerance, None
    if fits.any():
        index = int(np.argmax(np.where(fits, gains, -np.inf)))
        best_gain, best = float(gains[index]), [(int(rows[index]), int(columns[index]))]
    better = np.argsort(-gains)[:_MOVES]
    better = better[gains[better] > tolerance]
    worse = np.nonzero(gains <= tolerance)[0]
    worse = worse[np.argsort(-gains[worse])[:_MOVES]]
    if len(better) and len(worse):
        total = gains[better][:, None] + gains[worse][None, :]
        allowed = rows[better][:, None] != rows[worse][None, :]
        for cost, left in zip(costs, room, strict=True):
            if math.isfinite(left):
                allowed &= cost[better][:, None] + cost[worse][None, :] <= left
        total = np.where(allowed, total, -np.inf)
        first, second = np.unravel_index(int(np.argmax(total)), total.shape)
        if total[first, second] > best_gain:
            pair = (better[first], worse[second])
            best = [(int(rows[index]), int(columns[index])) for index in pair]
    return best
