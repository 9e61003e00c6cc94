"""Bundles, reports and targets side by side: one row per model and device, predicted beside measured.

Reports need nothing but their file; bundles are predicted for every target from the plan that their manifest keeps.
Runs that cannot share a column are refused with the reason. Knows neither consoles nor colours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgelm.bundle import MANIFEST_NAME, Bundle, ExportPlan, Prediction, Quality, Record, open_bundle
from edgelm.errors import EdgelmError, UsageError
from edgelm.report import Report, Samples, read_report
from targets.catalogue import workload_from_figures
from targets.changes import Change, changes_between, unlike
from targets.predict import RunSettings, predict
from targets.profile import TargetProfile, load_profile
from targets.workload import Workload, workload_from_plan

DEFAULT_PROMPT = 512


class Pair(Record):
    """One figure, predicted and measured; ``error_pct`` is (predicted - measured) / measured."""

    predicted: float | None = None
    measured: float | None = None

    @property
    def error_pct(self) -> float | None:
        """How far the prediction was off, None unless both are there."""
        if self.predicted is None or not self.measured:
            return None
        return 100 * (self.predicted - self.measured) / self.measured

    @property
    def value(self) -> float | None:
        """What counts: the measured figure, else the predicted one."""
        return self.predicted if self.measured is None else self.measured


class Line(Record):
    """One row of the table. ``fits`` is None where nobody predicted; ``spoilt`` says why a run is not to be trusted."""

    model: str
    target: str
    device: str
    format: str
    quant: str
    artifact_bytes: int
    kl_mean: float | None
    ram_bytes: Pair
    prefill_tps: Pair
    decode_tps: Pair
    ttft_s: Pair
    load_s: Pair
    fits: Literal["fits", "pages", "no"] | None
    fit_reason: str
    joule_per_token: float | None = None
    spoilt: str | None = None


class Comparison(Record):
    """The table, what it was measured with, the index of the best row per column, and remarks.

    ``changes`` judge the second of exactly two reports against the first; ``unlike`` says what else they differ in.
    """

    prompt_tokens: int
    generated_tokens: int | None
    depth: int
    lines: tuple[Line, ...]
    best: dict[str, int]
    notes: tuple[str, ...]
    changes: tuple[Change, ...] = ()
    unlike: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Run:
    """Settings that all rows share."""

    prompt_tokens: int
    generated_tokens: int | None
    depth: int
    flash_attention: bool = True

    def settings(self, context: int) -> RunSettings:
        """As prediction wants them: while tokens are generated, the cache holds half of them on average."""
        depth = self.depth + (self.generated_tokens or 0) // 2
        return RunSettings(
            context=context, depth=depth, prompt_tokens=self.prompt_tokens, flash_attention=self.flash_attention
        )


@dataclass(frozen=True, slots=True)
class _Model:
    """What is known of one model, from its bundle or from its report."""

    name: str
    format: str
    quant: str
    artifact_bytes: int
    sha256: str | None
    workload: Workload
    context: int
    quality: Quality | None


def compare(sources: Sequence[Path], targets: Sequence[str]) -> Comparison:
    """Read bundles and reports, predict the models for every target and put all into one table.

    Raises ``UsageError`` when nothing was given or when reports were not measured alike, and what reading raises.
    """
    if not sources:
        raise UsageError(
            "nothing to compare",
            hint="give reports (edgelm bench -o) or bundles: edgelm compare BUNDLE --target raspberry-pi-5",
        )
    bundles, reports = _read(sources)
    profiles = [load_profile(name) for name in targets]
    run = _common_run(reports)
    notes: list[str] = []
    lines = [_measured_line(report) for _, report in reports]
    models = _models(bundles, [report for _, report in reports], notes)
    for model, bundle in models:
        if bundle is not None and not targets and not _was_measured(model, reports):
            lines.append(_planned_line(model, bundle, run, notes))
        lines += [_predicted_line(model, profile, run) for profile in profiles]
    lines = _with_quality(lines, [model for model, _ in models], reports, notes)
    pair = len(reports) == 2 and not bundles
    return Comparison(
        prompt_tokens=run.prompt_tokens,
        generated_tokens=run.generated_tokens,
        depth=run.depth,
        lines=tuple(lines),
        best=best_lines(lines),
        notes=tuple(dict.fromkeys(notes)),
        changes=changes_between(reports[0][1], reports[1][1]) if pair else (),
        unlike=unlike(reports[0][1], reports[1][1]) if pair else (),
    )


def compare_plans(model: str, plans: Sequence[tuple[ExportPlan, str]], profile: TargetProfile) -> Comparison:
    """What exports of one model could become on a target: plans, each with the reason why it will or will not do.

    KL is what is expected, None where nothing was measured; plans are told apart by their bits per weight.
    """
    run, lines = _Run(DEFAULT_PROMPT, None, 0), []
    for plan, reason in plans:
        predicted, power = plan.predicted, profile.power_w
        joule = power.value / predicted.decode_tps if power is not None and predicted.decode_tps else None
        line = Line(
            model=model,
            target=predicted.target,
            device=profile.name,
            format=plan.format,
            quant=f"{plan.quant} {plan.bits_per_weight:.2f}",
            artifact_bytes=plan.artifact_bytes,
            kl_mean=plan.predicted_kl,
            ram_bytes=Pair(predicted=predicted.ram_bytes),
            prefill_tps=Pair(predicted=predicted.prefill_tps),
            decode_tps=Pair(predicted=predicted.decode_tps),
            ttft_s=Pair(predicted=_ttft(predicted, run.prompt_tokens)),
            load_s=Pair(predicted=predicted.load_warm_s),
            fits=predicted.fits,
            fit_reason=reason,
            joule_per_token=joule,
        )
        lines.append(line)
    measured = any(plan.predicted_kl is not None for plan, _ in plans)
    told = "KL is expected, not measured: from the damage of every tensor in its type, corrected by built artefacts"
    return Comparison(
        prompt_tokens=run.prompt_tokens,
        generated_tokens=None,
        depth=0,
        lines=tuple(lines),
        best=best_lines(lines),
        notes=(told,) if measured else (),
    )


def _read(sources: Sequence[Path]) -> tuple[list[Bundle], list[tuple[Path, Report]]]:
    bundles: list[Bundle] = []
    reports: list[tuple[Path, Report]] = []
    for path in sources:
        if path.is_dir() or path.name == MANIFEST_NAME:
            bundles.append(open_bundle(path if path.is_dir() else path.parent, check_hashes=False))
        else:
            reports.append((path, read_report(path)))
    return bundles, reports


def _common_run(reports: Sequence[tuple[Path, Report]]) -> _Run:
    """The prompt, generation and depth that all reports share. Raises ``UsageError`` naming two that differ."""
    if not reports:
        return _Run(DEFAULT_PROMPT, None, 0)
    first_path, first = reports[0]
    for path, report in reports[1:]:
        for field, words in (
            ("prompt_tokens", "prompt tokens"),
            ("generated_tokens", "generated tokens"),
            ("depth", "tokens of depth"),
        ):
            here, there = getattr(first.settings, field), getattr(report.settings, field)
            if here != there:
                raise UsageError(
                    f"{first_path} was measured with {here} {words}, {path} with {there}: speeds are not comparable",
                    hint="measure them alike (edgelm bench -p N -n N --depth N), or compare them separately",
                )
    settings = first.settings
    flash = all(report.engine.flash_attention is not False for _, report in reports)
    return _Run(settings.prompt_tokens or DEFAULT_PROMPT, settings.generated_tokens, settings.depth, flash)


def _models(
    bundles: Sequence[Bundle], reports: Sequence[Report], notes: list[str]
) -> list[tuple[_Model, Bundle | None]]:
    """Every model once: from its bundle, else from a report, whose workload has to be estimated."""
    found: list[tuple[_Model, Bundle | None]] = []
    for bundle in bundles:
        manifest = bundle.manifest
        workload = workload_from_plan(manifest.plan)
        if workload is None:
            workload = workload_from_figures(
                parameters=manifest.plan.parameters,
                file_bytes=manifest.plan.artifact_bytes,
                quant=manifest.plan.quant,
                model=manifest.name,
                format_name=manifest.format,
            )
            notes.append(
                f"{manifest.name}: the bundle does not state the model's shape, predictions assume a usual one"
            )
        record = next(item for item in manifest.files if item.name == manifest.artifact)
        model = _Model(
            manifest.name,
            manifest.format,
            manifest.plan.quant,
            manifest.plan.artifact_bytes,
            record.sha256,
            workload,
            int(manifest.plan.context.value),
            manifest.quality,
        )
        found.append((model, bundle))
    for report in reports:
        if not any(_same_model(model, report) for model, _ in found):
            found.append((_model_of_report(report, notes), None))
    return found


def _model_of_report(report: Report, notes: list[str]) -> _Model:
    record = report.model
    workload = workload_from_figures(
        parameters=record.parameters,
        file_bytes=record.artifact_bytes,
        quant=record.quant,
        model=record.name,
        format_name=record.format,
    )
    notes.append(
        f"{record.name}: known from a report only, predictions for other targets assume the usual shape of its size"
    )
    return _Model(
        record.name,
        record.format,
        record.quant,
        record.artifact_bytes,
        record.sha256,
        workload,
        report.settings.context,
        report.quality,
    )


def _same_model(model: _Model, report: Report) -> bool:
    if model.sha256 and report.model.sha256:
        return model.sha256 == report.model.sha256
    return (model.name, model.artifact_bytes) == (report.model.name, report.model.artifact_bytes)


def _was_measured(model: _Model, reports: Sequence[tuple[Path, Report]]) -> bool:
    return any(_same_model(model, report) for _, report in reports)


def _median(samples: Samples | None) -> float | None:
    return None if samples is None else samples.median


def _measured_line(report: Report) -> Line:
    predicted = report.predicted
    ttft_s = _ttft(predicted, report.settings.prompt_tokens) if predicted else None
    return Line(
        model=report.model.name,
        target=predicted.target if predicted else report.host.profile,
        device=report.host.cpu,
        format=report.model.format,
        quant=report.model.quant,
        artifact_bytes=report.model.artifact_bytes,
        kl_mean=None,
        ram_bytes=Pair(predicted=predicted.ram_bytes if predicted else None, measured=report.memory.rss_peak_bytes),
        prefill_tps=Pair(predicted=predicted.prefill_tps if predicted else None, measured=_median(report.prefill_tps)),
        decode_tps=Pair(predicted=predicted.decode_tps if predicted else None, measured=_median(report.decode_tps)),
        ttft_s=Pair(predicted=ttft_s, measured=_median(report.ttft_s)),
        load_s=Pair(predicted=predicted.load_warm_s if predicted else None, measured=report.load_s),
        fits=predicted.fits if predicted else None,
        fit_reason=predicted.fit_reason if predicted else "",
        joule_per_token=_joule_per_token(report),
        spoilt=None if report.valid else "; ".join(report.warnings) or "the report says that it is not valid",
    )


def _joule_per_token(report: Report) -> float | None:
    """Measured while decoding, of whatever the power source covers."""
    decode = next((item for item in report.measurements if item.kind == "decode"), None)
    return None if decode is None or decode.power_w is None else decode.power_w / decode.tps.median


def _planned_line(model: _Model, bundle: Bundle, run: _Run, notes: list[str]) -> Line:
    """A bundle for the target that it was planned for; predicted again, with the settings of the other lines."""
    plan = bundle.manifest.plan
    if plan.shape is not None and plan.target != "host":
        try:
            return _predicted_line(model, load_profile(plan.target), run)
        except EdgelmError as error:
            notes.append(f"{model.name}: {error.message}; the prediction kept in the bundle is shown")
    return _line_of(model, plan.predicted, plan.target, run, None)


def _predicted_line(model: _Model, profile: TargetProfile, run: _Run) -> Line:
    prediction = predict(model.workload, profile, run.settings(model.context))
    return _line_of(model, prediction, profile.name, run, profile)


def _line_of(model: _Model, prediction: Prediction, device: str, run: _Run, profile: TargetProfile | None) -> Line:
    power = profile.power_w if profile is not None else None
    joule = power.value / prediction.decode_tps if power is not None and prediction.decode_tps else None
    return Line(
        model=model.name,
        target=prediction.target,
        device=device,
        format=model.format,
        quant=model.quant,
        artifact_bytes=model.artifact_bytes,
        kl_mean=None,
        ram_bytes=Pair(predicted=prediction.ram_bytes),
        prefill_tps=Pair(predicted=prediction.prefill_tps),
        decode_tps=Pair(predicted=prediction.decode_tps),
        ttft_s=Pair(predicted=_ttft(prediction, run.prompt_tokens)),
        load_s=Pair(predicted=prediction.load_warm_s),
        fits=prediction.fits,
        fit_reason=prediction.fit_reason,
        joule_per_token=joule,
    )


def _ttft(prediction: Prediction, prompt_tokens: int) -> float | None:
    """Seconds to the first token: it comes out of the prefill itself, no decode step is needed for it."""
    return prompt_tokens / prediction.prefill_tps if prediction.prefill_tps else None


def _with_quality(
    lines: Sequence[Line], models: Sequence[_Model], reports: Sequence[tuple[Path, Report]], notes: list[str]
) -> list[Line]:
    """The lines with KL, as far as it was measured against the same text: other texts make other numbers."""
    known = {(model.name, model.artifact_bytes): model.quality for model in models if model.quality is not None}
    for _, report in reports:
        if report.quality is not None:
            known.setdefault((report.model.name, report.model.artifact_bytes), report.quality)
    ways = [(quality.text_sha256, quality.tokens) for quality in known.values()]
    common = max(ways, key=ways.count, default=None)
    filled = []
    for line in lines:
        quality = known.get((line.model, line.artifact_bytes))
        if quality is not None and (quality.text_sha256, quality.tokens) != common:
            notes.append(
                f"{line.model} {line.quant}: KL {quality.kl_mean:.4g} was measured on {quality.tokens} tokens of "
                f"another text ({quality.text}) and is left out of the column"
            )
            quality = None
        filled.append(line.model_copy(update={"kl_mean": quality.kl_mean if quality else None}))
    return filled


# column -> (figure of a line, whether less is better)
_COLUMNS: dict[str, tuple[Callable[[Line], float | None], bool]] = {
    "artifact_bytes": (lambda line: line.artifact_bytes, True),
    "kl_mean": (lambda line: line.kl_mean, True),
    "ram_bytes": (lambda line: line.ram_bytes.value, True),
    "prefill_tps": (lambda line: line.prefill_tps.value, False),
    "decode_tps": (lambda line: line.decode_tps.value, False),
    "ttft_s": (lambda line: line.ttft_s.value, True),
    "load_s": (lambda line: line.load_s.value, True),
    "joule_per_token": (lambda line: line.joule_per_token, True),
}


def best_lines(lines: Sequence[Line]) -> dict[str, int]:
    """Index of the best line of each column; none where fewer than two differ. Spoilt and unfit lines are out."""
    best: dict[str, int] = {}
    for column, (figure, less) in _COLUMNS.items():
        values = {
            index: value
            for index, line in enumerate(lines)
            if line.spoilt is None and line.fits != "no" and (value := figure(line)) is not None
        }
        if len(set(values.values())) > 1:
            best[column] = (min if less else max)(values, key=lambda index: values[index])
    return best


def pareto(lines: Sequence[Line]) -> list[int]:
    """Indices of the lines that no other line beats in both KL and decode speed, the smallest KL first."""
    points = [
        (line.kl_mean, line.decode_tps.value, index)
        for index, line in enumerate(lines)
        if line.kl_mean is not None and line.decode_tps.value is not None and line.spoilt is None
    ]
    front: list[int] = []
    fastest = 0.0
    for _, speed, index in sorted(points, key=lambda point: (point[0], -point[1])):
        if speed > fastest:
            fastest = speed
            front.append(index)
    return front
