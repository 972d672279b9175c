"""tf.data's model against the paper's worked example and against hand calculation."""

from __future__ import annotations

import pytest

from deltaserve.errors import PipelineError
from deltaserve.pipeline.tuning.analytic import Model, Operator, wait_ns
from deltaserve.pipeline.tuning.search import SEARCHES, Budget, gradient, hill_climb, stage_based

MS = 1e6


def example(downward="consumer", **changes):
    """Figure 5 of the paper: file -> interleave -> map -> batch of 10 -> prefetch."""
    operators = [
        Operator("file", 5 * MS),
        Operator("interleave", 0, way="interleave", inputs=("file",), high=8),
        Operator("map", 2 * MS, way="parallel", inputs=("interleave",), high=8, element_bytes=10),
        Operator("batch", 1 * MS, ratio=10, inputs=("map",)),
        Operator("prefetch", 0, way="prefetch", inputs=("batch",), high=16, element_bytes=100),
    ]
    return Model({o.name: o for o in operators}, "prefetch", 10 * MS, downward)


def test_the_papers_worked_example():
    times = example().output_times({"interleave": 1, "map": 5, "prefetch": 2})
    found = [times[name] / MS for name in ("interleave", "map", "batch", "prefetch")]
    assert found == pytest.approx([4.15, 3.55, 36.5, 27], rel=0.01)


def test_processing_downstream_counts_as_consumer_time():
    """TensorFlow's code: map's consumer needs (10 + 1) / 10 + 2 / 5 = 1.5 ms per element."""
    times = example("pipeline").output_times({"interleave": 1, "map": 5, "prefetch": 2})
    interleave = 5 * (1 - 0.3) / (1 - 0.3**2)
    load = 1.5 / interleave
    assert times["interleave"] / MS == pytest.approx(interleave)
    assert times["map"] / MS == pytest.approx(0.4 + interleave * (1 - load) / (1 - load**6))


def test_wait_of_one_queue():
    assert wait_ns(0, 5, 3) == 0
    assert wait_ns(7, 0, 3) == 7
    assert wait_ns(8, 8, 3) == 2
    assert wait_ns(8, 8 * (1 + 1e-7), 3) == pytest.approx(2, rel=1e-5)
    assert wait_ns(1, 1e6, 1000) == 0
    assert wait_ns(2, 1, 1) == pytest.approx(2 * 0.5 / 0.75)


def test_processing_time_is_all_the_work():
    assert example().processing_ns() / MS == pytest.approx(10 * (5 + 2) + 1)


def test_more_of_anything_never_lengthens_the_wait():
    model = example()
    settings = model.lowest()
    for name in settings:
        waits = [model.output_ns(settings | {name: n}) for n in range(1, 9)]
        assert waits == sorted(waits, reverse=True)


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_shorten_the_wait_within_their_bounds(name):
    model = example("pipeline")
    found = SEARCHES[name](model, Budget(cores=64))
    assert model.output_ns(found) < 0.5 * model.output_ns(model.lowest())
    assert all(1 <= found[o.name] <= o.high for o in model.tunable())


def test_hill_climb_ends_when_the_cores_cannot_do_better():
    model = example("pipeline")
    few, many = hill_climb(model, Budget(1)), hill_climb(model, Budget(64))
    assert model.output_ns(few) <= model.processing_ns()
    assert sum(few.values()) < sum(many.values())


def test_memory_bounds_every_search():
    model = example("pipeline")
    tight = Budget(64, memory=model.buffered_bytes(model.lowest()) + 50)
    for search in SEARCHES.values():
        assert model.buffered_bytes(search(model, tight)) <= tight.memory


def test_gradient_stops_adding_threads_at_the_cores():
    found = gradient(example("pipeline"), Budget(4))
    assert found["interleave"] + found["map"] <= 5  # rounded at the end


def test_stage_based_raises_only_the_slowest_until_the_demand_is_met():
    model = Model(example().operators, "prefetch", 30 * MS)
    # Per batch: file under the interleave 50 ms / p, map 20 ms / p, batch 1 ms.
    assert stage_based(model, Budget(8)) == {"interleave": 2, "map": 1, "prefetch": 1}
    operators = dict(model.operators) | {
        "map": Operator("map", 12 * MS, way="parallel", inputs=("interleave",), high=8)
    }
    slower = Model(operators, "prefetch", 55 * MS)
    assert stage_based(slower, Budget(8))["map"] == 3
    assert stage_based(slower, Budget(8))["interleave"] == 1


def test_a_shared_input_is_refused():
    twice = {
        "a": Operator("a", 1),
        "b": Operator("b", 1, inputs=("a", "a")),
    }
    with pytest.raises(PipelineError, match="'a' is consumed twice"):
        Model(twice, "b")
    with pytest.raises(PipelineError, match="no operator 'c'"):
        Model({"b": Operator("b", 1, inputs=("c",))}, "b")
