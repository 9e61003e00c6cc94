"""Buffers of threads: reused, grown, and never shared."""

from __future__ import annotations

import threading

from exporter.buffers import ThreadBuffers


def test_a_buffer_is_used_again_and_grows() -> None:
    buffers = ThreadBuffers()
    first = buffers.bytes("raw", 100)
    assert buffers.bytes("raw", 50).ctypes.data == first.ctypes.data
    assert len(buffers.bytes("raw", 50)) == 50
    grown = buffers.floats("raw", 1000)
    assert grown.size == 1000
    assert grown.ctypes.data != first.ctypes.data


def test_names_and_threads_have_their_own() -> None:
    buffers, others = ThreadBuffers(), []
    mine = buffers.bytes("raw", 64)
    mine[:] = 7
    assert buffers.bytes("values", 64).ctypes.data != mine.ctypes.data

    def ask() -> None:
        other = buffers.bytes("raw", 64)
        other[:] = 9
        others.append(other)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert others[0].ctypes.data != mine.ctypes.data
    assert set(mine.tolist()) == {7}
