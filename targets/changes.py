"""Two reports of one thing: what became faster or slower, how sure that is, and what else is different.

A spoilt run is no evidence: its figures are shown and not judged. Knows reports; not where they come from.
"""

from __future__ import annotations

from typing import Literal

from edgelm.bundle import Record
from edgelm.report import Measurement, Report
from targets.report.bench_table import point_name
from targets.significance import ALPHA, LEAST_SAMPLES, NOISE, difference


class Change(Record):
    """One figure of two reports: the second against the first.

    ``verdict`` is "no difference" when ranks or size of the change could be chance, "undecided" with fewer than four
    samples, "spoilt" when a label forbids a judgement. Where a report holds no samples, ``p_value`` is None.
    """

    figure: str
    before: float
    after: float
    change: float
    interval: tuple[float, float] | None
    p_value: float | None
    verdict: Literal["faster", "slower", "no difference", "undecided", "spoilt"]
    reason: str


def changes_between(before: Report, after: Report) -> tuple[Change, ...]:
    """Every point that both reports measured, and the peak memory."""
    known = {_key(item): item for item in before.measurements}
    found = [_speed(known[_key(item)], item) for item in after.measurements if _key(item) in known]
    return (*found, _memory(before, after))


def _key(item: Measurement) -> tuple[object, ...]:
    return item.kind, item.tokens, item.depth, item.sequences


def _speed(before: Measurement, after: Measurement) -> Change:
    found = difference(before.tps.samples, after.tps.samples)
    labels = dict.fromkeys(label.kind for item in (before, after) for label in item.labels)
    verdict: Literal["faster", "slower", "no difference", "undecided", "spoilt"]
    if labels:
        verdict, reason = "spoilt", f"labelled {', '.join(labels)}"
    elif found.verdict == "undecided":
        verdict, reason = "undecided", f"fewer than {LEAST_SAMPLES} samples on a side"
    elif found.verdict == "no difference":
        chance = found.p_value >= ALPHA
        verdict = "no difference"
        reason = f"p = {found.p_value:.2g}" if chance else f"below the {NOISE:.0%} that equal runs differ by"
    else:
        verdict, reason = "faster" if found.verdict == "higher" else "slower", f"p = {found.p_value:.2g}"
    return Change(
        figure=f"{point_name(after)} (tok/s)",
        before=before.tps.median,
        after=after.tps.median,
        change=found.change,
        interval=found.interval,
        p_value=found.p_value,
        verdict=verdict,
        reason=reason,
    )


def _memory(before: Report, after: Report) -> Change:
    """One number a run: nothing to test, but sizes hardly scatter."""
    sizes = before.memory.rss_peak_bytes, after.memory.rss_peak_bytes
    change = sizes[1] / sizes[0] - 1 if sizes[0] else 0.0
    same = abs(change) < NOISE
    return Change(
        figure="peak RSS (bytes)",
        before=sizes[0],
        after=sizes[1],
        change=change,
        interval=None,
        p_value=None,
        verdict="no difference" if same else "undecided",
        reason=f"below {NOISE:.0%}" if same else "one value a run: no test",
    )


def unlike(before: Report, after: Report) -> tuple[str, ...]:
    """What else differs between the runs, so that a change is not put down to the wrong cause."""
    pairs: dict[str, tuple[object, object]] = {
        "model": (before.model.sha256 or before.model.name, after.model.sha256 or after.model.name),
        "CPU": (before.host.cpu, after.host.cpu),
        "decode threads": (before.settings.threads_decode, after.settings.threads_decode),
        "prefill threads": (before.settings.threads_prefill, after.settings.threads_prefill),
        "GPU": (before.engine.gpu, after.engine.gpu),
        "GPU layers": (before.engine.gpu_layers or 0, after.engine.gpu_layers or 0),
        "rearranged beside a GPU": (before.engine.host_repack is True, after.engine.host_repack is True),
        "flash attention": (before.engine.flash_attention is not False, after.engine.flash_attention is not False),
        "waiting": (before.engine.waiting, after.engine.waiting),
        "engine build": (before.engine.system, after.engine.system),
    }
    for name in sorted(before.engine.versions.keys() | after.engine.versions.keys()):
        pairs[name] = (before.engine.versions.get(name), after.engine.versions.get(name))
    first, second = before.conditions, after.conditions
    if first is not None and second is not None:
        pairs["governor"] = (first.governor, second.governor)
    return tuple(f"{name}: {one} / {other}" for name, (one, other) in pairs.items() if one != other)
