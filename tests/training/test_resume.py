"""Names of run folders, and what a resumed run takes over."""

import json

import pytest
import torch

from tests.helpers import (
    PLAIN,
    RA,
    assert_same_run,
    files,
    image_folder,
    metrics,
    pixels,
    png,
    resume,
    state,
    train,
)
from utils.system.checkpoints import load_model
from utils.system.errors import UsageError
from utils.system.options import parse_training
from utils.training import runs

ONE_EPOCH = ("--epochs", 1)
TWO = ("--milestones", 2)

pytestmark = pytest.mark.usefixtures("short_runs")


# Names of folders


def named(*flags, recipe=RA):
    """Return the name of the folder of a command's run."""
    return runs.run_folder(parse_training("", recipe, list(map(str, flags)))).name


PUBLISHED = "ANCRA-strategy-random_adv-alpha-1.0-beta-6.0-zeta-3.0-seed-1"


@pytest.mark.parametrize(
    ("flags", "end"),
    [
        ("", ""),
        ("--model-dir ./model/ANCRA/ --epochs 5 --no-cuda", ""),
        ("--wd 0.1 --milestones 5,6", "-milestones-5,6-weight_decay-0.1"),
        ("--method pgd", "-pgd"),
        (
            "--lr-schedule cosine --epochs 9 --seed 1 --width 8",
            "-lr_schedule-cosine-width-8-epochs-9",
        ),
        ("--optimizer adamw --momentum 0.5", "-adamw"),
        ("--optimizer adamw --lr 0.01", "-adamw-lr-0.01"),
        ("--tag wider", "-tag-wider"),
        ("--no-ra --cr_beta 1", "-no-ra"),
    ],
)
def test_a_folder_is_named_as_published_then_by_what_differs(flags, end):
    assert named(*flags.split()) == PUBLISHED + end


def test_the_name_of_a_run_on_digits(straight_run):
    assert straight_run.name == (
        "run-strategy-random_adv-alpha-1.0-beta-6.0-zeta-3.0-seed-1-digits-batch_size-10"
        "-milestones-2-num_steps-2-warmup_epochs-0-width-4-limit_train-24-limit_test-12"
    )


def test_a_folder_is_named_by_its_method():
    recipe = PLAIN | {"model_dir": "./model/TRADES-ResNet18"}
    trades = "TRADES-ResNet18-beta-6.0-seed-1"
    assert named(recipe=recipe) == trades
    assert named("--zeta", 2, "--strategy", "soft", recipe=recipe) == trades
    assert named("--method", "pgd", "--beta", 2, recipe=recipe) == "PGD-ResNet18-seed-1"
    mart = named("--method", "mart", "--lr", 1, recipe=recipe)
    assert mart == "MART-ResNet18-beta-5.0-seed-1-lr-1.0"
    ancra = RA | {"model_dir": "./model/ANCRA-WideResNet34-TRADES"}
    assert named("--method", "mart", recipe=ancra).startswith("ANCRA-WideResNet34-MART-")


def test_folders_of_data_are_told_apart_by_their_paths(here):
    one = named("--dataset=folder", "--data-dir=a/cats/")
    assert one == named("--dataset=folder", f"--data-dir={here}/a/cats")
    assert one != named("--dataset=folder", "--data-dir=b/cats")
    assert "-folder-cats-" in one


# Going on


def test_a_run_goes_on_as_if_it_had_not_ended(tmp_path, straight_run):
    train(tmp_path, *TWO, *ONE_EPOCH)
    resumed = train(tmp_path, *TWO, "--epochs", 2, "--resume")
    assert_same_run(straight_run, resumed)
    assert [float(row["lr"]) for row in metrics(resumed)] == pytest.approx([0.03, 0.003])
    log = (resumed / "train.log").read_text()
    assert "resumed    in epoch 2, 0 images done\n" in log


def test_a_finished_run_stays_as_it_is(run, capsys):
    networks = {file: file.read_bytes() for file in run.glob("*model*.pt")}
    resume(run)
    assert "nothing is left to train" in capsys.readouterr().out
    assert networks == {file: file.read_bytes() for file in run.glob("*model*.pt")}


def test_run_json_keeps_what_resumes_were_given(tmp_path):
    run = train(tmp_path, *ONE_EPOCH)
    resume(run, "--epochs", 2, "--no-cuda")
    resume(run, "--epochs", 3, "--device", "cpu")
    record = json.loads((run / "run.json").read_text())
    epochs = [r["settings"]["epochs"] for r in (*record["earlier"], record)]
    assert epochs == [1, 2, 3]


# Settings that differ


def test_resume_alone_means_the_run_of_exactly_this_command(run, tmp_path):
    """Where there is none, no other run is touched."""
    before = files(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        train(tmp_path, *TWO, "--lr", 0.01, "--resume")
    assert files(tmp_path) == before


def test_a_run_of_a_changed_copy_of_the_code_is_refused(run):
    content = state(run)
    content["recipe"]["shift"] = 2.5
    torch.save(content, run / "last_state.pt")
    with pytest.raises(UsageError, match="version"):
        resume(run)


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (("--lr", 0.01), "--lr 0.01, the run has 0.03"),
        (("--lr", 0.03, "--zeta", 2, "--epochs", 9), "--zeta 2, the run has 3"),
        (("--milestones", "11,14"), "--milestones 11,14, the run has 2"),  # a default
        (("--optimizer", "adamw"), "--optimizer adamw, the run has sgd"),
        (("--gate", "soft", "--batch-size", 12), "--batch-size 12, the run has 10; --gate soft"),
    ],
)
def test_a_setting_that_the_named_run_has_otherwise_is_an_error(run, tmp_path, flags, difference):
    before = files(tmp_path)
    with pytest.raises(UsageError) as refusal:
        resume(run, "--model-dir", tmp_path / "run", *flags)
    assert f"--resume: {difference}" in str(refusal.value)
    assert files(tmp_path) == before


def test_a_setting_without_effect_may_be_given_to_a_resume(tmp_path):
    run = train(tmp_path, *ONE_EPOCH, recipe=PLAIN)
    resume(run, "--zeta", 9, "--strategy", "soft")
    assert state(run)["recipe"]["zeta"] == 3


# Images that differ


def test_a_resume_with_other_images_needs_a_flag(tmp_path, capsys):
    parts = dict.fromkeys(("train", "val", "test"), {"cat": 3, "dog": 3})
    pets = image_folder(tmp_path / "pets", parts)
    flags = ("--dataset", "folder", "--data-dir", pets, "--image-size", 16)
    run = train(tmp_path, *flags, *ONE_EPOCH)
    checksums = json.loads((run / "run.json").read_text())["checksums"]
    assert checksums == state(run)["checksums"]
    assert checksums.keys() == {"training", "selection", "test"}
    assert "on the val part, 6 images" in capsys.readouterr().out

    resume(run, "--epochs", 2)
    for part in ("train", "test"):
        png(pets / part / "dog/1.png", pixels(77, 16, 16, 3))
    before = files(run)
    with pytest.raises(UsageError, match="other images .*--other-data"):
        resume(run, "--epochs", 3)
    assert files(run) == before
    resume(run, "--epochs", 3, "--other-data")
    # The flag was for those images; these are the run's own now.
    resume(run, "--epochs", 4)
    record = json.loads((run / "run.json").read_text())
    same = [part["checksums"] == checksums for part in (*record["earlier"], record)]
    assert same == [True, True, False, False]


# Starting from weights


def test_a_restart_from_weights_has_a_fresh_optimiser(tmp_path):
    def restarted(name, file, *more):
        return train(tmp_path / name, "--restart_epoch", 1, "--ckpt_url", file, *more)

    file = train(tmp_path / "1", *ONE_EPOCH) / "model-wrn-last.pt"
    again = restarted("2", file)
    assert [row["epoch"] for row in metrics(again)] == ["2"]
    assert restarted("2", file, "--resume") == again

    weights = load_model(file)[0].state_dict()
    published = {f"module.{name.replace('fc.', 'linear.')}": w for name, w in weights.items()}
    torch.save({"net": published, "epoch": 1}, tmp_path / "published.pt")
    assert_same_run(again, restarted("3", tmp_path / "published.pt"))


def test_a_restart_takes_the_weights_of_its_epoch_from_a_run_folder(tmp_path):
    first = train(tmp_path / "1", "--epochs", 3, "--save-freq", 2)

    def restarted(epoch):
        flags = ("--epochs", epoch + 1, "--restart_epoch", epoch, "--ckpt_url", first)
        return (train(tmp_path / str(epoch), *flags) / "train.log").read_text()

    assert f"from the weights in {first}/model-2.pt" in restarted(2)
    assert f"from the weights in {first}/model-wrn-last.pt" in restarted(3)
    with pytest.raises(UsageError, match="no weights of epoch 7"):
        restarted(7)
    assert not (tmp_path / "7").exists()
