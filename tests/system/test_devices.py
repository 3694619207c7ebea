"""Which device is picked, and what computes there, with a made-up card."""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers import settings
from utils.system import distributed
from utils.system.devices import Sent, computing, has_kernels, pick_device, precision_name
from utils.system.errors import UsageError

WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # PyTorch 2.14 for CUDA 13.0


@pytest.fixture
def card(monkeypatch):
    """Two equal cards; `capability` is theirs, `current` the one that PyTorch computes on."""
    cards = SimpleNamespace(capability=(9, 0), architectures=WHEEL, current=0)

    def set_device(device):
        cards.current = torch.device(device).index

    def of_eight(including_emulation=False):
        return cards.capability >= (8, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: cards.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some Card")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: cards.architectures)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", of_eight)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", of_eight)
    return cards


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), WHEEL, True),
        ((8, 9), WHEEL, True),  # code for 8.6
        ((7, 5), WHEEL, True),
        ((7, 0), WHEEL, False),  # a V100
        ((6, 1), WHEEL, False),
        ((11, 0), WHEEL, False),
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_80", "compute_90"], True),  # compiled when it is loaded
        ((7, 0), ["sm_80", "compute_80"], False),
    ],
)
def test_code_runs_on_cards_of_its_major_number_or_is_compiled_for_later_ones(
    capability, architectures, runs
):
    assert has_kernels(capability, architectures) == runs


def test_the_device_that_is_picked_is_the_current_one(card):
    """Streams, events and CUDA graphs are those of the current device."""
    assert pick_device("cuda:1", False) == torch.device("cuda:1")
    assert card.current == 1
    assert pick_device("cuda", False) == torch.device(
        "cuda"
    )  # which is the current one, by definition
    assert card.current == 1


def test_a_card_without_kernels_is_not_taken_by_auto_and_refused_by_name(card, capsys):
    assert pick_device("auto", False).type == "cuda"
    card.capability = (7, 0)
    assert pick_device("auto", False) == torch.device("cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert "7.0" in line and "CPU" in line
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UsageError, match=f"--device {name}: .*7.0.*no kernels"):
            pick_device(name, False)
    card.architectures = []  # unknown
    assert pick_device("auto", False).type == "cuda"


def test_no_rank_computes_on_a_card_where_another_one_has_none(card, monkeypatch):
    monkeypatch.setattr(distributed, "agreed", lambda wish: 1)
    assert pick_device("auto", False) == torch.device("cpu")


@pytest.mark.parametrize("name", ["bf16", "tf32"])
def test_a_precision_that_a_card_has_no_units_for_is_refused(card, name):
    assert pick_device("cuda", False, name).type == "cuda"
    card.capability = (7, 5)
    for device in ("auto", "cuda", "cuda:1"):
        with pytest.raises(UsageError, match=f"--precision {name}: Some Card .*8.0"):
            pick_device(device, False, name)
    assert pick_device("cpu", False, name).type == "cpu"
    assert pick_device("cuda", False, "fp32").type == pick_device("cuda", False).type == "cuda"


def test_tf32_is_not_recorded_for_a_card_that_has_none(card):
    cuda = torch.device("cuda")
    assert precision_name(settings("--precision", "tf32"), cuda) == "TF32"
    assert precision_name(settings(), cuda).startswith("TF32 in convolutions")
    card.capability = (7, 5)
    assert precision_name(settings(), cuda) == "float32"


# What float32 is computed in: these switches can be set on a CPU, too


def own_state():
    """Return PyTorch's switches, newer and older; None where an older one cannot be read."""
    backends = torch.backends
    state = [
        s.fp32_precision
        for s in (backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn)
    ]
    state += [s.fp32_precision for s in (backends.cuda.matmul, backends.mkldnn.matmul)]
    older = (
        lambda: backends.cudnn.allow_tf32,
        lambda: backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    )
    for read in older:
        try:
            state.append(read())
        except RuntimeError:
            state.append(None)
    return state


def newer(switch, value):
    switch.fp32_precision = value


def older(switch, value):
    switch.allow_tf32 = value


USERS = {
    "nothing": lambda: None,
    "the newer one of all": lambda: newer(torch.backends, "tf32"),
    "the newer one of all, strict": lambda: newer(torch.backends, "ieee"),
    "the newer one of CUDA": lambda: newer(torch.backends.cudnn, "ieee"),
    "the newer one of CPUs": lambda: newer(torch.backends.mkldnn, "bf16"),
    "the newer one of convolutions": lambda: newer(torch.backends.cudnn.conv, "ieee"),
    "the newer one of convolutions, none": lambda: newer(torch.backends.cudnn.conv, "none"),
    "the newer one of products": lambda: newer(torch.backends.cuda.matmul, "tf32"),
    "the older one of convolutions": lambda: older(torch.backends.cudnn, False),
    "the older one of products": lambda: older(torch.backends.cuda.matmul, True),
    "the oldest one of products": lambda: torch.set_float32_matmul_precision("medium"),
}


@pytest.fixture
def untouched():
    yield
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    for switch in (
        torch.backends,
        torch.backends.cudnn,
        torch.backends.mkldnn,
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,
    ):
        switch.fp32_precision = "none"


@pytest.mark.parametrize("user", USERS)
def test_what_is_computed_in_does_not_depend_on_a_user_s_switches_and_leaves_them_alone(
    untouched, user
):
    USERS[user]()
    before = own_state()
    inside = {}
    for name in ("fp32", "default", "tf32"):
        with computing(name):
            inside[name] = [
                s.fp32_precision for s in (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
            ]
            with computing("fp32"):
                nested = torch.backends.cudnn.conv.fp32_precision
        assert own_state() == before
        assert nested == "ieee"
    assert inside == {"fp32": ["ieee"] * 2, "tf32": ["tf32"] * 2, "default": [before[2], before[4]]}


@pytest.mark.parametrize(
    "user", ["nothing", *(user for user in USERS if "older" in user or "oldest" in user)]
)
def test_networks_that_read_the_older_switches_can_do_so_inside(untouched, user):
    """As `torch.backends.cudnn.flags` does, and torch.compile of PyTorch 2.9."""
    USERS[user]()
    for name in ("fp32", "tf32"):
        with computing(name):
            assert (
                torch.backends.cudnn.allow_tf32
                == torch.backends.cuda.matmul.allow_tf32
                == (name == "tf32")
            )
            assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else "highest")


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
