"""The retention constraint against torch.distributions, autograd and jacrev."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call, jacrev

from nsrl.errors import NsrlError
from nsrl.rl.policies.actor_critic import policy_outputs
from nsrl.rl.retention.constraint import RetentionConstraint
from tests.rl.builders import trained
from tests.rl.oracles import state_kls


def moved_constraint(kind: str, preserve: str = "distribution", size: float = 0.05) -> RetentionConstraint:
    """A constraint whose policy has moved away from the reference."""
    agent, buffer = trained(kind)
    policy = type(agent.policy)(**agent.policy._get_constructor_parameters())
    policy.load_state_dict(agent.policy.state_dict())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return RetentionConstraint(policy, buffer, preserve, tempering=0.0)


@pytest.mark.parametrize(("kind", "preserve"), [("discrete", "distribution"), ("box", "distribution"), ("box", "mode")])
def test_measurement_and_gradient(kind: str, preserve: str) -> None:
    constraint = moved_constraint(kind, preserve)
    policy, buffer = constraint.policy, constraint.buffer
    found = policy.get_distribution(buffer.inputs()).distribution
    kl = state_kls(policy, buffer, preserve, outputs=found.logits if kind == "discrete" else found.mean)
    measured = constraint.measure()
    assert measured.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert measured.kl_max == pytest.approx(float(kl.max()), rel=1e-4)
    held = torch.as_tensor(buffer.heldout)
    assert measured.kl_heldout == pytest.approx(float(kl[held].mean()), rel=1e-4)
    named = dict(policy.named_parameters())
    expected = torch.autograd.grad(kl[~held].mean(), [named[name] for name in constraint.names])
    value, gradient = constraint.gradient(constraint.train)
    assert value == pytest.approx(float(kl[~held].mean()), rel=1e-4)
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in expected]), rtol=1e-3, atol=1e-6)
    assert not set(constraint.train.tolist()) & set(constraint.heldout.tolist())
    assert sorted([*constraint.train.tolist(), *constraint.heldout.tolist()]) == list(range(len(buffer)))


@pytest.mark.parametrize(("kind", "preserve"), [("discrete", "distribution"), ("box", "distribution"), ("box", "mode")])
def test_the_linearisation_has_the_slope_and_curvature_of_the_kl(kind: str, preserve: str) -> None:
    constraint = moved_constraint(kind, preserve)
    model = constraint.linearise(constraint.train)
    _, gradient = constraint.gradient(constraint.train)
    torch.testing.assert_close(model.jacobian.rmatvec(model.residual), gradient, rtol=1e-3, atol=1e-5)
    # Gauss-Newton: J^T J = mean_n (dz/dtheta)^T H (dz/dtheta), H the Fisher information of the outputs
    outputs = policy_outputs(constraint.policy, constraint.inputs)[constraint.train].detach()
    named = {name: p.detach() for name, p in constraint.policy.named_parameters() if name in constraint.names}

    class Bound(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = constraint.policy

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return policy_outputs(self.policy, inputs)

    def call(values: dict[str, torch.Tensor]) -> torch.Tensor:
        values = {f"policy.{name}": value for name, value in values.items()}
        return functional_call(Bound(), values, (constraint.inputs[constraint.train],))

    rows = jacrev(call)(named)
    dense = torch.cat([rows[name].flatten(2) for name in constraint.names], 2).double()
    if kind == "discrete":
        p = torch.softmax(outputs, -1).double()
        fisher = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    else:
        log_std = constraint.policy.log_std if preserve == "distribution" else torch.tensor(constraint.buffer.log_std)
        fisher = torch.diag(torch.exp(-2 * log_std.detach().double())).expand(len(outputs), -1, -1)
    # by its products with a dozen random directions, since the matrix itself has tens of millions of entries
    directions = torch.randn(dense.shape[2], 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = torch.einsum("noq,nqd->nod", fisher, torch.einsum("nop,pd->nod", dense, directions))
    expected = torch.einsum("nop,nod->pd", dense, moved) / len(outputs)
    if constraint.protects_log_std:
        start = sum(constraint.parameters.sizes[: constraint.names.index("log_std")])
        spread = slice(start, start + constraint.policy.log_std.numel())
        expected[spread] += 2.0 * directions[spread]
    ours = model.jacobian.dense().double()
    found = ours.T @ (ours @ directions)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_a_frozen_standard_deviation_counts_but_is_no_column() -> None:
    moved = moved_constraint("box")
    moved.policy.log_std.requires_grad_(False)
    constraint = RetentionConstraint(moved.policy, moved.buffer, tempering=0.0)
    assert constraint.names == tuple(name for name in moved.names if name != "log_std")
    assert constraint.measure().kl_mean == pytest.approx(float(state_kls(moved.policy, moved.buffer).mean()), rel=1e-4)
    value, gradient = constraint.gradient(constraint.train)
    model = constraint.linearise(constraint.train)
    torch.testing.assert_close(model.jacobian.rmatvec(model.residual), gradient, rtol=1e-3, atol=1e-5)
    assert value == pytest.approx(constraint.quadratic(constraint.train).divergence, rel=1e-6)


def test_only_the_actor_is_protected() -> None:
    _, buffer = trained("box")
    names = moved_constraint("box").names
    assert "log_std" in names and not any("value" in name for name in names)
    assert "log_std" not in moved_constraint("box", "mode").names
    agent, _ = trained("discrete")
    with pytest.raises(NsrlError, match="gaussian outputs but the policy's action distribution is categorical"):
        RetentionConstraint(agent.policy, buffer)


def weighted(constraint: RetentionConstraint, weights: np.ndarray) -> RetentionConstraint:
    buffer = replace(constraint.buffer, weights=weights.astype(np.float32))
    return RetentionConstraint(constraint.policy, buffer, constraint.preserve, constraint.tempering)


@pytest.mark.parametrize(("kind", "preserve"), [("discrete", "distribution"), ("box", "distribution"), ("box", "mode")])
def test_weights_repeat_states(kind: str, preserve: str) -> None:
    """A state of weight 3 counts as three copies of it, and one of weight 0 as none."""
    plain = moved_constraint(kind, preserve)
    counts = np.random.default_rng(0).integers(0, 4, len(plain.buffer))
    copies = np.repeat(np.arange(len(counts)), counts)
    repeated = replace(
        plain.buffer,
        observations=plain.buffer.observations[copies],
        outputs=plain.buffer.outputs[copies],
        heldout=plain.buffer.heldout[copies],
        weights=None,
        source=None,
    )
    ours = weighted(plain, counts)
    theirs = RetentionConstraint(plain.policy, repeated, preserve, plain.tempering)
    measured, expected = ours.measure(), theirs.measure()
    assert measured.kl_mean == pytest.approx(expected.kl_mean, rel=1e-6)
    assert measured.kl_heldout == pytest.approx(expected.kl_heldout, rel=1e-6)
    assert ours.divergence() == pytest.approx(theirs.divergence(), rel=1e-6)
    assert ours.divergences() == pytest.approx(theirs.divergences(), rel=1e-6)
    for one, other in zip(ours.gradient(ours.train), theirs.gradient(theirs.train), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-4, atol=1e-6)
    model, model_of_copies = ours.linearise(ours.train), theirs.linearise(theirs.train)
    assert model.divergence == pytest.approx(model_of_copies.divergence, rel=1e-6)
    rows, rows_of_copies = model.jacobian.dense().double(), model_of_copies.jacobian.dense().double()
    directions = torch.randn(rows.shape[1], 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fisher = rows_of_copies.T @ (rows_of_copies @ directions)
    found = rows.T @ (rows @ directions)
    torch.testing.assert_close(found, fisher, rtol=1e-3, atol=1e-6 * float(fisher.abs().max()))
    slope = model_of_copies.jacobian.rmatvec(model_of_copies.residual)
    torch.testing.assert_close(model.jacobian.rmatvec(model.residual), slope, rtol=1e-3, atol=1e-5)
    passes = ours.quadratic(ours.train)
    vector = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0))
    rise = 0.5 * (rows @ vector.double() + model.residual).square().sum() - 0.5 * model.residual.square().sum()
    assert passes.predict(vector) == pytest.approx(model.divergence + float(rise), rel=1e-5)
    torch.testing.assert_close(passes.jacobian.matvec(vector).double(), rows @ vector.double(), rtol=1e-4, atol=1e-4)


def test_equal_weights_are_no_weights_to_the_last_bit() -> None:
    plain = moved_constraint("box")
    same = weighted(plain, np.full(len(plain.buffer), 0.3))
    assert same.measure() == plain.measure()
    assert torch.equal(same.gradient(same.train)[1], plain.gradient(plain.train)[1])
    one, other = (constraint.linearise(constraint.train[:40]) for constraint in (same, plain))
    assert torch.equal(one.residual, other.residual) and torch.equal(one.jacobian.dense(), other.jacobian.dense())


def test_importance_multiplies_the_weights() -> None:
    plain = moved_constraint("discrete")
    states = plain.train[:30]
    importance = torch.linspace(1, 4, 30)
    weights = np.ones(len(plain.buffer))
    weights[states.numpy()] = importance.numpy()
    one, other = plain.linearise(states, importance), weighted(plain, weights).linearise(states)
    assert one.divergence == pytest.approx(other.divergence, rel=1e-6)
    torch.testing.assert_close(one.jacobian.dense(), other.jacobian.dense())
    torch.testing.assert_close(one.residual, other.residual)


def test_a_policy_of_other_width_is_refused() -> None:
    agent, buffer = trained("discrete")
    wide = replace(buffer, outputs=np.zeros((len(buffer), 3), dtype=np.float32))
    with pytest.raises(NsrlError, match="3 outputs a state but the policy has 2"):
        RetentionConstraint(agent.policy, wide)
