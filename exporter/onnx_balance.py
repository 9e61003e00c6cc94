"""Balances what a matrix reads against its columns, so that both keep more of themselves in 8 bits.

Kernels round activations to 8 bits block by block, as weights are: a channel that is much larger than its neighbours
takes their precision. Multiplied by a factor on the way in and divided by it in the matrix, the product stays what it
was; with sqrt(w / a), a and w being the root mean squares of the channel and of its column, both are equally uneven
(SmoothQuant, Xiao et al. 2022, https://arxiv.org/abs/2211.10438, with exponent 1/2). Whatever makes the channel carries
the factor: a norm, rows of the values, rows of the half that is not gated; of a tied embedding one product per token.
So nothing is computed more. Factors are powers of two: no weight changes but in its exponent.

Knows how a decoder is joined; neither graphs nor files, nor where the squares come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from exporter.architectures.base import TensorDescription
from exporter.onnx_layout import Decoder, Layer, Part

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
_LARGEST = 2.0**6  # of a factor, and the inverse of the smallest: dead channels have no say


@dataclass(frozen=True, slots=True)
class Site:
    """Matrices that read the same values, by their names. ``shared`` (kv heads, heads of each, head size) where heads
    that share values have to share factors."""

    readers: tuple[str, ...]
    shared: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        return self.readers[0]


def balance_sites(decoder: Decoder) -> tuple[Site, ...]:
    """Everywhere that something before a matrix can carry factors: not behind an activation, and not where a matrix
    reads the stream itself."""
    found = []
    for layer in decoder.layers:
        inputs, network = _names(*layer.inputs), _names(*([layer.gate] if layer.gate else []), layer.up)
        if layer.attention_norm is not None:
            alone = not _one_norm(decoder, layer)
            found.append(Site(inputs if alone else inputs + network))
        found.append(Site(_names(layer.output), (layer.kv_heads, layer.heads // layer.kv_heads, decoder.head_size)))
        if layer.feed_forward_norm is not None:
            found.append(Site(network))
        if layer.gate is not None or layer.joined_gate:
            found.append(Site(_names(layer.down)))
    return (*found, Site((decoder.output_matrix.name,)))


def balance_factors(
    sites: Sequence[Site], squares: Mapping[str, Doubles], columns: Mapping[str, Doubles]
) -> dict[str, Floats]:
    """Factors of each site's channels by its name. ``squares`` are mean squares of the channels by site, ``columns``
    sums of squares of the columns by matrix."""
    factors = {}
    for site in sites:
        weights = np.sum([columns[name] for name in site.readers], axis=0)
        # The logarithm to base 2 of (w / a)^(1/2), from squares.
        steps = (_logarithm(weights) - _logarithm(squares[site.name])) / 4
        if site.shared is not None:
            steps = np.broadcast_to(steps.reshape(site.shared).mean(axis=1, keepdims=True), site.shared).reshape(-1)
        limit = np.log2(_LARGEST)
        factors[site.name] = np.exp2(np.rint(np.clip(steps - steps.mean(), -limit, limit))).astype(np.float32)
    return factors


def balanced(decoder: Decoder, factors: Mapping[str, Floats]) -> Decoder:
    """The decoder with every factor in what carries it and its inverse in the matrices behind."""
    layers = tuple(_balanced_layer(decoder, layer, factors) for layer in decoder.layers)
    last = factors[decoder.output_matrix.name]
    final_norm, table = _rows(decoder.final_norm, last), _columns(decoder.output_matrix, last)
    if decoder.head is not None:
        return replace(decoder, layers=layers, final_norm=final_norm, head=table)
    return replace(decoder, layers=layers, final_norm=final_norm, embedding=table, embedding_factors=last)


def _balanced_layer(decoder: Decoder, layer: Layer, factors: Mapping[str, Floats]) -> Layer:
    inputs, gate, up, down = layer.inputs, layer.gate, layer.up, layer.down
    attention_norm, feed_forward_norm = layer.attention_norm, layer.feed_forward_norm
    if attention_norm is not None:
        read = factors[inputs[0].weight.name]
        attention_norm = _rows(attention_norm, read)
        inputs = tuple(_part_columns(part, read) for part in inputs)
        if _one_norm(decoder, layer):
            gate, up = None if gate is None else _part_columns(gate, read), _part_columns(up, read)
    if feed_forward_norm is not None:
        read = factors[(gate or up).weight.name]
        feed_forward_norm = _rows(feed_forward_norm, read)
        gate, up = None if gate is None else _part_columns(gate, read), _part_columns(up, read)
    attended = factors[layer.output.weight.name]
    values = attended.reshape(layer.kv_heads, -1, decoder.head_size)[:, 0].reshape(-1)
    inputs = (*inputs[:-1], _last_rows(inputs[-1], values))
    if down.weight.name in factors:
        read = factors[down.weight.name]
        up, down = _last_rows(up, read), _part_columns(down, read)
    return replace(
        layer,
        attention_norm=attention_norm,
        inputs=inputs,
        output=_part_columns(layer.output, attended),
        feed_forward_norm=feed_forward_norm,
        gate=gate,
        up=up,
        down=down,
    )


def _one_norm(decoder: Decoder, layer: Layer) -> bool:
    """Whether attention and network read the same normalised values."""
    return decoder.structure.parallel_residual and layer.feed_forward_norm is None


def _names(*parts: Part) -> tuple[str, ...]:
    return tuple(part.weight.name for part in parts)


def _logarithm(squares: Doubles) -> Doubles:
    """To base 2; what is next to nothing beside the others counts as a little."""
    logarithm: Doubles = np.log2(np.maximum(squares, max(1e-8 * float(squares.mean()), 1e-30)))
    return logarithm


def _rows(part: Part, factors: Floats) -> Part:
    bias = None if part.bias is None else _row_factors(part.bias, factors)
    return Part(_row_factors(part.weight, factors), bias)


def _last_rows(part: Part, factors: Floats) -> Part:
    """The last rows are what carries the factors: all of a matrix of its own, the end of a joined one."""
    whole = np.ones(part.rows, np.float32)
    whole[part.rows - len(factors) :] = factors
    return _rows(part, whole)


def _part_columns(part: Part, factors: Floats) -> Part:
    return Part(_columns(part.weight, factors), part.bias)


def _row_factors(tensor: TensorDescription, factors: Floats) -> TensorDescription:
    return replace(tensor, row_factors=factors if tensor.row_factors is None else tensor.row_factors * factors)


def _columns(tensor: TensorDescription, factors: Floats) -> TensorDescription:
    """What reads channels that carry factors has their inverse."""
    return replace(tensor, column_factors=(1 / factors).astype(np.float32))
