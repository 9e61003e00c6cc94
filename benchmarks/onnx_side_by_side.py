"""Our ONNX engine against its peers, in turn, at equal threads; peers that are missing are named.

Speed and peak RSS of whole processes: ours; onnxruntime-genai's generator on the same graph and weights (only its
inputs are put into genai's form, and it computes logits of all positions, as genai wants them); ORTModelForCausalLM on
an optimum export (float32, and optimum's dynamic int8); our GGUF engine on bundles whose KL is printed beside. What
exports cost is measured by ``onnx_export_cost.py``.

    python -m venv /tmp/genai && /tmp/genai/bin/pip install onnxruntime-genai
    python benchmarks/onnx_side_by_side.py DIRECTORY --genai /tmp/genai/bin/python --rounds 7

Many short runs are easier to keep quiet than a long one: with ``--work`` bundles and folders are kept and reused,
``--only`` picks contestants, and rows are added to those of earlier calls (delete the file to begin anew).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import RESULTS, Run, append, edgelm, machine, run
from onnx_export_cost import can_import, optimum_command

WORKERS = Path(__file__).with_name("onnx_workers.py")
ONNX_QUANTS, GGUF_QUANTS = ("fp32", "int8", "int4"), ("Q8_0", "Q4_K_M")


@dataclass(frozen=True)
class Side:
    """One contestant: a command whose output is JSON, and how to read rates from it."""

    name: str
    case: str
    command: list[str]
    rates: Callable[[dict[str, Any]], dict[str, float]]
    kl: float | None = None

    @property
    def label(self) -> str:
        """What ``--only`` looks at."""
        return f"{self.name} {self.case}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="a Hugging Face directory")
    parser.add_argument("--genai", type=Path, help="a Python interpreter that has onnxruntime-genai")
    parser.add_argument("--rounds", type=int, default=7, help="0 only makes the contestants")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--generated", type=int, default=128)
    parser.add_argument("--work", type=Path, help="keep bundles and folders here, and use those that are here")
    parser.add_argument("--only", default="", metavar="REGEX", help="contestants in whose name, as 'genai int8', it is")
    parser.add_argument("--label", default="", help="of the machine, in the name of the file of rows: rows do not mix")
    arguments = parser.parse_args()
    missing: list[str] = []
    with tempfile.TemporaryDirectory(prefix="onnx-bench-") as directory:
        work = arguments.work or Path(directory)
        work.mkdir(parents=True, exist_ok=True)
        found = [side for side in sides(arguments, work, missing) if re.search(arguments.only, side.label)]
        name = "-".join(filter(None, ("onnx_side_by_side", arguments.source.resolve().name, arguments.label)))
        append(name, {"machine": machine()})
        for text in missing:
            append(name, {"missing": text})
            print(f"missing: {text}")
        speeds(arguments, found, name)
    path = RESULTS / f"{name}.jsonl"
    summarise([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    print(f"raw rows: {path}")


def accounted(finished: Run) -> dict[str, Any]:
    return {"wall_s": finished.wall_s, "cpu_s": finished.cpu_s, "peak_rss_bytes": finished.peak_rss_bytes}


def sides(arguments: argparse.Namespace, work: Path, missing: list[str]) -> list[Side]:
    """Everybody who can take part, with bundles and folders made where they are not there yet."""
    found: list[Side] = []
    counts = ["-p", str(arguments.prompt), "-n", str(arguments.generated)]
    threads = ["--threads", str(arguments.threads), "--threads-prefill", str(arguments.threads)]
    has_genai = arguments.genai is not None and can_import(arguments.genai, "onnxruntime_genai")
    for form, quants in (("onnx", ONNX_QUANTS), ("gguf", GGUF_QUANTS)):
        for quant in quants:
            bundle = work / f"bundle-{form}-{quant}"
            if not bundle.exists():
                run(edgelm("export", str(arguments.source), "--format", form, "--quant", quant, "-o", str(bundle)))
            kl = json.loads((bundle / "manifest.json").read_text())["quality"]["kl_mean"]
            print(f"{form} {quant}: mean KL {kl:.4f}")
            command = edgelm("bench", str(bundle), *counts, "-r", "1", *threads, "--json")
            found.append(Side(f"edgelm {form}", quant, command, _own_rates, kl))
            if form == "onnx" and has_genai:
                folder = work / f"genai-{quant}"
                if not folder.exists():
                    genai_folder(bundle, folder, arguments.threads, arguments.prompt + arguments.generated + 8)
                found.append(_worker("genai", quant, folder, arguments, str(arguments.genai)))
    if not has_genai:
        missing.append("onnxruntime-genai: name an interpreter that has it with --genai")
    if can_import(sys.executable, "optimum.exporters.onnx"):
        exported, int8 = work / "optimum-fp32", work / "optimum-int8"
        if not exported.exists():
            run([*optimum_command(arguments.source), str(exported)])
        found.append(_worker("optimum", "fp32", exported, arguments, sys.executable))
        if not int8.exists():
            dynamic_int8(exported, int8)
        found.append(_worker("optimum", "int8", int8, arguments, sys.executable))
    else:
        missing.append("optimum-onnx (pip install 'edgelm[optimum]')")
    return found


def _own_rates(report: dict[str, Any]) -> dict[str, float]:
    return {name: report[name]["median"] for name in ("prefill_tps", "decode_tps")}


def _worker(side: str, case: str, folder: Path, arguments: argparse.Namespace, python: str) -> Side:
    counts = ["-p", str(arguments.prompt), "-n", str(arguments.generated), "--threads", str(arguments.threads)]
    return Side(side, case, [python, str(WORKERS), side, str(folder), *counts], dict)


def speeds(arguments: argparse.Namespace, contestants: Sequence[Side], name: str) -> None:
    """Add rows of rates and peak RSS; who goes first alternates, so that a drifting machine favours nobody."""
    for number in range(arguments.rounds):
        for side in contestants if number % 2 else contestants[::-1]:
            finished = run(side.command)
            rates = side.rates(json.loads(finished.stdout[finished.stdout.index("{") :]))
            row = {"round": number, "side": side.name, "case": side.case, "kl": side.kl, "threads": arguments.threads}
            append(name, row | rates | accounted(finished))


def dynamic_int8(exported: Path, destination: Path) -> None:
    """The optimum export in onnxruntime's dynamic int8, per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    shutil.copytree(exported, destination, ignore=shutil.ignore_patterns("*.onnx", "*.onnx_data"))
    quantize_dynamic(exported / "model.onnx", destination / "model.onnx", per_channel=True, weight_type=QuantType.QInt8)


def genai_folder(bundle: Path, folder: Path, threads: int, context: int) -> None:
    """Our graph behind genai's inputs: attention_mask tells lengths, logits are of all positions."""
    import onnx
    from onnx import TensorProto, helper

    folder.mkdir()
    for name in ("model.onnx.data", "tokenizer.json"):
        shutil.copyfile(bundle / name, folder / name)  # a link would make the bundle one that is refused
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    graph = model.graph
    replaced = ("seqlens_k", "total_sequence_length", "logit_rows")
    inputs = [item for item in graph.input if item.name not in replaced]
    inputs.insert(1, helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]))
    constants = {"g.zero": (0, []), "g.one": (1, []), "g.axis": (1, [1]), "g.flat": (-1, [1])}
    for name, (value, shape) in constants.items():
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, shape, [value]))
    vocabulary = next(item for item in graph.output if item.name == "logits").type.tensor_type.shape.dim[1].dim_value
    graph.initializer.append(helper.make_tensor("g.words", TensorProto.INT64, [1], [vocabulary]))
    before = [
        helper.make_node("ReduceSum", ["attention_mask", "g.axis"], ["g.lengths"], keepdims=0),
        helper.make_node("Sub", ["g.lengths", "g.one"], ["g.last"]),
        helper.make_node("Cast", ["g.last"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["g.total1"], start=1, end=2),
        helper.make_node("Squeeze", ["g.total1"], ["g.total"]),
        helper.make_node("Cast", ["g.total"], ["total_sequence_length"], to=TensorProto.INT32),
        helper.make_node("Size", ["input_ids"], ["g.count"]),
        helper.make_node("Range", ["g.zero", "g.count", "g.one"], ["logit_rows"]),
    ]
    join_head(graph)
    for node in graph.node:
        node.output[:] = ["g.rows" if name == "logits" else name for name in node.output]
    after = [
        helper.make_node("Shape", ["input_ids"], ["g.shape"]),
        helper.make_node("Concat", ["g.shape", "g.words"], ["g.logits_shape"], axis=0),
        helper.make_node("Reshape", ["g.rows", "g.logits_shape"], ["logits"]),
    ]
    outputs = [item for item in graph.output if item.name != "logits"]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", vocabulary])
    built = helper.make_graph(
        [*before, *graph.node, *after], "decoder", inputs, [logits, *outputs], initializer=list(graph.initializer)
    )
    wrapped = helper.make_model(built, opset_imports=model.opset_import, ir_version=model.ir_version)
    (folder / "model.onnx").write_bytes(wrapped.SerializeToString())
    (folder / "genai_config.json").write_text(json.dumps(genai_config(graph, vocabulary, threads, context)))


def join_head(graph: Any) -> None:
    """One product for all logits, where the graph has pieces: for logits of all positions they would cost memory."""
    whole = next((node for node in graph.node if node.op_type == "Concat" and list(node.output) == ["logits"]), None)
    if whole is None:
        return
    pieces = [node for node in graph.node if node.output[0] in whole.input]
    stored = {item.name: item for item in graph.initializer}
    first = pieces[0]
    for index, name in enumerate(first.input):
        if name not in stored:
            continue
        parts = [stored[piece.input[index]] for piece in pieces]
        parts[0].dims[0] = sum(part.dims[0] for part in parts)
        place = {entry.key: entry for entry in parts[0].external_data}
        place["length"].value = str(
            sum(int(entry.value) for part in parts for entry in part.external_data if entry.key == "length")
        )
    for attribute in first.attribute:
        if attribute.name == "N":
            attribute.i = sum(next(item.i for item in piece.attribute if item.name == "N") for piece in pieces)
    first.output[0] = "logits"
    for node in (whole, *pieces[1:]):
        graph.node.remove(node)


def genai_config(graph: Any, vocabulary: int, threads: int, context: int) -> dict[str, Any]:
    """What genai wants to know of a graph."""
    caches = [item for item in graph.input if item.name.endswith(".key")]
    shape = [dimension.dim_value for dimension in caches[0].type.tensor_type.shape.dim]
    heads = next(
        attribute.i
        for node in graph.node
        if node.op_type == "GroupQueryAttention"
        for attribute in node.attribute
        if attribute.name == "num_heads"
    )
    decoder = {
        "session_options": {"intra_op_num_threads": threads, "log_id": "bench", "provider_options": []},
        "filename": "model.onnx",
        "head_size": shape[3],
        "hidden_size": heads * shape[3],
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": heads,
        "num_hidden_layers": len(caches),
        "num_key_value_heads": shape[1],
    }
    model = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "context_length": context, "type": "llama"}
    search = {"max_length": context, "past_present_share_buffer": True, "do_sample": False}
    return {"model": {**model, "vocab_size": vocabulary, "decoder": decoder}, "search": search}


# --- summary


def summarise(rows: Sequence[dict[str, Any]]) -> None:
    """Medians, and the ratio of medians to ours in the same class."""

    speed = [row for row in rows if "case" in row]

    def median(side: str, case: str, field: str) -> float:
        return statistics.median(row[field] for row in speed if (row["side"], row["case"]) == (side, case))

    seen = dict.fromkeys((row["side"], row["case"]) for row in speed)
    for side, case in seen:
        fields = [median(side, case, name) for name in ("prefill_tps", "decode_tps", "peak_rss_bytes")]
        told = (
            f"{side} {case}: prompt {fields[0]:.0f}, decode {fields[1]:.1f} tokens/s, peak {fields[2] / 2**20:.0f} MiB"
        )
        kl = next(row["kl"] for row in speed if (row["side"], row["case"]) == (side, case))
        told += "" if kl is None else f", KL {kl:.4f}"
        if side in ("genai", "optimum") and ("edgelm onnx", case) in seen:
            own = [median("edgelm onnx", case, name) for name in ("prefill_tps", "decode_tps")]
            peak = median("edgelm onnx", case, "peak_rss_bytes")
            told += f"; ours / theirs: prompt {own[0] / fields[0]:.2f}, decode {own[1] / fields[1]:.2f}"
            told += f", peak {peak / fields[2]:.2f}"
        print(told)


if __name__ == "__main__":
    main()
