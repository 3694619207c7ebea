"""Networks of --model: functions of the user's own that return a classifier."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from models import Heads, ReverseAttentionNetwork
from models.reverse_attention import GateInput
from utils.data.datasets import Split, as_input, checksum_of
from utils.system.errors import UsageError, first_line

OURS = Path(__file__).resolve().parents[2]


class Foreign(nn.Module):
    """A network or function of the user's, whose logits are cast to float32."""

    def __init__(self, network: Callable[..., Tensor | Heads]) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, gate: GateInput = None, heads: bool = False) -> Tensor | Heads:
        """Return logits (N, C), or the `Heads` of a network that has some."""
        if not heads:
            return self.network(x).float()
        answer = self.network(x, gate, heads=True)
        auxiliary = tuple(logits.float() for logits in answer.auxiliary)
        return Heads(answer.final.float(), auxiliary, answer.features.float())


def load_foreign(model: str) -> tuple[nn.Module, dict]:
    """Call the function that --model names -> its network in eval mode, and what is known of it.

    Errors: UsageError where the function cannot be imported or called.
    """
    module_name, _, function = model.rpartition(":")
    folder = Path.cwd()
    if module_name.endswith(".py"):
        folder = Path(module_name).resolve().parent
        module_name = Path(module_name).stem
    try:
        with _imports_from(folder):
            module = importlib.import_module(module_name)
            network = getattr(module, function)()
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise UsageError(
            f"--model {model}: {type(error).__name__}: {first_line(error)}; name "
            "package.module:function or FILE.py:function, no arguments"
        ) from error

    # A network with heads, `model(x, gate, heads=True)`, is attacked at each of them.
    own_classifiers = getattr(network, "block_classifiers", None)
    info = {
        "arch": model,
        "dataset": None,
        "image_size": None,
        "reverse_attention": getattr(network, "reverse_attention", None) is True,
        "gate": getattr(network, "gate", None),
        "classifier": "own" if own_classifiers else "shared",
        "ra_blocks": getattr(network, "ra_blocks", None),
        "recipe": None,
        "notes": [],
        "file": module.__file__,
    }
    if not isinstance(network, ReverseAttentionNetwork):
        network = Foreign(network)
    return network.requires_grad_(False).eval(), info


@contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    """Let imports find the user's packages, also those called `models` and `utils` as ours are."""
    names = set()
    if folder != OURS:
        names = {"models", "utils"} & {path.stem for path in folder.iterdir()}
    ours = _remove_modules(names)
    path = sys.path[:]
    others = [entry for entry in path if not names or Path(entry).resolve() != OURS]
    sys.path[:] = [str(folder), str(Path.cwd()), *others]
    try:
        yield
    finally:
        sys.path[:] = path
        _remove_modules(names)
        sys.modules.update(ours)


def _remove_modules(packages: set[str]) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in names}


def foreign_checksum(network: nn.Module, info: dict, split: Split) -> str:
    """Return a checksum of a network of --model: its defining file, state dict and some logits.

    The logits cover what a function without a state dict keeps elsewhere.
    """
    with torch.no_grad():
        logits = network(as_input(split.images[:8]))
    file = Path(info["file"]).read_bytes()
    values = checksum_of([*network.state_dict().values(), logits])
    return hashlib.sha256(file + values.encode()).hexdigest()
