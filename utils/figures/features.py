"""Features of networks and what is measured on them: distances, clusters, embeddings. The jobs of the figures' scripts.

Features are the pooled last map: weighted, after reverse attention, which is what the classifier sees, and unweighted,
before it. Weighting by the predicted class builds part of the clustering in, so everything here is measured on both.
(Unweighted means before the last gate: the block before it was gated by its own prediction, which stays.)
"""

import atexit
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils.attacks import Attack, cross_entropy, pgd
from utils.data.datasets import Split, numbers_of, shuffled
from utils.data.subject import Subject, load_subject, over_images
from utils.figures.plots import draw_embedding, draw_histogram, save_or_note, window
from utils.negatives import choose_negatives
from utils.step import towards_labels
from utils.system import distributed
from utils.system.attack_copy import frozen
from utils.system.devices import computing
from utils.system.errors import RunError, UsageError
from utils.system.files import read_arrays, require_writable, write_arrays
from utils.system.options import eps_text
from utils.system.provenance import provenance
from utils.system.settings import FEATURES, Distances, Histograms, Umap

BLOCK = 200  # negatives come from the same 200 images, the test batch of the method, whatever --test-batch-size is
NEIGHBOURS = 12
PAIRS = {"PP": "image and its PGD example", "NP": "image and a negative"}
OTHER_OUT = "name another folder by --out"
METRICS = {"cosine": "cosine similarity", "L2": "L2 distance"}
Values = dict[str, np.ndarray]  # of M images, (M,) each, by `layer_pair_metric`


class Features(NamedTuple):
    """Of M images, on the CPU. weighted, unweighted: (M, F). logits: (M, C), the final ones."""

    weighted: Tensor
    unweighted: Tensor
    logits: Tensor


def extract(
    net: nn.Module, split: Split, rows: Tensor, batch_size: int, attack: Attack | None = None, task: str = "features"
) -> Features:
    """Features of the images at `rows` (M,) of a split, attacked or not.

    net: what `frozen` yields. attack sees the split's labels, be they the images' own or those to be pushed to, and its
    numbers, which seed the noise. task: named by the progress bar. Errors: RunError where features are not finite.
    """

    def work(x: Tensor, labels: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        if attack is not None:
            x = attack(net, x, labels, numbers)
        with torch.no_grad():
            heads = net(x, heads=True)
        return heads.features, heads.unweighted, heads.logits(net.predict)

    with tqdm(total=len(rows), desc=task, unit="img", leave=False, disable=distributed.quiet()) as bar:
        features = Features(*over_images(split, rows, batch_size, work, bar.update))
    if not all(part.isfinite().all() for part in features):
        raise RunError("the network answers with features that are not finite; its training has diverged")
    return features


def pgd_on(subject: Subject, settings: Distances | Umap) -> Callable[..., Attack]:
    """The figures' PGD, a function of its objective; it starts from x + 0.001 N(0, 1)."""
    steps, seed = settings.num_steps, settings.seed
    return partial(pgd, eps=subject.eps, step_size=subject.step_size, steps=steps, start="normal", seed=seed)


def choose_in_blocks(labels: Tensor, logits: Tensor | None, strategy: str, seed: int) -> Tensor:
    """One negative for each image of a test set, never of its class -> (N,) indices.

    The set is shuffled by the seed, since folders come sorted by class, and cut into blocks of `BLOCK` images, within
    which `choose_negatives` chooses. A block of one class alone is filled up with as many images of others.
    labels: (N,), logits: (N, C) of natural images or None for random; on the CPU. Errors: UsageError for one class.
    """
    if len(labels.unique()) < 2:
        raise UsageError("the test images are of a single class, and negatives are of another; raise --n-examples")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.empty_like(labels)
    for anchors in shuffled(len(labels), seed).split(BLOCK):
        block = anchors
        if len(labels[block].unique()) < 2:
            others = (labels != labels[block[0]]).nonzero().squeeze(1)
            block = torch.cat([block, others[torch.randperm(len(others), generator=generator)[:BLOCK]]])
        found = choose_negatives(None if logits is None else logits[block], labels[block], strategy, generator)
        chosen[anchors] = block[found[: len(anchors), 0]]
    return chosen


def compare(first: Tensor, second: Tensor) -> dict[str, np.ndarray]:
    """Cosine similarity and L2 distance of the rows of two (M, F), each (M,) in float64."""
    first, second = first.double(), second.double()
    cosine = F.cosine_similarity(first, second, eps=1e-30)
    return {"cosine": cosine.numpy(), "L2": (first - second).norm(dim=1).numpy()}


def summary(values: np.ndarray) -> dict[str, float]:
    """Max, min, mean and unbiased variance (nan for a single value)."""
    variance = values.var(ddof=1) if len(values) > 1 else float("nan")
    return {"max": values.max(), "min": values.min(), "mean": values.mean(), "variance": variance}


def clusters(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """How far classes are clusters: mean silhouette in [-1, 1], and k-NN label agreement in [0, 1].

    By correlation distance, which is UMAP's here: cosine distance of rows less their mean. Agreement is the share of
    images of the same class among the `NEIGHBOURS` nearest ones, the image itself left out. features: (M, F).
    """
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    centred = (features - features.mean(1, keepdim=True)).numpy()
    labels = labels.numpy()
    silhouette = silhouette_score(centred, labels, metric="cosine")
    near = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine").fit(centred).kneighbors(return_distance=False)
    return float(silhouette), float((labels[near] == labels[:, None]).mean())


def embed(features: Tensor, seed: int) -> np.ndarray:
    """UMAP (densMAP) of features (M, F), M > `NEIGHBOURS`, with the paper's settings -> (M, 2); one thread, seeded."""
    try:
        import umap
    except RuntimeError:  # numba keeps what it compiles beside the code or at home, and can write to neither
        import numba

        numba.config.CACHE_DIR = tempfile.mkdtemp(prefix="numba-")
        atexit.register(shutil.rmtree, numba.config.CACHE_DIR, ignore_errors=True)
        import umap

    kind = {"metric": "correlation", "densmap": True, "dens_lambda": 1.5, "random_state": seed, "n_jobs": 1}
    return umap.UMAP(n_neighbors=NEIGHBOURS, min_dist=0.01, **kind).fit_transform(features.numpy())


def weighs(network: dict) -> bool:
    """Whether a network weights its features, by what its checkpoint or a file of distances says of it."""
    return network.get("reverse_attention") is True and network.get("gate") != "none"


# names


def class_names(split: Split) -> list[str]:
    """Names of classes for people: words for wnids, the first of several synonyms unless two classes share it."""
    first = [words.split(",")[0] for words in split.words or split.classes]
    named = zip(first, split.classes, strict=True)
    return [name if first.count(name) == 1 else f"{name} ({code})" for name, code in named]


def target_classes(wanted: str, split: Split) -> list[int]:
    """Classes of the split named by --target_label: `all`, a name, or a number; a name wins over a number."""
    present, names = split.labels.unique().tolist(), class_names(split)
    if wanted == "all":
        return present
    asked, spoken = wanted.strip().casefold(), [words.casefold().split(",") for words in split.words or split.classes]
    exactly = [k for k, name in enumerate(split.classes) if wanted == name]
    by_word = [k for k, words in enumerate(spoken) if asked in map(str.strip, words)]
    found = exactly or by_word or [k for k in range(len(names)) if wanted == str(k)]
    if not found:
        known = f"a number from 0 to {len(names) - 1}, a name, or all; the first are {', '.join(names[:5])}"
        raise UsageError(f"no class {wanted!r}: give {known}")
    if len(found) > 1:
        raise UsageError(f"{wanted!r} names several classes, {', '.join(map(str, found))}; give one number")
    if found[0] not in present:
        none = f"class {names[found[0]]!r} has no image among the {len(split.labels)} test images"
        raise UsageError(f"{none}; raise --n-examples or name another class")
    return found


def distinct(*candidates: Sequence[str]) -> list[str]:
    """The first of several lists of names in which no name comes twice; where there is none, the first one numbered."""
    numbered = [f"{name} {i}" for i, name in enumerate(candidates[0], 1)]
    return next((list(names) for names in candidates if len(set(names)) == len(names)), numbered)


def file_stem(*parts: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", "-".join(filter(None, parts))).lstrip(".")


# files


def prepare_files(files: Iterable[Path], subjects: Sequence[Subject]) -> None:
    """Make the folder of npz files about these checkpoints; UsageError where it cannot be, or they are about others."""
    own = [subject.file.resolve() for subject in subjects]
    for file in files:
        require_writable(file.parent, OTHER_OUT)
        stored = read_arrays(file)[0].get("checkpoints") if file.exists() else own
        if not isinstance(stored, list) or [Path(str(path)).resolve() for path in stored] != own:
            raise UsageError(f"{file} holds figures of another run; tell this one apart by --name or --out")


def origin(subjects: Sequence[Subject], settings: Distances | Umap) -> dict:
    """What every npz file says of the checkpoints, the attack and the computer that it comes from."""
    first, seed = subjects[0], settings.seed
    about = {"checkpoints": [str(s.file) for s in subjects], "dataset": first.dataset, "features": settings.features}
    about |= {"epsilon": first.eps, "step_size": first.step_size, "num_steps": settings.num_steps, "seed": seed}
    about |= {"predict": settings.predict, "precision": settings.precision, "notes": [s.notes for s in subjects]}
    return about | {"provenance": provenance(first.split.labels.device, seed)}


def read_distances(file: Path) -> tuple[dict, Values]:
    """Settings and values of a file of feature_distance.py, checked; UsageError naming it."""
    settings, arrays = read_arrays(file)
    kinds = {"name": str, "method": str, "dataset": str, "target": int, "target_name": str, "features": str}
    told = all(isinstance(settings.get(key), kind) for key, kind in kinds.items()) and settings["features"] in FEATURES
    distances = [arrays.get(key, np.array([])) for key in map("_".join, product(FEATURES, PAIRS, METRICS))]
    if not told or not all(d.dtype.kind == "f" and d.ndim == 1 and d.size and np.isfinite(d).all() for d in distances):
        raise UsageError(f"{file} is none of feature_distance.py, or a damaged one; write it anew by that")
    return settings, arrays


# feature_distance.py


def feature_distance(settings: Distances) -> None:
    """PP and NP distances of the images of a class, or of each: print them and save one npz file for each class."""
    subject = load_subject(settings, settings.model_dir)
    targets, names = target_classes(settings.target_label, subject.split), class_names(subject.split)
    strategy = "" if settings.strategy == "random" else settings.strategy
    name = settings.name or file_stem(subject.method, subject.info["arch"], subject.dataset, strategy)
    files = {target: Path(settings.out) / f"{name}-{target}.npz" for target in targets}
    distributed.from_first(lambda: prepare_files(files.values(), [subject]))
    labels, values = measure_distances(subject, targets, settings)
    if not distributed.first():
        return

    about = {"name": name, "method": subject.method, "strategy": settings.strategy, **origin([subject], settings)}
    about |= {key: subject.info.get(key) for key in ("arch", "reverse_attention", "gate")}
    about["test_images"] = len(subject.split.labels)
    print(f"{name}: {subject.described()}")
    print(
        f"PP: PGD-{settings.num_steps}, eps {eps_text(subject.eps)}, step {eps_text(subject.step_size)}, "
        f"on the answer; NP: {settings.strategy} negatives; seed {settings.seed}"
    )
    for target, file in files.items():
        found = {key: of_all[labels == target] for key, of_all in values.items()}
        write_arrays(file, about | {"target": target, "target_name": names[target]}, **found)
        print_distances(f"class {target} ({names[target]})", found, subject.info, settings.features)
        print(f"saved {file}")
    if len(files) > 1:
        print_distances("all of these classes", values, subject.info, settings.features)
    elsewhere = "" if settings.out == Distances.out else f" --distances {shlex.quote(settings.out)}"
    print(f"draw by: python draw_hist.py{elsewhere}")


def measure_distances(subject: Subject, targets: list[int], settings: Distances) -> tuple[np.ndarray, Values]:
    """Of the M images of some classes: their labels (M,), and all that their files are to hold."""
    split, labels, numbers = subject.split, subject.split.labels.cpu(), numbers_of(subject.split)
    size, attack = settings.test_batch_size, pgd_on(subject, settings)
    strategy, _, pushed = settings.strategy.partition("_")
    rows = torch.isin(labels, torch.tensor(targets)).nonzero().squeeze(1)
    with frozen(subject.model) as net, computing(settings.precision):
        logits = None
        if strategy != "random":
            logits = extract(net, split, torch.arange(len(labels)), size, None, "predictions").logits
        negatives = choose_in_blocks(labels, logits, strategy, settings.seed)[rows]
        natural = extract(net, split, rows, size, None, "natural")
        others = {"PP": extract(net, split, rows, size, attack(cross_entropy), f"PGD-{settings.num_steps}")}
        # the negatives' images with their anchors' labels, to be pushed to, and numbers, that is noise
        anchors, shown = (split.take(of.to(split.labels.device)) for of in (rows, negatives))
        shown = shown._replace(labels=anchors.labels, numbers=numbers[rows])
        weight = subject.auxiliary_weight
        push = attack(lambda net, y: lambda x: towards_labels(net(x, heads=True), y, weight)) if pushed else None
        others["NP"] = extract(net, shown, torch.arange(len(rows)), size, push, "negatives")
    values = {"indices": numbers[rows].numpy(), "negatives": numbers[negatives].numpy()}
    for layer, (pair, other) in product(FEATURES, others.items()):
        for metric, found in compare(getattr(natural, layer), getattr(other, layer)).items():
            values[f"{layer}_{pair}_{metric}"] = found
    return labels[rows].numpy(), values


def print_distances(title: str, values: Values, info: dict, chosen: str) -> None:
    """A class's table, weighted and unweighted features side by side, and what it says of alignment and exclusion."""
    layers = FEATURES if weighs(info) else FEATURES[:1]
    by = "softmax" if info.get("gate") == "soft" else "the predicted class"
    heads = (f"weighted by {by}", "unweighted") if len(layers) > 1 else ("nothing is weighted",)
    print(f"\n{title}, {len(values['weighted_PP_cosine'])} images")
    print(" " * 10 + "".join(f"{head:^44}" for head in heads))
    print(" " * 10 + "".join(f"{column:>11}" for column in ("max", "min", "mean", "variance")) * len(heads))
    for pair, metric in product(PAIRS, METRICS):
        cells = [f"{x:>11.4g}" for layer in layers for x in summary(values[f"{layer}_{pair}_{metric}"]).values()]
        print(f"{pair} {metric:<7}" + "".join(cells))
    pp, negative = (values[f"{chosen}_{pair}_cosine"] for pair in PAIRS)
    print(
        f"by {f'{chosen} ' if len(layers) > 1 else ''}features\n"
        f"  alignment: an image and its adversarial example have cosine {pp.mean():.3f} in the mean (best: 1)\n"
        f"  exclusion: an image and its negative have cosine {negative.mean():.3f} in the mean (the lower the better)\n"
        f"  {100 * (pp > negative).mean():.1f} % of them are nearer to their adversarial example than to their negative"
    )


# draw_hist.py


class Entry(NamedTuple):
    """A file of distances, and what --labels calls it."""

    file: Path
    label: str | None
    settings: dict
    values: Values


def draw_hist(settings: Histograms) -> None:
    """Draw PP and NP by cosine and L2 of every file: four figures over all classes, and four for each target label."""
    if not distributed.first():
        return
    groups = groups_of(settings)
    for group in groups:
        refuse_mixed(group, settings.features)
    groups = [*over_classes(groups), *groups]
    show = window(settings.show)
    folder = require_writable(Path(settings.out), OTHER_OUT)
    figures = tqdm(list(product(groups, PAIRS, METRICS)), "drawing", unit="figure", leave=False, disable=None)
    drawn = [draw_group(*what, settings, folder) for what in figures]
    show()
    if not all(drawn):
        raise RunError(f"{drawn.count(False)} of {len(drawn)} figures are not drawn; the notes above say why")


def groups_of(settings: Histograms) -> list[list[Entry]]:
    """The files that --distances, --labels and --dataset choose, by target label, baselines first."""
    files = []
    for path in map(Path, settings.distances or ("./distances",)):
        inside = [path] if path.is_file() else sorted(path.glob("*.npz"))
        if not inside:
            raise UsageError(f"{path}: no distances there; first run feature_distance.py --model_dir RUN --target_label all")
        files += inside
    if settings.labels and len(settings.labels) != len(files):
        raise UsageError(f"--labels has {len(settings.labels)} names and there are {len(files)} files of distances")
    given = settings.labels or [None] * len(files)
    entries = [Entry(file, label, *read_distances(file)) for file, label in zip(files, given, strict=True)]
    entries = [entry for entry in entries if settings.dataset in (None, entry.settings["dataset"])]
    if not entries:
        raise UsageError(f"none of the {len(files)} files of distances is of {settings.dataset}")
    if settings.distances and all(Path(path).is_file() for path in settings.distances):
        return [entries]  # files named one by one are for one figure
    entries.sort(key=lambda e: "ANC" in e.settings["method"] or e.settings.get("reverse_attention") is True)
    targets = sorted({entry.settings["target"] for entry in entries})
    return [[entry for entry in entries if entry.settings["target"] == target] for target in targets]


def over_classes(groups: list[list[Entry]]) -> list[list[Entry]]:
    """The group of figures over the classes of which all runs have files; none where they are less than two."""
    by_run: dict[str, dict[int, Entry]] = {}
    for entry in chain.from_iterable(groups):
        run = str([entry.settings["name"], entry.settings.get("checkpoints")])
        by_run.setdefault(run, {})[entry.settings["target"]] = entry
    targets = sorted(set.intersection(*map(set, by_run.values())))
    if len(targets) < 2:
        return []
    group = []
    for entries in by_run.values():
        first, *others = (entries[target] for target in targets)
        note_differences(first, others, "features")
        label = first.label if all(other.label == first.label for other in others) else None
        settings = first.settings | {"target": "all", "target_name": f"{len(targets)} classes together"}
        distances = [key for key in first.values if key.startswith(FEATURES)]
        values = {key: np.concatenate([entries[target].values[key] for target in targets]) for key in distances}
        group.append(Entry(first.file, label, settings, values))
    return [group]


def refuse_mixed(group: list[Entry], features: str | None) -> None:
    """UsageError where files cannot share a histogram; a line on standard output where they should not."""
    first, *others = group
    for other in others:
        both, one, two = f"{first.file} and {other.file}", first.settings, other.settings
        for key in ("dataset", "target", "target_name", *(() if features else ("features",))):
            if one[key] != two[key]:
                said = f"{both} do not belong into one histogram: {key} {one[key]!r} and {two[key]!r}"
                raise UsageError(f"{said}; choose by --dataset, --distances or --features")
    note_differences(first, others)


def note_differences(first: Entry, others: list[Entry], *more: str) -> None:
    """A line on standard output for each setting that files of one histogram do not share. more: further settings."""
    for other in others:
        for key in ("epsilon", "step_size", "num_steps", "strategy", "predict", "test_images", *more):
            one, two = first.settings.get(key), other.settings.get(key)
            if one != two:
                print(f"note: {first.file} and {other.file} differ in {key}: {one} and {two}")


def draw_group(group: list[Entry], pair: str, metric: str, settings: Histograms, folder: Path) -> bool:
    """One figure of PP or NP by one metric, a histogram for each file -> whether it could be drawn."""
    common = group[0].settings
    layer = settings.features or common["features"]
    names = [[e.label] if e.label else [e.settings["method"], e.settings["name"], e.file.stem] for e in group]
    labels = distinct(*zip(*names, strict=True))
    values = {label: e.values[f"{layer}_{pair}_{metric}"] for label, e in zip(labels, group, strict=True)}
    classes = common["target_name"] if common["target"] == "all" else f"class {common['target_name']}"
    features = f"{layer} features" if any(weighs(e.settings) for e in group) else "features"
    title = f"{pair}: {PAIRS[pair]}\n{common['dataset']}, {classes}, {features}"
    which = "unweighted" * (layer == "unweighted")
    file = folder / (file_stem("hist", common["dataset"], str(common["target"]), pair, metric, which) + ".png")
    draw = partial(draw_histogram, values, METRICS[metric], title, settings.show)
    tqdm.write((flaw := save_or_note(draw, file)) or f"saved {file} and .pdf")
    return not flaw


# draw_umap.py


def draw_umap(settings: Umap) -> None:
    """Embed the features of test images of one or several runs, draw them as panels, save figure and embeddings."""
    subjects = load_subjects(settings)
    dataset, split = subjects[0].dataset, subjects[0].split
    labels = split.labels.cpu()
    refuse_few(labels)
    methods = [subject.method for subject in subjects]
    names = list(settings.labels or distinct(methods, [f"{s.method} {s.file.stem}" for s in subjects]))
    which = ("adversarial" if settings.adversarial else "", "unweighted" if settings.features == "unweighted" else "")
    stem = settings.name or file_stem("umap", "_".join(names), dataset, *which)
    show = window(settings.show)
    saved = Path(settings.out) / f"{stem}.npz"
    distributed.from_first(lambda: prepare_files([saved], subjects))
    extracted = [extract_kinds(s, name, settings) for s, name in zip(subjects, names, strict=True)]
    if not distributed.first():
        return

    panels, numbers = [], {}
    for subject, name, kinds in zip(subjects, names, extracted, strict=True):
        print(f"{name}: {subject.file}, {subject.described()}")
        measured = measure_clusters(subject, kinds, labels)
        print(f"  embedding {len(kinds) * len(labels)} points by UMAP", flush=True)
        points = embed(torch.cat([getattr(found, settings.features) for found in kinds.values()]), settings.seed)
        if not np.isfinite(points).all():
            raise RunError(f"UMAP cannot place every image of {name}; take more images by --n-examples")
        panels.append((name, points, measured))
        for layer, kind, silhouette, agreement in measured:
            numbers[f"{name}, {layer}, {kind}"] = {"silhouette": silhouette, "agreement": agreement}
    kinds, weighed = list(extracted[0]), any(weighs(subject.info) for subject in subjects)
    embedded = f"{settings.features} features" if weighed else "features"
    about = {"names": names, "kinds": kinds, "measured": numbers, **origin(subjects, settings)}
    arrays = {"indices": numbers_of(split).numpy(), "labels": labels.numpy()}
    arrays |= {f"embedding_{i}": points for i, (_, points, _) in enumerate(panels)}
    write_arrays(saved, about, **arrays)
    draw = partial(draw_embedding, panels, labels.numpy(), class_names(split), kinds, embedded, settings.show)
    if flaw := save_or_note(draw, saved.with_suffix(".png")):
        raise RunError(f"{flaw}; the embedding is saved in {saved}")
    print(f"saved {saved.with_suffix('.png')} and .pdf, embedding {saved}")
    show()


def load_subjects(settings: Umap) -> list[Subject]:
    """The runs to draw; UsageError where they are not of the same test images."""
    first, *others = subjects = [load_subject(settings, path) for path in settings.model_dir]
    for other in others:
        same = first.dataset == other.dataset and first.split.classes == other.split.classes
        if not same or not torch.equal(first.split.labels, other.split.labels):
            both = f"{first.file} is of {first.dataset} and {other.file} of {other.dataset}, other test images"
            raise UsageError(f"{both}; panels show the same ones, so name runs of one data set")
    return subjects


def refuse_few(labels: Tensor) -> None:
    """UsageError where test images are too few, or of too few classes, for UMAP and the numbers beside it."""
    count, classes = len(labels), len(labels.unique())
    if count <= NEIGHBOURS + 2:
        raise UsageError(f"UMAP needs at least {NEIGHBOURS + 3} test images, not {count}; raise --n-examples")
    if not 1 < classes < count:
        found = f"{count} test images of {classes} {'class' if classes == 1 else 'classes'} form no clusters"
        raise UsageError(f"{found}; at least two classes and one of two images are needed; raise --n-examples")


def extract_kinds(subject: Subject, name: str, settings: Umap) -> dict[str, Features]:
    """Features of a run's test images, natural ones and, where they are asked for, their PGD examples."""
    attacks = {"natural": None}
    if settings.adversarial:
        attacks[f"PGD-{settings.num_steps}"] = pgd_on(subject, settings)(cross_entropy)
    every, size = torch.arange(len(subject.split.labels)), settings.test_batch_size
    with frozen(subject.model) as net, computing(settings.precision):
        return {kind: extract(net, subject.split, every, size, by, f"{name} {kind}") for kind, by in attacks.items()}


def measure_clusters(subject: Subject, kinds: dict[str, Features], labels: Tensor) -> list[tuple]:
    """Print how far classes are clusters, by layer and kind -> (layer, kind, silhouette, agreement) of each."""
    lines = []
    weighed = weighs(subject.info)
    for layer in FEATURES if weighed else FEATURES[:1]:
        for kind, features in kinds.items():
            silhouette, agreement = clusters(getattr(features, layer), labels)
            which, share = layer if weighed else "plain", f"{NEIGHBOURS}-NN label agreement {100 * agreement:6.2f} %"
            print(f"  {which:<10} {kind:<8} silhouette {silhouette:6.3f}, {share}")
            lines.append((which, kind, silhouette, agreement))
    return lines
