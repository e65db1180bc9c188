"""Every loss, on a toy token environment: sequences of six tokens out of five must learn a pattern in seconds."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl.engine.config import build
from ctrlrl.engine.update import Updater
from ctrlrl.losses import base
from ctrlrl.nets.actor_critic import ActorCritic
from ctrlrl.types import SequenceBatch

LENGTH, TOKENS, SEQUENCES = 6, 5, 64
PATTERN = torch.tensor([3, 0, 4, 1, 1, 2])


@pytest.mark.parametrize("name", base.names())
def test_improves_on_token_sequences(name):
    torch.manual_seed(0)
    settings = {"batch_size": None, "epochs": 4, "learning_rate": 0.02, "normalize_obs": False, "value_epochs": None}
    config, loss = build(base.get(name), settings | {"value_batch_size": None, "value_clip": None})
    space = gym.spaces.Box(0.0, 1.0, (LENGTH,), np.float32)
    policy = ActorCritic(space, gym.spaces.Discrete(TOKENS), config.network, loss.critics, normalize_obs=False)
    updater = Updater(policy, loss, config, compile=False)
    obs = torch.eye(LENGTH).expand(SEQUENCES, LENGTH, LENGTH)
    lengths = torch.randint(3, LENGTH + 1, (SEQUENCES, 1))
    mask = torch.arange(LENGTH) < lengths
    generator = torch.Generator().manual_seed(0)
    scores = []
    for k in range(40):
        noise = policy.noise(SEQUENCES, LENGTH, generator)
        action = policy.act(obs.flatten(0, 1), noise.flatten(0, 1)).clone().view(SEQUENCES, LENGTH)
        reward = ((action == PATTERN) & mask).float()
        scores.append(float(reward.sum() / mask.sum()))
        with torch.no_grad():
            out = policy(obs, action)
        value = out.values["value"]
        batch = SequenceBatch(
            obs=obs,
            action=action,
            mask=mask,
            logp_old=out.logp,
            advantage=reward - value,
            value_target=reward,
            value_old=value,
            dist_old=out.dist.params(),
            sequence_return=reward.sum(1),
            group=torch.arange(SEQUENCES) // 8,
        )
        knobs = {"learning_rate": torch.tensor(0.02)}
        for controller in loss.controllers().values():
            found = controller.step(controller.initial(), {"progress": k / 40})[1]
            knobs |= {key: torch.tensor(v) for key, v in found.items()}
        updater.run(batch, knobs, generator)
        updater.accept()
    assert scores[0] < 0.4
    assert np.mean(scores[-5:]) > 0.75, scores[-5:]
