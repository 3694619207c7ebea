"""What makes training fast changes nothing: folded attacks, forwards of a step, precision, memory, compilation."""

import copy
import gc
import json
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import utils.training.loop as training
from models import ARCHS, build_model
from tests.golden_numbers import assert_near
from tests.helpers import RUN, a_few_steps, python, settings, some_batch, train
from utils import attacks
from utils.attacks import Bfloat16, Standing, cross_entropy, frozen, pgd, pgd40_heads
from utils.data.subject import right_or_not, verdicts
from utils.negatives import choose_negatives
from utils.step import attack_batch, training_loss
from utils.system.devices import compile_for_training
from utils.system.errors import RunError, UsageError

ONE = ("--epochs", 1)

pytestmark = pytest.mark.usefixtures("short_runs")


class Calls(TorchDispatchMode):
    """Notes (operator, arguments) of everything that is computed inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.append((operator.overloadpacket.__name__, args))
        return operator(*args, **(kwargs or {}))

    def of(self, name):
        return [args for operator, args in self.seen if operator == name]


def a_network(width=8):
    """A ResNet-18 for 4 classes, a few steps trained, and a batch."""
    torch.manual_seed(0)
    x, labels = some_batch()
    return a_few_steps(build_model("ResNet18", 4, width=width, image_size=16), x, labels), x, labels


# Attacks see the network that is trained


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("reverse_attention", [True, False], ids=["ra", "plain"])
def test_folded_logits_are_the_trained_network_s(arch, reverse_attention):
    torch.manual_seed(0)
    width, size = (1, 32) if arch.startswith("WRN") else (8, 64 if arch == "PreActResNet18" else 32)
    model = build_model(arch, 4, reverse_attention=reverse_attention, width=width, image_size=size)
    x, labels = some_batch(size=size)
    a_few_steps(model, x, labels).eval()
    with frozen(model) as net, torch.no_grad():
        assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) < sum(
            isinstance(m, nn.BatchNorm2d) for m in model.modules()
        )
        plain, folded = model(x, heads=True), net(x, heads=True)
        for value, expected in zip((folded.final, *folded.auxiliary), (plain.final, *plain.auxiliary), strict=True):
            assert_near(value, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["heads", "final"])
def test_verdicts_of_pgd40_are_those_of_the_plain_network(trained, kind):
    model, split, _ = trained
    plain = copy.deepcopy(model).requires_grad_(False)
    attack = {
        "heads": pgd40_heads(0.1, 0.02, 2, 1),
        "final": pgd(cross_entropy, 0.1, 0.02, 40, start="uniform", seed=1),
    }[kind]
    with frozen(model) as net:
        folded, unfolded = (verdicts(n, split, 360, attack) for n in (net, plain))
    assert 0 < folded.sum() < verdicts(plain, split, 360).sum()
    assert (folded != unfolded).float().mean() <= 0.005


@pytest.mark.parametrize("precision", ["default", "bf16"])
def test_an_attack_leaves_the_training_network_as_it_was(precision):
    model, x, labels = a_network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    with Calls() as calls:
        s = settings(*RUN, "--precision", precision, "--strategy", "hard_adv")
        attack_batch(Standing(model, precision), x, labels, s, torch.Generator(), 1)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.requires_grad and torch.equal(parameter.grad, gradient)
    backward = calls.of("convolution_backward")
    assert backward and all(tuple(args[-1]) == (True, False, False) for args in backward)  # of images, not of weights


# A step computes no more than the method says


@pytest.mark.parametrize(
    ("flags", "small", "forwards", "attacked"),
    [
        ((), 0, 3, 4),
        ((), attacks.SMALL, 3, 2),
        (("--strategy", "hard_adv"), 0, 3, 5),
        (("--strategy", "hard_adv"), attacks.SMALL, 3, 3),
        (("--inner", "kl"), attacks.SMALL, 3, 3),
        (("--strategy", "random"), attacks.SMALL, 3, 2),
        (("--no-anc",), attacks.SMALL, 2, 2),
        (("--no-anc", "--inner", "kl"), attacks.SMALL, 2, 3),
        (("--no-anc", "--method", "pgd"), attacks.SMALL, 1, 2),
    ],
)
def test_forwards_of_a_step(tmp_path, monkeypatch, flags, small, forwards, attacked):
    """Two steps an attack, both as one batch where it is small; natural logits once, and only where they are needed."""
    monkeypatch.setattr(attacks, "SMALL", small)
    seen, networks = [], []

    def build(*args, **kwargs):
        model = build_model(*args, **kwargs)
        model.register_forward_hook(lambda module, inputs, out: seen.append(module))  # frozen copies carry it too
        networks.append(model)
        return model

    monkeypatch.setattr(training, "build_model", build)
    monkeypatch.setattr(training, "evaluate", lambda *args: (0, 0))
    train(tmp_path, *ONE, *flags)
    trained = sum(module is networks[0] for module in seen)
    assert (trained, len(seen) - trained) == (3 * forwards, 3 * attacked)  # three batches


@pytest.mark.parametrize("arch", ["PreActResNet18", "WRN-28-10"])
def test_batchnorm_over_several_ranks_is_an_affine_layer_in_attacks_on_a_card(monkeypatch, arch):
    torch.manual_seed(0)
    x, labels = some_batch(size=32)
    model = a_few_steps(build_model(arch, 4, width=1 if arch.startswith("WRN") else 4, image_size=32), x, labels)
    monkeypatch.setattr(attacks, "affine_norms", lambda net: True)
    net = Standing(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))).net
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
    with torch.no_grad():
        assert_near(net(x), model.eval()(x), 1e-5)


@pytest.mark.parametrize("arch", ["PreActResNet18", "WRN-28-10"])
@pytest.mark.parametrize("on_a_card", [False, True])
def test_a_standing_network_takes_over_what_an_update_changed(monkeypatch, arch, on_a_card):
    """Weights and statistics, folded or not; with the layers that a CUDA device gets, too."""
    torch.manual_seed(0)
    x, labels = some_batch(size=32)
    model = build_model(arch, 4, width=1 if arch.startswith("WRN") else 4, image_size=32)
    with monkeypatch.context() as patch:
        patch.setattr(attacks, "affine_norms", lambda net: on_a_card)
        standing = Standing(model)
    kinds = [sum(isinstance(m, kind) for m in standing.net.modules()) for kind in (attacks.Affine, nn.BatchNorm2d)]
    assert kinds[0 if on_a_card else 1] > 0 == kinds[1 if on_a_card else 0]
    places = [tensor.data_ptr() for tensor in standing.net.state_dict().values()]
    for _ in range(2):
        a_few_steps(model, x, labels, steps=2)
        with torch.no_grad():
            assert_near(standing.refresh()(x), model.eval()(x), 1e-5)
    assert [tensor.data_ptr() for tensor in standing.net.state_dict().values()] == places  # as a CUDA graph needs it


def test_choosing_negatives_waits_for_the_device_a_fixed_number_of_times():
    counts = []
    for count in (16, 128):
        _, labels = some_batch(count)
        with Calls() as calls:
            choose_negatives(torch.randn(count, 4), labels, "hard", torch.Generator())
        waits = ("_local_scalar_dense", "_unique2", "unique_dim", "nonzero", "item")
        counts.append(sum(len(calls.of(name)) for name in waits))
    assert counts[0] == counts[1] <= 2


def test_a_frozen_copy_is_gone_when_its_attack_is_over():
    """By reference counts alone: waiting for the garbage collector would hold several copies."""
    model = build_model("ResNet18", 4, width=4, image_size=16)
    gc.disable()
    try:
        for precision in ("default", "bf16"):
            with frozen(model, precision) as net:
                copies = weakref.ref(net)
                net(some_batch()[0])
            del net
            assert copies() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_peak_memory_is_that_of_the_process_alone_and_does_not_grow():
    """Not that of the one that started it, and of memory that is no longer held, too; a copy kept adds 3 MB a step."""
    held = b"1" * 1_500_000_000
    code = """
import torch
from tests.tools.benchmarks import Step
from utils.system.devices import peak_memory
device, job, said = torch.device("cpu"), Step("ResNet18", 12, 16, 4, 16, torch.device("cpu")), []
for step in range(23):
    job.ours(num_steps=1)
    if step in (2, 22):
        said.append(peak_memory(device))
torch.ones(10**8)
print(*said, peak_memory(device))
"""
    done = python("-c", code)
    early, late, after = (int(peak) / 1e6 for peak in done.stdout.split())
    assert early < 1000 < len(held) / 1e6
    assert late - early < 20
    assert after - late == pytest.approx(400, rel=0.1)


# --precision bf16


def test_bfloat16_is_the_network_s_business_alone():
    model, x, labels = a_network()
    exact, rounded = settings(*RUN), settings(*RUN, "--precision", "bf16")
    with frozen(model, "bf16") as net:
        assert {m.weight.dtype for m in net.modules() if isinstance(m, nn.Conv2d)} == {torch.bfloat16}
        assert {m.weight.dtype for m in net.modules() if isinstance(m, nn.Linear)} == {torch.float32}
        heads = net(x, heads=True)
        assert {t.dtype for t in (heads.final, *heads.auxiliary, heads.features, net(x))} == {torch.float32}
    with frozen(model) as net:
        assert_near(heads.final, net(x), 0.05)
        assert not torch.equal(heads.final, net(x))
    attacked = attack_batch(Standing(model, "bf16"), x, labels, rounded, torch.Generator().manual_seed(0), 1)
    for images in (attacked.adversarial, attacked.negative):
        assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
    assert (attacked.adversarial - x).abs().max() <= rounded.epsilon + 1e-6
    losses = [training_loss(copy.deepcopy(model), x, labels, attacked, s).loss for s in (exact, rounded)]
    assert losses[1].dtype == torch.float32
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=0.05)
    losses[1].backward()


def test_a_run_in_bfloat16_keeps_float32_weights_and_evaluates_in_float32(tmp_path, monkeypatch, capsys):
    real = training.verdicts

    def in_float32(net, *args, **kwargs):
        assert not isinstance(net, Bfloat16)
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        return real(net, *args, **kwargs)

    monkeypatch.setattr(training, "verdicts", in_float32)
    run = train(tmp_path, *ONE, "--amp", "bf16")
    assert run.name.endswith("-precision-bf16")
    assert json.loads((run / "run.json").read_text())["precision"] == "bfloat16 autocast over float32 weights"
    said = capsys.readouterr().out
    assert "bfloat16 autocast" in said
    assert 0.1 < float(said.split("peak memory ")[1].split(" GB")[0]) < 1000  # of each epoch
    state = torch.load(run / "last_state.pt", weights_only=True)
    assert {v.dtype for v in state["model"].values()} == {torch.float32, torch.int64}
    assert {s["momentum_buffer"].dtype for s in state["optimizer"]["state"].values()} == {torch.float32}


def test_what_is_not_finite_is_caught_in_bfloat16_too(tmp_path):
    with pytest.raises(RunError, match=r"not finite|the loss is"):
        train(tmp_path, *ONE, "--precision", "bf16", "--lr", "1e20")


# --precision tf32, --compile


@pytest.mark.parametrize(("precision", "seen"), [("default", (True, False)), ("fp32", (False, False)), ("tf32", (True, True))])
def test_attacks_search_in_the_precision_asked_for_and_verdicts_are_float32(tmp_path, monkeypatch, precision, seen):
    """The switches of a CUDA device, which a CPU does not heed."""

    def switches():
        both = torch.backends.cudnn.conv, torch.backends.cuda.matmul
        return tuple(switch.fp32_precision == "tf32" for switch in both)

    noted, real = {}, {"attack_batch": training.attack_batch, "linf_pgd": attacks.linf_pgd}

    def note(name):
        def noting(*args, **kwargs):
            noted.setdefault(name, set()).add(switches())
            return real[name](*args, **kwargs)

        return noting

    def network(*args, **kwargs):
        with torch.no_grad():
            noted.setdefault("verdict", set()).add(switches())
        return real["net"](*args, **kwargs)

    monkeypatch.setattr(training, "attack_batch", note("attack_batch"))
    monkeypatch.setattr(attacks, "linf_pgd", note("linf_pgd"))
    train(tmp_path, *ONE, "--precision", precision)
    assert noted == {"attack_batch": {seen}, "linf_pgd": {seen}}
    assert switches() == (True, False)

    real["net"] = lambda x: x.flatten(1)[:, :4]
    logits = right_or_not(network, None, *some_batch(4), torch.arange(4))[2]
    assert noted["verdict"] == {(False, False)} and logits.shape == (4, 4)


def test_tf32_says_where_it_has_no_effect(tmp_path, capsys):
    train(tmp_path, *ONE, "--precision", "tf32")
    assert capsys.readouterr().err.splitlines()[-1].endswith("--precision tf32 accepted, no effect here")


@pytest.mark.slow
def test_a_missing_compiler_is_one_line(tmp_path):
    environment = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = python("train_CIFAR10_ResNet.py", *RUN, "--compile", "--model-dir", tmp_path / "run", **environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("train_CIFAR10_ResNet.py: error: --compile: torch.compile does not work here")
    assert line.endswith("install a C++ compiler, or leave --compile out")
    assert not list(tmp_path.glob("run*"))


def test_no_compilation_is_wrong_use_before_anything_is_written(tmp_path, monkeypatch):
    def fail(function, **how):
        raise RuntimeError("no compiler\nand much else")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UsageError, match=r"--compile: torch.compile does not work here \(no compiler\); install"):
        train(tmp_path, "--compile")
    assert not list(tmp_path.glob("run*"))


def test_compilation_leaves_keys_and_copies_alone(monkeypatch):
    model = build_model("ResNet18", 4, width=4, image_size=16)
    keys = list(model.state_dict())
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    compile_for_training(model, torch.device("cpu"))
    assert model._compiled_call_impl is not None
    assert list(model.state_dict()) == keys
    with frozen(model) as net:  # that of the evaluation, not compiled
        assert net._compiled_call_impl is None


def test_each_shape_is_compiled_by_itself(monkeypatch):
    """An epoch's short last batch changes nothing for the batches after it, and there are not too many shapes."""
    inputs_of_graphs, real = [], torch.compile

    def backend(graph, inputs):
        inputs_of_graphs.append([node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")])
        return graph

    monkeypatch.setattr(torch, "compile", lambda function, options=None, **how: real(function, backend=backend, **how))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    torch.compiler.reset()
    model, x, labels = a_network(width=2)
    compile_for_training(model, torch.device("cpu"))
    standing, s = Standing(model, compiled=True), settings(*RUN, "--strategy", "hard_adv")
    compiled = []
    for count in (8, 8, 5, 8):
        attacked = attack_batch(standing, x[:count], labels[:count], s, torch.Generator(), 1)
        training_loss(model, x[:count], labels[:count], attacked, s).loss.backward()
        compiled.append(len(inputs_of_graphs))
    torch.compiler.reset()
    assert compiled[0] == compiled[1] < compiled[2] == compiled[3]
    assert not any(isinstance(value, torch.SymInt) for inputs in inputs_of_graphs for value in inputs)  # of any size


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run_up_to_rounding(tmp_path):
    """One step; from the second on the signs of attacks amplify it. Another step then shares the first one's graphs."""
    from torch._dynamo.utils import counters

    flags = ("--limit-train", 10, "--eval-interval", 9, "--epochs", 1)
    eager = train(tmp_path / "1", *flags)
    counters.clear()
    compiled = train(tmp_path / "2", *flags, "--compile")
    assert eager.name == compiled.name  # what is computed is the same
    one, other = (torch.load(run / "last_state.pt", weights_only=True)["model"] for run in (eager, compiled))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert_near(other[key].double(), value.double(), 1e-4)
    graphs = counters["stats"]["unique_graphs"]
    train(tmp_path / "2", *flags, "--epochs", 2, "--resume")
    assert counters["stats"]["unique_graphs"] == graphs > 0
