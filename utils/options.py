"""Command lines: flags, defaults and what a wrong use says. Imports nothing slow, so that --help answers at once.

A setting comes from, in rising order: the published recipe below, the script's own recipe, the data set's, the command.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

ARCHS = ("ResNet18", "WRN-34-10", "WRN-28-10", "PreActResNet18")
DATASETS = ("cifar10", "cifar100", "tiny-imagenet", "digits", "folder")
STRATEGIES = ("random", "soft", "hard", "easy")
ATTACKS = ("natural", "fgsm", "pgd", "cw", "autoattack", "adaptive", "noise")
CHOICES_OF_NEGATIVES = [strategy + adversarial for strategy in STRATEGIES for adversarial in ("", "_adv")]
LARGEST_SIDE = 1024
AUGMENTATIONS = ("crop-flip", "crop", "none")
FEATURES = ("weighted", "unweighted")
GRACE = 5  # seconds that a rank waits for the launcher to end it after another rank has said why the job ends

TRAINING = {
    "method": "trades",
    "dataset": "cifar10",
    "arch": "ResNet18",
    "no_ra": False,
    "no_anc": False,
    "batch_size": 128,
    "test_batch_size": 100,
    "epochs": 120,
    "milestones": [75, 90, 100],
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 2e-4,
    "epsilon": 8 / 255,
    "num_steps": 10,
    "step_size": 0.007,
    "inner": "ce",
    "beta": 6.0,
    "alpha": 1.0,
    "zeta": 3.0,
    "cr_beta": 2.0,
    "strategy": "random_adv",
    "warmup_epochs": 10,
    "sample_class_number": 1,
    "sample_number": 1,
    "width": None,
    "image_size": 32,
    "augmentation": "crop-flip",
    "val_size": 0,
    "limit_train": None,
    "limit_test": None,
    "eval_interval": 1,
    "log_interval": 100,
    "save_freq": 10,
    "seed": 1,
    "data_dir": "./data",
    "model_dir": "./model/ANCRA",
    "restart_epoch": 0,
    "ckpt_url": None,
    "resume": None,
    "amp": "none",
    "tf32": False,
    "compile": False,
    "device": "auto",
    "no_cuda": False,
    "sync_bn": False,
}

CHECKPOINT = {
    "dataset": None,
    "arch": None,
    "no_ra": False,
    "width": None,
    "image_size": None,
    "test_batch_size": 200,
    "epsilon": 8 / 255,
    "step_size": 0.007,
    "n_examples": None,
    "seed": 1,
    "data_dir": "./data",
    "device": "auto",
    "no_cuda": False,
}

EVALUATION = CHECKPOINT | {
    "ckpt_url": None,
    "model": None,
    "attacks": ["natural", "fgsm", "pgd", "cw", "autoattack"],
    "num_steps": 40,
    "random": True,
    "restarts": 5,
    "surrogate": None,
    "diagnostics": False,
    "save_adversarial": None,
    "log_path": None,
}

_FEATURES = {"model_dir": None, "num_steps": 10, "features": "weighted", "name": None}
DISTANCE = CHECKPOINT | _FEATURES | {"target_label": None, "strategy": "random", "out": "./distances"}
HISTOGRAM = {
    "distances": ["./distances"],
    "labels": None,
    "dataset": None,
    "features": None,
    "out": "./figure",
    "show": False,
}
UMAP = CHECKPOINT | _FEATURES | {"labels": None, "adversarial": False, "seed": 42, "out": "./figure", "show": False}

# What a data set changes: digits are small and few, so the recipe is their own; the paper's three keep the published
# one, in which Tiny-ImageNet has larger images and no augmentation. A digit has a hand and is never flipped.
BY_DATASET = {
    "cifar10": {},
    "cifar100": {},
    "tiny-imagenet": {"image_size": 64, "augmentation": "none"},
    "digits": {
        "image_size": 16,
        "width": 12,
        "augmentation": "none",
        "epsilon": 0.1,
        "step_size": 0.02,
        "epochs": 16,
        "milestones": [11, 14],
        "lr": 0.03,
    },
    "folder": {},
}

# On --resume the run's own settings win, but for these, which do not change what is computed, only how far and where.
FREE_ON_RESUME = (
    "epochs",
    "eval_interval",
    "log_interval",
    "save_freq",
    "test_batch_size",
    "data_dir",
    "compile",
    "device",
    "no_cuda",
)


class UsageError(Exception):
    """Something the user can mend; one line on standard error, exit status 2."""


class RunError(Exception):
    """The run failed; one line on standard error, exit status 1."""


class Stopped(BaseException):
    """Interrupted or terminated, resumable. args: the signal's number and a line; exit status 128 + signal."""


class Parser(argparse.ArgumentParser):
    """Flags in both spellings (--model-dir, --model_dir), no abbreviations, errors of one line."""

    def __init__(self, doc: str, defaults: dict) -> None:
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self.defaults = defaults
        self.flags = {}  # setting -> what `add_argument` was told

    def flag(self, *names: str, help: str, **kwargs: object) -> None:
        """Add a flag given by its spellings with dashes, the first one naming the setting."""
        name = names[0].removeprefix("--").replace("-", "_")
        underscored = ["--" + n.removeprefix("--").replace("-", "_") for n in names if n.startswith("--")]
        dashed = [n.replace("_", "-") for n in underscored]
        spellings = dict.fromkeys([*names, *underscored, *dashed])
        default, self.flags[name] = self.defaults[name], kwargs
        if default is not None and kwargs.get("action") != "store_true":
            help += f" (default: {_shown(default)}{self._by_dataset(name)})"
        self.add_argument(*spellings, dest=name, help=help.replace("%", "%%"), **kwargs)

    def _by_dataset(self, name: str) -> str:
        others = {d: v[name] for d, v in BY_DATASET.items() if name in v and v[name] != self.defaults[name]}
        return "".join(f"; {d}: {_shown(value)}" for d, value in others.items())

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None):
        for arg in args or ():
            flag, _, value = arg.partition("=")
            if value == "--" and flag.startswith("-"):  # argparse takes it for no value at all and says nothing
                self.error(f"argument {flag}: expected a value, not '--'")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if not first_process():
            time.sleep(GRACE)
            sys.exit(2)
        self.exit(2, f"{self.prog}: error: {message}\n")


def several_processes() -> bool:
    """Whether torchrun has started this process as one of several ranks."""
    told = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return os.environ.keys() >= told and os.environ["WORLD_SIZE"] != "1"


def first_process() -> bool:
    """Whether this process speaks: the first rank under torchrun, or the only process."""
    return not several_processes() or os.environ["RANK"] == "0"


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def number(low: float, high: float = math.inf, *, open_low: bool = False) -> Callable[[str], float]:
    """A parser of real numbers in [low, high], fractions such as 8/255 included."""

    def parse(text: str) -> float:
        try:
            over, _, under = text.partition("/")
            value = float(over) / float(under) if under else float(over)
        except (ValueError, ZeroDivisionError):
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)) or (open_low and value == low):
            bound = f"above {low:g}" if open_low else f"of at least {low:g}"
            bound += "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {bound}")
        return value

    return parse


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """A parser of whole numbers in [low, high]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            bound = f"of at least {low}" if high == 2**31 - 1 else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bound}")
        return value

    return parse


def milestones(text: str) -> list[int]:
    """Epochs, rising, separated by commas; `none` for none."""
    if text == "none":
        return []
    epochs = [whole(1)(part) for part in text.split(",")]
    if epochs != sorted(set(epochs)):
        raise argparse.ArgumentTypeError(f"{text!r} does not rise; write epochs such as 75,90,100")
    return epochs


def attacks(text: str) -> list[str]:
    """Names of `ATTACKS`, separated by commas; `all` for all."""
    if text == "all":
        return list(ATTACKS)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ATTACKS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(ATTACKS)}, all")
    return list(dict.fromkeys(names))


def image_size(text: str) -> int:
    """Side of an image: a multiple of 8 from 16 on, so that every stage's map has at least 2x2 cells."""
    value = whole(16, LARGEST_SIDE)(text)
    if value % 8:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 8")
    return value


def truth(text: str) -> bool:
    """True or False, in the usual spellings."""
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return known[text.lower()]


def path(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path")
    if not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} has characters that cannot be shown")
    return text


def word(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty name")
    return text


def file_name(text: str) -> str:
    """The beginning of a file's name, without folders."""
    if not text.strip() or "/" in text or os.sep in text or text.startswith(".") or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a file name; folders go into --out")
    return text


def _data_flags(parser: Parser) -> None:
    parser.flag("--dataset", choices=DATASETS, help="data set")
    parser.flag(
        "--data-dir",
        type=path,
        metavar="DIR",
        help="where data sets lie or are downloaded to; for `folder`, "
        "the one with train/<class>/ and test/<class>/ or val/<class>/",
    )
    parser.flag("--image-size", type=image_size, metavar="N", help="side of the images of digits and folder")


def _network_flags(parser: Parser) -> None:
    parser.flag("--arch", choices=ARCHS, help="network")
    parser.flag(
        "--width",
        type=whole(1, 1024),
        metavar="N",
        help="channels of the first stage (default: 64; digits: 12), or a WRN's widen factor (default: 10; digits: 1)",
    )
    parser.flag("--no-ra", action="store_true", help="without reverse attention")


def _device_flags(parser: Parser) -> None:
    parser.flag("--seed", type=whole(0), metavar="N", help="seed of all that is random")
    parser.flag("--device", type=path, metavar="D", help="auto, cpu, cuda or cuda:N")
    parser.flag("--no-cuda", action="store_true", help="use the CPU")


def _training_parser(doc: str, recipe: dict) -> Parser:
    """Every flag of a training script. recipe: the script's own defaults."""
    parser = Parser(doc, TRAINING | recipe)
    flag = parser.flag
    flag("--method", choices=("pgd", "trades", "mart"), help="objective")
    _network_flags(parser)
    flag("--no-anc", action="store_true", help="without asymmetric negative contrast")
    _data_flags(parser)
    flag("--augmentation", choices=AUGMENTATIONS, help="crop: random shifts by an eighth of the side, zero-padded")
    flag(
        "--val-size",
        type=whole(0),
        metavar="N",
        help="hold out N training images and select the best epoch on them, not on the test set",
    )
    flag("--limit-train", type=whole(2), metavar="N", help="train on N images only, for trials")
    flag("--limit-test", type=whole(1), metavar="N", help="evaluate on N images only, for trials")
    flag("--batch-size", type=whole(2), metavar="N", help="images a training step")
    flag("--test-batch-size", type=whole(1), metavar="N", help="images a batch of evaluation")
    flag("--epochs", type=whole(1), metavar="N", help="epochs to train")
    flag("--milestones", type=milestones, metavar="E,E", help="epochs from whose start on lr is divided by 10")
    flag("--lr", type=number(0, open_low=True), metavar="X", help="learning rate of SGD")
    flag("--momentum", type=number(0, 1), metavar="X", help="momentum of SGD")
    flag("--weight-decay", "--wd", type=number(0), metavar="X", help="weight decay, on every parameter")
    flag(
        "--epsilon", type=number(0, 1), metavar="X", help="L-infinity radius of attacks, images in [0, 1]; 8/255 works"
    )
    flag("--num-steps", type=whole(1), metavar="N", help="steps of a training attack")
    flag("--step-size", type=number(0, 1, open_low=True), metavar="X", help="size of an attack step")
    flag("--inner", choices=("ce", "kl"), help="what the untargeted training attack ascends")
    flag("--beta", type=number(0), metavar="X", help="weight of the KL term of trades and mart")
    flag("--alpha", type=number(0, 1), metavar="X", help="asymmetry of ANC; 1 freezes the natural side")
    flag("--zeta", type=number(0), metavar="X", help="weight of ANC")
    flag("--cr_beta", type=number(0), metavar="X", help="weight of the auxiliary heads")
    flag("--strategy", choices=CHOICES_OF_NEGATIVES, help="choice of negatives")
    flag("--warmup-epochs", type=whole(0), metavar="N", help="epochs in which every strategy chooses at random")
    flag("--sample_class_number", type=whole(1, 1000), metavar="N", help="classes of negatives an anchor")
    flag("--sample_number", type=whole(1, 1000), metavar="N", help="negatives of each class")
    flag("--eval-interval", type=whole(1), metavar="N", help="evaluate every N epochs, and after the last")
    flag("--log-interval", type=whole(1), metavar="N", help="log every N batches")
    flag("--save-freq", "-s", type=whole(1), metavar="N", help="keep a checkpoint every N epochs")
    flag("--model-dir", type=path, metavar="DIR", help="beginning of the run folder's name")
    flag(
        "--resume",
        type=path,
        nargs="?",
        const=True,
        metavar="PATH",
        help="continue this run, or the one of PATH (a run folder or its last_state.pt)",
    )
    flag("--restart_epoch", type=whole(0), metavar="N", help="start behind epoch N from the weights of --ckpt_url")
    flag("--ckpt_url", type=path, metavar="FILE", help="weights for --restart_epoch")
    flag("--amp", choices=("none", "bf16"), help="precision of training's attacks and forwards; evaluation is float32")
    flag("--tf32", action="store_true", help="train with TF32 on CUDA; evaluation is float32")
    flag(
        "--compile",
        type=truth,
        nargs="?",
        const=True,
        metavar="BOOL",
        help="train through torch.compile; needs a C++ compiler",
    )
    _device_flags(parser)
    flag("--sync-bn", action="store_true", help="under torchrun: BatchNorm over the batches of all ranks; CUDA only")
    return parser


def impossible_setting(settings: dict) -> str | None:
    """The name of the first of a run's stored settings that no command line can have given; None where all could."""
    flags = _training_parser("", {}).flags
    for name, value in settings.items():
        kind, kwargs = type(value), flags[name]
        plain = kind in (bool, int, float, str, type(None)) or (kind is list and all(type(v) is int for v in value))
        if not plain:
            return name  # nothing that could grow when it is written out
        if value is None and TRAINING[name] is None:
            continue
        try:
            if "action" in kwargs:
                fits = kind is bool
            elif "choices" in kwargs:
                fits = kind is str and value in kwargs["choices"]
            else:
                text = ",".join(map(str, value)) or "none" if kind is list else str(value)
                fits = kwargs["type"](text) == value
        except (argparse.ArgumentTypeError, ValueError):
            fits = False
        if not fits:
            return name
    return None


def parse_training(doc: str, recipe: dict, argv: list[str]) -> argparse.Namespace:
    """Parse a training script's command line. recipe: the script's own defaults.

    Returns every setting of `TRAINING`, and `given`: the names of those that the command gave; `defaults`: the script's
    defaults for the data set, from which the run's folder tells what is special.
    """
    parser = _training_parser(doc, recipe)
    given = vars(parser.parse_args(argv))
    options = _merge(TRAINING | recipe, given)
    if options.restart_epoch and not options.ckpt_url:
        parser.error("--restart_epoch needs --ckpt_url FILE, the weights to start from")
    if options.ckpt_url and not options.restart_epoch:
        parser.error("--ckpt_url needs --restart_epoch N, the epoch its weights come from")
    if options.restart_epoch and options.resume is not None:
        parser.error("--restart_epoch starts a run from weights, --resume continues one; give one of them")
    if options.restart_epoch >= options.epochs:
        parser.error(f"--restart_epoch {options.restart_epoch} leaves nothing to train; --epochs is {options.epochs}")
    idle = (
        ("strategy", "sample_class_number", "sample_number", "alpha", "zeta", "warmup_epochs") if options.no_anc else ()
    )
    idle += ("beta",) if options.method == "pgd" else ()
    idle += ("cr_beta",) if options.no_ra else ()
    named = ", ".join(f"--{name}" for name in idle if name in given)
    if named and first_process():
        print(f"{parser.prog}: {named} accepted, no effect here", file=sys.stderr)
    options.given = sorted(given)
    options.defaults = vars(_merge(TRAINING | recipe, {"dataset": options.dataset, "arch": options.arch}))
    options.own = {key: (TRAINING | recipe)[key] for key in ("method", "dataset", "arch", "no_ra", "no_anc")}
    return options


def _checkpoint_flags(parser: Parser) -> None:
    """Those of `CHECKPOINT`: what every script that looks at a trained network takes."""
    _data_flags(parser)
    _network_flags(parser)
    parser.flag(
        "--n-examples",
        "--limit-test",
        type=whole(1),
        metavar="N",
        help="take N test images only, the first after a fixed shuffle",
    )
    parser.flag("--test-batch-size", type=whole(1), metavar="N", help="images a batch")
    parser.flag("--epsilon", type=number(0, 1), metavar="X", help="L-infinity radius, images in [0, 1]; 8/255 works")
    parser.flag("--step-size", type=number(0, 1, open_low=True), metavar="X", help="size of an attack step")
    _device_flags(parser)


def parse_evaluation(doc: str, argv: list[str]) -> argparse.Namespace:
    """Parse test_white_attack.py's command line; returns every setting of `EVALUATION`, and `given`."""
    parser = Parser(doc, EVALUATION)
    flag = parser.flag
    flag("--ckpt_url", "--model-dir", type=path, metavar="PATH", help="checkpoint file or run folder; required")
    flag("--model", type=path, metavar="M:F", help="any classifier instead: package.module:function that builds it")
    flag("--attacks", type=attacks, metavar="A,A", help=f"which of {', '.join(ATTACKS)}; or all")
    flag("--num-steps", type=whole(1), metavar="N", help="steps of PGD; CW takes half as many")
    flag("--random", type=truth, nargs="?", const=True, metavar="BOOL", help="start FGSM, PGD and CW at random")
    flag("--restarts", type=whole(1), metavar="N", help="starts of the adaptive attack's PGD on each view")
    flag("--surrogate", type=path, metavar="PATH", help="a checkpoint whose gradients the adaptive attack tries too")
    flag("--diagnostics", action="store_true", help="look for signs of gradient masking; two pictures")
    flag("--save-adversarial", type=path, metavar="FILE", help="npz for the worst image found of each one")
    flag(
        "--log_path",
        type=path,
        metavar="FILE",
        help="log to append to, beside which the other files go (default: test.log beside the checkpoint)",
    )
    _checkpoint_flags(parser)
    given = vars(parser.parse_args(argv))
    if ("ckpt_url" in given) == ("model" in given):
        parser.error("one of --ckpt_url PATH, a checkpoint file or a run folder, and --model M:F is required")
    options = argparse.Namespace(**EVALUATION | given)
    options.given = sorted(given)
    idle = () if "adaptive" in options.attacks else ("restarts",) if options.diagnostics else ("restarts", "surrogate")
    idle += ("arch", "width", "no_ra") if options.model else ()
    named = ", ".join(f"--{name}" for name in idle if name in given)
    if named and first_process():
        print(f"{parser.prog}: {named} accepted, no effect here", file=sys.stderr)
    return options


def _feature_flags(parser: Parser) -> None:
    """What feature_distance.py and draw_umap.py share besides `_checkpoint_flags`."""
    _checkpoint_flags(parser)
    parser.flag("--num-steps", type=whole(1), metavar="N", help="steps of PGD")
    parser.flag(
        "--features",
        choices=FEATURES,
        help="weighted: behind reverse attention, as published; unweighted: the last map before it",
    )


def parse_distance(doc: str, argv: list[str]) -> argparse.Namespace:
    """Parse feature_distance.py's command line; returns every setting of `DISTANCE`, and `given`."""
    parser = Parser(doc, DISTANCE)
    flag = parser.flag
    flag("--model_dir", "--ckpt_url", type=path, metavar="PATH", help="run folder or checkpoint file; required")
    flag("--target_label", type=word, metavar="K", help="a class by name or number, or `all`; required")
    _feature_flags(parser)
    flag("--strategy", choices=CHOICES_OF_NEGATIVES, help="choice of negatives; _adv pushes them to look like class K")
    flag("--name", type=file_name, help="first part of the files' names (default: method, network, data set)")
    flag("--out", type=path, metavar="DIR", help="folder of the files")
    return _required(parser, argv, {"model_dir": "a run folder or checkpoint file", "target_label": "a class or `all`"})


def parse_histogram(doc: str, argv: list[str]) -> argparse.Namespace:
    """Parse draw_hist.py's command line; returns every setting of `HISTOGRAM`, and `given`."""
    parser = Parser(doc, HISTOGRAM)
    flag = parser.flag
    flag("--distances", type=path, nargs="+", metavar="FILE", help="files of feature_distance.py, or folders of them")
    flag("--labels", type=word, nargs="+", metavar="NAME", help="legend, one for each FILE (default: method)")
    flag("--dataset", choices=DATASETS, help="take the files of one data set only")
    flag("--features", choices=FEATURES, help="which of the two that each file holds (default: the files' own choice)")
    _figure_flags(parser)
    return _required(parser, argv, {})


def parse_umap(doc: str, argv: list[str]) -> argparse.Namespace:
    """Parse draw_umap.py's command line; returns every setting of `UMAP`, and `given`."""
    parser = Parser(doc, UMAP)
    flag = parser.flag
    flag("--model_dir", "--ckpt_url", type=path, nargs="+", metavar="PATH", help="runs, a panel for each; required")
    flag("--labels", type=word, nargs="+", metavar="NAME", help="titles of the panels (default: method)")
    flag("--adversarial", action="store_true", help="embed the images' PGD examples together with them")
    _feature_flags(parser)
    flag("--name", type=file_name, help="first part of the files' names (default: what is drawn)")
    _figure_flags(parser)
    options = _required(parser, argv, {"model_dir": "run folders or checkpoint files"})
    if options.labels and len(set(options.labels)) < len(options.labels):
        parser.error("--labels names two panels alike")
    if options.labels and len(options.labels) != len(options.model_dir):
        parser.error(f"--labels names {len(options.labels)} panels and --model_dir {len(options.model_dir)}")
    return options


def _figure_flags(parser: Parser) -> None:
    parser.flag("--out", type=path, metavar="DIR", help="folder of the figures")
    parser.flag("--show", action="store_true", help="also open a window")


def _required(parser: Parser, argv: list[str], needed: dict[str, str]) -> argparse.Namespace:
    """The parser's defaults and what the command gave, `given` among it. needed: flags it must give, what they are."""
    given = vars(parser.parse_args(argv))
    for name, what in needed.items():
        if name not in given:
            parser.error(f"--{name} is required: {what}")
    options = argparse.Namespace(**parser.defaults | given)
    options.given = sorted(given)
    return options


def _merge(defaults: dict, given: dict) -> argparse.Namespace:
    """Defaults, then the data set's, then the command's."""
    dataset = given.get("dataset", defaults["dataset"])
    settings = defaults | BY_DATASET[dataset] | given
    if dataset == "digits" and "width" not in given and settings["arch"].startswith("WRN"):
        settings["width"] = 1
    return argparse.Namespace(**settings)


def train(doc: str, **recipe: object) -> NoReturn:
    """The whole of a training script: parse the command line, train, exit. recipe: the script's own defaults."""
    options = parse_training(doc, recipe, sys.argv[1:])

    def job() -> None:
        from utils.training import run

        run(options)

    guarded(job)


def guarded(job: Callable[[], None]) -> NoReturn:
    """Run `job` and exit: 0 done, 1 the run failed, 2 wrong use or input, 130 and 143 interrupted and terminated."""
    prog = os.path.basename(sys.argv[0])
    try:
        from utils.distributed import started

        with started():
            job()
    except UsageError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"{prog}: failed: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that vanished
        cause = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error
        print(f"{prog}: failed: {cause}; what was saved before is intact", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            line = (str(error) or type(error).__name__).splitlines()[0]
            print(f"{prog}: failed: torch.compile: {line}; --resume --compile False continues", file=sys.stderr)
            sys.exit(1)
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        print(f"{prog}: failed: out of memory; lower --batch-size, --test-batch-size or --width", file=sys.stderr)
        sys.exit(1)
    except Stopped as stop:
        signum, line = stop.args
        print(f"{prog}: {line}", file=sys.stderr)
        sys.exit(128 + signum)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    sys.exit(0)
