"""Every setting, once: its name, type, default and a line of help.

Command lines, --help, what a run stores, what may change on resume and the name of a run's folder
are derived from the classes below. The value of a setting comes from the command, else from the
file of --config, else from `DEFAULTS_OF`, else from the script's own recipe, else from the class.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Annotated, Any, Literal, get_args

from tyro import MISSING

from utils.system.values import (
    CODE,
    Count,
    CountOrNone,
    Epochs,
    FileNameOrNone,
    NotNegative,
    Path,
    PathOrFlagAlone,
    PathOrNone,
    Positive,
    Seeds,
    Share,
    ShareBelowOne,
    Switch,
    Whole,
    also,
    listed,
    network,
    number,
    one_of,
    whole,
)

Values = dict[str, Any]  # of settings, by their names

Method = Literal["pgd", "trades", "mart"]
Dataset = Literal["cifar10", "cifar100", "tiny-imagenet", "digits", "fashion-mnist", "folder"]
Strategy = Literal[
    "random", "random_adv", "soft", "soft_adv", "hard", "hard_adv", "easy", "easy_adv"
]
Arch = Literal["ResNet18", "WRN-34-10", "WRN-28-10", "PreActResNet18"]
Inner = Literal["ce", "kl"]
Norm = Literal["Linf", "L2"]
Gate = Literal["label", "predicted", "soft", "none"]
Classifier = Literal["shared", "own"]
Layer = Literal["weighted", "unweighted"]
Precision = Literal["default", "fp32", "tf32", "bf16"]
UpTo1024 = Annotated[int, whole(1, 1024)]
UpTo1024OrNone = Annotated[int | None, whole(1, 1024)]

ARCHS = get_args(Arch)
FEATURES = get_args(Layer)
NETWORK = network(ARCHS)

ATTACKS = (
    "natural",
    "fgsm",
    "pgd",
    "cw",
    "autoattack",
    "adaptive",
    "noise",
    "transfer",
    "square",
)
# Attacks that need no gradient of the network.
BLIND = ("natural", "noise", "square", "transfer")
ALL_ATTACKS = ATTACKS[:-1]  # Square is part of AutoAttack.
APGD_STEPS = 100  # as in AutoAttack

# Mean and standard deviation of red, green and blue of training images in [0, 1], as published
# networks use them.
MEANS = {
    "cifar10": (0.4914, 0.4822, 0.4465),
    "cifar100": (0.5071, 0.4865, 0.4409),
    "tiny-imagenet": (0.4802, 0.4481, 0.3975),
    "imagenet": (0.485, 0.456, 0.406),
}
STDS = {
    "cifar10": (0.2471, 0.2435, 0.2616),
    "cifar100": (0.2673, 0.2564, 0.2762),
    "tiny-imagenet": (0.277, 0.2691, 0.2821),
    "imagenet": (0.229, 0.224, 0.225),
}

# Settings that combine the method with something else, and what a run that has one is called.
COMPANIONS = {
    "norm": "norm",
    "awp": "AWP",
    "ema": "EMA",
    "optimizer": "optimiser",
    "extra_data": "extra data",
    "label_smoothing": "label smoothing",
    "lr_schedule": "schedule",
    "warmup_lr": "lr warm-up",
    "gate": "gate",
    "classifier": "classifier",
    "ra_blocks": "RA blocks",
}


@dataclass(frozen=True)
class FromFile:
    """What every script takes: settings that a file gives."""

    config: PathOrNone = None
    """JSON or YAML file of settings by name, such as a run's run.json; flags win over it"""


@dataclass(frozen=True)
class Training(FromFile):
    """The settings of a training script; the defaults are ANCRA-TRADES on CIFAR-10 as published."""

    # What is trained on what
    method: Method = "trades"
    """objective"""
    dataset: Dataset = "cifar10"
    """data set"""
    arch: Annotated[str, NETWORK] = "ResNet18"
    """network. A function of your own takes num_classes, and image_size and width if you like, and
    returns a module that turns images in [0, 1] into logits. Reverse attention needs features(x),
    a map or tokens (N, D, ...), and the linear layer fc, and forward has to be fc of their mean"""
    no_ra: Switch = False
    """train without reverse attention"""
    no_anc: Switch = False
    """train without asymmetric negative contrast"""

    # Length and optimiser
    batch_size: Annotated[int, whole(2)] = 128
    """images in a training step"""
    test_batch_size: CountOrNone = None
    """images in a batch of evaluation; if unset, 100, on CUDA what fits"""
    epochs: Count = 120
    """epochs to train"""
    milestones: Epochs = (75, 90, 100)
    """epochs at whose start the learning rate is divided by 10"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd, as published, or adamw, which suits transformers; its betas are 0.9 and 0.999"""
    lr: Positive = 0.01
    """learning rate"""
    momentum: Share = 0.9
    """momentum of sgd"""
    weight_decay: Annotated[NotNegative, also("--wd")] = 2e-4
    """weight decay: by sgd of every parameter, by adamw of those that have more than one dimension
    and no `pos` in their names, so not of BatchNorm, biases and position embeddings"""

    # Attack
    norm: Norm = "Linf"
    """norm of the ball of attacks: Linf steps along the gradient's signs, L2 along the gradient
    divided by its L2 norm. L2 radii: 0.5 as usual on CIFAR, 1 on Tiny-ImageNet, whose diagonal is
    twice as long, 1.5 on fashion-mnist, and 1.5 on digits, where TRADES keeps as much as in Linf
    at 0.1"""
    epsilon: NotNegative = 8 / 255
    """radius of the ball, for images in [0, 1]"""
    num_steps: Count = 10
    """steps of a training attack"""
    step_size: Positive = 0.007
    """size of an attack step"""
    inner: Inner = "ce"
    """loss that the untargeted training attack ascends"""
    attack_cr_beta: Annotated[float | None, number("[0, inf)")] = None
    """weight of the auxiliary heads in training attacks; if unset, that of --cr_beta"""

    # Loss
    beta: NotNegative = 6.0
    """weight of the KL term of trades and mart"""
    alpha: Share = 1.0
    """asymmetry of ANC; 1 freezes the natural side"""
    zeta: NotNegative = 3.0
    """weight of ANC"""
    cr_beta: NotNegative = 2.0
    """weight of the auxiliary heads"""

    # Negatives
    strategy: Strategy = "random_adv"
    """choice of negatives"""
    warmup_epochs: Whole = 10
    """epochs in which every strategy chooses at random"""
    sample_class_number: UpTo1024 = 1
    """classes of negatives for an anchor"""
    sample_number: UpTo1024 = 1
    """negatives of each class"""

    # What the method is combined with
    awp: NotNegative = 0.0
    """adversarial weight perturbation, such as 0.005, or 0.01 for pgd"""
    awp_warmup: Whole = 10
    """epochs without --awp (no release trains mart well with it)"""
    ema: ShareBelowOne = 0.0
    """average the weights, by 0.995 say, and evaluate, select and save the average"""
    lr_schedule: Literal["milestones", "cosine", "cyclic", "piecewise"] = "milestones"
    """cosine and cyclic change the learning rate at each step, piecewise at 1/2 and 3/4"""
    warmup_lr: Whole = 0
    """epochs in which the learning rate rises from 0"""
    label_smoothing: ShareBelowOne = 0.0
    """smoothing of pgd's cross-entropy and of that of trades on natural images, such as 0.1"""
    extra_data: PathOrNone = None
    """npz file of generated images: image (M, S, S, 3) uint8, label (M,)"""
    extra_fraction: Annotated[float, number("(0, 1)")] = 0.7
    """share of --extra-data in a batch. An epoch sees each other image once; releases count all
    images of a batch"""

    # Network and images
    gate: Gate = "label"
    """row of W that weights a map: that of the label in training and of the prediction elsewhere,
    that of the prediction, all of them by softmax, or none"""
    classifier: Classifier = "shared"
    """whose W weights maps and gives auxiliary logits: that of all heads, or an own one of each
    gated block, as in CAS"""
    ra_blocks: Literal[1, 2] = 2
    """last blocks with reverse attention; the first WRN code had 1"""
    width: UpTo1024OrNone = None
    """channels of the first stage, or the widen factor of a WRN; if unset, 64 or 10"""
    image_size: UpTo1024 = 32
    """side of the images of digits, fashion-mnist and a folder. 32 pads the 28x28 pixels of
    fashion-mnist by zeros; other sides scale them"""
    augmentation: Literal["crop-flip", "crop", "none"] = "crop-flip"
    """crop shifts images at random by up to an eighth of the side, padded by zeros"""
    val_size: Whole = 0
    """select the best epoch on N held-out training images, not on the test set"""
    limit_train: CountOrNone = None
    """train on N images only, for trials"""
    limit_test: CountOrNone = None
    """evaluate on N images only, for trials"""

    # Log
    eval_interval: Count = 1
    """evaluate every N epochs, and after the last"""
    log_interval: Count = 100
    """log every N batches"""
    tensorboard: Switch = False
    """write the content of metrics.csv for TensorBoard, too"""
    save_freq: Annotated[Count, also("-s")] = 10
    """keep a checkpoint every N epochs, and draw the curves"""

    # Seed and files
    seed: Seeds = 1
    """seed of all random numbers; of 1,2,3 each trains a run of its own. The same command goes on
    with those that were stopped, and ends with mean, standard deviation and range"""
    jobs: Count = 1
    """of several seeds, train N at once, which share the threads; each has the next CUDA device"""
    data_dir: Path = "./data"
    """where data sets are stored. A folder holds train/<class>/ and test/<class>/ or val/<class>/;
    if it has both, val selects the epoch. Its images are squashed to --image-size, alpha is blended
    over black, grey becomes three channels. The four idx files of fashion-mnist, with or without
    .gz, are taken where they lie here"""
    model_dir: Path = "./model/ANCRA"
    """beginning of the name of the run's folder"""
    restart_epoch: Whole = 0
    """start after epoch N from the weights of --ckpt_url"""
    ckpt_url: PathOrNone = None
    """weights for --restart_epoch: a file or a run folder"""
    tag: FileNameOrNone = None
    """end of the name of the run's folder; tells runs of changed code apart"""
    resume: PathOrFlagAlone = None
    """continue this run, or the one of PATH, a run folder or last_state.pt"""
    other_data: Switch = False
    """let --resume go on with other images than those that the run had"""
    overwrite: Switch = False
    """replace the run that the folder holds; says what is lost"""

    # Device
    compile: Switch = False
    """train through torch.compile; needs a compiler"""
    precision: Annotated[Precision, also("--amp")] = "default"
    """of training: PyTorch's own (TF32 in convolutions on CUDA), float32, TF32 in matrix products,
    too, or bfloat16 autocast, also in the search of each epoch's PGD-40; verdicts are float32"""
    cuda_graph: Switch = True
    """replay the training attack as one CUDA graph; same images"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    no_cuda: Switch = False
    """use the CPU"""
    sync_bn: Switch = False
    """under torchrun, compute BatchNorm over the batches of all ranks; CUDA only"""

    @property
    def attack_auxiliary_weight(self) -> float:
        """Weight of the auxiliary heads in what training attacks ascend."""
        return self.cr_beta if self.attack_cr_beta is None else self.attack_cr_beta

    @property
    def extra_images(self) -> int:
        """How many images of a batch are from --extra-data."""
        return round(self.batch_size * self.extra_fraction) if self.extra_data else 0


# Other defaults of `Training` by the values of these settings, or of several of them together;
# later rows win. Digits are small and few, and never flipped. The beta of mart and the zeta of
# WRN-28-10 are those of the authors' README of 2023-10-05.
DECIDING = ("dataset", "method", "arch", "optimizer", "norm")
DEFAULTS_OF = {
    ("tiny-imagenet",): {"image_size": 64, "augmentation": "none"},
    ("digits",): {
        "epochs": 16,
        "milestones": (11, 14),
        "lr": 0.03,
        "epsilon": 0.1,
        "step_size": 0.02,
        "warmup_epochs": 4,
        "width": 12,
        "image_size": 16,
        "augmentation": "none",
    },
    ("fashion-mnist",): {
        "epochs": 30,
        "milestones": (20, 26),
        "lr": 0.03,
        "epsilon": 0.1,
        "step_size": 0.02,
        "augmentation": "none",
    },
    ("mart",): {"beta": 5.0},
    ("pgd",): {"awp_warmup": 0},
    ("WRN-28-10",): {"zeta": 6.0},
    (CODE,): {"width": None, "ra_blocks": 1},
    ("digits", "WRN-28-10"): {"width": 1},
    ("digits", "WRN-34-10"): {"width": 1},
    ("adamw",): {"lr": 1e-3, "weight_decay": 0.05},
    ("digits", "adamw"): {"lr": 3e-3},
    ("L2",): {"epsilon": 0.5, "step_size": 0.1},
    ("tiny-imagenet", "L2"): {"epsilon": 1.0, "step_size": 0.2},
    ("digits", "L2"): {"epsilon": 1.5, "step_size": 0.3},
    ("fashion-mnist", "L2"): {"epsilon": 1.5, "step_size": 0.3},
}

# Settings that may change on resume: they decide how far and where to train, not what is computed.
FREE = {
    "test_batch_size",
    "epochs",
    "eval_interval",
    "log_interval",
    "tensorboard",
    "save_freq",
    "data_dir",
    "compile",
    "cuda_graph",
    "device",
    "no_cuda",
}

# Settings of a command, which its run does not store.
OF_A_COMMAND = ("config", "jobs", "resume", "other_data", "overwrite")


@dataclass(frozen=True)
class Checkpoint(FromFile):
    """What every script takes that looks at a trained network.

    None stands for what the checkpoint or its data set says.
    """

    dataset: Dataset | None = None
    """data set; if unset, the checkpoint's own"""
    data_dir: PathOrNone = None
    """where data sets are stored; if unset, where the training had them"""
    image_size: UpTo1024OrNone = None
    """side of the images of digits, fashion-mnist and a folder. 32 pads the 28x28 pixels of
    fashion-mnist by zeros; other sides scale them"""
    arch: Annotated[str | None, NETWORK] = None
    """network; if unset, the checkpoint's own. One of your own code has to be named"""
    width: UpTo1024OrNone = None
    """channels of the first stage, or the widen factor of a WRN"""
    no_ra: Switch = False
    """a network without reverse attention"""
    gate: Gate | None = None
    """row of W that weights a map, as in training"""
    classifier: Classifier | None = None
    """whose W weights maps, as in training; tensors tell it"""
    ra_blocks: Literal[1, 2] | None = None
    """last blocks with reverse attention"""
    predict: Literal["final", "auxiliary1", "auxiliary2"] = "final"
    """head whose logits are the network's answer"""
    mean: Annotated[tuple[float, ...] | None, listed(number("[0, 1]"), MEANS)] = None
    """a network of normalised images: three numbers, or the name of published ones (cifar10,
    cifar100, tiny-imagenet, imagenet); attacks see images in [0, 1]"""
    std: Annotated[tuple[float, ...] | None, listed(number("(0, 1]"), STDS)] = None
    """as --mean"""
    key: str | None = None
    """which weights of a file that holds several, such as model_ema"""
    n_examples: Annotated[int | None, whole(1), also("--limit-test")] = None
    """first N test images of a fixed shuffle"""
    test_batch_size: Count = 200
    """images in a batch"""
    norm: Norm | None = None
    """norm of the ball of attacks; if unset, that of the training"""
    epsilon: Annotated[float | None, number("[0, inf)")] = None
    """radius of the ball, for images in [0, 1]; if unset, that of the norm and the data set"""
    step_size: Annotated[float | None, number("(0, inf)")] = None
    """size of an attack step; if unset, that of the norm and the data set"""
    seed: Whole = 1
    """seed of all random numbers"""
    precision: Literal["default", "fp32", "tf32"] = "default"
    """of attacks on CUDA: PyTorch's own (TF32 in convolutions), float32 or TF32. Verdicts are
    float32 in any case"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    no_cuda: Switch = False
    """use the CPU"""


@dataclass(frozen=True)
class Evaluation(Checkpoint):
    """The settings of test_white_attack.py."""

    ckpt_url: Annotated[tuple[Path, ...], also("--model-dir")] = ()
    """checkpoint files or run folders; either this or --model is required"""
    test_batch_size: Count = 250
    """images in a batch"""
    model: PathOrNone = None
    """any classifier instead: package.module:function or FILE.py:function"""
    attacks: Annotated[tuple[str, ...], listed(one_of(ATTACKS), {"all": ALL_ATTACKS})] = ATTACKS[:5]
    """which of natural, fgsm, pgd, cw, autoattack, adaptive, noise, square, transfer; `all` means
    all but square"""
    num_steps: Count = 40
    """steps of PGD; CW takes half as many"""
    random: Switch = True
    """start FGSM, PGD and CW at random"""
    restarts: Count = 5
    """starts of the adaptive attack's PGD on each view"""
    precision: Precision = "default"
    """of attacks: on CUDA PyTorch's own (TF32 in convolutions), float32 or TF32; for a first look
    bfloat16 in all steps by gradients. Verdicts are float32 in any case"""
    apgd_steps: Annotated[int, whole(5)] = APGD_STEPS
    """steps of the adaptive attack's APGD; fewer for a first look"""
    apgd_restarts: Count = 1
    """starts of each APGD of the adaptive attack, and of each of its targets"""
    surrogate: PathOrNone = None
    """checkpoint whose gradients `transfer` and the adaptive attack take"""
    diagnostics: Switch = False
    """look for signs of gradient masking; draws two pictures"""
    save_adversarial: PathOrNone = None
    """npz file for the worst adversarial example of each image"""
    log_path: PathOrNone = None
    """log to append to; other files go beside it. If unset, test.log beside the checkpoint or in
    ./evaluated"""


@dataclass(frozen=True)
class Features(Checkpoint):
    """What both scripts take that look at the features of images and their PGD examples."""

    num_steps: Count = 10
    """steps of PGD"""
    features: Layer = "weighted"
    """weighted: after reverse attention, as published; unweighted: the last map before it"""
    name: FileNameOrNone = None
    """first part of the files' names; if unset, what they hold"""


@dataclass(frozen=True)
class Distances(Features):
    """The settings of feature_distance.py."""

    model_dir: Annotated[Path, also("--ckpt-url")] = MISSING
    """run folder or checkpoint file"""
    target_label: str = MISSING
    """a class by name or number, or `all`"""
    strategy: Strategy = "random"
    """choice of negatives; _adv pushes them to look like the class"""
    out: Path = "./distances"
    """folder of the files"""


@dataclass(frozen=True)
class Umap(Features):
    """The settings of draw_umap.py."""

    model_dir: Annotated[tuple[Path, ...], also("--ckpt-url")] = MISSING
    """run folders or checkpoint files, a panel for each"""
    labels: tuple[str, ...] | None = None
    """titles of the panels; if unset, the methods"""
    adversarial: Switch = False
    """embed the images' PGD examples together with them"""
    seed: Whole = 42
    """seed of all random numbers"""
    out: Path = "./plots"
    """folder of the figures"""
    show: Switch = False
    """also open a window"""


@dataclass(frozen=True)
class Histograms(FromFile):
    """The settings of draw_hist.py."""

    distances: tuple[Path, ...] = ()
    """files of feature_distance.py, or folders of them; if unset, ./distances"""
    labels: tuple[str, ...] | None = None
    """legend, a name for each file; if unset, the methods"""
    dataset: Dataset | None = None
    """take the files of one data set only"""
    features: Layer | None = None
    """which of the two features of a file; if unset, the file's own choice"""
    out: Path = "./plots"
    """folder of the figures"""
    show: Switch = False
    """also open a window"""


def is_code(arch: object) -> bool:
    """Whether a network is FILE.py:function, the user's own code, and none of `ARCHS`."""
    return ".py:" in str(arch)


def code_flags(arch: str) -> list[str]:
    """The flag that every command on a network of the user's own code has to have."""
    return ["--arch", arch] if is_code(arch) else []


def arch_name(arch: str) -> str:
    """What a network is called in the names of files: of FILE.py:function the function."""
    return arch.rpartition(":")[2]


def training_settings(given: Values, script: Mapping[str, Any] = {}) -> Training:
    """The settings of a training. script: a script's own recipe; given: what the command says."""
    recipe = {**asdict(Training()), **script}
    asked = {**recipe, **given}
    chosen = {asked[name] for name in DECIDING}
    if is_code(asked["arch"]):
        chosen.add(CODE)
    for owners, defaults in DEFAULTS_OF.items():
        if chosen.issuperset(owners):
            recipe.update(defaults)
    # TRADES-ResNet18 of another method is MART-ResNet18.
    own_method = recipe["method"].upper()
    recipe["model_dir"] = recipe["model_dir"].replace(own_method, asked["method"].upper())
    return Training(**{**recipe, **given})


def dataset_defaults(dataset: str, norm: str = Training.norm) -> Training:
    """The training defaults of a data set, whose eps, step and image size also hold elsewhere."""
    return training_settings({"dataset": dataset, "norm": norm})


def largest_radius(norm: str, side: int) -> float:
    """The radius of a ball that holds all images of this side, whichever is its centre."""
    return 1.0 if norm == "Linf" else math.sqrt(3 * side * side)


def beyond_all_images(norm: str, eps: float, step_size: float, side: int) -> str:
    """What is wrong with a ball and a step, or '' where neither leads beyond all images."""
    largest = largest_radius(norm, side)
    if max(eps, step_size) <= largest:
        return ""
    return (
        f"--epsilon {eps:.4g} and --step-size {step_size:.4g} must be at most {largest:.4g} for "
        f"--norm {norm} and images of side {side}"
    )


def fitting(recipe: Values) -> Values:
    """The settings of a stored recipe that a training has here."""
    return {name: value for name, value in recipe.items() if hasattr(Training, name)}


def combined(recipe: Values) -> list[str]:
    """What stored settings combine the method with, in words: `AWP 0.005`."""
    trained = Training(**recipe)
    without_effect = idle(trained)
    parts = []
    for name, title in COMPANIONS.items():
        value = getattr(trained, name)
        if value != getattr(Training, name) and name not in without_effect:
            parts.append(f"{title} {os.path.basename(str(value))}")  # of a path the file's name
    return parts


def idle(settings: Training) -> tuple[str, ...]:
    """The names of the settings of a run whose values change nothing."""
    negatives = ("strategy", "sample_class_number", "sample_number", "warmup_epochs")
    are_idle = {
        ("alpha", "zeta", *negatives): settings.no_anc,
        ("beta",): settings.method == "pgd",
        ("momentum",): settings.optimizer != "sgd",
        ("cr_beta", "attack_cr_beta", "gate", "classifier", "ra_blocks"): settings.no_ra,
        ("awp_warmup",): not settings.awp,
        ("extra_fraction",): not settings.extra_data,
        ("milestones",): settings.lr_schedule != "milestones",
    }
    return tuple(chain.from_iterable(names for names, holds in are_idle.items() if holds))


def stored(settings: Training) -> Values:
    """The settings that define a run, as checkpoints keep them."""
    return {name: value for name, value in asdict(settings).items() if name not in OF_A_COMMAND}
