"""Copies of a classic-control task stepped together as NumPy arrays, bit for bit as gymnasium steps them one by one.

    from nsrl_envs.vectorised.vec_env import side_by_side
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env("nsrl/CartPole-v0", 8, seed=0, vec_env_cls=side_by_side)

To read in this order: `families` (the equations), `layers` (what is around them), `batch` (copies as columns of an
array), `vec_env` (Stable-Baselines3's interface, and when arrays are used) on `infos`. This file imports none of them,
so that the equations can be had without Stable-Baselines3.
"""
