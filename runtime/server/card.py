"""A model's card: what a person wants to know of it, and what was predicted, for the page to show beside what it does.

Knows what a manifest and an engine tell; nothing of requests.
"""

from __future__ import annotations

from typing import Any

from edgelm.bundle import EmbeddingQuality, ExportPlan, Manifest, Quality, TaskQuality
from edgelm.units import format_bytes
from runtime.encoder import EncoderInfo
from runtime.engine import EngineInfo


def card(name: str, state: str, info: EngineInfo | EncoderInfo | None, manifest: Manifest | None) -> dict[str, Any]:
    """JSON of one model. ``info`` is None while it is not loaded, ``manifest`` for a bare model file.

    ``facts`` are names and values to show in order; ``predicted`` has bytes and tokens per second, or is null.
    """
    facts = {} if info is None else _engine_facts(info)
    if manifest is not None:
        facts |= _plan_facts(manifest.plan) | _quality_facts(manifest.proof)
        facts["Source"] = manifest.source.location
    return {
        "name": name,
        "state": state,
        "generates": not isinstance(info, EncoderInfo) and (manifest is None or manifest.encoder is None),
        "facts": facts,
        "predicted": None if manifest is None else _predicted(manifest.plan),
    }


def _engine_facts(info: EngineInfo | EncoderInfo) -> dict[str, str]:
    facts = {
        "Architecture": info.architecture,
        "Parameters": f"{info.parameters / 1e6:.1f} million",
        "Weights": format_bytes(info.weights_bytes),
    }
    if isinstance(info, EncoderInfo):
        facts["Vectors"] = f"{info.dimensions} numbers, of texts up to {info.context} tokens"
        facts["Engine"] = f"{info.engine}, {info.threads} threads"
    else:
        facts["Context"] = f"{info.context} tokens, {info.sequences} at once"
        facts["KV cache"] = format_bytes(info.kv_bytes)
        facts["Engine"] = f"{info.engine}, {info.threads_decode} threads"
        if info.attention is not None:
            facts["Flash attention"] = f"{info.attention.value}: {info.attention.reason}"
    if info.offload is not None and info.offload.device is not None:
        plan, device = info.offload, info.offload.device
        facts["GPU"] = f"{plan.gpu_layers} of {plan.most} layers on {device.name} ({device.description})"
    return facts


def _plan_facts(plan: ExportPlan) -> dict[str, str]:
    types = ", ".join(f"{count} x {name}" for name, count in plan.type_counts.items())
    return {
        "Quantisation": f"{plan.quant}, {plan.bits_per_weight:.2f} bits per weight",
        "Tensors": types,
        "Planned for": plan.target,
        "Fit there": plan.predicted.fit_reason,
    }


def _quality_facts(proof: Quality | EmbeddingQuality | TaskQuality | None) -> dict[str, str]:
    if isinstance(proof, TaskQuality):
        return {"Same outcome as the original": f"{100 * proof.agreement:.1f} % of {proof.texts} texts"}
    if isinstance(proof, Quality):
        return {
            "Mean KL to the original": f"{proof.kl_mean:.4f} nats per token",
            "Same first choice": f"{100 * proof.top1_agreement:.1f} % of tokens",
        }
    return {}


def _predicted(plan: ExportPlan) -> dict[str, Any]:
    predicted = plan.predicted
    rates = {"prefill_tps": predicted.prefill_tps, "decode_tps": predicted.decode_tps}
    return {"target": predicted.target, "ram_bytes": predicted.ram_bytes, **rates}
