"""Features of networks, the distances and clusters they form, and the jobs of three scripts.

Features are the pooled last map of a network: *weighted* after reverse attention, which is what the
classifier sees, and *unweighted* before it. Weighting by the predicted class builds a part of the
clustering in, so everything is measured on both. Unweighted means before the last gate: the block
before it was gated by its own prediction.
"""

import atexit
import re
import shlex
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils.attacks import Attack, Objective, cross_entropy, pgd
from utils.data.datasets import Split, numbers_of, shuffled
from utils.data.subject import Subject, load_subject, over_images
from utils.figures.plots import (
    Clusters,
    Panel,
    draw_embedding,
    draw_histogram,
    require_display,
    save_or_note,
    show_windows,
)
from utils.negatives import choose_negatives
from utils.step import towards_labels
from utils.system import distributed
from utils.system.attack_copy import frozen
from utils.system.devices import computing
from utils.system.errors import RunError, UsageError
from utils.system.files import read_arrays, require_writable, write_arrays
from utils.system.provenance import provenance
from utils.system.settings import FEATURES, Distances, Histograms, Umap
from utils.system.values import eps_text

BLOCK = 200  # negatives come from the same 200 images, whatever --test-batch-size is
NEIGHBOURS = 12
PAIRS = {"PP": "image and its PGD example", "NP": "image and a negative"}
METRICS = {"cosine": "cosine similarity", "L2": "L2 distance"}
DISTANCES = ["_".join(parts) for parts in product(FEATURES, PAIRS, METRICS)]
OUT_HINT = "name another folder by --out"
Values = dict[str, np.ndarray]  # of M images, (M,) each, by `layer_pair_metric`


# Features and what is measured on them


class Features(NamedTuple):
    """Features of M images, on the CPU.

    weighted, unweighted: (M, F). logits: (M, C), the final ones.
    """

    weighted: Tensor
    unweighted: Tensor
    logits: Tensor


def extract(
    net: nn.Module,
    split: Split,
    rows: Tensor,
    batch_size: int,
    attack: Attack | None = None,
    task: str = "features",
) -> Features:
    """Compute the features of the images at `rows` (M,) of a split, attacked or not.

    net: what `frozen` yields. attack: gets the labels of the split, and the numbers of its images,
    which seed its noise. task: the name of the progress bar.
    Errors: RunError where features are not finite.
    """

    def forward(x: Tensor, labels: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        if attack is not None:
            x = attack(net, x, labels, numbers)
        with torch.no_grad():
            heads = net(x, heads=True)
        return heads.features, heads.unweighted, heads.logits(net.predict)

    with tqdm(
        total=len(rows), desc=task, unit="img", leave=False, disable=distributed.quiet()
    ) as bar:
        features = Features(*over_images(split, rows, batch_size, forward, bar.update))
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
    for anchors in shuffled(len(labels), seed).split(BLOCK):
        block = anchors
        if len(labels[block].unique()) < 2:
            others = (labels != labels[block[0]]).nonzero().squeeze(1)
            order = torch.randperm(len(others), generator=generator)
            block = torch.cat([block, others[order[:BLOCK]]])
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


def measure_clusters(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Measure how far classes are clusters: mean silhouette, and label agreement of neighbours.

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
    return float(silhouette), float((labels[nearest] == labels[:, None]).mean())


def embed(features: Tensor, seed: int) -> np.ndarray:
    """Embed features (M, F), M > `NEIGHBOURS`, by UMAP with the paper's settings -> (M, 2)."""
    try:
        import umap
    except RuntimeError:  # numba can write its cache neither to the installation nor to the home
        import numba

        numba.config.CACHE_DIR = tempfile.mkdtemp(prefix="numba-")
        atexit.register(shutil.rmtree, numba.config.CACHE_DIR, ignore_errors=True)
        import umap

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

    by_name = []
    for k, synonyms in enumerate(split.words or split.classes):
        spellings = synonyms.casefold().split(", ")
        if wanted == split.classes[k] or wanted.casefold() in spellings:
            by_name.append(k)
    matches = by_name or [k for k in range(len(split.classes)) if str(k) == wanted]
    targets = [k for k in matches if k in present]
    if not targets:
        raise UsageError(
            f"no test image is of a class {wanted!r}: give a number from 0 to "
            f"{len(split.classes) - 1}, a name such as {class_names(split)[0]}, or all; "
            "or raise --n-examples"
        )
    return targets


def file_stem(*parts: str) -> str:
    """Join parts of a file's name, leave empty ones out, and replace what file systems forbid."""
    return re.sub(r"[^\w.+-]+", "_", "-".join(filter(None, parts))).lstrip(".")


# Files


def require_own(files: Sequence[Path], subjects: Sequence[Subject]) -> None:
    """Make the folder of npz files. Errors: UsageError where one holds figures of other runs."""
    checkpoints = [str(subject.file.resolve()) for subject in subjects]
    for file in files:
        require_writable(file.parent, OUT_HINT)
        if file.exists():
            settings, _ = read_arrays(file)
            if [str(Path(path).resolve()) for path in settings["checkpoints"]] != checkpoints:
                raise UsageError(f"{file} holds figures of another run; give --name or --out")


def describe_origin(subjects: Sequence[Subject], settings: Distances | Umap) -> dict:
    """Return what every npz file says of the checkpoints, the attack and the computer."""
    first = subjects[0]
    return {
        "checkpoints": [str(subject.file) for subject in subjects],
        "dataset": first.dataset,
        "features": settings.features,
        "epsilon": first.eps,
        "step_size": first.step_size,
        "num_steps": settings.num_steps,
        "seed": settings.seed,
        "predict": settings.predict,
        "precision": settings.precision,
        "notes": [subject.notes for subject in subjects],
        "provenance": provenance(first.split.labels.device, settings.seed),
    }


def read_distances(file: Path) -> tuple[dict, Values]:
    """Read settings and distances from a file of feature_distance.py."""
    settings, arrays = read_arrays(file)
    required = {"name", "method", "checkpoints", "dataset", "target", "target_name", "features"}
    if not {*required, *DISTANCES} <= {*settings, *arrays}:
        raise UsageError(f"{file} is not a file of feature_distance.py")
    return settings, arrays


# feature_distance.py


def feature_distance(settings: Distances) -> None:
    """Measure PP and NP distances of one class or each; print them, and save a file a class."""
    subject = load_subject(settings, settings.model_dir)
    split = subject.split
    targets = find_classes(settings.target_label, split)
    strategy = "" if settings.strategy == "random" else settings.strategy
    name = settings.name
    if name is None:
        name = file_stem(subject.method, subject.info["arch"], subject.dataset, strategy)
    files = [Path(settings.out) / f"{name}-{target}.npz" for target in targets]
    distributed.from_first(lambda: require_own(files, [subject]))

    labels, values = measure_distances(subject, targets, settings)
    if not distributed.first():
        return

    print(f"{name}: {subject.described()}")
    print(
        f"PP: PGD-{settings.num_steps}, eps {eps_text(subject.eps)}, step "
        f"{eps_text(subject.step_size)}, on the answer; NP: {settings.strategy} negatives; "
        f"seed {settings.seed}"
    )
    about = {
        "name": name,
        "method": subject.method,
        "strategy": settings.strategy,
        **describe_origin([subject], settings),
        "arch": subject.info["arch"],
        "reverse_attention": subject.info["reverse_attention"],
        "gate": subject.info.get("gate"),
        "test_images": len(split.labels),
    }
    gated = has_gate(subject.info)
    for target, file in zip(targets, files, strict=True):
        target_name = class_names(split)[target]
        of_class = {key: array[labels == target] for key, array in values.items()}
        write_arrays(file, about | {"target": target, "target_name": target_name}, **of_class)
        print_distances(f"class {target} ({target_name})", of_class, gated, settings.features)
        print(f"saved {file}")
    if len(targets) > 1:
        print_distances("all of these classes", values, gated, settings.features)
    print(f"draw by: python draw_hist.py --distances {shlex.quote(settings.out)}")


def measure_distances(
    subject: Subject, targets: list[int], settings: Distances
) -> tuple[np.ndarray, Values]:
    """Measure PP and NP distances of the M images of some classes.

    Returns their labels (M,), and the arrays (M,) of their files: the distances, and the numbers of
    the images and of their negatives in the test set.
    """
    split = subject.split
    device = split.labels.device
    labels = split.labels.cpu()
    numbers = numbers_of(split)
    rows = torch.isin(labels, torch.tensor(targets)).nonzero().squeeze(1)
    strategy, _, adversarial = settings.strategy.partition("_")
    batch_size = settings.test_batch_size

    def like_anchors(net: nn.Module, anchor_labels: Tensor) -> Objective:
        weight = subject.auxiliary_weight
        return lambda x: towards_labels(net(x, heads=True), anchor_labels, weight)

    with frozen(subject.model) as net, computing(settings.precision):
        logits = None
        if strategy != "random":
            every_row = torch.arange(len(labels))
            logits = extract(net, split, every_row, batch_size, task="predictions").logits
        negatives = choose_in_blocks(labels, logits, strategy, settings.seed)[rows]

        natural = extract(net, split, rows, batch_size, task="natural")
        attack = pgd_attack(cross_entropy, subject, settings)
        attacked = extract(net, split, rows, batch_size, attack, f"PGD-{settings.num_steps}")

        # Negatives are pushed towards their anchors' labels, from noise of their anchors' numbers.
        push = pgd_attack(like_anchors, subject, settings) if adversarial else None
        pushed = split.take(negatives.to(device))
        pushed = pushed._replace(labels=split.labels[rows.to(device)], numbers=numbers[rows])
        negative = extract(net, pushed, torch.arange(len(rows)), batch_size, push, "negatives")

    values = {"indices": numbers[rows].numpy(), "negatives": numbers[negatives].numpy()}
    for layer in FEATURES:
        for pair, other in (("PP", attacked), ("NP", negative)):
            distances = compare(getattr(natural, layer), getattr(other, layer))
            for metric, array in distances.items():
                values[f"{layer}_{pair}_{metric}"] = array
    return labels[rows].numpy(), values


def print_distances(title: str, values: Values, gated: bool, chosen: str) -> None:
    """Print a table of distances, and how many images are nearer to their PGD examples.

    gated: whether the network weights its features; otherwise both kinds are the same. chosen: the
    features that the last line is about.
    """
    print(f"\n{title}, {len(values['weighted_PP_cosine'])} images")
    print(" " * 21 + "".join(f"{column:>11}" for column in ("max", "min", "mean", "variance")))
    for layer, pair, metric in product(FEATURES if gated else FEATURES[:1], PAIRS, METRICS):
        array = values[f"{layer}_{pair}_{metric}"]
        variance = array.var(ddof=1) if len(array) > 1 else np.nan
        cells = (array.max(), array.min(), array.mean(), variance)
        row = f"{layer if gated else 'plain':<10} {pair} {metric:<7}"
        print(row + "".join(f"{cell:>11.4g}" for cell in cells))
    is_aligned = values[f"{chosen}_PP_cosine"] > values[f"{chosen}_NP_cosine"]
    print(
        f"{100 * is_aligned.mean():.1f} % have a larger cosine to their PGD example (PP, alignment)"
    )
    print("than to their negative (NP, exclusion)")


# draw_hist.py


class Entry(NamedTuple):
    """The distances of a run on one class or several. label: by `--labels`, or None."""

    label: str | None
    settings: dict
    values: Values


def draw_hist(settings: Histograms) -> None:
    """Draw PP and NP by cosine and L2: four figures over all classes, and four for each class."""
    if not distributed.first():
        return
    comparable = defaultdict(list)
    for entry in load_entries(settings):
        comparable[entry.settings["dataset"], entry.settings["features"]].append(entry)
    figures = []
    for entries in comparable.values():
        note_differences(entries)
        figures += group_by_class([*over_classes(entries), *entries])

    folder = require_writable(Path(settings.out), OUT_HINT)
    if settings.show:
        require_display()
    tasks = list(product(figures, PAIRS, METRICS))
    failed = 0
    for entries, pair, metric in tqdm(tasks, "drawing", unit="figure", leave=False, disable=None):
        failed += not draw_distances(entries, pair, metric, folder, settings.show)
    if settings.show:
        show_windows()
    if failed:
        raise RunError(f"{failed} of {len(tasks)} figures are not drawn; the notes above say why")


def load_entries(settings: Histograms) -> list[Entry]:
    """Read the files that `--distances` and `--dataset` choose.

    They come by class, networks with a gate last, or with `--labels` in the order of the labels.
    """
    files = []
    for path in map(Path, settings.distances or [Distances.out]):
        inside = [path] if path.is_file() else sorted(path.glob("*.npz"))
        if not inside:
            raise UsageError(
                f"{path}: no distances there; "
                "first run feature_distance.py --model_dir RUN --target_label all"
            )
        files += inside
    labels = settings.labels or [None] * len(files)
    if len(labels) != len(files):
        raise UsageError(f"--labels has {len(labels)} names for {len(files)} files of distances")

    entries = []
    for file, label in zip(files, labels, strict=True):
        about, values = read_distances(file)
        about["features"] = settings.features or about["features"]
        if settings.dataset in (None, about["dataset"]):
            entries.append(Entry(label, about, values))
    if not entries:
        raise UsageError(f"none of the {len(files)} files of distances is of {settings.dataset}")
    if settings.labels is None:
        entries.sort(key=lambda entry: (entry.settings["target"], has_gate(entry.settings)))
    return entries


def note_differences(entries: list[Entry]) -> None:
    """Print the settings in which files of one data set differ."""
    for key in ("epsilon", "step_size", "num_steps", "strategy", "predict", "test_images"):
        names = {str(entry.settings.get(key)): entry.settings["name"] for entry in entries}
        if len(names) > 1:
            values = ", ".join(f"{value} ({name})" for value, name in names.items())
            print(f"note: the files of {entries[0].settings['dataset']} differ in {key}: {values}")


def over_classes(entries: list[Entry]) -> list[Entry]:
    """Put together each run's distances of the classes that all runs have files of.

    Returns an entry a run, none where there is a single such class.
    """
    runs: dict[tuple, dict[int, Entry]] = defaultdict(dict)
    for entry in entries:
        about = entry.settings
        run = (about["name"], str(about["checkpoints"]))
        runs[run][about["target"]] = entry
    targets = sorted(set.intersection(*map(set, runs.values())))
    if len(targets) < 2:
        return []

    together = []
    for by_target in runs.values():
        first = by_target[targets[0]]
        values = {}
        for key in DISTANCES:
            values[key] = np.concatenate([by_target[target].values[key] for target in targets])
        classes = {"target": "all", "target_name": f"{len(targets)} classes together"}
        together.append(Entry(first.label, first.settings | classes, values))
    return together


def group_by_class(entries: list[Entry]) -> list[list[Entry]]:
    """Group the entries of each figure. Errors: UsageError where a class has two names."""
    groups = defaultdict(list)
    for entry in entries:
        groups[entry.settings["target"]].append(entry)
    for target, group in groups.items():
        names = {entry.settings["target_name"] for entry in group}
        if len(names) > 1:
            raise UsageError(
                f"class {target} is {' and '.join(sorted(names))} in different files; "
                "choose files by --distances"
            )
    return list(groups.values())


def draw_distances(entries: list[Entry], pair: str, metric: str, folder: Path, show: bool) -> bool:
    """Draw one figure, a histogram for each entry; return whether that worked."""
    about = entries[0].settings
    layer = about["features"]
    methods = [entry.settings["method"] for entry in entries]
    values = []
    for entry, method in zip(entries, methods, strict=True):
        name = method if methods.count(method) == 1 else entry.settings["name"]
        values.append((entry.label or name, entry.values[f"{layer}_{pair}_{metric}"]))

    classes = about["target_name"]
    if about["target"] != "all":
        classes = f"class {classes}"
    gated = any(has_gate(entry.settings) for entry in entries)
    features = f"{layer} features" if gated else "features"
    title = f"{pair}: {PAIRS[pair]}\n{about['dataset']}, {classes}, {features}"

    unweighted = "unweighted" if layer == "unweighted" else ""
    stem = file_stem("hist", about["dataset"], str(about["target"]), pair, metric, unweighted)
    file = folder / f"{stem}.png"
    draw = partial(draw_histogram, values, METRICS[metric], title, show)
    note = save_or_note(draw, file)
    tqdm.write(note or f"saved {file} and .pdf")
    return not note


# draw_umap.py


def draw_umap(settings: Umap) -> None:
    """Embed features of test images of one or several runs, draw them as panels, and save both."""
    subjects = load_subjects(settings)
    split = subjects[0].split
    labels = split.labels.cpu()
    require_clusters(labels)
    names = settings.labels
    if names is None:
        names = [subject.method for subject in subjects]
        if len(set(names)) < len(names):
            names = [f"{name} {i}" for i, name in enumerate(names, 1)]

    adversarial = "adversarial" if settings.adversarial else ""
    unweighted = "unweighted" if settings.features == "unweighted" else ""
    stem = settings.name
    if stem is None:
        stem = file_stem("umap", "_".join(names), subjects[0].dataset, adversarial, unweighted)
    file = Path(settings.out) / f"{stem}.npz"
    if settings.show:
        require_display()
    distributed.from_first(lambda: require_own([file], subjects))

    panels = []
    for subject, name in zip(subjects, names, strict=True):
        by_kind = extract_kinds(subject, name, settings)
        if distributed.first():
            panels.append(embed_run(subject, name, by_kind, settings))
    if not distributed.first():
        return
    kinds = list(by_kind)
    save_embedding(file, panels, kinds, subjects, settings)

    gated = any(has_gate(subject.info) for subject in subjects)
    features = f"{settings.features} features" if gated else "features"
    classes = class_names(split)
    draw = partial(draw_embedding, panels, labels.numpy(), classes, kinds, features, settings.show)
    note = save_or_note(draw, file.with_suffix(".png"))
    if note:
        raise RunError(f"{note}; the embedding is saved in {file}")
    print(f"saved {file.with_suffix('.png')} and .pdf, embedding {file}")
    if settings.show:
        show_windows()


def load_subjects(settings: Umap) -> list[Subject]:
    """Load the runs to draw. Errors: UsageError where their test images are not the same."""
    subjects = [load_subject(settings, path) for path in settings.model_dir]
    first = subjects[0]
    for other in subjects[1:]:
        same_data = first.dataset == other.dataset and first.split.classes == other.split.classes
        if not same_data or not torch.equal(first.split.labels, other.split.labels):
            raise UsageError(
                f"{first.file} is of {first.dataset} and {other.file} of {other.dataset}, other "
                "test images; panels show the same ones, so name runs of one data set"
            )
    return subjects


def require_clusters(labels: Tensor) -> None:
    """Raise UsageError where images or classes are too few for UMAP and the numbers beside it."""
    count = len(labels)
    classes = len(labels.unique())
    if count <= NEIGHBOURS + 2 or not 1 < classes < count:
        raise UsageError(
            f"{count} test images of {classes} classes form no clusters; UMAP needs at least "
            f"{NEIGHBOURS + 3}, of two classes or more; raise --n-examples"
        )


def extract_kinds(subject: Subject, name: str, settings: Umap) -> dict[str, Features]:
    """Extract a run's features of natural images and, with --adversarial, of PGD examples."""
    attacks = {"natural": None}
    if settings.adversarial:
        attacks[f"PGD-{settings.num_steps}"] = pgd_attack(cross_entropy, subject, settings)
    rows = torch.arange(len(subject.split.labels))
    by_kind = {}
    with frozen(subject.model) as net, computing(settings.precision):
        for kind, attack in attacks.items():
            task = f"{name} {kind}"
            by_kind[kind] = extract(
                net, subject.split, rows, settings.test_batch_size, attack, task
            )
    return by_kind


def embed_run(subject: Subject, name: str, by_kind: dict[str, Features], settings: Umap) -> Panel:
    """Embed the features of one run, and print what is measured on them."""
    labels = subject.split.labels.cpu()
    print(f"{name}: {subject.file}, {subject.described()}")
    clusters = print_clusters(by_kind, labels, has_gate(subject.info))
    print(f"  embedding {len(by_kind) * len(labels)} points by UMAP", flush=True)
    chosen = [getattr(features, settings.features) for features in by_kind.values()]
    points = embed(torch.cat(chosen), settings.seed)
    if not np.isfinite(points).all():
        raise RunError(f"UMAP cannot place every image of {name}; raise --n-examples")
    return Panel(name, points, clusters)


def print_clusters(by_kind: dict[str, Features], labels: Tensor, gated: bool) -> list[Clusters]:
    """Measure and print how far classes are clusters, by layer and kind of images."""
    measured = []
    for layer in FEATURES if gated else ("weighted",):
        for kind, features in by_kind.items():
            silhouette, agreement = measure_clusters(getattr(features, layer), labels)
            layer_name = layer if gated else "plain"
            print(
                f"  {layer_name:<10} {kind:<8} silhouette {silhouette:6.3f}, "
                f"{NEIGHBOURS}-NN label agreement {100 * agreement:6.2f} %"
            )
            measured.append(Clusters(layer_name, kind, silhouette, agreement))
    return measured


def save_embedding(
    file: Path,
    panels: list[Panel],
    kinds: list[str],
    subjects: list[Subject],
    settings: Umap,
) -> None:
    """Save the points of all panels, and what was measured beside them."""
    split = subjects[0].split
    measured = {}
    for panel in panels:
        for clusters in panel.clusters:
            measured[f"{panel.name}, {clusters.layer}, {clusters.images}"] = {
                "silhouette": clusters.silhouette,
                "agreement": clusters.agreement,
            }
    about = {
        "names": [panel.name for panel in panels],
        "kinds": kinds,
        "measured": measured,
        **describe_origin(subjects, settings),
    }
    arrays = {"indices": numbers_of(split).numpy(), "labels": split.labels.cpu().numpy()}
    for i, panel in enumerate(panels):
        arrays[f"embedding_{i}"] = panel.points
    write_arrays(file, about, **arrays)
