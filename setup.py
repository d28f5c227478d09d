"""What goes into the wheel: nsrl, nsrl_envs, and the configurations, which lie beside the packages in a checkout."""

from setuptools import find_packages, setup

KINDS = ("", ".bench", ".continual", ".edit", ".post_training")
CONFIGS = {f"nsrl.configs{kind}": f"configs{kind.replace('.', '/')}" for kind in KINDS}

setup(
    packages=[*find_packages(include=["nsrl", "nsrl.*"]), *find_packages("envs"), *CONFIGS],
    package_dir={"nsrl_envs": "envs/nsrl_envs", **CONFIGS},
    package_data={"": ["py.typed", "*.yaml"]},
)
