"""From optimum's three graphs of an encoder-decoder to two that store nothing twice.

Optimum writes one decoder for the first token and one for those that follow. The first one's only work that the other
cannot do is keys and values of the text for every layer: that part moves behind the encoder, the rest is dropped.
Knows onnx models in memory, no files.
"""

from __future__ import annotations

from typing import Any

from edgelm.errors import CheckpointError

_STATES, _HIDDEN = "last_hidden_state", "encoder_hidden_states"


def joined_graphs(graphs: dict[str, Any], name: str) -> tuple[Any, Any]:
    """The graph that reads a text, and the one that writes token by token. The models given are used up.

    Raises ``CheckpointError`` when they are not built as these steps assume.
    """
    try:
        reader, first, writer = (graphs[stem] for stem in ("encoder_model", "decoder_model", "decoder_with_past_model"))
    except KeyError as error:
        raise CheckpointError(f"optimum drew no {error.args[0]} of {name}") from error
    crossing = [item for item in first.graph.output if ".encoder." in item.name]
    if not crossing or [item.name for item in reader.graph.output] != [_STATES]:
        raise CheckpointError(f"optimum's graphs of {name} have no keys and values of the text")
    _append(reader, first, crossing, name)
    own = {item.name for item in crossing}
    kept = [item for item in writer.graph.output if item.name not in own]
    del writer.graph.output[:]
    writer.graph.output.extend(kept)
    return reader, writer


def _append(reader: Any, first: Any, crossing: list[Any], name: str) -> None:
    """Move what computes ``crossing`` behind the reader, whose only output that becomes."""
    nodes = _needed(first.graph, [item.name for item in crossing], name)
    given = {"input_ids", _HIDDEN, *(item.name for item in crossing)}

    def renamed(value: str) -> str:
        if value == _HIDDEN:
            return _STATES
        return value if not value or value in given else f"crossing/{value}"

    used = {value for node in nodes for value in node.input}
    for tensor in first.graph.initializer:
        if tensor.name in used:
            moved = reader.graph.initializer.add()
            moved.CopyFrom(tensor)
            moved.name = renamed(tensor.name)
    for node in nodes:
        moved = reader.graph.node.add()
        moved.CopyFrom(node)
        moved.name = f"crossing/{node.name}"
        del moved.input[:], moved.output[:]
        moved.input.extend(map(renamed, node.input))
        moved.output.extend(map(renamed, node.output))
    del reader.graph.output[:]
    reader.graph.output.extend(crossing)


def _needed(graph: Any, wanted: list[str], name: str) -> list[Any]:
    """The nodes that values depend on, in their order.

    Of the tokens written they need the number of sequences alone, which the text has too: where a shape of what those
    tokens became is asked for its first number, the shape of the text's ids is asked instead.
    """
    maker = {value: index for index, node in enumerate(graph.node) for value in node.output}
    written = _depending(graph, "input_ids")
    open_, found = list(wanted), set[int]()
    while open_:
        index = maker.get(open_.pop())
        if index is None or index in found:
            continue
        node = graph.node[index]
        found.add(index)
        if node.op_type == "Shape" and node.input[0] in written:
            node.input[0] = "input_ids"
        elif "input_ids" in node.input:
            raise CheckpointError(f"optimum's graph of {name} mixes tokens that are written with those that are read")
        open_ += node.input
    nodes = [graph.node[index] for index in sorted(found)]
    shapes = {node.output[0] for node in nodes if node.op_type == "Shape" and node.input[0] == "input_ids"}
    zeros = {node.output[0] for node in nodes if node.op_type == "Constant" and _is_zero(node)}
    for node in nodes:
        if shapes.intersection(node.input) and (node.op_type != "Gather" or node.input[1] not in zeros):
            raise CheckpointError(f"optimum's graph of {name} asks for more than the number of sequences")
    return nodes


def _depending(graph: Any, start: str) -> set[str]:
    """All values that a value has a part in; nodes stand in the order of their use."""
    found = {start}
    for node in graph.node:
        if found.intersection(node.input):
            found.update(node.output)
    return found


def _is_zero(node: Any) -> bool:
    from onnx import numpy_helper

    return any(item.name == "value" and numpy_helper.to_array(item.t).tolist() == 0 for item in node.attribute)
