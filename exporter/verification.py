"""Checks a finished bundle from outside: what it promises against what it holds, and on demand the whole proof again.

Reads the bundle as a stranger would. Knows nothing of how it was made, except for what the manifest says.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgelm.bundle import Bundle, EmbeddingQuality, Quality, TaskQuality, TokenIdentity, open_bundle
from edgelm.errors import BundleError, ProofError, UsageError
from edgelm.progress import SILENT, Progress
from exporter import embedding_quality, quality, task_quality
from exporter.chat_proof import prove_chat
from exporter.checkpoint import open_checkpoint, open_source
from exporter.device import ON_CPU, Placement, resolve_device
from exporter.optimum_tasks import prove_words
from exporter.token_identity import compare_files, compare_tokenizers
from exporter.tokenizer import read_tokenizer
from runtime.engines.llamacpp import load_library
from runtime.engines.llamacpp_encoder import encoder_offload
from runtime.gguf_header import GGUFHeader, read_gguf_header
from runtime.offload import offload_of
from runtime.onnx_header import read_onnx_model, stored_bytes

TOKENIZER = "tokenizer.json"
# A repeated measurement may come from the other reference and from other kernels.
KL_TOLERANCE_FACTOR, KL_TOLERANCE_NATS = 1.10, 0.001
COSINE_TOLERANCE_FACTOR, COSINE_TOLERANCE = 1.10, 1e-4
_COMPUTED = ("rotary.", "rotary_local.", "embedding.factors")


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked, all of it good. ``quality`` is the new measurement, None without a reference;
    ``within_recorded`` tells whether its mean KL is in the manifest's 95 % interval, None where there is none."""

    bundle: Bundle
    token_identity: TokenIdentity
    quality: Quality | EmbeddingQuality | TaskQuality | None
    within_recorded: bool | None = None


def verify(
    directory: Path,
    reference: str | None,
    progress: Progress = SILENT,
    *,
    evaluation: Path | None = None,
    placement: Placement = ON_CPU,
) -> Verification:
    """Check hashes, sizes, the artefact's header and the tokenizer; with a ``reference`` source prove all again.

    ``evaluation`` is a text file that takes the place of the built-in text; its figures are told, and compared with the
    manifest's only when these are of the same text. ``placement`` is where both models compute. Raises
    ``UsageError`` for one of both without a reference and for a GPU of llama.cpp's that is not there or not for this
    bundle, ``MissingDependencyError`` for one of torch's, ``DoesNotFitError`` when one holds less than is to go there,
    ``BundleError`` when the bundle is not what its manifest says, ``ProofError`` when a tokenizer or a chat prompt
    differs or the quality is worse than recorded, and what reading the reference raises.
    """
    if evaluation is not None and reference is None:
        raise UsageError("--eval needs --reference: quality is measured against the source")
    _check_placement(directory, reference, placement)
    device = placement.device
    with progress.stage("checking hashes", 1) as stage:
        bundle = open_bundle(directory)
        stage.advance()
    is_onnx = bundle.manifest.format == "onnx"
    tokens = _check_onnx(bundle) if is_onnx else _check_gguf(bundle)
    with progress.stage("comparing tokenizers", 1) as stage:
        identity = _own_tokenizer(bundle, tokens)
        stage.advance()
    if reference is None:
        return Verification(bundle, identity, None)
    checkpoint = open_checkpoint(open_source(reference, progress))
    if bundle.manifest.task is not None:
        identity = prove_words(checkpoint, bundle.path)
        task = task_quality.measure(
            bundle.artifact_path, checkpoint, bundle.manifest.task, identity, evaluation, progress, device=device
        )
        _check_task(bundle.manifest.task_quality, task)
        return Verification(bundle, identity, task)
    source = read_tokenizer(checkpoint)
    identity = _compare(bundle, source.tokenizer_json, source.vocabulary)
    _require_identity(identity, f"{reference} and the artefact")
    if bundle.manifest.encoder is not None:
        artifact = bundle.artifact_path
        vectors = embedding_quality.measure(artifact, checkpoint, identity, evaluation, progress, placement=placement)
        _check_cosines(bundle.manifest.embedding_quality, vectors)
        return Verification(bundle, identity, vectors)
    measured = quality.measure(bundle.artifact_path, checkpoint, identity, evaluation, progress, placement=placement)
    chat = prove_chat(bundle.path, bundle.artifact_path, checkpoint, source, progress, placement=placement)
    measured = measured.model_copy(update={"chat": chat})
    recorded = bundle.manifest.quality
    _check_quality(recorded, measured)
    return Verification(bundle, identity, measured, quality.within(measured, recorded) if recorded else None)


def _check_placement(directory: Path, reference: str | None, placement: Placement) -> None:
    """What is asked of GPUs, refused now and not after gigabytes were read."""
    if placement.device != "auto" and reference is None:
        raise UsageError("--device needs --reference: only the source is computed there")
    if placement.device == "cuda":
        resolve_device(placement.device)
    if placement.gpu_layers == 0:
        if placement.gpu:
            raise UsageError("--gpu needs --gpu-layers: the CPU computes without it", hint="add --gpu-layers auto")
        return
    if reference is None:
        raise UsageError("--gpu-layers needs --reference: without it nothing is computed")
    bundle = open_bundle(directory, check_hashes=False)
    if bundle.manifest.format == "onnx":
        raise UsageError(f"{directory} is an ONNX model: --gpu-layers and --gpu are for GGUF", hint="leave them out")
    header = read_gguf_header(bundle.artifact_path)
    if bundle.manifest.encoder is not None:
        longest = int(bundle.manifest.plan.context.value)
        encoding = embedding_quality.encoder_options(longest, placement)
        encoder_offload(load_library(), header, encoding, bundle.artifact_path.name)
        return
    trained = header.metadata.get(f"{header.metadata.get('general.architecture')}.context_length", quality.WINDOW)
    options = quality.engine_options(min(int(trained), quality.WINDOW), placement)
    offload_of(load_library(), header, options, bundle.artifact_path.name)


def _check_gguf(bundle: Bundle) -> int:
    """The header is valid and holds what the plan says; the number of tokens in its vocabulary."""
    header = read_gguf_header(bundle.artifact_path)
    _check_tensors(bundle, header)
    return len(header.metadata.get("tokenizer.ggml.tokens", ()))


def _check_onnx(bundle: Bundle) -> int:
    """The model is valid and stores as many bytes as the plan says; the number of tokens that it tells logits of.

    Matrices that are one in the graph cannot be told apart by name, and what is computed is not planned: rotary tables,
    factors of a balanced embedding.
    """
    model = read_onnx_model(bundle.artifact_path)
    seq2seq = bundle.manifest.task.seq2seq if bundle.manifest.task else None
    if seq2seq is not None:
        read_onnx_model(bundle.path / seq2seq.decoder)
    if bundle.manifest.encoder is not None or bundle.manifest.task is not None:
        # Drawn by a tracer: constants of its own are stored with the weights, so sizes are the hashes' business.
        count = model.metadata.get("edgelm.vocabulary", "")
        return int(count) if count.isdecimal() else 0
    weights = [item for item in model.initializers if item.external and not item.name.startswith(_COMPUTED)]
    stored = stored_bytes(weights)  # tied tables are one place
    planned = sum(item.size_bytes for item in bundle.manifest.plan.tensors)
    if stored != planned:
        raise BundleError(
            f"{bundle.artifact_path} is not what its manifest plans: {stored} bytes of weights, not {planned}",
            hint="export it again",
        )
    logits = next((item.shape for item in model.outputs if item.name == "logits"), None)
    return logits[-1] if logits and isinstance(logits[-1], int) else 0


def _check_tensors(bundle: Bundle, header: GGUFHeader) -> None:
    planned = {(item.name, item.shape, item.type) for item in bundle.manifest.plan.tensors}
    stored = {(item.name, item.shape, item.type) for item in header.tensors}
    if planned != stored:
        name, shape, kind = min(planned ^ stored)
        where = "only the plan has" if (name, shape, kind) in planned else "the plan does not have"
        raise BundleError(
            f"{bundle.artifact_path} is not what its manifest plans: {where} the tensor {name} {list(shape)} as {kind}",
            hint="export it again",
        )


def _own_tokenizer(bundle: Bundle, tokens: int) -> TokenIdentity:
    path = bundle.file(TOKENIZER)
    if path is None:
        raise BundleError(f"{bundle.path} has no {TOKENIZER}", hint="export it again")
    try:
        tokenizer_json = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8", hint="export it again") from error
    identity = _compare(bundle, tokenizer_json, tokens)
    _require_identity(identity, f"{path} and the artefact")
    return identity


def _compare(bundle: Bundle, tokenizer_json: str, tokens: int) -> TokenIdentity:
    if bundle.manifest.format == "onnx":
        return compare_files(tokenizer_json, bundle.path / TOKENIZER)
    return compare_tokenizers(tokenizer_json, tokens, bundle.artifact_path)


def _require_identity(identity: TokenIdentity, what: str) -> None:
    if not identity.identical:
        raise ProofError(
            f"{what} do not give the same token ids: {identity.first_difference}", hint="export the bundle again"
        )


def _check_quality(recorded: Quality | None, measured: Quality) -> None:
    if recorded is None:
        return
    limit = recorded.kl_mean * KL_TOLERANCE_FACTOR + KL_TOLERANCE_NATS
    comparable = recorded.text_sha256 == measured.text_sha256
    if comparable and measured.kl_mean > limit:
        raise ProofError(
            f"mean KL is {measured.kl_mean:.4f} nats per token, the manifest says {recorded.kl_mean:.4f}",
            hint=_is_it_the_source(measured.computed_by),
        )


def _is_it_the_source(computed_by: str | None) -> str:
    hint = "is --reference the checkpoint that the bundle was made from?"
    return f"{hint} If it is, this GPU computes worse: compare without --gpu-layers" if computed_by else hint


def _check_task(recorded: TaskQuality | None, measured: TaskQuality) -> None:
    if recorded is None or recorded.text_sha256 != measured.text_sha256:
        return
    if measured.kl_mean > recorded.kl_mean * KL_TOLERANCE_FACTOR + KL_TOLERANCE_NATS:
        raise ProofError(
            f"mean KL is {measured.kl_mean:.4f} nats, the manifest says {recorded.kl_mean:.4f}",
            hint="is --reference the checkpoint that the bundle was made from?",
        )


def _check_cosines(recorded: EmbeddingQuality | None, measured: EmbeddingQuality) -> None:
    if recorded is None or recorded.text_sha256 != measured.text_sha256:
        return
    if 1 - measured.cosine_mean > (1 - recorded.cosine_mean) * COSINE_TOLERANCE_FACTOR + COSINE_TOLERANCE:
        raise ProofError(
            f"mean cosine is {measured.cosine_mean:.6f}, the manifest says {recorded.cosine_mean:.6f}",
            hint=_is_it_the_source(measured.computed_by),
        )
