"""The study of changed data with a few labels: its rivals choose on labels alone, and it runs from end to end."""

import json
import sys
from pathlib import Path

import pytest
import torch
from commands import clone
from conftest import ROOT
from test_recipes import start
from torch import nn

sys.path.insert(0, str(ROOT / "recipes"))
from adapt import (
    Domain,
    Task,
    best,
    last_layer_again,
    look,
    norms_and_last_layer,
    refitted,
    temperature_scaling,
    trained,
    weights,
)
from omegaconf import OmegaConf
from rivals import NotApplicable

SETTINGS = OmegaConf.create({"folds": 4, "epochs": 2, "rates": [0.01]})


def network(*behind: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3), *behind).eval()


def task(model: nn.Module, turned: bool = False, count: int = 60) -> Task:
    """Labels that a surer network gives, or those with its classes in another order."""
    inputs = 3 * torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        probs = (2.5 * model(inputs)).softmax(1)
    targets = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(2)).squeeze(1)
    targets = (targets + turned) % 3
    domain = Domain(model, 1.0, (inputs[:100], targets[:100]), inputs[100:200], (inputs[200:], targets[200:]))
    return Task(domain, count, SETTINGS, 0, {})


def loss(probs: torch.Tensor, of: Task) -> float:
    return float(nn.functional.nll_loss(probs.log(), of.domain.test[1]))


def test_the_best_temperature_and_candidate_are_found_whatever_the_others_became():
    logits = 3 * torch.randn(1, 20_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.multinomial((logits[0] / 2).softmax(1), 1, generator=torch.Generator().manual_seed(1)).squeeze(1)
    candidates = torch.cat([logits.flip(1), torch.full_like(logits, torch.nan), logits])
    index, temperature, _ = best(candidates, targets, 1.0)
    assert index == 2
    assert temperature == pytest.approx(2, rel=0.05)


def test_few_labels_that_are_all_right_do_not_make_a_network_certain():
    logits = 2 * torch.eye(3, dtype=torch.float64).repeat(5, 1)
    _, temperature, _ = best(logits.unsqueeze(0), logits.argmax(1), 1.5)
    assert 0.3 < temperature < 1.5


def test_the_last_layer_learns_where_classes_have_moved():
    moved = task(network(), turned=True)
    assert loss(last_layer_again(moved).probs, moved) < 0.8 * loss(temperature_scaling(moved).probs, moved)


def test_a_last_layer_that_must_not_move_is_scaled_alone():
    given = task(network())
    known = given.domain.seen[0].first(60)
    own = weights(given.domain.model[3])  # type: ignore[index]
    again, _ = refitted(own, known.activations, given.targets, 1e6)
    _, temperature, _ = best(known.logits.unsqueeze(0), given.targets, 1.0)
    torch.testing.assert_close(again, own[0] / temperature, rtol=0.02, atol=1e-3)


def test_a_network_that_goes_on_behind_its_last_linear_layer_has_none_to_fit():
    assert look(network(), torch.randn(5, 4)).activations is not None
    with pytest.raises(NotApplicable):
        last_layer_again(task(network(nn.Softplus())))


def test_new_statistics_are_those_of_the_unlabelled_images_and_the_network_stays():
    here = task(network()).domain
    before = {name: value.clone() for name, value in here.model.state_dict().items()}
    adapted, _ = here.adapted
    with torch.no_grad():
        inputs = adapted[0](here.unlabelled)  # type: ignore[index]
    torch.testing.assert_close(adapted[1].running_mean, inputs.mean(0))  # type: ignore[index]
    assert not adapted.training
    torch.testing.assert_close(here.model.state_dict(), before, rtol=0, atol=0)


def test_fine_tuning_changes_the_weights_that_it_is_to_change_and_no_statistics():
    given = task(network())
    names = norms_and_last_layer(given.domain.model)
    assert names == {"1.weight", "1.bias", "3.weight", "3.bias"}
    (*_, tuned) = trained(given, names, 0.01, 2, torch.arange(60))
    before = given.domain.model.state_dict()
    changed = {name for name, value in tuned.state_dict().items() if not value.equal(before[name])}
    assert changed == names


def test_folds_hold_out_every_label_once():
    folds = task(network(), count=50).folds
    assert torch.cat([held for _, held in folds]).sort().values.tolist() == list(range(50))
    assert all(not set(learn.tolist()) & set(held.tolist()) for learn, held in folds)


def test_the_study_runs_on_digits_and_writes_what_it_found(tmp_path: Path):
    sizes = ["data.holdout=100", "num_calibration=40", "labels=[20,30]", "num_unlabelled=30", "num_test=20"]
    sizes += ["domains=[none,rotate/5]", "epochs=1", "rates=[0.001]", "folds=2", "ranks=[2,4]"]
    sizes += ["trainer.max_epochs=1", "trainer.enable_progress_bar=false", "logger=wandb"]
    sizes += ["ella.num_landmarks=16", "ella.num_curvature=16"]
    (made,), printed = start("adapt.py", clone(tmp_path / "clone"), *sizes)
    found = json.loads((made / "adapt.json").read_text())
    assert set(found) == {"none", "rotate/5", "NLL"}
    for rows in found["rotate/5"].values():
        assert len(rows) == 1
        for row in rows:
            methods = {"MAP", "temperature scaling", "last layer fitted again", "BatchNorm statistics"}
            methods |= {"fine-tuning, better by CV", "lightning-ella, no labels", "lightning-ella, 4 directions"}
            assert methods | {"BatchNorm statistics and lightning-ella"} < set(row)
            assert all(figures["nll"] > 0 and figures["seconds"] >= 0 for figures in row.values())
    assert found["none"]["20"][0]["MAP"]["nll"] != found["rotate/5"]["20"][0]["MAP"]["nll"]
    assert set(found["NLL"]) == {"changed", "unchanged"}
    for words in ("20 labels: NLL", "over temperature scaling", "unchanged"):
        assert words in printed
    for name in ("adapt", "ranks"):
        assert (made / f"{name}.png").stat().st_size > 10_000
    (stored,) = made.glob("wandb/offline-run-*/run-*.wandb")
    assert b"adapt/rotate/5/20/MAP/nll" in stored.read_bytes()
