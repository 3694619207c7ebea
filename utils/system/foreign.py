"""Networks of the user's own code: those that --arch trains, and those that --model evaluates."""

import copy
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from models import Heads, ReverseAttentionNetwork
from models.reverse_attention import GateInput, pool
from utils.system.errors import UsageError, first_line
from utils.system.settings import is_code

OURS = Path(__file__).resolve().parents[2]


# --arch FILE.py:function


class OwnNetwork(ReverseAttentionNetwork):
    """A module of the user's with the interface of the networks in `models`.

    network: turns images (N, 3, H, W) in [0, 1] into logits (N, C). With reverse attention its
    `features(x)`, a map or tokens (N, D, ...), is the map of the one gated block, and its linear
    layer `fc` the classifier. Features of a plain network are the input of its last linear layer,
    or the logits where there is none. A state dict is that of `network`.
    """

    def __init__(self, network: nn.Module, reverse_attention: bool) -> None:
        super().__init__()
        self.network = network
        self.reverse_attention = reverse_attention
        self.last_input = None
        linears = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        if linears and not reverse_attention:
            linears[-1].register_forward_pre_hook(self.keep_input)

    def forward(self, x: Tensor, gate: GateInput = None, heads: bool = False) -> Tensor | Heads:
        if self.reverse_attention:
            return super().forward(x, gate, heads)
        final = self.network(x)
        features = final if self.last_input is None else self.last_input.flatten(1)
        self.last_input = None
        return Heads(final, (), features, features) if heads else final

    def keep_input(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep what the last linear layer gets; a hook that runs before its forward."""
        self.last_input = inputs[0]

    def trunk(self, x: Tensor) -> Tensor:
        z = self.network.features(x)
        return z.reshape(*z.shape[:2], -1, 1)

    def last_blocks(self) -> tuple[nn.Module, nn.Module]:
        return nn.Identity(), nn.Identity()

    @property
    def classifier(self) -> nn.Linear:
        """The linear layer of all heads."""
        return self.network.fc

    def add_block_classifiers(self) -> None:
        """Give the block a classifier of its own, which the state dict has, too."""
        super().add_block_classifiers()
        self.network.block_classifiers = self.block_classifiers

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Return the state dict of the user's module."""
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: object, **kwargs: object) -> object:
        """Load a state dict of the user's module."""
        return self.network.load_state_dict(*args, **kwargs)


def build_own(
    arch: str,
    num_classes: int,
    *,
    reverse_attention: bool,
    image_size: int,
    gate: str,
    classifier: str,
    ra_blocks: int,
    width: int | None = None,
) -> nn.Module:
    """Build the network of FILE.py:function, and try it on images; arguments as of `build_model`.

    The function gets num_classes, width where it is given, and image_size and reverse_attention
    where it names them. Errors: UsageError where it does not return such a network.
    """
    given = {"num_classes": num_classes}
    if width is not None:
        given["width"] = width
    offered = {"image_size": image_size, "reverse_attention": reverse_attention}
    images = torch.linspace(0, 1, 6 * image_size**2).view(2, 3, image_size, image_size)
    try:
        with torch.random.fork_rng(devices=[]):
            network, _ = _run(arch, given, offered)
            if not isinstance(network, nn.Module):
                raise TypeError(f"it returns {type(network).__name__}, no torch.nn.Module")
            with torch.no_grad():
                for training in (True, False):
                    trial = copy.deepcopy(network).train(training)
                    shape = getattr(trial(images), "shape", None)
                    if shape != (2, num_classes):
                        raise ValueError(f"its answer is {shape}, not logits {(2, num_classes)}")
                if isinstance(network, ReverseAttentionNetwork):
                    model = network
                elif reverse_attention:
                    model = _with_one_block(network, images, ra_blocks)
                else:
                    model = OwnNetwork(network, False)
            model.reverse_attention = reverse_attention
            model.gate = gate
            model.ra_blocks = ra_blocks
            if reverse_attention and classifier == "own":
                model.add_block_classifiers()
            return model
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise UsageError(f"--arch {arch}: {first_line(error)}") from error


def _with_one_block(network: nn.Module, images: Tensor, ra_blocks: int) -> OwnNetwork:
    """Return a module with reverse attention. ValueError where it has nothing for it."""
    classifier = getattr(network, "fc", None)
    if not isinstance(classifier, nn.Linear) or not hasattr(network, "features"):
        raise ValueError("no features(x) and linear fc for reverse attention; add --no-ra")
    if ra_blocks > 1:
        raise ValueError("it has one block for reverse attention; leave --ra-blocks out")
    model = OwnNetwork(network, True).eval()
    if not torch.allclose(classifier(pool(model.trunk(images))), network(images), 1e-3, 1e-5):
        raise ValueError(
            "forward(x) is not fc(features(x).flatten(2).mean(2)); mend it, or add --no-ra"
        )
    return model.train()


def source_of(arch: str) -> str | None:
    """Return a checksum of the file of FILE.py:function; None of a network in `models`."""
    if not is_code(arch):
        return None
    return hashlib.sha256(Path(arch.rpartition(":")[0]).read_bytes()).hexdigest()


# --model module:function


class ToFloat32(nn.Module):
    """A network or function whose logits, or `Heads`, are cast to float32."""

    def __init__(self, network: Callable[..., Tensor | Heads]) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, *args: GateInput, **kwargs: bool) -> Tensor | Heads:
        return tree_map_only(Tensor, Tensor.float, self.network(x, *args, **kwargs))


def load_foreign(model: str) -> tuple[nn.Module, dict]:
    """Call the function that --model names -> its network in eval mode, and what is known of it.

    Errors: UsageError where the function cannot be imported or called.
    """
    try:
        network, file = _run(model)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise UsageError(
            f"--model {model}: {first_line(error)}; name "
            "package.module:function or FILE.py:function, no arguments"
        ) from error

    info = {
        "arch": model,
        "dataset": None,
        "image_size": None,
        "reverse_attention": getattr(network, "reverse_attention", None) is True,
        "recipe": None,
        "notes": [],
        "file": file,
    }
    if info["reverse_attention"]:  # `model(x, gate, heads=True)`, which is attacked at each head
        info["gate"] = getattr(network, "gate", None)
        info["classifier"] = "own" if getattr(network, "block_classifiers", None) else "shared"
        info["ra_blocks"] = getattr(network, "ra_blocks", None)
    if not isinstance(network, ReverseAttentionNetwork):
        network = ToFloat32(network)
    return network.requires_grad_(False).eval(), info


# The user's code


def _run(
    code: str, given: Mapping[str, object] = {}, offered: Mapping[str, object] = {}
) -> tuple[object, str]:
    """Call package.module:function or FILE.py:function -> what it returns, and its file.

    given: its arguments. offered: further ones, for a function that names them.
    """
    module_name, _, function_name = code.rpartition(":")
    folder = Path.cwd()
    if module_name.endswith(".py"):
        folder = Path(module_name).resolve().parent
        module_name = Path(module_name).stem
    with _imports_from(folder):
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
        wanted = {
            name: value
            for name, value in offered.items()
            if name in inspect.signature(function).parameters
        }
        return function(**given, **wanted), module.__file__


@contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    """Let imports find the user's packages, also those called `models` and `utils` as ours are."""
    names = set()
    if folder != OURS:
        names = {"models", "utils"} & {path.stem for path in folder.iterdir()}
    ours = _take_modules(names)
    path = sys.path[:]
    others = [entry for entry in path if not names or Path(entry).resolve() != OURS]
    sys.path[:] = [str(folder), str(Path.cwd()), *others]
    try:
        yield
    finally:
        sys.path[:] = path
        _take_modules(names)
        sys.modules.update(ours)


def _take_modules(packages: set[str]) -> dict[str, ModuleType]:
    """Forget the modules of some packages, so that they are imported anew, and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in names}
