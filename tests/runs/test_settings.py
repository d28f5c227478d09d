import os
import sys
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonargparse import get_loader

from nsrl.continual.config import ContinualConfig
from nsrl.errors import NsrlError
from nsrl.reading import documents
from nsrl.rl.budget.config import RetentionConfig
from nsrl.runs.config import CollectConfig, DemoConfig, EvaluateConfig, FinetuneConfig, PretrainConfig
from nsrl.runs.sequences.config import SequenceConfig, SequenceTask
from nsrl.runs.settings import build_parser, describe_type, key_types, load, load_value, parse, plain, suggest, to_yaml

CONFIGS = [PretrainConfig, CollectConfig, FinetuneConfig, EvaluateConfig, DemoConfig, SequenceConfig]
READY = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def read(config, *words):
    return parse(config, words, build_parser(config))[0]


def written(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_written_reads_back_the_same(config, tmp_path):
    assert load(config, written(tmp_path, to_yaml(config()))) == config()


@settings(max_examples=8)
@given(
    budget=st.just(0.0) | st.floats(1e-10, 10),
    rate=st.floats(1e-8, 1.0),
    steps=st.integers(1, 10**9),
    method=st.sampled_from(["finetune", "kl_penalty"]),
)
def test_numbers_survive_the_way_through_yaml(budget, rate, steps, method, tmp_path_factory):
    config = replace(
        FinetuneConfig(),
        total_timesteps=steps,
        method=method,
        retention=RetentionConfig(kl_budget=budget),
        ppo=replace(FinetuneConfig().ppo, learning_rate=rate),
    )
    assert load(FinetuneConfig, written(tmp_path_factory.mktemp("yaml"), to_yaml(config))) == config


@pytest.mark.parametrize("config", CONFIGS)
def test_every_key_is_documented(config):
    documented = build_parser(config).format_help()
    for key, kind in key_types(config):
        if not is_dataclass(kind):
            assert f"--{key} " in documented

    def check(owner):
        for item in fields(owner):
            assert f"{item.name}:" in owner.__doc__ or f"{item.name}," in owner.__doc__, (owner, item.name)

    for owner in {config, SequenceTask, *(kind for _, kind in key_types(config) if is_dataclass(kind))}:
        check(owner)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = written(tmp_path, "seed: 3\nppo:\n  n_epochs: 4\n  gamma: 0.9\n")
    config = read(FinetuneConfig, "--config", str(path), "--ppo.gamma", "0.5")
    assert (config.seed, config.ppo.n_epochs, config.ppo.gamma) == (3, 4, 0.5)
    assert config.total_timesteps == FinetuneConfig().total_timesteps
    assert read(FinetuneConfig, f"--config={path}", "--ppo.gamma=0.5") == config


def test_numbers_may_be_written_as_people_write_them():
    config = read(FinetuneConfig, "--ppo.learning_rate", "1e-3", "--retention.kl_budget", "0", "--ppo.gamma", "null")
    assert config.ppo.learning_rate == 1e-3 and config.retention.kl_budget == 0 and config.ppo.gamma is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("total_timestep: 3", r"unknown key total_timestep in .*c\.yaml; did you mean total_timesteps\?"),
        ("ppo:\n  n_stepz: 3", r"unknown key ppo\.n_stepz in .*c\.yaml; did you mean ppo\.n_steps\?"),
        ("kl_budget: 0.1", r"unknown key kl_budget in .*; did you mean retention\.kl_budget\?"),
        ("retention:\n  seed: 1", r"unknown key retention\.seed in .*; did you mean seed\?"),
        ("xyzzy: 3", r"unknown key xyzzy in .*; see --help"),
        ("ppo: 3", r"ppo in .*c\.yaml must hold keys and values .*, not 3"),
        ("- 1\n- 2", r".*c\.yaml must hold keys and values"),
        ("ppo: {", r"c\.yaml is not YAML at line"),
        ("ppo:\n  n_steps: many", r"ppo\.n_steps must be a whole number or null, not many"),
        ("total_timesteps: 2.5", r"total_timesteps must be a whole number, not 2\.5"),
        (
            "method: nullspace",
            r"method must be one of 'null_space', 'kl_penalty', 'finetune', 'l2', 'ewc', 'der', 'frozen', 'agem', "
            r"'gradient_only', not nullspace",
        ),
        ("trust: 3", r"trust must be true or false, not 3"),
        ("ppo:\n  gamma: 1.5", r"ppo\.gamma must be between 0\.0 and 1\.0, not 1\.5"),
        ("retention:\n  kl_budget: -1", r"kl_budget must be a number of nats >= 0 .*, not -1"),
        ("retention:\n  kl_budget: .nan", r"kl_budget must be a number of nats >= 0 .*, not nan"),
        ("penalty: .nan", r"penalty must be at least 0\.0, not nan"),
        ("seed: -1", r"seed must be at least 0, not -1"),
    ],
)
def test_a_bad_file_gets_one_sentence(text, sentence, tmp_path):
    path = written(tmp_path, text)
    for attempt in (lambda: read(FinetuneConfig, "--config", str(path)), lambda: load(FinetuneConfig, path)):
        with pytest.raises(NsrlError, match=sentence) as caught:
            attempt()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--total_timestep", "3"], r"unknown option --total_timestep; did you mean --total_timesteps\?"),
        (["--kl_budget", "0.1"], r"unknown option --kl_budget; did you mean --retention\.kl_budget\?"),
        (["--ppo.nsteps=3"], r"unknown option --ppo\.nsteps; did you mean --ppo\.n_steps\?"),
        (["--confg", "x"], r"unknown option --confg; did you mean --config\?"),
        (["--seed", "many"], r"seed must be a whole number, not many"),
        (["--seed"], r"--seed"),
        (["stray"], r"stray"),
        (["--retention.kl_budget", "nan"], r"retention\.kl_budget must be a number, not nan"),
        (["--config", "missing.yaml"], r"cannot read the configuration missing\.yaml: No such file"),
    ],
)
def test_a_bad_command_line_gets_one_sentence(words, sentence):
    with pytest.raises(NsrlError, match=sentence) as caught:
        read(FinetuneConfig, *words)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(NsrlError, match="not a text file"):
        load(FinetuneConfig, path)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that leaves a trace when it is imported, and whether it has been."""
    (tmp_path / "traced_module.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\nclass Name: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "traced_module.Name", (tmp_path / "trace").exists
    sys.modules.pop("traced_module", None)


@pytest.mark.parametrize(
    "value",
    [
        "{class_path: NAME}",
        "{class_path: NAME, init_args: {}}",
        "'{class_path: NAME}'",
        '"{\\"class\\\\u005fpath\\": \\"NAME\\"}"',
        "[{a: {class_path: NAME}}]",
        "&a {? class_path : NAME}",
        '{"class\\u005fpath": NAME}',
    ],
)
@pytest.mark.parametrize("place", ["strategy:\n  options: {lam: VALUE}", "presets:\n  ewc: {lam: VALUE}"])
def test_no_configuration_imports_a_module(place, value, module, tmp_path):
    """jsonargparse takes a mapping with class_path, even inside a text, for a class to import where anything goes."""
    name, imported = module
    text = place.replace("VALUE", value.replace("NAME", name))
    words = ["--strategy.options", "{lam: " + value.replace("NAME", name) + "}"]
    path = written(tmp_path, text)
    for attempt in (
        lambda: load(ContinualConfig, path),
        lambda: read(ContinualConfig, "--config", str(path)),
        lambda: read(ContinualConfig, *words),
    ):
        with suppress(NsrlError):
            attempt()
        assert not imported()
    build_parser(ContinualConfig).parse_object({"presets": {"ewc": {"lam": {"class_path": name}}}})
    assert imported(), "jsonargparse no longer imports, and the test proves nothing"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@example("0:")
@example("00")
@example("._")
@example("[1, {a: 010}]")
@given(PLAIN | st.text("abe01. -+{},:[]'_", max_size=12))
def test_values_are_read_as_jsonargparse_reads_them(value):
    text = value if isinstance(value, str) else yaml.safe_dump(value)
    theirs = ours = None
    with suppress(NsrlError):
        ours = load_value(text)
    with suppress(yaml.YAMLError):
        try:
            theirs = get_loader("yaml")(text)
        except (TypeError, ValueError):  # PyYAML's own, on "1:" or "._", a number that it cannot read: text to us
            return
    # ours refuses more: keys that are there twice or no text, and numbers of more than 64 bits
    assert ours is None or alike(ours, theirs)


def alike(ours, theirs):
    """Whether both are the same, but for numbers of YAML 1.1 alone (010), which are text to us."""
    if isinstance(ours, str) and isinstance(theirs, int | float) and not isinstance(theirs, bool):
        return documents.is_number_of_yaml_alone(ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(alike, ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return alike(list(ours), list(theirs)) and alike(list(ours.values()), list(theirs.values()))
    return ours == theirs


def test_a_file_cannot_vouch_for_itself(tmp_path):
    path = written(tmp_path, "trust: true")
    with pytest.raises(NsrlError, match="--trust true"):
        read(FinetuneConfig, "--config", str(path))
    assert read(FinetuneConfig, "--config", str(path), "--trust", "true").trust
    assert not read(FinetuneConfig, "--config", str(path), "--trust=false").trust


def test_a_group_may_come_from_a_file_that_is_checked_as_any_other(tmp_path):
    path = written(tmp_path, "gamma: 0.5")
    assert read(FinetuneConfig, "--ppo", str(path)).ppo.gamma == 0.5
    written(tmp_path, "gama: 0.5")
    with pytest.raises(NsrlError, match=r"unknown key gama in .*c\.yaml"):
        read(FinetuneConfig, "--ppo", str(path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NsrlError, match="no ordinary file"):
        read(FinetuneConfig, "--ppo", str(tmp_path / "pipe"))


@given(st.sampled_from([key for key, kind in key_types(FinetuneConfig) if not is_dataclass(kind)]), st.data())
def test_one_wrong_letter_in_a_key_still_finds_it(key, data):
    if len(key.rpartition(".")[2]) < 5:
        return
    position = data.draw(st.integers(0, len(key) - 1))
    typo = key[:position] + key[position + 1 :]
    known = [name for name, _ in key_types(FinetuneConfig)]
    if typo not in known:
        assert suggest(typo, known).startswith("; did you mean ")


def test_types_are_told_in_words():
    assert describe_type(float | None) == "a number or null"
    assert describe_type(list[int]) == "a list, each entry a whole number"


def test_entries_of_a_list_are_read_checked_and_written(tmp_path):
    text = "tasks:\n  - {env: A-v0, total_timesteps: 7}\n  - {env: B-v0, kl_budget: 1.0e-3, name: b}\n"
    config = load(SequenceConfig, written(tmp_path, text))
    assert config.tasks == [SequenceTask("A-v0", 7), SequenceTask("B-v0", kl_budget=1e-3, name="b")]
    assert load(SequenceConfig, written(tmp_path, to_yaml(config))) == config
    assert read(SequenceConfig, "--tasks", "[{env: A-v0}]").tasks == [SequenceTask("A-v0")]
    for text, sentence in (
        ("tasks:\n  - env: A\n  - {env: B, kl_budge: 1}", r"unknown key kl_budge in entry 2 of tasks in .*kl_budget\?"),
        ("tasks:\n  - {env: A, total_timesteps: many}", r"tasks must be a list, each entry keys and values \(env,"),
        ("tasks:\n  - {total_timesteps: 3}", r"c\.yaml: tasks must be a list, each entry keys and values \(env"),
        ("tasks:\n  - 3", r"entry 1 of tasks in .* must hold keys and values .*, not 3"),
        ("tasks: 3", r"tasks must be a list, each entry keys and values .*, not 3"),
    ):
        with pytest.raises(NsrlError, match=sentence) as caught:
            load(SequenceConfig, written(tmp_path, text))
        assert "\n" not in str(caught.value)


def test_budgets_of_tasks_are_a_mapping(tmp_path):
    text = "retention:\n  task_budgets: {A-v0: 1.0e-3, B-v0: 0.1}\n"
    config = load(FinetuneConfig, written(tmp_path, text))
    assert config.retention.task_budgets == {"A-v0": 1e-3, "B-v0": 0.1}
    assert load(FinetuneConfig, written(tmp_path, to_yaml(config))) == config
    with pytest.raises(NsrlError, match=r"task_budgets must be keys and values, each value a number or null"):
        load(FinetuneConfig, written(tmp_path, "retention:\n  task_budgets: {A: much}\n"))


def test_the_run_sets_the_seed_of_the_draws_itself():
    assert "seed" not in plain(FinetuneConfig())["retention"]


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_the_ready_configurations_are_valid(path):
    kinds = {"pretrain": PretrainConfig, "demo": DemoConfig, "sequence": SequenceConfig}
    kind = kinds.get(path.stem.partition("_")[0], FinetuneConfig)
    config = load(kind, path)
    # what the demo runs without a file is what its file says
    assert (plain(config) == plain(kind())) == (kind is DemoConfig)
    rollout = getattr(config, "ppo", None)
    if rollout is not None and rollout.n_steps:
        assert rollout.n_envs * rollout.n_steps % rollout.batch_size == 0
