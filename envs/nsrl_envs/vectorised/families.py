"""The classic-control equations on arrays: the operations of gymnasium's `step`, in its order, an element a copy.

Sums, products and quotients of doubles are rounded alike in a scalar and in an array, and so are NumPy's sines and
cosines and its remainders. Powers are not: gymnasium's `x**2` of a scalar is the C library's power, which differs
from the product of an array's square in the last bit of one number in a thousand. Those are taken number by number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from gymnasium.envs.classic_control.acrobot import AcrobotEnv
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.envs.classic_control.mountain_car import MountainCarEnv
from gymnasium.envs.classic_control.pendulum import PendulumEnv

#: Next state (variables, n), rewards (n,) float64, whether it terminated (n,).
Outcome = tuple[np.ndarray, np.ndarray, np.ndarray]


class Family(Protocol):
    """The equations of one kind of base environment under fixed physical constants; equal if all of those are."""

    def step(self, state: np.ndarray, actions: np.ndarray) -> Outcome:
        """Advance n copies: state (variables, n) float64 contiguous, actions (n, ...) in the base's action space."""

    def show(self, state: np.ndarray, observations: np.ndarray) -> None:
        """Write the observations of a state into (n, entries) float32."""

    def read(self, base: Any) -> np.ndarray | None:
        """The state of a base environment, (variables,); None before its first episode or after the end of one."""

    def write(self, base: Any, state: np.ndarray) -> None:
        """Put a state (variables,), reached by a step, into a base environment."""


def family_of(base: Any) -> Family | None:
    """The equations that a base environment steps by, None if they are not known here.

    A subclass may do anything, so that only gymnasium's classes themselves are known.
    """
    if type(base) is CartPoleEnv:
        return _CartPole.of(base)
    if type(base) is PendulumEnv:
        return _Pendulum(*(float(getattr(base, name)) for name in ("max_speed", "max_torque", "dt", "g", "m", "l")))
    if type(base) is AcrobotEnv:
        return _Acrobot.of(base)
    return _MountainCar.of(base) if type(base) is MountainCarEnv else None


@dataclass(frozen=True)
class _CartPole:
    """State: position (m), velocity, angle (rad), angular velocity; forces in N, time in s."""

    gravity: float
    masspole: float
    total_mass: float
    length: float
    polemass_length: float
    force: float
    tau: float
    farthest: float
    steepest: float

    @classmethod
    def of(cls, base: CartPoleEnv) -> _CartPole | None:
        if base._sutton_barto_reward or base.kinematics_integrator != "euler":
            return None
        return cls(
            base.gravity,
            base.masspole,
            base.total_mass,
            base.length,
            base.polemass_length,
            base.force_mag,
            base.tau,
            base.x_threshold,
            base.theta_threshold_radians,
        )

    def step(self, state: np.ndarray, actions: np.ndarray) -> Outcome:
        theta, theta_dot = state[2], state[3]
        force = np.where(actions == 1, self.force, -self.force)
        cosine, sine = np.cos(theta), np.sin(theta)
        inertial = (force + self.polemass_length * np.square(theta_dot) * sine) / self.total_mass
        angular = (self.gravity * sine - cosine * inertial) / (
            self.length * (4.0 / 3.0 - self.masspole * np.square(cosine) / self.total_mass)
        )
        linear = inertial - self.polemass_length * angular * cosine / self.total_mass
        rates = np.empty_like(state)
        rates[0], rates[1], rates[2], rates[3] = state[1], linear, theta_dot, angular
        following = state + self.tau * rates
        fallen = (np.abs(following[0]) > self.farthest) | (np.abs(following[2]) > self.steepest)
        return following, np.ones(len(fallen)), fallen

    def show(self, state: np.ndarray, observations: np.ndarray) -> None:
        observations[:] = state.T

    def read(self, base: Any) -> np.ndarray | None:
        return None if base.steps_beyond_terminated is not None else base.state

    def write(self, base: Any, state: np.ndarray) -> None:
        base.state = state
        x, _, theta, _ = state
        # what a step beyond the end warns of
        base.steps_beyond_terminated = 0 if abs(x) > self.farthest or abs(theta) > self.steepest else None


@dataclass(frozen=True)
class _Pendulum:
    """State: angle (rad, not wrapped), angular velocity (rad/s), last torque (N m; only drawings show it)."""

    max_speed: float
    max_torque: float
    dt: float
    g: float
    m: float
    l: float

    def step(self, state: np.ndarray, actions: np.ndarray) -> Outcome:
        theta, theta_dot = state[0], state[1]
        torque = np.clip(actions[:, 0], -self.max_torque, self.max_torque)
        # scalars times scalars: which precision a float32 times a Python float has depends on NumPy's version
        push = 3.0 / (self.m * self.l**2)
        effort = np.array([0.001 * (u**2) for u in torque])
        pushed = np.array([push * u for u in torque])
        angle = ((theta + np.pi) % (2 * np.pi)) - np.pi
        angle_squared, theta_dot_squared = _squared(np.stack([angle, theta_dot]))
        costs = angle_squared + 0.1 * theta_dot_squared + effort
        following = np.empty_like(state)
        speed = theta_dot + (3 * self.g / (2 * self.l) * np.sin(theta) + pushed) * self.dt
        following[1] = np.clip(speed, -self.max_speed, self.max_speed)
        following[0] = theta + following[1] * self.dt
        following[2] = torque
        return following, -costs, np.zeros(len(costs), dtype=bool)

    def show(self, state: np.ndarray, observations: np.ndarray) -> None:
        observations[:, 0], observations[:, 1], observations[:, 2] = np.cos(state[0]), np.sin(state[0]), state[1]

    def read(self, base: Any) -> np.ndarray | None:
        state = getattr(base, "state", None)
        return None if state is None else np.append(state, 0.0 if base.last_u is None else base.last_u)

    def write(self, base: Any, state: np.ndarray) -> None:
        base.state = state[:2].copy()
        base.last_u = np.float32(state[2])


@dataclass(frozen=True)
class _Acrobot:
    """State: the two angles (rad) and their velocities, by one Runge-Kutta step of fourth order."""

    dt: float
    l1: float
    m1: float
    m2: float
    lc1: float
    lc2: float
    moi: float
    fastest: tuple[float, float]
    torques: tuple[float, ...]

    @classmethod
    def of(cls, base: AcrobotEnv) -> _Acrobot | None:
        if base.torque_noise_max > 0 or base.book_or_nips != "book":
            return None
        return cls(
            base.dt,
            base.LINK_LENGTH_1,
            base.LINK_MASS_1,
            base.LINK_MASS_2,
            base.LINK_COM_POS_1,
            base.LINK_COM_POS_2,
            base.LINK_MOI,
            (base.MAX_VEL_1, base.MAX_VEL_2),
            tuple(base.AVAIL_TORQUE),
        )

    def step(self, state: np.ndarray, actions: np.ndarray) -> Outcome:
        torque, half = np.array(self.torques)[actions], self.dt / 2.0
        k1 = self._rates(state, torque)
        k2 = self._rates(state + half * k1, torque)
        k3 = self._rates(state + half * k2, torque)
        k4 = self._rates(state + self.dt * k3, torque)
        following = state + self.dt / 6.0 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles = following[:2]
        while (over := angles > np.pi).any():
            angles[over] -= np.pi - -np.pi
        while (under := angles < -np.pi).any():
            angles[under] += np.pi - -np.pi
        for row, most in zip((2, 3), self.fastest, strict=True):
            following[row] = np.clip(following[row], -most, most)
        above = -np.cos(angles[0]) - np.cos(angles[1] + angles[0]) > 1.0
        return following, np.where(above, 0.0, -1.0), above

    def _rates(self, state: np.ndarray, torque: np.ndarray) -> np.ndarray:
        theta1, theta2, dtheta1, dtheta2 = state
        l1, m1, m2, lc1, lc2, moi, g = self.l1, self.m1, self.m2, self.lc1, self.lc2, self.moi, 9.8
        sine2, cosine2 = np.sin(theta2), np.cos(theta2)
        d1 = m1 * lc1**2 + m2 * (l1**2 + lc2**2 + 2 * l1 * lc2 * cosine2) + moi + moi
        d2 = m2 * (lc2**2 + l1 * lc2 * cosine2) + moi
        phi2 = m2 * lc2 * g * np.cos(theta1 + theta2 - np.pi / 2.0)
        dtheta1_squared, dtheta2_squared = _squared(state[2:])
        phi1 = (
            -m2 * l1 * lc2 * dtheta2_squared * sine2
            - 2 * m2 * l1 * lc2 * dtheta2 * dtheta1 * sine2
            + (m1 * lc1 + m2 * l1) * g * np.cos(theta1 - np.pi / 2)
            + phi2
        )
        rates = np.empty_like(state)
        rates[0], rates[1] = dtheta1, dtheta2
        rates[3] = (torque + d2 / d1 * phi1 - m2 * l1 * lc2 * dtheta1_squared * sine2 - phi2) / (
            m2 * lc2**2 + moi - _squared(d2) / d1
        )
        rates[2] = -(d2 * rates[3] + phi1) / d1
        return rates

    def show(self, state: np.ndarray, observations: np.ndarray) -> None:
        observations[:, 0], observations[:, 1] = np.cos(state[0]), np.sin(state[0])
        observations[:, 2], observations[:, 3] = np.cos(state[1]), np.sin(state[1])
        observations[:, 4], observations[:, 5] = state[2], state[3]

    def read(self, base: Any) -> np.ndarray | None:
        return base.state

    def write(self, base: Any, state: np.ndarray) -> None:
        base.state = state


@dataclass(frozen=True)
class _MountainCar:
    """State: position and velocity."""

    leftmost: float
    rightmost: float
    fastest: float
    goal: float
    goal_velocity: float
    force: float
    gravity: float

    @classmethod
    def of(cls, base: MountainCarEnv) -> _MountainCar:
        return cls(
            base.min_position,
            base.max_position,
            base.max_speed,
            base.goal_position,
            base.goal_velocity,
            base.force,
            base.gravity,
        )

    def step(self, state: np.ndarray, actions: np.ndarray) -> Outcome:
        position, velocity = state
        # math, not NumPy, as gymnasium has it
        slope = np.array([math.cos(angle) for angle in 3 * position])
        velocity = velocity + ((actions - 1) * self.force + slope * (-self.gravity))
        velocity = np.clip(velocity, -self.fastest, self.fastest)
        position = np.clip(position + velocity, self.leftmost, self.rightmost)
        velocity[(position == self.leftmost) & (velocity < 0)] = 0.0
        arrived = (position >= self.goal) & (velocity >= self.goal_velocity)
        return np.stack([position, velocity]), np.full(len(arrived), -1.0), arrived

    def show(self, state: np.ndarray, observations: np.ndarray) -> None:
        observations[:] = state.T

    def read(self, base: Any) -> np.ndarray | None:
        state = getattr(base, "state", None)
        return None if state is None else np.array(state)

    def write(self, base: Any, state: np.ndarray) -> None:
        base.state = (state[0], state[1])


def _squared(values: np.ndarray) -> np.ndarray:
    """`x**2` of each float64, same shape; by C's power, which Python's floats and NumPy's scalars both use."""
    return np.array([value**2 for value in values.ravel().tolist()]).reshape(values.shape)
