"""How a model's Jacobian is captured and multiplied with: from its layers' factors, or by passes through it."""

from nsrl.projection.jacobians.capture import JacobianError
from nsrl.projection.jacobians.columns import parameter_columns
from nsrl.projection.jacobians.factored import FactoredJacobian, Jacobian, StackedJacobian
from nsrl.projection.jacobians.linearise import jacobian
from nsrl.projection.jacobians.matrix_free import GraphPasses, LayerPasses, Passes, PolicyJacobian, Products
from nsrl.projection.jacobians.sharded import ShardedJacobian, shard_layers, sharded_jacobian

__all__ = [
    "FactoredJacobian",
    "GraphPasses",
    "Jacobian",
    "JacobianError",
    "LayerPasses",
    "Passes",
    "PolicyJacobian",
    "Products",
    "ShardedJacobian",
    "StackedJacobian",
    "jacobian",
    "parameter_columns",
    "shard_layers",
    "sharded_jacobian",
]
