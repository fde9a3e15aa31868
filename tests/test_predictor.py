"""The head: what it gives, where it works, what it saves and what it refuses."""

from pathlib import Path

import pytest
import torch
from conftest import Case, make_case
from safetensors.torch import save_file

from lightning_ella import ELLAPredictor, fit_ella

SMALL = {"num_landmarks": 30, "rank": 4, "num_curvature": 20, "prior_variance": 0.5, "covariance_scale": 2.0}


def fitted(case: Case, **settings) -> ELLAPredictor:
    return fit_ella(case.model, case.loader(), **{**SMALL, **settings})


def test_a_prediction_has_what_the_contract_names(case: Case):
    out = fitted(case)(case.inputs)
    assert out.probs.shape == out.logits_mean.shape == out.logits_variance.shape == (60, 3)
    assert out.logits_covariance.shape == (60, 3, 3)
    assert out.entropy.shape == out.mutual_information.shape == (60,)
    assert (out.mutual_information <= out.entropy).all()
    assert len(out) == 60


def test_the_covariance_is_built_on_demand_only():
    case = make_case("mlp")
    assert not any(value.shape == (60, 3, 3) for value in vars(fitted(case)(case.inputs).logits).values())


def test_saved_and_loaded_it_predicts_the_same_bits(case: Case, tmp_path: Path):
    predictor = fitted(case, predictive="bridge")
    path = predictor.save(tmp_path / "new folder" / "ella.safetensors")
    loaded = ELLAPredictor.load(path, case.model)
    assert loaded(case.inputs).probs.equal(predictor(case.inputs).probs)
    assert loaded.settings == predictor.settings
    assert loaded.covariance_scale == 2.0
    assert [p.name for p in path.parent.iterdir()] == ["ella.safetensors"]


def test_other_weights_are_refused(tmp_path: Path):
    case = make_case("conv_batchnorm")
    path = fitted(case).save(tmp_path / "ella.safetensors")
    case.model[1].running_mean += 1e-6  # statistics count as weights
    with pytest.raises(ValueError, match=r"ella\.safetensors was fitted at other weights .* or fit again"):
        ELLAPredictor.load(path, case.model)


def test_another_network_is_refused(tmp_path: Path):
    path = fitted(make_case("mlp")).save(tmp_path / "ella.safetensors")
    with pytest.raises(ValueError, match="belongs to a network with other layers"):
        ELLAPredictor.load(path, make_case("vit").model)


def test_other_weights_at_the_same_address_are_noticed():
    case = make_case("mlp")
    predictor, layer = fitted(case), case.model[0]
    layer.weight = torch.nn.Parameter(layer.weight.data)  # nothing has been written to it
    predictor(case.inputs)
    address = layer.weight.data_ptr()
    layer.weight.data.add_(1.0)  # as when an allocator hands out the address again: nothing counts it
    layer.weight = torch.nn.Parameter(layer.weight.data)
    assert (layer.weight.data_ptr(), layer.weight._version) == (address, 0)
    with pytest.raises(ValueError, match="was fitted at other weights"):
        predictor(case.inputs)


def test_weights_that_change_later_are_noticed():
    case = make_case("mlp")
    predictor = fitted(case)
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    case.model.load_state_dict(state)  # written to, but the same
    predictor(case.inputs)
    with torch.no_grad():
        case.model[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match="this posterior was fitted at other weights"):
        predictor(case.inputs)


def test_a_layer_of_another_name_is_noticed():
    case = make_case("mlp")
    predictor = fitted(case)
    last = next(reversed(case.model._modules))
    case.model._modules["head"] = case.model._modules.pop(last)
    with pytest.raises(ValueError, match="belongs to a network with other layers"):
        predictor(case.inputs)


@pytest.mark.parametrize("content", [b"", b"not a posterior", None])
def test_other_files_are_refused(tmp_path: Path, content: bytes | None):
    path = tmp_path / "other.safetensors"
    if content is None:
        save_file({"weight": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"other.safetensors is (not a file of the format|damaged or no safetensors file)"
    ):
        ELLAPredictor.load(path, make_case("mlp").model)


def test_it_works_in_train_mode_inference_mode_and_under_gradients():
    case = make_case("vit")
    predictor = fitted(case)
    expected = predictor(case.inputs).probs
    case.model.train()
    with torch.inference_mode():
        inside = predictor(case.inputs.clone()).probs
    assert inside.equal(expected)
    assert case.model.training
    with torch.enable_grad():
        out = predictor(case.inputs.requires_grad_())
    assert not out.probs.requires_grad


def test_it_moves_and_casts_as_one_module():
    case = make_case("mlp")
    predictor = fitted(case).to("meta")
    assert predictor.curvature.is_meta
    assert all(tangents.is_meta for tangents in predictor.basis.values())


def test_the_parts_are_plain_tensors_that_can_be_changed():
    case = make_case("mlp")
    predictor = fitted(case)
    before = predictor(case.inputs).logits_variance
    predictor.covariance_scale.mul_(3)
    torch.testing.assert_close(predictor(case.inputs).logits_variance, 3 * before)


def test_a_loaded_head_can_be_an_attribute_of_its_module(tmp_path: Path):
    case = make_case("vit")
    keys = list(case.model.state_dict())
    case.model.ella = ELLAPredictor.load(fitted(case).save(tmp_path / "ella.safetensors"), case.model)
    assert list(case.model.state_dict()) == keys
    case.model.eval().train().to("cpu")
    assert case.model.ella(case.inputs).probs.shape == (60, 3)


@pytest.mark.parametrize("engine", ["forward", "layerwise"])
@pytest.mark.parametrize("frozen", ["0", ""])
def test_what_is_frozen_later_counts_as_at_the_fit(tmp_path: Path, engine: str, frozen: str):
    case = make_case("mlp")
    predictor = fitted(case, engine=engine)
    expected = predictor(case.inputs).logits_variance
    path = predictor.save(tmp_path / "ella.safetensors")
    case.model.get_submodule(frozen).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in case.model.parameters()]
    assert predictor(case.inputs).logits_variance.equal(expected)
    assert ELLAPredictor.load(path, case.model)(case.inputs).logits_variance.equal(expected)
    assert [parameter.requires_grad for parameter in case.model.parameters()] == flags


def test_what_was_frozen_at_the_fit_stays_certain(tmp_path: Path):
    case = make_case("frozen")
    predictor = fitted(case)
    path = predictor.save(tmp_path / "ella.safetensors")
    case.model.requires_grad_(True)
    loaded = ELLAPredictor.load(path, case.model)
    assert loaded(case.inputs).probs.equal(predictor(case.inputs).probs)


@pytest.mark.parametrize("name", ["conv_batchnorm", "vit"])
def test_autocast_around_it_changes_nothing(name: str):
    case = make_case(name)
    case.model, case.inputs = case.model.float(), case.inputs.float()
    predictor = fitted(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = predictor(case.inputs)
        found = inside.probs, inside.logits_covariance, inside.logits.joint[0:2, 0:2], inside.entropy
    outside = predictor(case.inputs)
    expected = outside.probs, outside.logits_covariance, outside.logits.joint[0:2, 0:2], outside.entropy
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
