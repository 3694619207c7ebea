"""Features of networks, the distances and clusters they form, and the jobs of three scripts.

Features are the pooled last map of a network: *weighted* after reverse attention, which is what the
classifier sees, and *unweighted* before it. Weighting by the predicted class builds a part of the
clustering in, so everything is measured on both. Unweighted means before the last gate: the block
before it was gated by its own prediction.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from utils.attacks import Attack, Objective, cross_entropy, pgd
from utils.data.datasets import Split, over_images, shuffled
from utils.data.subject import Subject, load_subject
from utils.figures.plots import Draw, Panel, draw_embedding, draw_histogram, save_figure
from utils.negatives import choose_negatives
from utils.step import towards_labels
from utils.system import distributed
from utils.system.attack_copy import frozen
from utils.system.devices import computing
from utils.system.errors import RunError, UsageError, first_line
from utils.system.files import read_arrays, require_writable, write_arrays
from utils.system.log import progress_bar
from utils.system.provenance import provenance
from utils.system.settings import FEATURES, Distances, Histograms, Umap, arch_name

BLOCK = 200  # negatives come from the same 200 images, whatever --test-batch-size is
NEIGHBOURS = 12
PAIRS = {"PP": "image and its PGD example", "NP": "image and a negative"}
METRICS = {"cosine": "cosine similarity", "L2": "L2 distance"}
# Settings of distances, of which a note says that files in one figure differ in them
COMPARED = (
    "target_name",
    "norm",
    "epsilon",
    "step_size",
    "num_steps",
    "strategy",
    "n_examples",
)
OUT_HINT = "name another folder by --out"
Values = dict[str, np.ndarray]  # of M images, (M,) each, by `layer_pair_metric`
Measured = tuple[dict, Values]  # the settings of a file of distances, and what it holds


# Features and what is measured on them


class Features(NamedTuple):
    """Features of M images, on the CPU.

    weighted, unweighted: (M, F). logits: (M, C), the final ones.
    """

    weighted: Tensor
    unweighted: Tensor
    logits: Tensor


def extract(
    net: nn.Module, split: Split, batch_size: int, attack: Attack | None = None
) -> Features:
    """Compute the features of the images of a split, attacked or not.

    net: what `frozen` yields. attack: gets the labels of the split, and the numbers of its images,
    which seed its noise.
    Errors: RunError where features are not finite.
    """

    def forward(x, labels, numbers):
        if attack is not None:
            x = attack(net, x, labels, numbers)
        with torch.no_grad():
            heads = net(x, heads=True)
        return heads.features, heads.unweighted, heads.logits(net.predict)

    count = len(split.labels)
    with progress_bar(total=count, unit="img") as bar:
        features = Features(*over_images(split, batch_size, forward, bar.update))
    if not all(part.isfinite().all() for part in features):
        raise RunError("the network's features are not finite; its training has diverged")
    return features


def pgd_attack(
    objective: Callable[[nn.Module, Tensor], Objective],
    subject: Subject,
    settings: Distances | Umap,
) -> Attack:
    """Return the figures' PGD, which starts from x + 0.001 N(0, 1), as an attack."""
    return pgd(
        objective,
        subject.eps,
        subject.step_size,
        settings.num_steps,
        start="normal",
        seed=settings.seed,
        norm=subject.norm,
    )


def choose_in_blocks(labels: Tensor, logits: Tensor | None, strategy: str, seed: int) -> Tensor:
    """Choose one negative, never of its own class, for each image of a test set.

    The set is shuffled, since folders come sorted by class, and cut into blocks of `BLOCK` images,
    from which `choose_negatives` chooses. A block of a single class gets as many images of others.

    labels: (N,). logits: (N, C) of the natural images, None where strategy is `random`.
    Returns the indices of the negatives, (N,). Errors: UsageError where there is a single class.
    """
    if len(labels.unique()) < 2:
        raise UsageError(
            "the test images are of a single class, and negatives are of another; "
            "raise --n-examples"
        )
    generator = torch.Generator().manual_seed(seed)
    negatives = torch.empty_like(labels)
    order = shuffled(len(labels), seed)
    for anchors in order.split(BLOCK):
        block = anchors
        if len(labels[block].unique()) < 2:
            others = order[labels[order] != labels[block[0]]]
            block = torch.cat([block, others[:BLOCK]])
        block_logits = None if logits is None else logits[block]
        chosen = choose_negatives(block_logits, labels[block], strategy, generator)
        negatives[anchors] = block[chosen[: len(anchors), 0]]
    return negatives


def compare(first: Tensor, second: Tensor) -> dict[str, np.ndarray]:
    """Measure the rows of one (M, F) against those of another, by each of `METRICS` -> (M,)."""
    first = first.double()
    second = second.double()
    cosine = F.cosine_similarity(first, second, eps=1e-30)
    return {"cosine": cosine.numpy(), "L2": (first - second).norm(dim=1).numpy()}


def measure_clusters(features: Tensor, labels: Tensor) -> dict[str, float]:
    """Measure how far classes are clusters: mean `silhouette`, and `agreement` of neighbours.

    Distances are correlation distances, as in UMAP: cosine distances of rows less their mean.
    Agreement is the share of the `NEIGHBOURS` nearest images, the image itself left out, that are
    of its class. features: (M, F).
    """
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    centred = (features - features.mean(1, keepdim=True)).numpy()
    labels = labels.numpy()
    silhouette = silhouette_score(centred, labels, metric="cosine")
    neighbours = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine").fit(centred)
    nearest = neighbours.kneighbors(return_distance=False)
    is_same = labels[nearest] == labels[:, None]
    return {"silhouette": float(silhouette), "agreement": float(is_same.mean())}


def embed(features: Tensor, seed: int) -> np.ndarray:
    """Embed features (M, F), M > `NEIGHBOURS`, by UMAP with the paper's settings -> (M, 2)."""
    try:
        import umap  # takes seconds to load
    except RuntimeError as error:  # numba has no folder to keep compiled code in
        hint = "set NUMBA_CACHE_DIR to a folder that can be written"
        raise RunError(f"UMAP cannot be loaded ({first_line(error)}); {hint}") from error

    model = umap.UMAP(
        n_neighbors=NEIGHBOURS,
        min_dist=0.01,
        metric="correlation",
        densmap=True,
        dens_lambda=1.5,
        random_state=seed,
        n_jobs=1,
    )
    return model.fit_transform(features.numpy())


# Names


def has_gate(network: dict) -> bool:
    """Return whether a network weights its features. network: what a checkpoint says it is."""
    return network.get("reverse_attention") is True and network.get("gate") != "none"


def layers_of(network: dict) -> tuple[str, ...]:
    """Return the kinds of features of a network; without a gate nothing is weighted."""
    return FEATURES if has_gate(network) else ("unweighted",)


def feature_name(layer: str, networks: Iterable[dict]) -> str:
    """Return what features of some networks are called."""
    return f"{layer} features" if any(map(has_gate, networks)) else "features"


def class_names(split: Split) -> list[str]:
    """Return what people call the classes, the first synonym of each."""
    return [synonyms.split(",")[0] for synonyms in split.words or split.classes]


def find_classes(wanted: str, split: Split) -> list[int]:
    """Return the classes that `--target_label` means: `all`, a name, a synonym or a number.

    A name wins over a number. Errors: UsageError where there is no image of such a class.
    """
    present = split.labels.unique().tolist()
    if wanted == "all":
        return present

    spellings = split.words or split.classes
    name = wanted.casefold()
    chosen = [k for k in present if name in spellings[k].casefold().split(", ")]
    if not chosen:
        chosen = [k for k in present if wanted in (split.classes[k], str(k))]
    if not chosen:
        raise UsageError(
            f"no test image is of a class {wanted!r}: give a number, a name such as "
            f"{class_names(split)[0]}, or all; or raise --n-examples"
        )
    return chosen


def file_stem(*parts: str) -> str:
    """Join parts of a file's name, leave empty ones out, and replace what file systems forbid."""
    return re.sub(r"[^\w.+-]+", "_", "-".join(filter(None, parts))).lstrip(".")


# Files


def require_own(files: Iterable[Path], subjects: Sequence[Subject]) -> None:
    """Make the folder of npz files. Errors: UsageError where one holds figures of other runs."""
    for file in files:
        require_writable(file.parent, OUT_HINT)
        if file.exists() and read_arrays(file)[0].get("checkpoints") != checkpoint_paths(subjects):
            raise UsageError(f"{file} holds figures of another run; give --name or --out")


def checkpoint_paths(subjects: Sequence[Subject]) -> list[str]:
    """Return the absolute paths of the checkpoints of some runs."""
    return [str(subject.file.resolve()) for subject in subjects]


def describe_origin(subjects: Sequence[Subject], settings: Distances | Umap) -> dict:
    """Return what every npz file says of settings, checkpoints, the attack and the computer."""
    first = subjects[0]
    return asdict(settings) | {
        "checkpoints": checkpoint_paths(subjects),
        "dataset": first.dataset,
        "norm": first.norm,
        "epsilon": first.eps,
        "step_size": first.step_size,
        "notes": [subject.notes for subject in subjects],
        "provenance": provenance(first.split.labels.device, settings.seed),
    }


def save(draw: Draw, file: Path, show: bool) -> None:
    """Save a figure as PNG and PDF. show: whether a window is to show it, too."""
    save_figure(draw, file, plt.figure if show else Figure)
    print(f"saved {file} and .pdf")


# feature_distance.py


def feature_distance(settings: Distances) -> None:
    """Measure PP and NP distances of one class or all; print and save them.

    There is a file for each class and, of several classes, one for all of them together.
    """
    subject = load_subject(settings, settings.model_dir)
    split = subject.split
    targets = find_classes(settings.target_label, split)
    strategy = "" if settings.strategy == "random" else settings.strategy
    name = settings.name or file_stem(
        subject.method, arch_name(subject.info["arch"]), subject.dataset, strategy
    )
    titles = {target: class_names(split)[target] for target in targets}
    if len(targets) > 1:
        titles["all"] = "all classes"
    files = {target: Path(settings.out) / f"{name}-{target}.npz" for target in titles}
    distributed.from_first(lambda: require_own(files.values(), [subject]))

    labels, values = measure_distances(subject, targets, settings)
    if not distributed.first():
        return

    print(f"{name}: {subject.described()}; NP: {settings.strategy} negatives")
    print(f"PP: PGD-{settings.num_steps}, {subject.radius}, on the answer")
    about = {
        **describe_origin([subject], settings),
        "name": name,
        "method": subject.method,
        "arch": subject.info["arch"],
        "reverse_attention": subject.info["reverse_attention"],
        "gate": subject.info.get("gate"),
    }
    for target, title in titles.items():
        chosen = slice(None) if target == "all" else labels == target
        of_class = {key: array[chosen] for key, array in values.items()}
        write_arrays(files[target], about | {"target": target, "target_name": title}, **of_class)
        print(f"\n{files[target]}: class {target} ({title}), {len(of_class['indices'])} images")
        print_distances(of_class, layers_of(subject.info), settings.features)


def measure_distances(
    subject: Subject, targets: list[int], settings: Distances
) -> tuple[np.ndarray, Values]:
    """Measure PP and NP distances of the M images of some classes.

    Returns their labels (M,), and the arrays (M,) of their files: the distances, and the numbers of
    the images and of their negatives in the test set.
    """
    split = subject.split
    labels = split.labels.cpu()
    rows = torch.isin(labels, torch.tensor(targets)).nonzero().squeeze(1)
    anchors = split.take(rows)
    strategy, _, adversarial = settings.strategy.partition("_")
    batch_size = settings.test_batch_size

    def like_anchors(net, anchor_labels):
        weight = subject.auxiliary_weight
        return lambda x: towards_labels(net(x, heads=True), anchor_labels, weight)

    with frozen(subject.model) as net, computing(settings.precision):
        logits = None
        if strategy != "random":
            logits = extract(net, split, batch_size).logits
        negatives = split.take(choose_in_blocks(labels, logits, strategy, settings.seed)[rows])

        natural = extract(net, anchors, batch_size)
        attack = pgd_attack(cross_entropy, subject, settings)
        attacked = extract(net, anchors, batch_size, attack)

        # Negatives are pushed towards their anchors' labels, from noise of their anchors' numbers.
        push = pgd_attack(like_anchors, subject, settings) if adversarial else None
        pushed = negatives._replace(labels=anchors.labels, numbers=anchors.numbers)
        negative = extract(net, pushed, batch_size, push)

    values = {"indices": anchors.numbers.numpy(), "negatives": negatives.numbers.numpy()}
    for layer in FEATURES:
        for pair, other in (("PP", attacked), ("NP", negative)):
            distances = compare(getattr(natural, layer), getattr(other, layer))
            for metric, array in distances.items():
                values[f"{layer}_{pair}_{metric}"] = array
    return labels[rows].numpy(), values


def print_distances(values: Values, layers: tuple[str, ...], chosen: str) -> None:
    """Print a table of distances, and how many images are nearer to their PGD examples.

    layers: the features of the table. chosen: those of the last line.
    """
    print(f"{'':21}{'max':>11}{'min':>11}{'mean':>11}{'variance':>11}")
    for layer, pair, metric in product(layers, PAIRS, METRICS):
        array = values[f"{layer}_{pair}_{metric}"]
        variance = array.var(ddof=1) if len(array) > 1 else np.nan
        numbers = (array.max(), array.min(), array.mean(), variance)
        cells = [f"{number:>10.4g}" for number in numbers]
        print(f"{layer:<10} {pair} {metric:<7}", *cells)
    is_nearer = values[f"{chosen}_PP_cosine"] > values[f"{chosen}_NP_cosine"]
    print(f"{100 * is_nearer.mean():.1f} % are nearer to their PGD example than to their negative")


# draw_hist.py


def draw_hist(settings: Histograms) -> None:
    """Draw PP and NP by cosine and L2, four figures for each class and for all of them."""
    files_of_figure = defaultdict(list)
    for about, values in load_distances(settings):
        key = (about["dataset"], about["features"], about["target"])
        files_of_figure[key].append((about, values))
    require_writable(Path(settings.out), OUT_HINT)
    for files in files_of_figure.values():
        draw_distances(files, settings)
    if settings.show:
        plt.show()


def load_distances(settings: Histograms) -> list[Measured]:
    """Read settings and distances of the files that `--distances` and `--dataset` choose.

    `--labels` take the place of the methods.
    """
    files = []
    for path in map(Path, settings.distances or [Distances.out]):
        files += sorted(path.glob("*.npz")) if path.is_dir() else [path]
    labels = settings.labels or [None] * len(files)
    if len(labels) != len(files):
        raise UsageError(f"--labels has {len(labels)} names for {len(files)} files of distances")

    chosen = []
    for file, label in zip(files, labels, strict=True):
        about, values = read_arrays(file)
        if "target_name" not in about:
            raise UsageError(f"{file} is not a file of feature_distance.py")
        about["method"] = label or about["method"]
        about["features"] = settings.features or about["features"]
        if settings.dataset in (None, about["dataset"]):
            chosen.append((about, values))
    if not chosen:
        wanted = settings.dataset or "any data set"
        raise UsageError(f"there are no distances of {wanted}; run feature_distance.py first")
    if settings.labels is None:  # baselines first
        chosen.sort(key=lambda measured: measured[0].get("reverse_attention") is True)
    return chosen


def draw_distances(files: list[Measured], settings: Histograms) -> None:
    """Draw the four figures of a class, each with a histogram for each file.

    Print the settings in which the files differ.
    """
    abouts = [about for about, _ in files]
    first = abouts[0]
    for key in COMPARED:
        different = {str(about.get(key)) for about in abouts}
        if len(different) > 1:
            values = ", ".join(sorted(different))
            print(f"note: files of class {first['target']} differ in {key}: {values}")

    names = [about["method"] for about in abouts]
    if len(set(names)) < len(names):
        names = [about["name"] for about in abouts]
    layer = first["features"]
    unweighted = "unweighted" if layer == "unweighted" else ""
    shown = f"{first['dataset']}, {first['target_name']}, {feature_name(layer, abouts)}"
    for pair, metric in product(PAIRS, METRICS):
        arrays = [values[f"{layer}_{pair}_{metric}"] for _, values in files]
        draw = partial(
            draw_histogram,
            list(zip(names, arrays, strict=True)),
            METRICS[metric],
            f"{pair}: {PAIRS[pair]}\n{shown}",
        )
        stem = file_stem("hist", first["dataset"], str(first["target"]), pair, metric, unweighted)
        save(draw, Path(settings.out) / f"{stem}.png", settings.show)


# draw_umap.py


def draw_umap(settings: Umap) -> None:
    """Embed features of test images of one or several runs, draw them as panels, and save both."""
    subjects = load_subjects(settings)
    names = settings.labels or [subject.method for subject in subjects]
    if len(set(names)) < len(names):
        names = [f"{name} {i}" for i, name in enumerate(names, 1)]
    adversarial = "adversarial" if settings.adversarial else ""
    unweighted = "unweighted" if settings.features == "unweighted" else ""
    stem = settings.name or file_stem(
        "umap", "_".join(names), subjects[0].dataset, adversarial, unweighted
    )
    file = Path(settings.out) / f"{stem}.npz"
    distributed.from_first(lambda: require_own([file], subjects))

    by_kind = [extract_kinds(subject, settings) for subject in subjects]
    if not distributed.first():
        return
    panels = []
    for subject, name, features in zip(subjects, names, by_kind, strict=True):
        panels.append(embed_run(subject, name, features, settings))

    split = subjects[0].split
    labels = split.labels.cpu().numpy()
    kinds = list(by_kind[0])
    about = {
        "names": names,
        "kinds": kinds,
        "measured": [panel.measured for panel in panels],
        **describe_origin(subjects, settings),
    }
    arrays = {f"embedding_{i}": panel.points for i, panel in enumerate(panels)}
    write_arrays(file, about, indices=split.numbers.numpy(), labels=labels, **arrays)
    print(f"saved {file}")

    features = feature_name(settings.features, [subject.info for subject in subjects])
    draw = partial(draw_embedding, panels, labels, class_names(split), kinds, features)
    save(draw, file.with_suffix(".png"), settings.show)
    if settings.show:
        plt.show()


def load_subjects(settings: Umap) -> list[Subject]:
    """Load the runs to draw.

    Errors: UsageError where their test images are not the same, or too few for UMAP and clusters.
    """
    subjects = [load_subject(settings, path) for path in settings.model_dir]
    first = subjects[0]
    labels = first.split.labels
    for other in subjects[1:]:
        if first.dataset != other.dataset or not torch.equal(labels, other.split.labels):
            raise UsageError(
                f"{first.file} and {other.file} are of different test images; panels show the same "
                "ones, so name runs of one data set"
            )
    if len(labels) < NEIGHBOURS + 3 or not 1 < len(labels.unique()) < len(labels):
        raise UsageError(
            f"{len(labels)} test images form no clusters; UMAP needs at least {NEIGHBOURS + 3}, of "
            "two classes or more; raise --n-examples"
        )
    return subjects


def extract_kinds(subject: Subject, settings: Umap) -> dict[str, Features]:
    """Extract a run's features of natural images and, with --adversarial, of PGD examples."""
    attacks = {"natural": None}
    if settings.adversarial:
        attacks[f"PGD-{settings.num_steps}"] = pgd_attack(cross_entropy, subject, settings)
    with frozen(subject.model) as net, computing(settings.precision):
        return {
            kind: extract(net, subject.split, settings.test_batch_size, attack)
            for kind, attack in attacks.items()
        }


def embed_run(subject: Subject, name: str, by_kind: dict[str, Features], settings: Umap) -> Panel:
    """Embed the features of one run, and measure how far classes are clusters in them."""
    labels = subject.split.labels.cpu()
    print(f"{name}: {subject.file}, {subject.described()}")
    measured = {}
    for layer, kind in product(layers_of(subject.info), by_kind):
        measured[f"{layer}, {kind}"] = measure_clusters(getattr(by_kind[kind], layer), labels)

    chosen = [getattr(features, settings.features) for features in by_kind.values()]
    points = embed(torch.cat(chosen), settings.seed)
    if not np.isfinite(points).all():
        raise RunError(f"UMAP cannot place every image of {name}; raise --n-examples")
    return Panel(name, points, measured)
