"""The plan of the frontier: pairs of tasks, methods, populations of agents, and the runs that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nsrl.errors import NsrlError

#: KL budget, states of a buffer, and those that a refresh adds.
BUDGET, STATES, REFRESHED = 0.01, 2048, 256


@dataclass(frozen=True)
class Pair:
    """A task pair of the benchmark.

    Attributes:
        old, new: environment ids.
        pretraining: timesteps until the old task is just solved.
        scratch: timesteps in which a fresh policy learns the new task; everybody else gets a quarter more.
        settings: rl-zoo's hyper-parameters of PPO.
        published: folders of agents that others have trained, in place of a population of our own; what tells the tasks
            apart is an input that they are given first (`nsrl.rl.surgery.add_context`).
        agents: the pair whose agents these are; empty for its own.
        solved: score of the new task that counts as solved, where a fresh policy may not get there; None for none.
        test: whether it is kept for judging; what was looked at on it all the same is in docs/log.md.
    """

    old: str
    new: str
    pretraining: int
    scratch: int
    settings: dict[str, Any] = field(default_factory=dict)
    published: tuple[str, ...] = ()
    agents: str = ""
    solved: float | None = None
    test: bool = False


#: The zoo's values for one environment each (rl-baselines3-zoo, hyperparams/ppo.yml), but for the number of copies.
PAIRS: dict[str, Pair] = {
    "cartpole_swapped": Pair(
        "nsrl/CartPole-v0",
        "nsrl/CartPoleSwapped-v0",
        40_000,
        40_000,
        {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "learning_rate": 1e-3},
    ),
    "acrobot_swapped": Pair(
        "nsrl/Acrobot-v0",
        "nsrl/AcrobotSwapped-v0",
        100_000,
        80_000,
        {"n_steps": 256, "gae_lambda": 0.94, "gamma": 0.99, "n_epochs": 4},
    ),
    "pendulum_reversed": Pair(
        "nsrl/Pendulum-v0",
        "nsrl/PendulumReversed-v0",
        100_000,
        80_000,
        {"n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10, "learning_rate": 1e-3},
    ),
    # agents of rl-trained-agents (see the LICENSE beside them), as rl-zoo lays them out
    "halfcheetah_backward": Pair(
        "nsrl/HalfCheetah-v0",
        "nsrl/HalfCheetahBackward-v0",
        0,
        200_000,
        published=("a2c", "ppo"),
    ),
    "pendulum_gsde": Pair(
        "nsrl/Pendulum-v0",
        "nsrl/PendulumReversed-v0",
        0,
        80_000,
        published=("ppo", "a2c"),
    ),
    "swimmer_backward": Pair(
        "nsrl/Swimmer-v0",
        "nsrl/SwimmerBackward-v0",
        0,
        200_000,
        published=("a2c",),
        test=True,
    ),
    "lunarlander_swapped": Pair(
        "nsrl/LunarLanderTold-v0",
        "nsrl/LunarLanderSwapped-v0",
        0,
        200_000,
        published=("ppo", "a2c"),
        solved=200.0,
        test=True,
    ),
    "lunarlander_continuous_reversed": Pair(
        "nsrl/LunarLanderContinuous-v0",
        "nsrl/LunarLanderContinuousReversed-v0",
        0,
        200_000,
        published=("ppo",),
        solved=200.0,
        test=True,
    ),
    "mountaincar_swapped": Pair(
        "nsrl/MountainCar-v0",
        "nsrl/MountainCarSwapped-v0",
        0,
        100_000,
        published=("ppo", "a2c"),
        solved=-110.0,
        test=True,
    ),
    # tasks that look the same, told apart by one more input (`nsrl_envs.told`)
    "lunarlander_wind": Pair(
        "nsrl/nsrl.LunarLander-v0.context0",
        "nsrl/nsrl.LunarLanderWind-v0.context1",
        0,
        200_000,
        published=("ppo", "a2c"),
        agents="lunarlander_swapped",
        solved=200.0,
        test=True,
    ),
    "hopper_low_gravity": Pair(
        "nsrl/nsrl.Hopper-v0.context0",
        "nsrl/nsrl.HopperLowGravity-v0.context1",
        0,
        200_000,
        published=("ppo",),
        test=True,
    ),
    "halfcheetah_heavy_torso": Pair(
        "nsrl/nsrl.HalfCheetahPlain-v0.context0",
        "nsrl/nsrl.HalfCheetahHeavyTorso-v0.context1",
        0,
        200_000,
        published=("ppo", "a2c"),
        agents="halfcheetah_backward",
        test=True,
    ),
    "mountaincar_continuous_reversed": Pair(
        "nsrl/MountainCarContinuous-v0",
        "nsrl/MountainCarContinuousReversed-v0",
        0,
        100_000,
        published=("ppo",),
        solved=90.0,
        test=True,
    ),
}


@dataclass(frozen=True)
class Method:
    """How the new task is learnt.

    Attributes:
        algorithm: "ppo" or "trpo".
        method: of the engine; "scratch": a fresh policy, learnt as stock SB3 does; or "joint": both tasks at once.
        options: of `from_pretrained`.
        later: whether the other methods are run on all agents first.
        refresh: whether the buffer is refreshed, at every tenth of the run.
    """

    algorithm: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    later: bool = False
    refresh: bool = False


#: Updates that share the network with the old task, inside the budget, although units are free.
SHARED: dict[str, Any] = {"confine": "off"}

#: One setting each for all pairs. The coefficients are those that did best on the development pair (see GRID). Rivals
#: are opened as ours are, and have the free units and the standardised critic, unless their name says otherwise.
METHODS: dict[str, Method] = {
    "scratch PPO": Method("ppo", "scratch"),
    "scratch TRPO": Method("trpo", "scratch"),
    "plain PPO": Method("ppo", "finetune"),
    "KL penalty": Method("ppo", "kl_penalty", {"penalty": 1.0}),
    "NullSpacePPO": Method("ppo", "null_space"),
    "NullSpaceTRPO": Method("trpo", "null_space"),
    "plain PPO (as it comes)": Method("ppo", "finetune", {"opening": "off", "values": "raw"}, later=True),
    "KL penalty (as it comes)": Method(
        "ppo", "kl_penalty", {"penalty": 1.0, "opening": "off", "values": "raw"}, later=True
    ),
    "output replay": Method("ppo", "der", {"penalty": 1.0}, later=True),
    "NullSpaceTRPO (unopened)": Method("trpo", "null_space", {"opening": "off"}, later=True),
    "NullSpaceTRPO (raw values)": Method("trpo", "null_space", {"values": "raw"}, later=True),
    "shared NullSpaceTRPO (budget 0.002)": Method("trpo", "null_space", {**SHARED, "kl_budget": 0.002}, later=True),
    "shared NullSpaceTRPO (worst 0.05)": Method("trpo", "null_space", {**SHARED, "worst_budget": 0.05}, later=True),
    "shared NullSpaceTRPO (agreement 0.99)": Method("trpo", "null_space", {**SHARED, "agreement": 0.99}, later=True),
    "shared NullSpaceTRPO (refresh)": Method("trpo", "null_space", SHARED, later=True, refresh=True),
    "shared NullSpaceTRPO (free target 0.9)": Method("trpo", "null_space", {**SHARED, "free_target": 0.9}, later=True),
    "shared NullSpacePPO": Method("ppo", "null_space", SHARED, later=True),
    "shared NullSpaceTRPO": Method("trpo", "null_space", SHARED, later=True),
    "plain TRPO": Method("trpo", "finetune", later=True),
    "KL penalty (TRPO)": Method("trpo", "kl_penalty", {"penalty": 1.0}, later=True),
    "L2": Method("ppo", "l2", {"penalty": 0.1}, later=True),
    "EWC": Method("ppo", "ewc", {"penalty": 10.0}, later=True),
    "frozen trunk": Method("ppo", "frozen", later=True),
    "A-GEM": Method("ppo", "agem", later=True),
    "gradients projected": Method("ppo", "gradient_only", later=True),
    "hard null space": Method("trpo", "null_space", {**SHARED, "kl_budget": 0.0}, later=True),
    # both tasks at once, half of the steps each: what there is to be had where the old one is at hand
    "joint training": Method("ppo", "joint", {"opening": "off"}, later=True),
}

#: Coefficients tried for each penalty, on two agents of the first development pair.
GRID: dict[str, tuple[float, ...]] = {
    "L2": (0.001, 0.01, 0.1, 1.0),
    "EWC": (0.1, 1.0, 10.0, 100.0),
    "KL penalty": (0.1, 0.3, 1.0, 3.0, 10.0),
    "output replay": (0.01, 0.1, 1.0, 10.0),
}

#: What else is varied, on the over-trained agents of two seeds: sizes of the buffer, and scales of the rewards.
BUFFERS = ("acrobot_swapped", (64, 256, 1024), ("KL penalty", "output replay", "NullSpacePPO", "NullSpaceTRPO"))
SCALES = ("pendulum_reversed", (0.01, 100.0), ("KL penalty", "NullSpacePPO", "NullSpaceTRPO"))

KINDS = ("default", "zoo")
SEEDS = (0, 1, 2)
MULTIPLES = (1, 3)


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        pair: name of the task pair.
        method: name of the method.
        kind, seed, multiple: of the agent; one that was published has a multiple of 0, and the seed is the run's.
        penalty: another coefficient than the method's own; None for that.
        states: of the buffer.
        scale: of the new task's rewards.
    """

    pair: str
    method: str
    kind: str
    seed: int
    multiple: int
    penalty: float | None = None
    states: int = STATES
    scale: float = 1.0

    @property
    def agent(self) -> str:
        """Name of the agent."""
        return f"{self.kind}_{self.seed}_x{self.multiple}" if self.multiple else self.kind

    @property
    def name(self) -> str:
        """Unique among the cells."""
        tuned = "" if self.penalty is None else f" {self.penalty:g}"
        size = "" if self.states == STATES else f" states={self.states}"
        scale = "" if self.scale == 1.0 else f" rewards={self.scale:g}"
        run = self.agent if self.multiple else f"{self.agent}_{self.seed}"
        return f"{self.pair}/{self.method}{tuned}{size}{scale}/{run}"


def plan_cells(only: Sequence[str] = (), quick: bool = False) -> list[Cell]:
    """All runs; agents outermost, so that a benchmark that is stopped early is balanced.

    Args:
        only: names of pairs and methods; none of a kind means all of it.
        quick: one agent.

    Raises:
        NsrlError: an unknown name.
    """
    unknown = [name for name in only if name not in PAIRS and name not in METHODS]
    if unknown:
        raise NsrlError(
            f"there is no pair or method {unknown[0]!r}; pairs: {', '.join(PAIRS)}; methods: {', '.join(METHODS)}"
        )
    pairs = [name for name in PAIRS if name in only] or list(PAIRS)
    methods = [name for name in METHODS if name in only] or list(METHODS)
    # seeds and over-training outermost: a benchmark that is stopped early is balanced
    rounds = [(seed, multiple) for seed in SEEDS for multiple in MULTIPLES[::-1]]
    cells: list[Cell] = []
    for later in (False, True):
        for seed, multiple in rounds[: 1 if quick else None]:
            for pair in pairs:
                agents = population(pair, seed, multiple)[: 1 if quick else None]
                cells += [Cell(pair, m, *agent) for agent in agents for m in methods if METHODS[m].later is later]
        if not later and not quick:
            cells += _varied(pairs, methods)
    return cells


def population(pair: str, seed: int, multiple: int) -> list[tuple[str, int, int]]:
    """Kind, seed and multiple of a round's agents; published ones belong to the rounds of the largest multiple."""
    published = PAIRS[pair].published
    if not published:
        return [(kind, seed, multiple) for kind in KINDS]
    return [(kind, seed, 0) for kind in published] if multiple == max(MULTIPLES) else []


def _varied(pairs: Sequence[str], methods: Sequence[str]) -> list[Cell]:
    """Other coefficients, sizes of the buffer and scales of the rewards."""
    hard = [(kind, seed, 3) for seed in SEEDS[:2] for kind in KINDS]
    cells = [
        Cell("cartpole_swapped", name, *agent, penalty=penalty)
        for name in methods
        for penalty in GRID.get(name, ())
        for agent in hard[:2]
        if penalty != METHODS[name].options["penalty"] and "cartpole_swapped" in pairs
    ]
    for (pair, values, names), key in ((BUFFERS, "states"), (SCALES, "scale")):
        varied: Sequence[Any] = values
        cells += [
            Cell(pair, name, *agent, **{key: value})
            for agent in hard
            for value in varied
            for name in names
            if pair in pairs and name in methods
        ]
    return cells
