"""Every setting, once: its name, default, values and help, and what a data set, a method or a network change of it.

Command lines, `--help`, what a run stores, what may change on resume and what a run folder is called are derived from
the five classes below. A setting comes from, in rising order: its default, the script's own recipe, `by`, the command.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any, NamedTuple, TypeVar

METHODS = ("pgd", "trades", "mart")
ARCHS = ("ResNet18", "WRN-34-10", "WRN-28-10", "PreActResNet18")
DATASETS = ("cifar10", "cifar100", "tiny-imagenet", "digits", "folder")
CLASSES = {"cifar10": 10, "digits": 10, "cifar100": 100, "tiny-imagenet": 200}  # those of a folder are its own
STRATEGIES = ("random", "soft", "hard", "easy")
CHOICES_OF_NEGATIVES = tuple(strategy + adversarial for strategy in STRATEGIES for adversarial in ("", "_adv"))
AUGMENTATIONS = ("crop-flip", "crop", "none")
SCHEDULES = ("milestones", "cosine", "cyclic", "piecewise")
PREDICTIONS = ("final", "auxiliary1", "auxiliary2")
GATES = ("label", "predicted", "soft", "none")
PRECISIONS = ("default", "fp32", "tf32", "bf16")
ATTACKS = ("natural", "fgsm", "pgd", "cw", "autoattack", "adaptive", "noise", "square", "transfer")
BLIND = ("natural", "noise", "square", "transfer")  # those that need no gradient of the network
ALL_ATTACKS = tuple(name for name in ATTACKS if name != "square")  # which AutoAttack contains
FEATURES = ("weighted", "unweighted")
LARGEST_SIDE = 1024
APGD_STEPS = 100  # as in AutoAttack
# Settings that combine the method with something else, and what a run is called that has one
COMPANIONS = {"awp": "AWP", "ema": "EMA", "extra_data": "extra data", "label_smoothing": "label smoothing"}
COMPANIONS |= {"lr_schedule": "schedule", "warmup_lr": "lr warm-up", "gate": "gate", "ra_blocks": "RA blocks"}
NORMALISATIONS = {  # of red, green and blue, of training images in [0, 1], as published networks use them
    "cifar10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)},
    "cifar100": {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
    "tiny-imagenet": {"mean": (0.4802, 0.4481, 0.3975), "std": (0.277, 0.2691, 0.2821)},
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
}


@dataclass(frozen=True)
class Kind:
    """The values that a setting takes. name: how `options` reads them; numbers lie in [low, high].

    above, below: they do not reach these.
    """

    name: str
    low: float = 0
    high: float = math.inf
    above: bool = False
    below: bool = False
    of: int | None = None  # a number too large may be meant as a part of this, 8 as 8/255


def whole(low: int = 0, high: int = 2**31 - 1) -> Kind:
    return Kind("whole", low, high)


def number(low: float = 0, high: float = math.inf, above: bool = False, below: bool = False, of: int | None = None) -> Kind:
    return Kind("number", low, high, above, below, of)


EPOCHS, SIDE, SWITCH, TRUTH = Kind("epochs"), Kind("side", 16, LARGEST_SIDE), Kind("switch"), Kind("truth")
PATH, WORD, FILE_NAME, SEVERAL_ATTACKS = Kind("path"), Kind("word"), Kind("file name"), Kind("attacks")
MEAN, STD = Kind("mean", 0, 1), Kind("std", 0, 1, above=True)  # by channel
PATH_OR_OWN = Kind("path or own")  # `--resume` alone means this command's own run


class Setting(NamedTuple):
    """What there is to know of a setting besides its name and default.

    kind: a `Kind`, or the tuple of its choices. by: other defaults, by a data set's, method's or network's name or by a
    tuple of these that must all hold; later ones win. also: further spellings of its flag. several: the flag takes
    more than one value. free: may change on resume, since it does not change what is computed, only how far and where.
    required: the command must give it. group: the heading in --help that begins with it.
    """

    kind: Kind | tuple[str, ...]
    help: str
    by: Mapping[str | tuple[str, ...], Any] = {}
    also: tuple[str, ...] = ()
    several: bool = False
    free: bool = False
    required: bool = False
    group: str = ""


def setting(default: Any, kind: Kind | tuple[str, ...], help: str, **more: Any) -> Any:
    return field(default=default, metadata={"setting": Setting(kind, help, **more)})


@dataclass(frozen=True)
class Training:
    """A training script's settings; the defaults are the published recipe of ANCRA-TRADES on CIFAR-10.

    Digits are small and few, so their recipe is their own, and a digit, which has a hand, is never flipped. MART's beta
    and WRN-28-10's zeta are those of the authors' README of 2023-10-05.
    """

    method: str = setting("trades", METHODS, "objective", group="what is trained on what")
    dataset: str = setting("cifar10", DATASETS, "data set")
    arch: str = setting("ResNet18", ARCHS, "network")
    no_ra: bool = setting(False, SWITCH, "without reverse attention")
    no_anc: bool = setting(False, SWITCH, "without asymmetric negative contrast")
    batch_size: int = setting(128, whole(2), "images a training step", group="length and optimiser")
    test_batch_size: int | None = setting(
        None, whole(1), "images a batch of evaluation (default: 100, on CUDA what fits)", free=True
    )
    epochs: int = setting(120, whole(1), "epochs to train", by={"digits": 16}, free=True)
    milestones: tuple[int, ...] = setting((75, 90, 100), EPOCHS, "where lr is divided by 10", by={"digits": (11, 14)})
    lr: float = setting(0.01, number(0, above=True), "learning rate of SGD", by={"digits": 0.03})
    momentum: float = setting(0.9, number(0, 1), "momentum of SGD")
    weight_decay: float = setting(2e-4, number(0), "weight decay, on every parameter", also=("--wd",))
    epsilon: float = setting(8 / 255, number(0, 1, of=255), "L-infinity radius", by={"digits": 0.1}, group="attack")
    num_steps: int = setting(10, whole(1), "steps of a training attack")
    step_size: float = setting(0.007, number(0, 1, True, of=255), "size of an attack step", by={"digits": 0.02})
    inner: str = setting("ce", ("ce", "kl"), "what the untargeted training attack ascends")
    attack_cr_beta: float | None = setting(
        None, number(0), "weight of the auxiliary heads in training attacks (default: --cr_beta)"
    )
    beta: float = setting(6.0, number(0), "weight of the KL term of trades and mart", by={"mart": 5.0}, group="loss")
    alpha: float = setting(1.0, number(0, 1), "asymmetry of ANC; 1 freezes the natural side")
    zeta: float = setting(3.0, number(0), "weight of ANC", by={"WRN-28-10": 6.0})
    cr_beta: float = setting(2.0, number(0), "weight of the auxiliary heads")
    strategy: str = setting("random_adv", CHOICES_OF_NEGATIVES, "choice of negatives", group="negatives")
    warmup_epochs: int = setting(10, whole(0), "epochs in which every strategy chooses at random", by={"digits": 4})
    sample_class_number: int = setting(1, whole(1, 1000), "classes of negatives an anchor")
    sample_number: int = setting(1, whole(1, 1000), "negatives of each class")
    awp: float = setting(0.0, number(0), "adversarial weight perturbation; 0.005, 0.01 for pgd", group="combined with")
    awp_warmup: int = setting(10, whole(0), "epochs without --awp (no release trains mart well with it)", by={"pgd": 0})
    ema: float = setting(0.0, number(0, 1, below=True), "average the weights, 0.995, and evaluate, select and save the average")
    lr_schedule: str = setting("milestones", SCHEDULES, "cosine, cyclic: step by step; piecewise: at 1/2, 3/4")
    warmup_lr: int = setting(0, whole(0), "epochs in which the learning rate rises from 0")
    label_smoothing: float = setting(
        0.0, number(0, 1, below=True), "of the cross-entropy of pgd, and of trades on natural images; 0.1"
    )
    extra_data: str | None = setting(None, PATH, "npz of generated images: image (M, S, S, 3) uint8, label (M,)")
    extra_fraction: float = setting(
        0.7,
        number(0, 1, above=True, below=True),
        "share of --extra-data in a batch; an epoch sees each other image once (releases count all images of a batch)",
    )
    gate: str = setting(
        "label",
        GATES,
        "row of W that weights a map: of the label in training and the prediction else, of the prediction, of all by "
        "softmax, or none at all",
        group="network, images",
    )
    ra_blocks: int = setting(2, whole(1, 2), "last blocks with reverse attention; the first WRN code had 1")
    width: int | None = setting(
        None,
        whole(1, 1024),
        "channels of the first stage (64 as published), or a WRN's widen factor (10)",
        by={"digits": 12, ("digits", "WRN-34-10"): 1, ("digits", "WRN-28-10"): 1},
    )
    image_size: int = setting(32, SIDE, "side of digits' and folder's images", by={"tiny-imagenet": 64, "digits": 16})
    augmentation: str = setting(
        "crop-flip",
        AUGMENTATIONS,
        "crop: random shifts by an eighth of the side, zero-padded",
        by={"tiny-imagenet": "none", "digits": "none"},
    )
    val_size: int = setting(0, whole(0), "select the best epoch on N held-out training images, not on the test set")
    limit_train: int | None = setting(None, whole(2), "train on N images only, for trials")
    limit_test: int | None = setting(None, whole(1), "evaluate on N images only, for trials")
    eval_interval: int = setting(1, whole(1), "evaluate every N epochs, and after the last", free=True, group="log")
    log_interval: int = setting(100, whole(1), "log every N batches", free=True)
    tensorboard: bool = setting(False, SWITCH, "write what metrics.csv holds for TensorBoard, too", free=True)
    save_freq: int = setting(10, whole(1), "keep a checkpoint every N epochs", also=("-s",), free=True)
    seed: int = setting(1, whole(0), "seed of all that is random", group="seed and files")
    data_dir: str = setting(
        "./data",
        PATH,
        "where data sets go; for `folder`: train/<class>/ and test/<class>/ or val/<class>/. With both val selects the "
        "epoch. Images are squashed to --image-size, alpha is blended over black, grey becomes three channels",
        free=True,
    )
    model_dir: str = setting("./model/ANCRA", PATH, "beginning of the run folder's name")
    restart_epoch: int = setting(0, whole(0), "start after epoch N from the weights of --ckpt_url")
    ckpt_url: str | None = setting(None, PATH, "weights for --restart_epoch: a file or a run folder")
    tag: str | None = setting(None, FILE_NAME, "ends the run folder's name; tells runs of changed code apart")
    resume: str | bool | None = setting(None, PATH_OR_OWN, "continue this run, or PATH, a folder or last_state.pt")
    other_data: bool = setting(False, SWITCH, "let --resume go on with other images than those that the run had")
    overwrite: bool = setting(False, SWITCH, "replace the run that the folder holds; what is lost is said")
    compile: bool = setting(False, TRUTH, "train through torch.compile; needs a compiler", free=True, group="device")
    precision: str = setting(
        "default",
        PRECISIONS,
        "of training: PyTorch's own (on CUDA TF32 in convolutions), float32, TF32 in matrix products too, or bfloat16 "
        "autocast, also of the search of each epoch's PGD-40; verdicts are float32 whatever it is",
        also=("--amp",),
    )
    cuda_graph: bool = setting(True, TRUTH, "replay the training attack as one CUDA graph; same images", free=True)
    device: str = setting("auto", PATH, "auto, cpu, cuda or cuda:N", free=True)
    no_cuda: bool = setting(False, SWITCH, "use the CPU", free=True)
    sync_bn: bool = setting(False, SWITCH, "under torchrun: BatchNorm over the batches of all ranks; CUDA only")

    @property
    def weight_in_attacks(self) -> float:
        """Of the auxiliary heads in what training attacks ascend."""
        return self.cr_beta if self.attack_cr_beta is None else self.attack_cr_beta

    @property
    def extra_images(self) -> int:
        """How many images of a batch are from --extra-data."""
        return round(self.batch_size * self.extra_fraction) if self.extra_data else 0


@cache
def described(cls: type) -> dict[str, Setting]:
    """What there is to know of each setting of a class, by name, in the class's order."""
    return {f.name: f.metadata["setting"] for f in fields(cls)}


FREE = frozenset(name for name, about in described(Training).items() if about.free)


def again(name: str, default: Any, **changes: Any) -> Any:
    """A setting of `Training` in another script: another default, and whatever `changes` says."""
    same = described(Training)[name]._replace(by={}, free=False, group="")
    return field(default=default, metadata={"setting": same._replace(**changes)})


@dataclass(frozen=True)
class Checkpoint:
    """What every script takes that looks at a trained network; None is what the checkpoint or its data set says."""

    dataset: str | None = again("dataset", None, group="network and images")
    data_dir: str | None = again("data_dir", None)
    image_size: int | None = again("image_size", None)
    arch: str | None = again("arch", None)
    width: int | None = again("width", None)
    no_ra: bool = again("no_ra", False)
    gate: str | None = again("gate", None)
    ra_blocks: int | None = again("ra_blocks", None)
    predict: str = setting("final", PREDICTIONS, "head whose logits are the network's answer")
    mean: tuple[float, ...] | None = setting(
        None, MEAN, f"a network of normalised images: three numbers, or {', '.join(NORMALISATIONS)}; attacks see [0, 1]"
    )
    std: tuple[float, ...] | None = setting(None, STD, "as --mean")
    key: str | None = setting(None, WORD, "which weights of a file that holds several, such as model_ema")
    n_examples: int | None = setting(None, whole(1), "first N test images of a fixed shuffle", also=("--limit-test",))
    test_batch_size: int = again("test_batch_size", 200, help="images a batch", group="batch, attack, device")
    epsilon: float | None = again("epsilon", None, help="L-infinity radius on [0, 1] (default: the data set's)")
    step_size: float | None = again("step_size", None, help="size of an attack step (default: the data set's)")
    seed: int = again("seed", 1)
    precision: str = again(
        "precision",
        "default",
        kind=PRECISIONS[:3],
        also=(),
        help="of attacks on CUDA: PyTorch's own (TF32 in convolutions), float32, or TF32; verdicts are float32",
    )
    device: str = again("device", "auto")
    no_cuda: bool = again("no_cuda", False)


@dataclass(frozen=True)
class Evaluation(Checkpoint):
    """The settings of test_white_attack.py."""

    ckpt_url: tuple[str, ...] | None = setting(
        None,
        PATH,
        "checkpoint files or run folders; one is required",
        also=("--model-dir",),
        several=True,
        group="evaluation",
    )
    # a block of `utils.evaluation.autoattack` in one pass
    test_batch_size: int = again("test_batch_size", 250, help="images a batch", group="batch, attack, device")
    model: str | None = setting(None, PATH, "any classifier instead: package.module:function, or FILE.py:function")
    image_size: int | None = again("image_size", None, kind=whole(1, LARGEST_SIDE), help="side of digits and folder")
    attacks: tuple[str, ...] = setting(
        ("natural", "fgsm", "pgd", "cw", "autoattack"),
        SEVERAL_ATTACKS,
        f"which of {', '.join(ATTACKS)}; all but square by `all`",
    )
    num_steps: int = again("num_steps", 40, help="steps of PGD; CW takes half as many")
    random: bool = setting(True, TRUTH, "start FGSM, PGD and CW at random")
    restarts: int = setting(5, whole(1), "starts of the adaptive attack's PGD on each view")
    apgd_steps: int = setting(APGD_STEPS, whole(5), "steps of the adaptive attack's APGD; fewer for a first look")
    surrogate: str | None = setting(None, PATH, "a checkpoint whose gradients `transfer` and the adaptive attack take")
    diagnostics: bool = setting(False, SWITCH, "look for signs of gradient masking; two pictures")
    save_adversarial: str | None = setting(None, PATH, "npz for the worst image found of each one")
    log_path: str | None = setting(
        None, PATH, "log to append to; other files go beside it (default: test.log by the checkpoint or in ./evaluated)"
    )


FEATURES_SETTING = FEATURES, "weighted: after reverse attention, as published; unweighted: the last map before it"


@dataclass(frozen=True)
class Distances(Checkpoint):
    """The settings of feature_distance.py."""

    model_dir: str | None = setting(None, PATH, "run folder or file", also=("--ckpt_url",), required=True, group="distances")
    target_label: str | None = setting(None, WORD, "a class by name or number, or `all`", required=True)
    num_steps: int = again("num_steps", 10, help="steps of PGD")
    features: str = setting("weighted", *FEATURES_SETTING)
    strategy: str = again("strategy", "random", help="choice of negatives; _adv pushes them to look like class K")
    name: str | None = setting(None, FILE_NAME, "first part of the files' names (default: method, network, data set)")
    out: str = setting("./distances", PATH, "folder of the files")


@dataclass(frozen=True)
class Histograms:
    """The settings of draw_hist.py."""

    distances: tuple[str, ...] | None = setting(
        None, PATH, "files of feature_distance.py, or folders of them (default: ./distances)", several=True
    )
    labels: tuple[str, ...] | None = setting(None, WORD, "legend, one for each FILE (default: method)", several=True)
    dataset: str | None = again("dataset", None, help="take the files of one data set only")
    features: str | None = setting(None, FEATURES, "which of a file's two (default: the file's own choice)")
    out: str = setting("./plots", PATH, "folder of the figures")
    show: bool = setting(False, SWITCH, "also open a window")


@dataclass(frozen=True)
class Umap(Checkpoint):
    """The settings of draw_umap.py."""

    model_dir: tuple[str, ...] | None = setting(
        None,
        PATH,
        "run folders or checkpoint files, a panel for each",
        also=("--ckpt_url",),
        several=True,
        required=True,
        group="picture",
    )
    labels: tuple[str, ...] | None = setting(None, WORD, "titles of the panels (default: method)", several=True)
    adversarial: bool = setting(False, SWITCH, "embed the images' PGD examples together with them")
    num_steps: int = again("num_steps", 10, help="steps of PGD")
    features: str = setting("weighted", *FEATURES_SETTING)
    seed: int = again("seed", 42)
    name: str | None = setting(None, FILE_NAME, "first part of the files' names (default: what is drawn)")
    out: str = setting("./plots", PATH, "folder of the figures")
    show: bool = setting(False, SWITCH, "also open a window")


OF_A_COMMAND = ("resume", "other_data", "overwrite")  # settings that are no run's
S = TypeVar("S", Training, Evaluation, Distances, Histograms, Umap)


def resolve(cls: type[S], given: Mapping[str, Any], script: Mapping[str, Any] = {}) -> S:
    """A script's settings. script: its own defaults; given: what the command says. ValueError for unknown names."""
    values = {f.name: f.default for f in fields(cls)} | dict(script)
    chosen = {(values | dict(given)).get(name) for name in ("dataset", "method", "arch")}
    unknown = chosen - {None, *DATASETS, *METHODS, *ARCHS}
    if unknown:
        raise ValueError(f"{', '.join(map(repr, unknown))}: no data set, method or network known here")
    for name, about in described(cls).items():
        for names, default in about.by.items():
            if chosen.issuperset((names,) if isinstance(names, str) else names):
                values[name] = default
    if cls is Training:  # TRADES-ResNet18 of another method is MART-ResNet18
        method = dict(given).get("method", values["method"])
        values["model_dir"] = values["model_dir"].replace(values["method"].upper(), method.upper())
    return cls(**values | dict(given))


def combined(recipe: Mapping[str, Any]) -> list[str]:
    """What stored settings combine the method with, in words: `AWP 0.005`."""
    plain, unused = asdict(Training()), ("gate", "ra_blocks") if recipe.get("no_ra") else ()
    own = {key: recipe[key] for key in COMPANIONS if recipe.get(key, plain[key]) != plain[key] and key not in unused}
    if "extra_data" in own:
        own["extra_data"] = os.path.basename(own["extra_data"])
    return [f"{COMPANIONS[key]} {value}" for key, value in own.items()]


def dataset_defaults(dataset: str) -> Training:
    """The training defaults of a data set, which are also those of looking at its networks: eps, step, image size."""
    return resolve(Training, {"dataset": dataset})


def idle(settings: Training) -> tuple[str, ...]:
    """The settings of a run whose values change nothing, by name."""
    of_anc = ("strategy", "sample_class_number", "sample_number", "alpha", "zeta", "warmup_epochs")
    names = of_anc * settings.no_anc + ("beta",) * (settings.method == "pgd")
    names += ("cr_beta", "attack_cr_beta", "gate", "ra_blocks") * settings.no_ra + ("awp_warmup",) * (not settings.awp)
    names += ("extra_fraction",) * (not settings.extra_data)
    return names + ("milestones",) * (settings.lr_schedule != "milestones")


def stored(settings: Training) -> dict[str, Any]:
    """The settings that define a run, as checkpoints keep them: plain values, lists for tuples."""
    own = {name: value for name, value in asdict(settings).items() if name not in OF_A_COMMAND}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}


def of_today(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings of an older version of this code in the words of this one; those new since then are defaults."""
    recipe = dict(recipe)
    if {"amp", "tf32"} <= recipe.keys():
        amp, tf32 = recipe.pop("amp"), recipe.pop("tf32")
        recipe["precision"] = "bf16" if amp == "bf16" else "tf32" if tf32 is True else "fp32"
    return stored(Training()) | recipe


def restored(recipe: Mapping[str, Any]) -> Training:
    """What `stored` has made of settings, in this version or an older one. TypeError for unknown names."""
    return Training(**{name: tuple(v) if isinstance(v, list) else v for name, v in of_today(recipe).items()})
