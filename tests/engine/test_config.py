"""Settings: sorted into loop, network and loss, checked when they are made."""

import dataclasses

import pytest

from ctrlrl.engine.config import ConfigError, OnPolicyConfig, build, from_dict, to_dict
from ctrlrl.losses import base
from ctrlrl.losses.ppo import PPO


def test_later_settings_win():
    config, loss = build(base.get("bpo"), {})
    assert config.max_grad_norm == 1.0 and loss.median_temp is None
    config, loss = build(base.get("bpo"), {"actor_hidden": [8]}, preset="released")
    assert config.network.actor_hidden == (8,) and config.network.critic_hidden == (256, 256)
    assert loss.median_temp == 1.0 and not config.normalize_obs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_steps": 2.5}, "n_steps=2.5 is a float; expected int"),
        ({"n_steps": True}, "n_steps=True is a bool"),
        ({"n_steps": 0}, "must be positive"),
        ({"gamma": 1.5}, r"must lie in \[0, 1\]"),
        ({"learning_rate": "3e-4"}, "is a str; expected float"),
        ({"normalize_obs": 1}, "expected bool"),
        ({"actor_hidden": 64}, "expected tuple"),
        ({"activation": "tanhh"}, "unknown"),
        ({"value_batch_size": 3}, "no separate value update"),
        ({"lerning_rate": 1e-3}, "Did you mean learning_rate"),
        ({"eps": -0.1}, "must be positive"),
        ({"learning_rate_schedule": "cosine"}, "expected one of 'constant', 'linear'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build(base.get("ppo"), settings)


def test_a_loss_may_not_shadow_the_loop():
    shadow = dataclasses.make_dataclass("Shadow", [("gamma", "float", 0.5)], bases=(PPO,), frozen=True)
    with pytest.raises(ConfigError, match="names its field gamma like a setting of the loop"):
        build(shadow, {})


def test_round_trip():
    config, _ = build(base.get("mdpo"), {"actor_hidden": (3, 4), "target_kl": 0.1})
    assert from_dict(OnPolicyConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match="another version"):
        from_dict(OnPolicyConfig, {"epoch": 3})


