"""Agents as people bring them: saved by others, over years, with what was usual then.

They lie outside the repository: in the folder that NSRL_AGENTS names, or else in ../shared/agents; where there is none,
the tests are skipped. Any folder of zips will do, as a clone of DLR-RM/rl-trained-agents.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.vec_env import VecNormalize

from nsrl.bench.studies.agents import BUDGET, find_agents, make_env, try_agent
from nsrl.cli.main import main
from nsrl.errors import NsrlError
from nsrl.rl import agents
from nsrl.rl.algorithms.ppo import NullSpacePPO
from nsrl.rl.playing.zoo_play import PLAYED, play_in_zoo

FOLDER = Path(os.environ.get("NSRL_AGENTS", Path(__file__).parents[2] / ".." / "shared" / "agents"))
#: Tried by `make test`, the others by `make test-all`.
QUICK = ("ppo/CartPole-v1_1", "ppo/Acrobot-v1_1", "a2c/CartPole-v1_1")


def found() -> list:
    try:
        known = find_agents(FOLDER)
    except NsrlError:
        why = "no agents here: clone DLR-RM/rl-trained-agents and set NSRL_AGENTS to it"
        return [pytest.param(None, marks=pytest.mark.skip(reason=why), id="none")]
    marks = {agent.name: () if agent.name in QUICK else (pytest.mark.slow,) for agent in known}
    return [pytest.param(agent, marks=marks[agent.name], id=agent.name) for agent in known]


def digest(folder: Path) -> str:
    content = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content.update(str(path).encode() + path.read_bytes())
    return content.hexdigest()


@pytest.mark.parametrize("agent", found())
def test_an_agent_learns_inside_its_budget_and_acts_the_same_in_stock_sb3(agent, request, tmp_path):
    before = digest(agent.path.parent)
    row = try_agent(agent.path, tmp_path, steps=2000 if request.node.get_closest_marker("slow") else 500)
    assert digest(agent.path.parent) == before, "its owner's files were written to"
    if row["status"] == "refused":
        pytest.skip(f"{row['stage']}: {row['reason']}")
    assert (row["status"], row["stage"]) == ("ok", "stock"), row["reason"]
    assert row["kl"] <= BUDGET and row["same_actions"]
    # torch's own KL of what stock SB3 has loaded: outputs in single precision, some of them with a tiny scale
    assert row["kl_stock"] == pytest.approx(row["kl"], rel=1e-3)
    assert row["enjoy"] in (PLAYED, None)
    # once more without the code under test: stock SB3 alone, in the environment, through the statistics beside the zip
    kind = {"PPO": PPO, "A2C": PPO}[row["algorithm"]]
    stock = kind.load(tmp_path / "agent.zip", device="cpu")
    envs = make_env(agent.path, stock.observation_space)
    statistics = tmp_path / "vecnormalize.pkl"
    assert statistics.is_file() == any(agent.path.parent.rglob("vecnormalize.pkl"))
    if statistics.is_file():
        envs = VecNormalize.load(str(statistics), envs)
        envs.training = False
    seen = envs.reset()
    for _ in range(20):
        actions, _ = stock.predict(seen, deterministic=True)
        seen, _, _, _ = envs.step(actions)
    assert np.isfinite(seen).all()


@pytest.mark.parametrize("agent", found())
def test_stock_sb3_and_nsrl_read_the_same_policy(agent):
    """The oracle is SB3's own loader, which unpickles; that of nsrl runs nothing."""
    try:
        ours = agents.load(agent.path).model
    except NsrlError as error:
        pytest.skip(str(error))
    stock = {"ppo": PPO, "a2c": A2C}[agent.name.partition("/")[0]]
    nowhere = {"lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.2, "learning_rate": 0.0}
    nowhere |= {"observation_space": ours.observation_space, "action_space": ours.action_space}
    theirs = stock.load(agent.path, device="cpu", custom_objects=nowhere)
    draws = np.random.default_rng(0).normal(size=(64, *ours.observation_space.shape)).astype(np.float32)
    np.testing.assert_array_equal(
        ours.predict(draws, deterministic=True)[0], theirs.predict(draws, deterministic=True)[0]
    )


class TestEnjoy:
    """rl_zoo3 is no dependency: a script of the same name stands for it, and `nsrl bench agents` has the real one."""

    @pytest.fixture
    def model(self) -> NullSpacePPO:
        return NullSpacePPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, device="cpu")

    @pytest.fixture
    def zoo(self, tmp_path, monkeypatch):
        def write(code: str) -> None:
            package = tmp_path / "site" / "rl_zoo3"
            package.mkdir(parents=True)
            (package / "__init__.py").touch()
            (package / "enjoy.py").write_text(code)
            monkeypatch.syspath_prepend(str(tmp_path / "site"))
            monkeypatch.setenv(
                "PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
            )
            importlib.invalidate_caches()

        return write

    def test_it_is_given_the_agent_in_its_layout(self, model, zoo, tmp_path):
        zoo(
            "import sys, pathlib\n"
            "words = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
            "folder = pathlib.Path(words['--folder']) / words['--algo'] / (words['--env'] + '_1')\n"
            "from stable_baselines3 import PPO\n"
            "PPO.load(folder / (words['--env'] + '.zip'))\n"
        )
        assert play_in_zoo(model, tmp_path / "zoo") == PLAYED

    def test_what_it_ends_with_is_told(self, model, zoo, tmp_path):
        zoo("raise SystemExit('no such wrapper')")
        assert play_in_zoo(model, tmp_path / "zoo") == "no such wrapper"


class TestBenchmark:
    """`nsrl bench agents` on a folder made here."""

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, device="cpu").save(
            tmp_path / "zoo" / "ppo" / "CartPole-v1_1" / "CartPole-v1.zip"
        )
        PPO("MlpPolicy", "Pendulum-v1", use_sde=True, n_steps=32, batch_size=32, device="cpu").save(
            tmp_path / "zoo" / "sde" / "NoSuchEnv-v1_1" / "NoSuchEnv-v1.zip"
        )
        (tmp_path / "zoo" / "broken.zip").write_bytes(b"no zip")
        return tmp_path / "zoo"

    def test_the_table_has_a_row_an_agent_and_is_not_made_twice(self, folder, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        words = ["bench", "agents", str(folder), "--quick", "--out", str(tmp_path / "out")]
        assert main(words) == 0
        text = capsys.readouterr().out
        rows = {line.split()[0]: line for line in text.splitlines() if line}
        assert {"ok", "yes"} <= set(rows["ppo/CartPole-v1_1"].split())
        assert "load: refused" in rows["broken"] and "refused" in rows["sde/NoSuchEnv-v1_1"]
        assert "is not a zip file" in text and str(folder) not in text.replace("\n", "")
        stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json")}
        assert len(stamps) == 3 and main(words) == 0
        assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json")}

    def test_bad_input_is_a_sentence(self, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        for words, said in (
            (["bench", "agents"], "needs a folder of agents"),
            (["bench", "agents", str(tmp_path / "empty")], "there is no agent in"),
            (["bench", "agents", str(tmp_path / "nowhere")], "there is no agent in"),
            (["bench", "trpo", str(tmp_path)], "a folder is for nsrl bench agents, not for trpo"),
        ):
            assert main(words) == 2
            assert said in capsys.readouterr().err
