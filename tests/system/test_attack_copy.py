"""The copy of a network that attacks see: as the network, whatever makes attacks on it fast."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

from models import build_model
from tests.golden_numbers import assert_near
from tests.helpers import RUN, assert_equal, settings, some_batch
from utils.step import training_loss
from utils.system.attack_copy import BATCH_NORMS, Affine, AttackCopy, frozen, in_precision
from utils.system.devices import compile_for_training
from utils.training.loop import attack_batch


def trained_network(arch="ResNet18", width=8, size=16):
    """Return a small network after a few training steps, and a batch of images and labels."""
    x, labels = some_batch(size=size)
    model = build_model(arch, 4, width=width, image_size=size)
    a_few_steps(model, x, labels)
    return model, x, labels


def a_few_steps(model, x, labels):
    """Train a little, so that BatchNorm is no longer that of a new network."""
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05, momentum=0.9)
    for _ in range(4):
        heads = model(x, labels, heads=True)
        loss = sum(F.cross_entropy(logits, labels) for logits in (heads.final, *heads.auxiliary))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def count(net, kind):
    """Return how many modules of a kind a network has."""
    return sum(isinstance(module, kind) for module in net.modules())


def addresses(net):
    """Return where a network's weights and statistics are in memory."""
    return [tensor.data_ptr() for tensor in net.state_dict().values()]


def assert_same_logits(net, model, x):
    """Compare the logits of all heads of a copy with those of its network."""
    model.eval()
    with torch.no_grad():
        heads = net(x, heads=True)
        expected = model(x, heads=True)
    assert_near(heads.final, expected.final, 1e-5)
    for logits, expected_logits in zip(heads.auxiliary, expected.auxiliary, strict=True):
        assert_near(logits, expected_logits, 1e-5)


def everything(model):
    """Return what an attack must leave as it is."""
    parameters = list(model.parameters())
    gradients = [(parameter.grad, parameter.requires_grad) for parameter in parameters]
    return model.state_dict(), gradients, [module.training for module in model.modules()]


def test_an_attack_leaves_the_network_as_it_was():
    model, x, _ = trained_network("PreActResNet18")
    before = copy.deepcopy(everything(model))
    with frozen(model) as net:
        assert not net.training
        assert not any(parameter.requires_grad for parameter in net.parameters())
        net(x)
    assert_equal(everything(model), before)


@pytest.mark.parametrize(
    ("arch", "width"), [("ResNet18", 8), ("PreActResNet18", 8), ("WRN-28-10", 1)]
)
@pytest.mark.parametrize("on_cuda", [False, True])
def test_weights_are_synced_in_place(monkeypatch, arch, width, on_cuda):
    """Weights and statistics, folded or not, and in the layers that a CUDA device gets."""
    model, x, labels = trained_network(arch, width, size=32)
    monkeypatch.setattr("utils.system.attack_copy.needs_affine", lambda net: on_cuda)
    attack_copy = AttackCopy(model)
    net = attack_copy.net
    if on_cuda:
        assert count(net, BATCH_NORMS) == 0
    else:
        assert count(net, Affine) == 0
        assert count(net, nn.BatchNorm2d) < count(model, nn.BatchNorm2d)
    before = addresses(net)
    a_few_steps(model, x, labels)
    attack_copy.sync_weights()
    assert_same_logits(net, model, x)
    assert addresses(net) == before


def test_synchronised_batch_norm_is_replaced_on_cuda(monkeypatch):
    model, x, _ = trained_network("PreActResNet18", size=32)
    monkeypatch.setattr("utils.system.attack_copy.needs_affine", lambda net: True)
    net = AttackCopy(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))).net
    assert count(net, BATCH_NORMS) == 0
    assert_same_logits(net, model, x)


def test_a_copy_is_freed_when_its_attack_is_over():
    """By reference counts alone: the garbage collector would let several copies pile up."""
    model = build_model("ResNet18", 4, width=4, image_size=16)
    gc.disable()
    try:
        for precision in ("default", "bf16"):
            with frozen(model, precision) as net:
                reference = weakref.ref(net)
                net(some_batch()[0])
            del net
            assert reference() is None
    finally:
        gc.enable()


def test_networks_in_bfloat16_return_float32_near_what_they_return_in_float32():
    model, x, _ = trained_network()
    expected = model.eval()(x)
    with frozen(model, "bf16") as attacked:
        for net in (attacked, in_precision(model, "bf16")):
            heads = net(x, heads=True)
            assert {tensor.dtype for tensor in tree_leaves(heads)} == {torch.float32}
            assert_near(heads.final, expected, 0.05)
            assert not torch.equal(heads.final, expected)


def test_each_shape_is_compiled_by_itself(monkeypatch):
    """An epoch's short last batch changes nothing for the batches after it."""
    compile_function = torch.compile
    backend = CompileCounterWithBackend("eager")

    def compile_without_inductor(function, options=None, **kwargs):
        return compile_function(function, backend=backend, **kwargs)

    monkeypatch.setattr(torch, "compile", compile_without_inductor)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    torch.compiler.reset()
    model, x, labels = trained_network(width=2)
    compile_for_training(model, torch.device("cpu"))
    attack_copy = AttackCopy(model, compiled=True)
    s = settings(*RUN, "--strategy", "hard_adv")
    graphs = []
    for size in (8, 8, 5, 8):
        batch = x[:size], labels[:size]
        attacked = attack_batch(attack_copy, *batch, s, torch.Generator(), 1)
        training_loss(model, *batch, attacked, s).loss.backward()
        graphs.append(len(backend.graphs))
    torch.compiler.reset()
    assert graphs[0] == graphs[1] < graphs[2] == graphs[3]
    for graph in backend.graphs:  # none is a graph for any size
        for node in graph.graph.find_nodes(op="placeholder"):
            assert not isinstance(node.meta["example_value"], torch.SymInt)
