"""Bugs of the projection core that these tests have found: delete an entry with its fix, the file with the last one."""

import re

import pytest

KNOWN_BUGS = {
    r"test_policies.py.*separate": "policy_outputs: SB3's extract_features returns a tuple for separate extractors",
    r"all_parameters\[(.*discrete states|dict)-shared": "capture: parameters out of reach go through vmap",
    r"out_of_reach_give|certificate_of_a_budget_out": "budgets out of reach: round-off eigenvalues are inverted",
    r"certificate_is_measured": "SpectralProjection: the residual is a constant 0.0",
    r"met_exactly_by_the_proposal\[krylov": "KrylovProjection: NaN where the budget equals the proposal's model",
    r"hard_projection_in_single_precision\[100000.0-2000": "rank tolerance drops true directions",
    r"predicted_is_true_in_single_precision\[100000.0-1e-08": "damped solve: one float32 pass, nothing measured",
    r"nonsense_is_refused": "projections: NaN and wrong shapes are not refused",
    r"rank_of_repeated_states\[dtype1": "rank tolerance of float64 factors is below the round-off of eigh",
    r"zero\[10000": "rank tolerance grows with the number of columns",
    r"partly_dense_columns": "blocks: layers whose weight or bias is dense in one of two Jacobians",
    r"every_must_be_positive": "attach_projection: every=0 divides by zero at the first step",
    r"without_tempering": "metrics: 0 / 0 for saturated logits without tempering",
    r"outputs_without_a_graph|several_outputs|no_samples": "capture: raw error instead of a JacobianError",
    r"outputs_that_are_not_finite": "jacobian: NaN outputs are called random",
    r"without_running": "capture: batch norm without running statistics raises a raw error",
    r"vmap_cannot_follow|test_prelu": "capture: layers that vmap cannot follow raise from inside functorch",
    r"test_named_padding": "capture: Conv2d with padding given by name is refused",
    r"do_not_reach_cost_nothing": "capture: parameters out of reach go through vmap",
    r"submodule_under_two_names": "capture: functional_call leaves its substitutes in aliased submodules",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for pattern, reason in KNOWN_BUGS.items():
            if "tests/projection/" in item.nodeid and re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))
