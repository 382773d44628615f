"""schedule.py: learning rates, and batches that grow."""

import pytest

from schedule import SCHEDULES, BatchRamp


def test_schedules_go_from_1_to_0():
    for name, shape in SCHEDULES.items():
        points = [shape(i / 20) for i in range(21)]
        assert points[0] == 1 and points == sorted(points, reverse=True)
        assert points[-1] == pytest.approx(0 if name != 'constant' else 1)
    assert SCHEDULES['wsd'](0.79) == 1 and SCHEDULES['wsd'](0.9) == pytest.approx(0.5)
    assert SCHEDULES['cosine'](0.5) == pytest.approx(0.5)


@pytest.mark.parametrize('micro_steps, iterations', [(1, 0), (4, 0), (4, 3), (8, 100), (100, 8)])
def test_batch_grows_from_one_micro_step_to_all(micro_steps, iterations):
    ramp = BatchRamp(micro_steps, iterations)
    sizes = [ramp.at(i) for i in range(iterations + 5)]
    assert sizes == sorted(sizes) and sizes[iterations:] == [micro_steps] * 5
    assert abs(sizes[0] - micro_steps / (iterations + 1)) < 1
    assert [ramp.before(i) for i in range(len(sizes))] == [sum(sizes[:i]) for i in range(len(sizes))]
