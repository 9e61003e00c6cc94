"""From when on an engine that does not come back is taken for hung."""

from __future__ import annotations

import pytest

from runtime.server.pace import PATIENCE, SILENCE_FLOOR_S, Pace
from runtime.server.scheduler import BATCH_TOKENS


def test_a_quick_engine_has_the_floor() -> None:
    assert Pace().silence_limit_s() == SILENCE_FLOOR_S
    assert Pace().after(0.02, 1).silence_limit_s() == SILENCE_FLOOR_S


def test_a_slow_engine_has_time_for_a_full_batch() -> None:
    pace = Pace().after(1.0, 1)
    assert pace.silence_limit_s() == pytest.approx(PATIENCE * BATCH_TOKENS)
    # Read from disk the first time; from memory it computes tokens in a tenth of that.
    assert pace.after(0.1, 1).silence_limit_s() == pytest.approx(PATIENCE * BATCH_TOKENS / 10)


def test_the_slowest_step_is_never_forgotten() -> None:
    pace = Pace().after(90.0, 1).after(0.01, 1).after(0.0, 0)
    assert pace == Pace(3, 90.0, 0.01)
    assert pace.silence_limit_s() == PATIENCE * 90
