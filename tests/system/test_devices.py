"""Which device is picked, and what computes there, with a made-up card."""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers import settings
from utils.system import devices, distributed
from utils.system.devices import Sent, computing, pick_device, precision_name
from utils.system.errors import UsageError

NO_KERNELS = "CUDA error: no kernel image is available"


@pytest.fixture
def card(monkeypatch):
    """Two equal cards: what fails there, whether they have TF32, and the current one's number."""
    cards = SimpleNamespace(error=None, modern=True, current=0)

    def set_device(device):
        cards.current = device.index

    monkeypatch.setattr(devices, "compute_error", lambda device: cards.error)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: cards.modern)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: cards.modern)
    return cards


def test_the_device_that_is_picked_is_the_current_one(card):
    """Streams, events and CUDA graphs are those of the current device."""
    assert pick_device("cuda:1", False) == torch.device("cuda:1")
    assert card.current == 1
    assert pick_device("auto", no_cuda=True) == torch.device("cpu")


def test_a_card_without_kernels_is_not_taken_by_auto_and_refused_by_name(card, capsys):
    assert pick_device("auto", False).type == "cuda"
    card.error = NO_KERNELS
    assert pick_device("auto", False) == torch.device("cpu")
    assert NO_KERNELS in capsys.readouterr().err
    with pytest.raises(UsageError, match=f"--device cuda:1: {NO_KERNELS}"):
        pick_device("cuda:1", False)


def test_no_rank_computes_on_a_card_where_another_one_has_none(card, monkeypatch):
    monkeypatch.setattr(distributed, "agreed", lambda wish: 1)
    assert pick_device("auto", False) == torch.device("cpu")


@pytest.mark.parametrize("name", ["bf16", "tf32"])
def test_a_precision_that_a_card_has_no_units_for_is_refused(card, name):
    assert pick_device("cuda", False, name).type == "cuda"
    card.modern = False
    with pytest.raises(UsageError, match=f"--precision {name}: Some Card .*8.0"):
        pick_device("cuda", False, name)
    assert pick_device("cpu", False, name).type == "cpu"
    assert pick_device("cuda", False, "fp32").type == "cuda"


def test_tf32_is_not_recorded_for_a_card_that_has_none(card):
    cuda = torch.device("cuda")
    assert precision_name(settings("--precision", "tf32"), cuda) == "TF32"
    card.modern = False
    assert precision_name(settings(), cuda) == "float32"


# PyTorch's switches can be set on a CPU, too.


def switches():
    """Return what float32 is computed in: in convolutions and in products."""
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.fixture
def untouched():
    """Put back PyTorch's switches after a test."""
    yield
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")


def set_newer():
    """Set the newer switches alone, after which the older ones cannot be read."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def set_older():
    """Set the older switches."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = True


def set_all_products():
    """Set what products are computed in on all devices."""
    torch.set_float32_matmul_precision("high")


@pytest.mark.parametrize("by_user", [lambda: None, set_newer, set_older, set_all_products])
def test_what_is_computed_in_does_not_depend_on_a_user_s_switches(untouched, by_user):
    by_user()
    before = switches()
    for precision, inside in (("fp32", "ieee"), ("tf32", "tf32")):
        with computing(precision):
            assert switches() == (inside, inside)
            # torch.compile reads the older ones.
            assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
            assert torch.get_float32_matmul_precision() in ("high", "highest")
        assert switches() == before
    with computing("default"):
        assert switches() == before


def test_figures_under_way_wait_for_the_device_that_computes_them(monkeypatch):
    """An event belongs to a stream of one device, and that is not the current device's."""
    streams = []
    event = SimpleNamespace(record=streams.append, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    values = SimpleNamespace(
        is_cuda=True, device="cuda:1", to=lambda *args, **kwargs: torch.tensor([1.5])
    )
    assert Sent(values).arrived() == [1.5]
    assert streams == ["stream of cuda:1"]
