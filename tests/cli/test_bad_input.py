"""One sentence on stderr, exit code 2, nothing written, no traceback."""

import json
import math
import pickle
import shutil
import zipfile

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO, SAC

from nsrl.cli.main import main
from nsrl.rl.retention.buffer import RetentionBuffer


@pytest.fixture
def refused(elsewhere, capsys):
    """Runs a command that has to be refused; returns the sentence."""

    def attempt(*words: str) -> str:
        capsys.readouterr()
        assert main([*words, "--progress", "false"]) == 2
        text = capsys.readouterr()
        assert text.out == ""
        assert text.err.startswith("nsrl: ") and text.err.count("\n") == 1 and "Traceback" not in text.err
        assert list(elsewhere.iterdir()) == []
        return text.err

    return attempt


@pytest.fixture
def edited(finetuned, tmp_path):
    """Writes a copy of the buffer with one part changed, past the checks of the class."""

    def edit(**parts) -> str:
        with np.load(finetuned / "retention.npz") as file:
            arrays = dict(file)
        header = json.loads(arrays["header"].tobytes())
        header["provenance"] |= parts.pop("provenance", {})
        arrays |= parts | {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
        np.savez(tmp_path / "edited.npz", **arrays)
        return str(tmp_path / "edited.npz")

    return edit


class TestAgents:
    def test_missing(self, refused, finetuning):
        assert "no agent at nowhere.zip" in refused(*finetuning("--agent", "nowhere.zip"))
        assert "no agent: set agent" in refused("finetune", "--pair", "cartpole_swapped")

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
    def test_truncated(self, share, refused, finetuning, pretrained, tmp_path):
        whole, cut = (pretrained / "agent.zip").read_bytes(), tmp_path / "cut.zip"
        cut.write_bytes(whole[: int(share * len(whole))])
        # half a zip may end behind policy.pth, which is a zip of its own
        sentence = refused(*finetuning("--agent", str(cut)))
        assert f"{cut} is not a zip file or is damaged" in sentence or f"{cut} is a zip without data" in sentence

    def test_not_sb3(self, refused, finetuning, tmp_path):
        with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
            file.writestr("hello.txt", "hello")
        assert "saved by Stable-Baselines3" in refused(*finetuning("--agent", str(tmp_path / "other.zip")))

    def test_off_policy(self, refused, finetuning, tmp_path):
        SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu").save(tmp_path / "sac.zip")
        assert "on-policy" in refused(*finetuning("--agent", str(tmp_path / "sac.zip")))

    def test_a_pickle_is_not_run(self, refused, finetuning, pretrained, tmp_path):
        class Attack:
            def __reduce__(self):
                return (open, (str(tmp_path / "attacked"), "w"))

        with zipfile.ZipFile(pretrained / "agent.zip") as source, zipfile.ZipFile(tmp_path / "evil.zip", "w") as target:
            for name in source.namelist():
                target.writestr(name, pickle.dumps(Attack()) if name == "policy.pth" else source.read(name))
        sentence = refused(*finetuning("--agent", str(tmp_path / "evil.zip")))
        assert "weights" in sentence and not (tmp_path / "attacked").exists()

    @pytest.mark.parametrize(
        "command",
        [
            ("finetune", "--old_env", "CartPole-v1", "--new_env", "nsrl/Pendulum-v0"),
            ("finetune", "--pair", "pendulum_reversed"),
            ("evaluate", "--env", "nsrl/Pendulum-v0"),
            ("collect", "--env", "nsrl/Pendulum-v0"),
        ],
    )
    def test_other_spaces_name_both(self, command, refused, pretrained):
        sentence = refused(*command, "--agent", str(pretrained))
        # one of the two has 5 observations, the other 4
        assert "(5,)" in sentence and "(4,)" in sentence

    def test_other_actions(self, refused, tmp_path):
        env = gym.wrappers.TransformAction(gym.make("CartPole-v1"), lambda action: action % 2, gym.spaces.Discrete(3))
        PPO("MlpPolicy", env, device="cpu").save(tmp_path / "three.zip")
        sentence = refused("evaluate", "--agent", str(tmp_path / "three.zip"), "--env", "CartPole-v1")
        assert "Discrete(3)" in sentence and "Discrete(2)" in sentence


class TestBuffers:
    def test_missing(self, refused, finetuning):
        assert "nowhere.npz: there is no such file" in refused(*finetuning("--buffer", "nowhere.npz"))

    def test_truncated(self, refused, finetuning, finetuned, tmp_path):
        whole = (finetuned / "retention.npz").read_bytes()
        (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
        assert "cut.npz" in refused(*finetuning("--buffer", str(tmp_path / "cut.npz")))

    def test_other_spaces(self, refused, finetuning, tmp_path):
        agent = PPO("MlpPolicy", "Pendulum-v1", n_steps=16, batch_size=16, device="cpu")
        RetentionBuffer.collect(agent, "Pendulum-v1", n_states=16).save(tmp_path / "pendulum.npz")
        sentence = refused(*finetuning("--buffer", str(tmp_path / "pendulum.npz")))
        assert "(3,)" in sentence and "(5,)" in sentence

    def test_another_agent(self, refused, finetuning, tmp_path):
        agent = PPO("MlpPolicy", "nsrl_envs:nsrl/CartPole-v0", device="cpu", seed=5)
        RetentionBuffer.collect(agent, "nsrl/CartPole-v0", n_states=16).save(tmp_path / "other.npz")
        assert "another agent" in refused(*finetuning("--buffer", str(tmp_path / "other.npz")))

    def test_empty(self, refused, finetuning, edited):
        empty = {"observations": np.zeros((0, 5), np.float32), "outputs": np.zeros((0, 2), np.float32)}
        empty |= {"heldout": np.zeros(0, bool), "weights": np.zeros(0, np.float32)}
        assert "the buffer is empty" in refused(*finetuning("--buffer", edited(**empty)))

    @pytest.mark.parametrize("part", ["observations", "outputs"])
    def test_nan(self, part, refused, finetuning, edited, finetuned):
        with np.load(finetuned / "retention.npz") as file:
            array = file[part].copy()
        array[3, 1] = math.nan
        sentence = refused(*finetuning("--buffer", edited(**{part: array})))
        assert "NaN" in sentence and part in sentence


class TestSettings:
    @pytest.mark.parametrize("budget", ["-1", "-1e-9", ".nan", "nan", "abc"])
    def test_budget(self, budget, refused, finetuning):
        assert "kl_budget must be a number" in refused(*finetuning(f"--retention.kl_budget={budget}"))

    def test_penalty(self, refused, finetuning):
        assert "penalty must be" in refused(*finetuning("--method", "kl_penalty", "--penalty=-1"))

    def test_settings_of_the_other_algorithm(self, refused, finetuning):
        assert "ppo.n_envs is a setting of algorithm ppo" in refused(*finetuning("--algorithm", "trpo"))
        assert "set ppo.n_steps, or leave it out" in refused(*finetuning("--trpo.n_steps", "64"))
        assert "set algorithm to trpo, or leave it out" in refused(*finetuning("--trpo.cg_damping", "1"))
        assert "trpo.target_kl must be at least 0" in refused(*finetuning("--trpo.target_kl=-1"))
        assert "algorithm must be" in refused(*finetuning("--algorithm", "sac"))

    def test_unknown_key(self, refused, finetuning, tmp_path):
        (tmp_path / "c.yaml").write_text("retention:\n  kl_budgt: 0.1\n")
        assert "did you mean retention.kl_budget?" in refused(*finetuning("--config", str(tmp_path / "c.yaml")))
        assert "did you mean --total_timesteps?" in refused(*finetuning("--total_timestep", "3"))

    def test_no_or_two_tasks(self, refused, pretrained):
        assert "no tasks: set pair" in refused("finetune", "--agent", str(pretrained))
        both = ("--pair", "cartpole_swapped", "--new_env", "CartPole-v1")
        sentence = refused("finetune", "--agent", str(pretrained), *both)
        assert "pair and old_env or new_env are both set" in sentence

    def test_unknown_pair_and_environment(self, refused, finetuning, pretrained):
        assert "did you mean 'cartpole_swapped'?" in refused(*finetuning("--pair", "cartpole_swaped"))
        for words in (["evaluate", "--agent", str(pretrained)], ["collect", "--agent", str(pretrained)], ["pretrain"]):
            assert "nsrl/CartPol-v0" in refused(*words, "--env", "nsrl/CartPol-v0")

    def test_a_missing_extra_is_named(self, refused, finetuning, pretrained, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "mujoco", None)
        monkeypatch.delitem(__import__("sys").modules, "gymnasium.envs.mujoco.half_cheetah_v5", raising=False)
        assert 'pip install "nsrl[mujoco]"' in refused("pretrain", "--env", "nsrl/HalfCheetah-v0")


class TestFolders:
    def test_in_use(self, refused, finetuning, finetuned):
        before = {path: path.read_bytes() for path in finetuned.rglob("*") if path.is_file()}
        sentence = refused(*finetuning("--out", str(finetuned)))
        assert f"the output folder {finetuned} is in use" in sentence
        assert {path: path.read_bytes() for path in finetuned.rglob("*") if path.is_file()} == before

    def test_a_file(self, refused, finetuning, tmp_path):
        (tmp_path / "file").write_text("precious")
        assert "is a file" in refused(*finetuning("--out", str(tmp_path / "file")))
        assert (tmp_path / "file").read_text() == "precious"

    def test_not_writable(self, refused, finetuning):
        assert "cannot make the output folder" in refused(*finetuning("--out", "/proc/nsrl"))

    def test_resuming_what_is_no_run(self, refused, tmp_path):
        assert "is no run folder" in refused("finetune", "--resume", str(tmp_path))

    def test_resuming_what_is_finished(self, refused, finetuned):
        assert "is finished; its results are in" in refused("finetune", "--resume", str(finetuned))

    def test_resuming_with_other_settings(self, refused, finetuned):
        assert "leave the other options out" in refused("finetune", "--resume", str(finetuned), "--seed", "3")

    def test_resuming_from_a_damaged_checkpoint(self, refused, finetuned, tmp_path):
        folder = tmp_path / "damaged"
        shutil.copytree(finetuned, folder)
        (folder / "metrics.json").unlink()
        (folder / "checkpoint.zip").write_bytes(b"PK\x03\x04 cut")
        assert "checkpoint.zip is truncated or damaged" in refused("finetune", "--resume", str(folder))
