"""When a CUDA graph is recorded, recorded again, and not trusted, with a stand-in for it."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from utils.system.graphs import WARM_UP, Graphed


class Recorder:
    """What PyTorch does on a card: while a graph is recorded, `traced` notes its calls.

    broken: a replay computes nothing, as that of a graph that was recorded on another device.
    """

    def __init__(self):
        self.broken = False
        self.eager, self.recordings, self.replays = 0, 0, 0  # calls
        self.graphs = []
        self.under_way = None

    def traced(self, xs, factor):
        self.eager += 1
        found = [factor * x for x in xs]
        if self.under_way is not None:
            self.under_way.work = xs, factor, found
        return found

    def new_graph(self):
        graph = SimpleNamespace(work=None)
        graph.replay = lambda: self.replay(graph)
        self.graphs.append(graph)
        return graph

    @contextmanager
    def recording(self, graph):
        self.recordings += 1
        self.under_way = graph
        yield
        self.under_way = None

    def replay(self, graph):
        self.replays += 1
        xs, factor, found = graph.work
        for x, output in zip(xs, found, strict=True):
            if not self.broken:
                output.copy_(factor * x)


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


def called(graphed, count, factor):
    """Call it on new values, and require the right ones in return."""
    xs = [torch.rand(count), torch.rand(count, 2)]
    for x, found in zip(xs, graphed(xs, factor), strict=True):
        assert torch.equal(found, factor * x)


def test_the_second_of_two_like_calls_is_recorded_and_later_ones_are_replayed(recorder):
    graphed = Graphed(recorder.traced)
    called(graphed, 4, 2.0)
    assert recorder.recordings == 0
    called(graphed, 4, 2.0)
    assert recorder.recordings == 1
    ran = recorder.eager
    for _ in range(3):
        called(graphed, 4, 2.0)
    assert recorder.eager == ran == 1 + WARM_UP + 1
    assert recorder.replays == 1 + 3


def test_a_graph_that_replays_nothing_is_noticed_and_said_once(recorder):
    """Else every step would train on the images of the batch that was recorded."""
    lines = []
    graphed = Graphed(recorder.traced, lines.append)
    recorder.broken = True
    for factor in (2.0, 3.0):
        for _ in range(4):
            called(graphed, 4, factor)
    assert len(lines) == 1 and "graph" in lines[0]
    assert recorder.recordings == 1


def test_rounding_is_no_difference(recorder):
    lines = []
    graphed = Graphed(recorder.traced, lines.append)

    def rounded(graph):
        xs, factor, found = graph.work
        for x, output in zip(xs, found, strict=True):
            output.copy_(factor * x * (1 + 1e-6))

    recorder.replay = rounded
    x = [torch.rand(4)]
    graphed(x, 2.0)
    graphed(x, 2.0)
    assert graphed.graph is not None and not lines


def test_a_short_batch_an_epoch_runs_as_it_is(recorder):
    graphed = Graphed(recorder.traced)
    for _ in range(4):
        for count in (4, 4, 4, 3):
            called(graphed, count, 2.0)
    assert recorder.recordings == 1


def test_calls_that_settle_on_other_arguments_are_recorded_again(recorder):
    """A training attack whose number of steps rises; the old graph is gone before the new one."""
    graphed = Graphed(recorder.traced)
    for epoch, factor in enumerate((2.0, 2.0, 3.0, 5.0)):
        graph = graphed.graph
        for count in (4, 4, 4, 3):
            called(graphed, count, factor)
        assert recorder.recordings == (1, 1, 2, 3)[epoch]
        assert (graphed.graph is graph) == (epoch == 1)


def test_the_old_graph_is_gone_when_a_new_one_is_recorded(recorder, monkeypatch):
    graphed = Graphed(recorder.traced)
    held = []

    def new_graph():
        held.append((graphed.graph, graphed.outputs, graphed.inputs))
        return recorder.new_graph()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    for factor in (2.0, 2.0, 3.0, 3.0):
        called(graphed, 4, factor)
    assert held == [(None, None, [])] * 2
