"""When a CUDA graph is recorded, recorded again, and not trusted, with a stand-in for it."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from utils.system.graphs import WARM_UP, Graphed


class Recorder:
    """What PyTorch does on a card: while a graph is recorded, `traced` notes its calls.

    error: of each value that a replay computes, relative; None: it computes nothing, as that of a
    graph that was recorded on another device.
    """

    def __init__(self):
        self.error = 0.0
        self.calls = 0
        self.recordings = 0
        self.replays = 0
        self.under_way = None  # the graph that is being recorded

    def traced(self, xs, factor):
        self.calls += 1
        outputs = [factor * x for x in xs]
        if self.under_way is not None:
            self.under_way.work = xs, factor, outputs
        return outputs

    def new_graph(self):
        graph = SimpleNamespace()
        graph.replay = lambda: self.replay(*graph.work)
        return graph

    @contextmanager
    def recording(self, graph):
        self.recordings += 1
        self.under_way = graph
        yield
        self.under_way = None

    def replay(self, xs, factor, outputs):
        self.replays += 1
        if self.error is None:
            return
        for x, output in zip(xs, outputs, strict=True):
            output.copy_(factor * x * (1 + self.error))


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", recorder.new_graph)
    monkeypatch.setattr(torch.cuda, "graph", recorder.recording)
    return recorder


def assert_right(graphed, count, factor):
    """Call it on new values, and require the right ones in return."""
    xs = [torch.rand(count), torch.rand(count, 2)]
    for x, output in zip(xs, graphed(xs, factor), strict=True):
        assert torch.allclose(output, factor * x)


def test_the_second_of_two_like_calls_is_recorded_and_later_ones_are_replayed(recorder):
    graphed = Graphed(recorder.traced)
    recorder.error = 1e-6  # rounding is no difference
    assert_right(graphed, 4, 2.0)
    assert recorder.recordings == 0
    for _ in range(4):
        assert_right(graphed, 4, 2.0)
    assert recorder.recordings == 1
    assert recorder.calls == 1 + WARM_UP + 1
    assert recorder.replays == 1 + 3


def test_a_graph_that_replays_nothing_is_noticed_and_said_once(recorder, capsys):
    """Else every step would train on the images of the batch that was recorded."""
    graphed = Graphed(recorder.traced)
    recorder.error = None
    for factor in (2.0, 3.0):
        for _ in range(4):
            assert_right(graphed, 4, factor)
    assert capsys.readouterr().out.count("graph") == 1
    assert recorder.recordings == 1


def test_calls_that_settle_on_other_arguments_are_recorded_again(recorder, monkeypatch):
    """A training attack whose number of steps rises; an epoch's short last batch is no change.

    The old graph is gone, with its memory, before the new one is recorded.
    """
    graphed = Graphed(recorder.traced)
    held = []

    def new_graph():
        held.append((graphed.graph, graphed.outputs, graphed.inputs))
        return recorder.new_graph()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    for epoch, factor in enumerate((2.0, 2.0, 3.0, 5.0)):
        for count in (4, 4, 4, 3):
            assert_right(graphed, count, factor)
        assert recorder.recordings == (1, 1, 2, 3)[epoch]
    assert held == [(None, None, [])] * 3
