import math

from verl.workers.lr_schedule import lr_factor


def test_warm_up_is_linear_and_then_the_named_schedule():
    assert [lr_factor("constant", s, 3, 10) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [lr_factor("linear", s, 0, 4) for s in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert math.isclose(lr_factor("cosine", 6, 2, 10), 0.5)
    assert lr_factor("cosine", 10, 2, 10) == 0.0
