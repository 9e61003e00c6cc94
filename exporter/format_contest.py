"""``--format auto`` on this machine: both formats are exported and proven, and a short measurement picks one.

Where both keep the limit of the mean KL, or are about equally far beyond it, the one that serves a request faster is
kept, GGUF where no difference is seen; else the one that loses less. Speeds are measured in processes of their own, in
turn. Knows neither how a bundle is made nor what is in it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from edgelm import bundle as bundles
from edgelm.bundle import Bundle, Format, FormatCandidate, FormatContest, Quality
from edgelm.errors import (
    BundleError,
    CheckpointError,
    DoesNotFitError,
    EdgelmError,
    EngineError,
    MissingDependencyError,
    ProofError,
)
from edgelm.progress import Progress
from exporter.format_choice import Contest
from exporter.gguf import write_errors
from exporter.options import ExportOptions
from runtime.trial import Trial, TrialSize, trial
from targets.significance import LEAST_SAMPLES, difference

REQUEST = (512, 128)
"""Tokens read and written by the request whose time is compared."""
PAIRS = 6  # of processes, one per format
LIMIT_S = 240.0  # no pair is begun after this
_REPETITION_S = 1.5  # about what a prompt and what generating may take in one repetition
_MOST, _LEAST = (512, 64), (32, 8)
_UNTOLD = (128, 16)  # where no speed is predicted
# What can keep one format from becoming a bundle and not the other.
_CANNOT = (BundleError, CheckpointError, DoesNotFitError, EngineError, MissingDependencyError, ProofError)

Make = Callable[[ExportOptions, Path], Bundle]


@dataclass
class _Side:
    """One format: its bundle or why there is none, and what was measured of it."""

    form: Format
    options: ExportOptions
    bundle: Bundle | None = None
    failed: EdgelmError | None = None
    trials: list[Trial] = field(default_factory=list)

    @property
    def label(self) -> str:
        quant = self.options.quant if self.bundle is None else self.bundle.manifest.plan.quant
        return f"{self.form.upper()} {quant}" if quant.lower() != "auto" else self.form.upper()

    @property
    def quality(self) -> Quality | None:
        return None if self.bundle is None else self.bundle.manifest.quality

    @property
    def rates(self) -> list[float]:
        """Requests per second, of each process."""
        return [1 / (REQUEST[0] / item.prefill_tps + REQUEST[1] / item.decode_tps) for item in self.trials]

    @property
    def record(self) -> FormatCandidate:
        quality = self.quality
        return FormatCandidate(
            format=self.form,
            quant=self.options.quant if self.bundle is None else self.bundle.manifest.plan.quant,
            artifact_bytes=None if self.bundle is None else self.bundle.manifest.artifact_bytes,
            kl_mean=None if quality is None else quality.kl_mean,
            prefill_tps=tuple(item.prefill_tps for item in self.trials),
            decode_tps=tuple(item.decode_tps for item in self.trials),
            failed=None if self.failed is None else self.failed.message,
        )


def hold(contest: Contest, staging: Path, make: Make, progress: Progress) -> None:
    """Leave the better bundle's files in ``staging``, with the contest in its manifest, and nothing of the other.

    ``make`` exports to a directory. Raises what it raises for GGUF where neither can be, and whatever is no reason to
    try the other format.
    """
    gguf, onnx = _Side("gguf", contest.gguf), _Side("onnx", contest.onnx)
    for side in (gguf, onnx):
        _try(side, staging, make)
    if gguf.failed is not None and onnx.failed is not None:
        raise gguf.failed
    chosen, reason = _decided(gguf, onnx, contest.kl_limit, progress)
    record = FormatContest(
        reason=reason, kl_limit=contest.kl_limit, candidates=tuple(side.record for side in (gguf, onnx))
    )
    _move_up(staging, chosen, record)


def _try(side: _Side, staging: Path, make: Make) -> None:
    try:
        side.bundle = make(side.options, staging / side.form)
    except _CANNOT as error:
        side.failed = error


def _decided(gguf: _Side, onnx: _Side, kl_limit: float, progress: Progress) -> tuple[_Side, str]:
    """The better one and why."""
    for side, other in ((gguf, onnx), (onnx, gguf)):
        if other.failed is not None:
            return side, f"{side.label}, since {other.label} cannot be: {other.failed.message}"
    by_loss = _by_loss(gguf, onnx, kl_limit)
    if by_loss is not None:
        return by_loss
    _measure(gguf, onnx, progress)
    return _by_speed(gguf, onnx, _losses(gguf, onnx, kl_limit))


def _by_loss(gguf: _Side, onnx: _Side, kl_limit: float) -> tuple[_Side, str] | None:
    """The one that loses less, where that decides: it alone keeps the limit, or it is clearly nearer to it."""
    one, other = gguf.quality, onnx.quality
    assert one is not None
    assert other is not None
    if max(one.kl_mean, other.kl_mean) <= kl_limit:
        return None
    if min(one.kl_mean, other.kl_mean) > kl_limit and _overlap(one, other):
        return None
    better, worse = (gguf, onnx) if one.kl_mean <= other.kl_mean else (onnx, gguf)
    low, high = sorted((one.kl_mean, other.kl_mean))
    told = f"at most {kl_limit:g} is aimed at" if low <= kl_limit else f"both above {kl_limit:g}"
    return better, f"{better.label}, since its mean KL is {low:.4f} and that of {worse.label} {high:.4f}; {told}"


def _overlap(one: Quality, other: Quality) -> bool:
    """Whether the intervals of both mean KLs have something in common."""
    first, second = one.kl_mean_interval, other.kl_mean_interval
    return first is not None and second is not None and first[0] <= second[1] and second[0] <= first[1]


def _losses(gguf: _Side, onnx: _Side, kl_limit: float) -> str:
    assert gguf.quality is not None
    assert onnx.quality is not None
    keep = max(gguf.quality.kl_mean, onnx.quality.kl_mean) <= kl_limit
    alike = f"both at most {kl_limit:g}" if keep else f"both above {kl_limit:g}, intervals overlap"
    return f"mean KL {gguf.quality.kl_mean:.4f} ({gguf.label}) and {onnx.quality.kl_mean:.4f} ({onnx.label}), {alike}"


def _measure(gguf: _Side, onnx: _Side, progress: Progress) -> None:
    """Trials of both in turn; who goes first alternates, so that a machine that drifts favours nobody."""
    size = _size(gguf, onnx)
    began = time.monotonic()
    with progress.stage("measuring both formats", 2 * PAIRS, unit="runs") as stage:
        for number in range(PAIRS):
            if time.monotonic() - began > LIMIT_S:
                return
            for side in (gguf, onnx) if number % 2 else (onnx, gguf):
                assert side.bundle is not None
                try:
                    side.trials.append(trial(side.bundle.path, size))
                except EngineError as error:
                    side.failed = error
                    return
                stage.advance()


def _size(gguf: _Side, onnx: _Side) -> TrialSize:
    """Tokens that take about ``_REPETITION_S`` each by the slower of both predictions, within the planned contexts."""
    plans = [side.bundle.manifest.plan for side in (gguf, onnx) if side.bundle is not None]
    found = []
    rates = (
        [plan.predicted.prefill_tps for plan in plans],
        [plan.predicted.decode_tps for plan in plans],
    )
    context = min(int(plan.context.value) for plan in plans)
    for index, predicted in enumerate(rates):
        known = [rate for rate in predicted if rate]
        count = _MOST[index] if known else _UNTOLD[index]
        while known and count > _LEAST[index] and count > _REPETITION_S * min(known):
            count //= 2
        found.append(max(min(count, context - 1), 1))
    return TrialSize(*found)


def _by_speed(gguf: _Side, onnx: _Side, losses: str) -> tuple[_Side, str]:
    """The faster one, and GGUF where none is seen to be."""
    broken = next((side for side in (gguf, onnx) if side.failed is not None), None)
    if broken is not None and broken.failed is not None:
        other = onnx if broken is gguf else gguf
        return other, f"{other.label}, since {broken.label} could not be measured: {broken.failed.message}"
    seconds = [1 / median(side.rates) for side in (gguf, onnx)]
    request = f"{REQUEST[0]} tokens read and {REQUEST[1]} written take {seconds[0]:.2f} s as {gguf.label} and "
    request += f"{seconds[1]:.2f} s as {onnx.label}, medians of {len(gguf.trials)} processes each in turn"
    spoilt = sorted({reason for side in (gguf, onnx) for item in side.trials for reason in item.spoilt})
    losses += f"; disturbed: {spoilt[0]}" if spoilt else ""
    found = difference(gguf.rates, onnx.rates)
    if found.verdict == "undecided":
        told = f"fewer than {LEAST_SAMPLES} pairs in {LIMIT_S:g} s tell no difference"
        return gguf, f"{gguf.label}, since {told}: {request}; {losses}"
    if found.verdict == "no difference":
        return gguf, f"{gguf.label}, since no difference in speed is seen: {request}; {losses}"
    faster, change = (onnx, 1 + found.change) if found.verdict == "higher" else (gguf, 1 / (1 + found.change))
    return faster, f"{faster.label}, measured as {change:.2f} times as fast: {request}; {losses}"


def _move_up(staging: Path, chosen: _Side, record: FormatContest) -> None:
    """The chosen bundle's files become those of ``staging``."""
    assert chosen.bundle is not None
    directory, manifest = chosen.bundle.path, chosen.bundle.manifest
    notes = (*manifest.plan.notes, f"format auto: {record.reason}")
    manifest = manifest.model_copy(
        update={"plan": manifest.plan.model_copy(update={"notes": notes}), "contest": record}
    )
    with write_errors(staging):
        for path in directory.iterdir():
            if path.name != bundles.MANIFEST_NAME:
                path.rename(staging / path.name)
        bundles.write_manifest(staging, manifest)
    for form in ("gguf", "onnx"):
        shutil.rmtree(staging / form, ignore_errors=True)
