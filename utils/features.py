"""Features of networks and what is measured on them: distances, clusters, embeddings. The jobs of the figures' scripts.

Features are the pooled last map: weighted, behind reverse attention, which is what the classifier sees, and unweighted,
before it. Weighting by the predicted class builds part of the clustering in, so everything here is measured on both.
(Unweighted means before the last gate: the block before it was gated by its own prediction, which stays.)
"""

import argparse
import difflib
import json
import re
import shlex
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils import distributed
from utils.attacks import Objective, cross_entropy, cross_entropy_over_heads, frozen, image_noise, linf_pgd
from utils.checkpoints import write_atomically
from utils.data import Split, as_input, batches, numbers_of, shuffled
from utils.evaluation import Attack, load_subject, method_name, recipe_weight
from utils.figures import draw_embedding, draw_histogram, require_display, save_figure, show_figures
from utils.negatives import choose_negatives
from utils.options import FEATURES, RunError, UsageError
from utils.provenance import provenance

BLOCK = 200  # negatives come from the same 200 images, the test batch of the method, whatever --test-batch-size is
NEIGHBOURS = 12
PAIRS = {"PP": "image and its PGD example", "NP": "image and a negative"}
METRICS = {"cosine": "cosine similarity", "L2": "L2 distance"}


class Features(NamedTuple):
    """Of M images, on the CPU. weighted, unweighted: (M, F). logits: (M, C), the final ones."""

    weighted: Tensor
    unweighted: Tensor
    logits: Tensor


def extract(
    net: nn.Module, split: Split, indices: Tensor, batch_size: int, attack: Attack | None = None, task: str = "features"
) -> Features:
    """Features of every image of a split, attacked or not.

    net: what `frozen` yields. indices: (M,) the images' numbers in the whole test set, which seed their noise. attack
    sees the split's labels, be they the images' own or those to be pushed to. task: named by the progress bar.
    Errors: RunError where features are not finite.
    """
    parts, count = [], len(split.labels)
    shared = count >= distributed.world()  # each rank takes its slice of the images; of fewer, each takes all
    own = torch.arange(count)[distributed.own_slice(count)] if shared else torch.arange(count)
    with tqdm(total=len(own), desc=task, unit="img", leave=False, disable=distributed.quiet()) as bar:
        for rows in batches(own, batch_size):
            batch = split.take(rows.to(split.labels.device))
            x = as_input(batch.images)
            if attack is not None:
                x = attack(net, x, batch.labels, indices[rows])
            with torch.no_grad():
                heads = net(x, heads=True)
            parts.append([part.cpu() for part in (heads.features, heads.unweighted, heads.final)])
            bar.update(len(rows))
    whole = [torch.cat(part) for part in zip(*parts, strict=True)]
    features = Features(*(distributed.joined(part, count) if shared else part for part in whole))
    if not all(part.isfinite().all() for part in features):
        raise RunError("the network answers with features that are not finite; its training has diverged")
    return features


def figure_pgd(
    objective: Callable[[nn.Module, Tensor], Objective], eps: float, step_size: float, steps: int, seed: int
) -> Attack:
    """The figures' PGD: `steps` on objective(net, labels), from x + 0.001 N(0, 1)."""

    def attack(net: nn.Module, x: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        start = x + 0.001 * image_noise(x, indices, seed, "normal")
        return linf_pgd(x, objective(net, labels), eps, step_size, steps, start)

    return attack


def towards(auxiliary_weight: float) -> Callable[[nn.Module, Tensor], Objective]:
    """What adversarial negatives ascend: less the cross-entropy over heads of the anchors' labels, as in training."""

    def objective(net: nn.Module, labels: Tensor) -> Objective:
        loss = cross_entropy_over_heads(net, labels, auxiliary_weight)
        return lambda x: -loss(x)

    return objective


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
    import umap

    reducer = umap.UMAP(
        n_neighbors=NEIGHBOURS,
        min_dist=0.01,
        metric="correlation",
        densmap=True,
        dens_lambda=1.5,
        random_state=seed,
        n_jobs=1,
    )
    return reducer.fit_transform(features.numpy())


# names


def class_names(split: Split) -> list[str]:
    """Names of classes for people: words for wnids, the first of several synonyms unless two classes share it."""
    names = [name.split(",")[0] for name in split.words or split.classes]
    return [
        name if names.count(name) == 1 else f"{name} ({code})" for name, code in zip(names, split.classes, strict=True)
    ]


def target_classes(wanted: str, split: Split) -> list[int]:
    """Classes of the split named by --target_label: `all`, a name, or a number; a name wins over a number."""
    present = split.labels.unique().tolist()
    if wanted == "all":
        return present
    spoken = [
        {name.strip().casefold() for name in (code, *words.split(","))}
        for code, words in zip(split.classes, split.words or split.classes, strict=True)
    ]
    found = [label for label, names in enumerate(spoken) if wanted.strip().casefold() in names]
    if wanted in split.classes:
        found = [split.classes.index(wanted)]
    elif not found and re.fullmatch("[0-9]+", wanted) and int(wanted) < len(spoken):
        found = [int(wanted)]
    if len(found) > 1:
        raise UsageError(f"--target_label {wanted!r} names the classes {', '.join(map(str, found))}; give one number")
    if not found:
        known = () if wanted.isdecimal() else sorted(set().union(*spoken))
        near = difflib.get_close_matches(wanted.casefold(), known, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the first are {', '.join(class_names(split)[:5])}"
        raise UsageError(f"no class {wanted!r}: give a number from 0 to {len(spoken) - 1}, a name, or all; {hint}")
    if found[0] not in present:
        raise UsageError(
            f"class {class_names(split)[found[0]]!r} has no image among the {len(split.labels)} test images; "
            "raise --n-examples or name another class"
        )
    return found


def distinct(*candidates: Sequence[str]) -> list[str]:
    """The first of several lists of names in which no name comes twice; where there is none, the first one numbered."""
    for names in candidates:
        if len(set(names)) == len(names):
            return list(names)
    return [f"{name} {i}" for i, name in enumerate(candidates[0], 1)]


def file_stem(*parts: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", "-".join(filter(None, parts))).lstrip(".")


# files


def write_arrays(file: Path, settings: dict, **arrays: np.ndarray) -> None:
    """Save arrays and settings, the latter as a JSON string, as one npz file, whole or not at all."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as out:
            np.savez_compressed(out, settings=json.dumps(settings), **arrays)

    write_atomically(file, write)


def read_arrays(file: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Settings and arrays of a file of `write_arrays`, without ever running code from it; UsageError naming it."""
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {key: content[key] for key in content.files}
        settings = json.loads(str(arrays.pop("settings")))
        if not isinstance(settings, dict):
            raise ValueError("settings are no dictionary")
    except FileNotFoundError:
        raise UsageError(f"{file} does not exist; write it by feature_distance.py") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror or error})") from error
    except (
        ValueError, KeyError, TypeError, AttributeError, EOFError, NotImplementedError, RuntimeError,
        zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise UsageError(f"{file} is none of this repository's npz files, or a truncated one; remove it") from error
    return settings, arrays


def read_distances(file: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Settings and values of a file of feature_distance.py, checked; UsageError naming it."""
    settings, arrays = read_arrays(file)
    kinds = {"name": str, "method": str, "dataset": str, "target": int, "target_name": str, "features": str}
    keys = [f"{layer}_{pair}_{metric}" for layer in FEATURES for pair in PAIRS for metric in METRICS]
    wrong = [key for key, kind in kinds.items() if not isinstance(settings.get(key), kind)]
    wrong += [key for key in keys if not _usable(arrays.get(key))]
    if wrong or settings["features"] not in FEATURES:
        raise UsageError(f"{file} has no usable {(wrong or ['features'])[0]}; write it anew by feature_distance.py")
    return settings, arrays


def _usable(values: np.ndarray | None) -> bool:
    return values is not None and values.dtype.kind == "f" and values.ndim == 1 and len(values) > 0 \
        and bool(np.isfinite(values).all())  # fmt: skip


def output_folder(path: str) -> Path:
    """The folder of --out, made where it is missing; UsageError where that cannot be."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}); name another folder by --out") from error
    return folder


def prepare_files(files: Iterable[Path], checkpoints: list[str]) -> None:
    """Make the folder of files that will hold figures of these checkpoints; UsageError where they cannot."""
    for file in files:
        output_folder(str(file.parent))
        refuse_other_runs(file, checkpoints)


def refuse_other_runs(file: Path, checkpoints: list[str]) -> None:
    """UsageError where a file holds figures of other checkpoints than these, which writing it would lose."""
    if not file.exists():
        return
    stored = read_arrays(file)[0].get("checkpoints")
    if not isinstance(stored, list) or [Path(str(p)).resolve() for p in stored] != [
        Path(p).resolve() for p in checkpoints
    ]:
        raise UsageError(f"{file} holds figures of another run; tell this one apart by --name, or name another --out")


# jobs


def feature_distance(options: argparse.Namespace) -> None:
    """PP and NP distances of the images of a class, or of each: print them and save one npz file for each class."""
    subject = load_subject(options, options.model_dir)
    split, labels = subject.split, subject.split.labels.cpu()
    numbers = numbers_of(split)
    targets = target_classes(options.target_label, split)
    strategy, _, pushed = options.strategy.partition("_")
    method = method_name(subject)
    name = options.name or file_stem(
        method, subject.info["arch"], subject.dataset, "" if options.strategy == "random" else options.strategy
    )
    files = {target: Path(options.out) / f"{name}-{target}.npz" for target in targets}
    distributed.from_first(lambda: prepare_files(files.values(), [str(subject.file)]))
    attack = (subject.eps, subject.step_size, options.num_steps, options.seed)
    rows = torch.isin(labels, torch.tensor(targets)).nonzero().squeeze(1)
    with frozen(subject.model) as net:

        def features(images: Tensor, of: Tensor, anchors: Tensor, attack: Attack | None, task: str) -> Features:
            """Of these images, with the labels `of` other images for the attack, whose noise is that of the anchors."""
            device = split.labels.device
            part = Split(split.images[images.to(device)], split.labels[of.to(device)], split.classes)
            return extract(net, part, numbers[anchors], options.test_batch_size, attack, task)

        logits = None
        if strategy != "random":
            every = torch.arange(len(labels))
            logits = features(every, every, every, None, "predictions").logits
        negatives = choose_in_blocks(labels, logits, strategy, options.seed)[rows]
        natural = features(rows, rows, rows, None, "natural")
        adversarial = features(rows, rows, rows, figure_pgd(cross_entropy, *attack), f"PGD-{options.num_steps}")
        push = figure_pgd(towards(recipe_weight(subject)), *attack) if pushed else None
        negative = features(negatives, rows, rows, push, "negatives")

    if not distributed.first():
        return
    values = {}
    for layer in FEATURES:
        for pair, other in (("PP", adversarial), ("NP", negative)):
            for metric, found in compare(getattr(natural, layer), getattr(other, layer)).items():
                values[f"{layer}_{pair}_{metric}"] = found
    origin = provenance(split.labels.device, options.seed)
    for target, file in files.items():
        own = (labels[rows] == target).numpy()
        found = {key: value[own] for key, value in values.items()}
        settings = {
            "name": name,
            "method": method,
            "checkpoints": [str(subject.file)],
            "arch": subject.info["arch"],
            "reverse_attention": subject.info["reverse_attention"],
            "dataset": subject.dataset,
            "target": target,
            "target_name": class_names(split)[target],
            "features": options.features,
            "strategy": options.strategy,
            "epsilon": subject.eps,
            "step_size": subject.step_size,
            "num_steps": options.num_steps,
            "seed": options.seed,
            "test_images": len(labels),
            "provenance": origin,
        }
        indices = {"indices": numbers[rows][own].numpy(), "negatives": numbers[negatives][own].numpy()}
        write_arrays(file, settings, **indices, **found)

    print(f"{name}: {subject.described()}")
    print(
        f"PP: PGD-{options.num_steps}, eps {subject.eps:.5g}, step {subject.step_size:.5g}, on the final logits; "
        f"NP: {options.strategy} negatives; seed {options.seed}"
    )
    for target, file in files.items():
        found = {key: value[(labels[rows] == target).numpy()] for key, value in values.items()}
        print_distances(f"class {target} ({class_names(split)[target]})", found, subject.info, options.features)
        print(f"saved {file}")
    if len(files) > 1:
        print_distances("all of these classes", values, subject.info, options.features)
    print(
        "draw by: python draw_hist.py"
        + ("" if options.out == "./distances" else f" --distances {shlex.quote(options.out)}")
    )


def print_distances(title: str, values: dict[str, np.ndarray], info: dict, chosen: str) -> None:
    """A class's table, weighted and unweighted features side by side, and what it says of alignment and exclusion."""
    layers = FEATURES if info["reverse_attention"] else FEATURES[:1]
    heads = ("weighted by the predicted class", "unweighted") if len(layers) > 1 else ("nothing is weighted",)
    columns = ("max", "min", "mean", "variance")
    print(f"\n{title}, {len(values['weighted_PP_cosine'])} images")
    print(" " * 10 + "".join(f"{head:^44}" for head in heads))
    print(" " * 10 + "".join(f"{column:>11}" for _ in heads for column in columns))
    for pair in PAIRS:
        for metric in METRICS:
            cells = [f"{x:>11.4g}" for layer in layers for x in summary(values[f"{layer}_{pair}_{metric}"]).values()]
            print(f"{pair} {metric:<7}" + "".join(cells))
    pp, negative = (values[f"{chosen}_{pair}_cosine"] for pair in PAIRS)
    print(
        f"by {f'{chosen} ' if len(layers) > 1 else ''}features\n"
        f"  alignment: an image and its adversarial example have cosine {pp.mean():.3f} in the mean (best: 1)\n"
        f"  exclusion: an image and its negative have cosine {negative.mean():.3f} in the mean (the lower the better)\n"
        f"  {100 * (pp > negative).mean():.1f} % of them are nearer to their adversarial example than to their negative"
    )


def draw_hist(options: argparse.Namespace) -> None:
    """Draw PP and NP by cosine and L2 of every file, four figures for each target label."""
    if not distributed.first():
        return
    files = []
    for path in map(Path, options.distances):
        inside = [path] if path.is_file() else sorted(path.glob("*.npz"))
        if not inside:
            raise UsageError(
                f"{path}: no distances there; first run: python feature_distance.py --model_dir RUN --target_label all"
            )
        files += inside
    if options.labels and len(options.labels) != len(files):
        raise UsageError(f"--labels has {len(options.labels)} names and there are {len(files)} files of distances")
    given = options.labels or [None] * len(files)
    entries = [(file, label, *read_distances(file)) for file, label in zip(files, given, strict=True)]
    if options.dataset:
        entries = [entry for entry in entries if entry[2]["dataset"] == options.dataset]
        if not entries:
            raise UsageError(f"none of the {len(files)} files of distances is of {options.dataset}")
    if "distances" in options.given and all(path.is_file() for path in map(Path, options.distances)):
        groups = [entries]  # files named one by one are for one figure
    else:
        groups = [[e for e in entries if e[2]["target"] == k] for k in sorted({e[2]["target"] for e in entries})]
    for group in groups:
        refuse_mixed(group, options.features)
    if options.show:
        require_display()
    folder = output_folder(options.out)
    figures = []
    with tqdm(total=4 * len(groups), desc="drawing", unit="figure", leave=False, disable=None) as bar:
        for group in groups:
            settings = group[0][2]
            layer = options.features or settings["features"]
            labels = distinct(
                [label or s["method"] for _, label, s, _ in group],
                [label or s["name"] for _, label, s, _ in group],
                [label or file.stem for file, label, _, _ in group],
            )
            for pair, metric in ((p, m) for p in PAIRS for m in METRICS):
                values = {label: e[3][f"{layer}_{pair}_{metric}"] for label, e in zip(labels, group, strict=True)}
                title = f"{pair}: {PAIRS[pair]}\n{settings['dataset']}, class {settings['target_name']}"
                title += f", {layer} features" if any(e[2].get("reverse_attention") for e in group) else ""
                figure = draw_histogram(values, METRICS[metric], title, options.show)
                stem = file_stem("hist", settings["dataset"], str(settings["target"]), pair, metric)
                stem += "-unweighted" if layer == "unweighted" else ""
                tqdm.write(f"saved {' and '.join(map(str, save_figure(figure, folder / stem)))}")
                figures += [figure] if options.show else []
                bar.update()
    if options.show:
        show_figures()


def refuse_mixed(group: list[tuple], features: str | None) -> None:
    """UsageError where files cannot share a histogram; a line on standard output where they should not."""
    first, _, settings, _ = group[0]
    for file, _, other, _ in group[1:]:
        for key, mend in (
            ("dataset", "choose by --dataset or --distances"),
            ("target", "choose files of one class by --distances"),
            ("target_name", "they are of different data; choose by --distances"),
            ("features", "choose by --features"),
        ):
            if settings[key] != other[key] and not (key == "features" and features):
                raise UsageError(
                    f"{first} and {file} do not belong into one histogram: {key} {settings[key]!r} and {other[key]!r}; "
                    + mend
                )
        for key in ("epsilon", "step_size", "num_steps", "strategy", "test_images"):
            if settings.get(key) != other.get(key):
                print(f"note: {first} and {file} differ in {key}: {settings.get(key)} and {other.get(key)}")


def draw_umap(options: argparse.Namespace) -> None:
    """Embed the features of test images of one or several runs, draw them as panels, save figure and embeddings."""
    subjects = []
    for path in options.model_dir:
        subject = load_subject(options, path)
        subjects.append(subject)
        if (subject.dataset, subject.split.classes) != (subjects[0].dataset, subjects[0].split.classes) or not (
            torch.equal(subject.split.labels, subjects[0].split.labels)
        ):
            raise UsageError(
                f"{subjects[0].file} is of {subjects[0].dataset} and {subject.file} of {subject.dataset}, other test "
                "images; panels show the same ones, so name runs of one data set"
            )
    split, labels = subjects[0].split, subjects[0].split.labels.cpu()
    numbers = numbers_of(split)
    refuse_few(labels)
    methods = [method_name(subject) for subject in subjects]
    names = options.labels or distinct(
        methods, [f"{method} {subject.file.stem}" for method, subject in zip(methods, subjects, strict=True)]
    )
    stem = options.name or file_stem(
        "umap", "_".join(names), subjects[0].dataset, "adversarial" if options.adversarial else "",
        "unweighted" if options.features == "unweighted" else "",
    )  # fmt: skip
    if options.show:
        require_display()
    checkpoints = [str(subject.file) for subject in subjects]
    saved = Path(options.out) / f"{stem}.npz"
    distributed.from_first(lambda: prepare_files([saved], checkpoints))

    found = []
    for subject, name in zip(subjects, names, strict=True):
        settings = (subject.eps, subject.step_size, options.num_steps, options.seed)
        attacks = {"natural": None}
        if options.adversarial:
            attacks[f"PGD-{options.num_steps}"] = figure_pgd(cross_entropy, *settings)
        kinds = {}
        with frozen(subject.model) as net:
            for kind, attack in attacks.items():
                kinds[kind] = extract(net, subject.split, numbers, options.test_batch_size, attack, f"{name} {kind}")
        found.append(kinds)
    if not distributed.first():
        return

    panels, arrays, measured = [], {}, {}
    for i, (subject, name, kinds) in enumerate(zip(subjects, names, found, strict=True)):
        print(f"{name}: {subject.file}, {subject.described()}")
        lines = []
        for layer in FEATURES if subject.info["reverse_attention"] else FEATURES[:1]:
            for kind, features in kinds.items():
                silhouette, agreement = clusters(getattr(features, layer), labels)
                which = layer if subject.info["reverse_attention"] else "plain"
                measured[f"{name}, {which}, {kind}"] = {"silhouette": silhouette, "agreement": agreement}
                print(f"  {which:<10} {kind:<8} silhouette {silhouette:6.3f}, "
                      f"{NEIGHBOURS}-NN label agreement {100 * agreement:6.2f} %")  # fmt: skip
                lines.append((which, kind, silhouette, agreement))
        print(f"  embedding {sum(len(f.logits) for f in kinds.values())} points by UMAP", flush=True)
        embedding = embed(torch.cat([getattr(features, options.features) for features in kinds.values()]), options.seed)
        if not np.isfinite(embedding).all():
            raise RunError(f"UMAP cannot place every image of {name}; take more images by --n-examples")
        arrays[f"embedding_{i}"] = embedding
        panels.append((name, embedding, lines))
    weighed = any(subject.info["reverse_attention"] for subject in subjects)
    embedded = f"{options.features} features" if weighed else "features"
    figure = draw_embedding(panels, labels.numpy(), class_names(split), list(attacks), embedded, options.show)
    settings = {
        "names": names,
        "checkpoints": checkpoints,
        "dataset": subjects[0].dataset,
        "features": options.features,
        "kinds": list(attacks),
        "epsilon": subjects[0].eps,
        "step_size": subjects[0].step_size,
        "num_steps": options.num_steps,
        "seed": options.seed,
        "measured": measured,
        "provenance": provenance(split.labels.device, options.seed),
    }
    write_arrays(saved, settings, indices=numbers.numpy(), labels=labels.numpy(), **arrays)
    print(f"saved {' and '.join(map(str, save_figure(figure, saved.parent / stem)))}, embedding {saved}")
    if options.show:
        show_figures()


def refuse_few(labels: Tensor) -> None:
    """UsageError where test images are too few, or of too few classes, for UMAP and the numbers beside it."""
    count, classes = len(labels), len(labels.unique())
    if count <= NEIGHBOURS + 2:
        raise UsageError(f"UMAP with {NEIGHBOURS} neighbours needs at least {NEIGHBOURS + 3} test images, not {count}; "
                         "raise --n-examples")  # fmt: skip
    if not 1 < classes < count:
        raise UsageError(
            f"{count} test images of {classes} {'class' if classes == 1 else 'classes'} form no clusters; at least two "
            "classes and one of two images are needed; raise --n-examples"
        )
