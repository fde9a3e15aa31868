"""Gradients and products against a dense Jacobian."""

import pytest
import torch
from conftest import Case, flat, make_case
from torch import nn

from lightning_ella.engine import Linearization
from lightning_ella.linearize import as_function


def tangents(linearization: Linearization, rank: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(rank, *value.shape).to(value) for name, value in linearization.parameters.items()}


def gradient_rows(linearization: Linearization, inputs, outputs: torch.Tensor) -> torch.Tensor:
    chunks = linearization.gradients(inputs, outputs)
    return torch.cat([torch.cat(list(chunk.values()), dim=1) for chunk in chunks])


@pytest.mark.parametrize("engine", ["forward", "layerwise"])
@pytest.mark.parametrize(("samples", "directions"), [(1, 1), (4, 3), (None, None)])
def test_features_are_the_jacobian_times_the_basis(
    case: Case, engine: str, samples: int | None, directions: int | None
):
    with as_function():
        linearization = Linearization(
            case.model, engine=engine, samples_per_chunk=samples, tangents_per_chunk=directions
        )
        basis = tangents(linearization, 7)
        logits, features = linearization.features(case.inputs, basis)
    torch.testing.assert_close(features, case.jacobian() @ flat(basis), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, case.logits())


def test_gradients_are_rows_of_the_jacobian(case: Case):
    with as_function():
        rows = gradient_rows(Linearization(case.model), case.inputs, case.targets)
    expected = case.jacobian()[torch.arange(len(case)), case.targets]
    torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-9)


def test_projections_are_cotangents_times_jacobian_times_basis(case: Case):
    v = torch.randn(len(case), 3, dtype=torch.float64)
    with as_function():
        linearization = Linearization(case.model, samples_per_chunk=len(case))
        basis = tangents(linearization, 4)
        logits, projections = linearization.projections(case.inputs, lambda _, part: v[part], basis)
    expected = torch.einsum("bc,bcp,pk->bk", v, case.jacobian(), flat(basis))
    torch.testing.assert_close(projections, expected)
    torch.testing.assert_close(logits, case.logits())


def test_only_trainable_parameters_count():
    case = make_case("frozen")
    assert set(Linearization(case.model).parameters) == {"2.weight", "2.bias"}


def test_the_network_is_left_as_it_was(case: Case):
    case.model.train()
    next(case.model.children()).eval()
    modes = [module.training for module in case.model.modules()]
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    with as_function():
        linearization = Linearization(case.model, engine="forward")
        linearization.features(case.inputs, tangents(linearization, 2))
        gradient_rows(linearization, case.inputs, case.targets)
    assert [module.training for module in case.model.modules()] == modes
    assert all(parameter.grad is None for parameter in case.model.parameters())
    torch.testing.assert_close(case.model.state_dict(), state, rtol=0, atol=0)


def test_modes_come_back_after_an_error():
    model = nn.Dropout().train()
    with pytest.raises(ValueError, match="it gives"), as_function():
        Linearization(nn.LSTM(1, 1)).logits(model(torch.zeros(1, 1)))
    assert model.training


def test_features_do_not_vanish_in_inference_mode():
    case = make_case("mlp")
    with torch.inference_mode(), as_function():
        linearization = Linearization(case.model, engine="forward")
        basis = tangents(linearization, 2)
        _, features = linearization.features(case.inputs, basis)
    torch.testing.assert_close(features, case.jacobian() @ flat(basis))


def test_shared_weights_are_one_parameter():
    case = make_case("mlp")
    case.model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    case.model[2].weight = case.model[0].weight
    with as_function():
        linearization = Linearization(case.model)
        basis = tangents(linearization, 4)
        _, features = linearization.features(case.inputs, basis)
    assert len(basis) == 3
    torch.testing.assert_close(features, case.jacobian() @ flat(basis))


def test_compiled_networks_run_eagerly():
    case = make_case("mlp")
    compiled = torch.compile(case.model, backend="inductor")  # would fail under forward mode, and take minutes
    with as_function():
        linearization = Linearization(compiled, engine="forward")
        basis = tangents(linearization, 2)
        _, features = linearization.features(case.inputs, basis)
    torch.testing.assert_close(features, case.jacobian() @ flat(basis))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Flatten(0), r"it gives \(9,\)"),
        (nn.LSTM(3, 3), "it gives a tuple of .*model.inputs.\\[0\\]"),
        (nn.Linear(3, 2, dtype=torch.float64).requires_grad_(False), "requires_grad=True"),
        (nn.Linear(3, 2, dtype=torch.bfloat16), "call model.float"),
    ],
)
def test_unusable_networks_are_refused(model: nn.Module, message: str):
    model.register_parameter("extra", next(iter(model.parameters()), nn.Parameter(torch.zeros(1))))
    x = torch.randn(3, 3, dtype=next(model.parameters()).dtype)
    with pytest.raises(ValueError, match=message), as_function():
        Linearization(model).logits(x)


def test_infinite_outputs_are_refused():
    case = make_case("mlp")
    with torch.no_grad():
        case.model[2].bias[0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite"), as_function():
        Linearization(case.model).logits(case.inputs)
