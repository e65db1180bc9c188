"""Off-policy MDPO: its logarithm, its actor's loss in closed form, whole updates, and what makes it SAC."""

import copy
import math

import pytest
import torch
from helpers.agents import NOISY, quiet
from helpers.off_policy import (
    Double,
    PlainGaussian,
    adam,
    assert_like,
    drawn,
    learner,
    make,
    plain,
    polyak,
    transitions,
)  # fmt: skip

from ctrlrl import api
from ctrlrl.engine.learner import part
from ctrlrl.nets.actors import SquashedGaussian
from ctrlrl.online.mdpo_off import MDPOOff, log_q

GAMMA, TAU, RATE, B = 0.95, 0.1, 1e-2, 12
F64 = torch.float64


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# -- the logarithm --------------------------------------------------------------------------------


@pytest.mark.parametrize("q,value", [(1.0, math.log(0.1)), (2.0, -0.9), (1.4, (0.1**0.4 - 1.0) / 0.4)])
def test_the_tsallis_logarithm_of_a_tenth(q, value):
    assert log_q(torch.tensor(math.log(0.1), dtype=F64), q).item() == pytest.approx(value, abs=1e-14)
    assert value == pytest.approx({1.0: -2.3026, 2.0: -0.9, 1.4: -1.5047}[q], abs=5e-5)


def test_the_tsallis_logarithm_tends_to_the_natural_one_and_is_zero_at_one():
    logp = torch.linspace(-6, 2, 9, dtype=F64)
    torch.testing.assert_close(log_q(logp, 1.0 + 1e-9), logp, rtol=0, atol=1e-7)
    for q in (1.0, 1.3, 2.0):
        assert log_q(torch.zeros((), dtype=F64), q) == 0.0


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
def test_below_the_floor_the_logarithm_is_constant_and_teaches_nothing(q):
    logp = torch.tensor([-20.0, -14.0, -13.0, 1.0], dtype=F64, requires_grad=True)
    value = log_q(logp, q, floor=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), logp)
    floor = math.log(1e-6) if q == 1.0 else (1e-6 ** (q - 1.0) - 1.0) / (q - 1.0)
    assert value[:2].tolist() == pytest.approx([floor, floor], abs=1e-12)
    assert (gradient[:2] == 0.0).all()
    torch.testing.assert_close(gradient[2:], torch.exp((q - 1.0) * logp[2:].detach()))
    torch.testing.assert_close(value[2:], log_q(logp[2:], q))


# -- the actor's loss -----------------------------------------------------------------------------


def gaussian(mean, log_std):
    return SquashedGaussian(*(torch.tensor(x, dtype=F64).view(1, 1).requires_grad_() for x in (mean, log_std)))


PAIR = torch.tensor([[-1.0], [1.0]], dtype=F64)
"""Noise with mean 0 and variance 1: the mean over it is exact for whatever is quadratic in it."""
M, S, OLD_M, OLD_S = 0.4, 0.7, -0.3, 1.1


def gradients(method, alpha, q=0.0):
    """Derivatives of the actor's loss by mean and log-deviation of the new policy."""
    policy, old = gaussian(M, math.log(S)), gaussian(OLD_M, math.log(OLD_S))
    u = policy.pre_tanh(PAIR)
    loss = method.policy_objective(policy, old, u, q * u[:, 0], torch.tensor(alpha, dtype=F64))
    return [g.item() for g in torch.autograd.grad(loss, [policy.mean, policy.log_std])]


def test_the_reverse_direction_is_the_divergence_of_the_new_policy_from_the_old():
    """Without entropy: c KL(new || old) - Q, for Q = u; the squashing cancels in the divergence."""
    found = gradients(MDPOOff(kl_coef=0.8, proximity="reverse"), alpha=0.0, q=1.0)
    mean = 0.8 * (M - OLD_M) / OLD_S**2 - 1.0
    assert found == pytest.approx([mean, 0.8 * (S**2 / OLD_S**2 - 1.0)], abs=1e-12)


def test_the_forward_direction_is_the_divergence_of_the_old_policy_from_the_new():
    found = gradients(MDPOOff(kl_coef=0.8, proximity="forward"), alpha=0.0, q=1.0)
    mean = 0.8 * (M - OLD_M) / S**2 - 1.0
    assert found == pytest.approx([mean, 0.8 * (1.0 - (OLD_S**2 + (M - OLD_M) ** 2) / S**2)], abs=1e-12)


def by_hand(m, s, c, lam, q, old=(OLD_M, OLD_S), floor=0.0, forward=False):
    """The loss from densities of the squashed action, in plain numbers; Q is a^2."""
    total = 0.0
    for z in (-1.0, 1.0):
        u = m + s * z
        action = math.tanh(u)

        def density(mean, std, u=u, action=action):
            normal = math.exp(-0.5 * ((u - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
            return max(floor, normal / (1.0 - action**2))

        def log(x):
            dual = 2.0 - q
            return math.log(x) if q == 1.0 else (x ** (1.0 - dual) - 1.0) / (1.0 - dual)

        new, before = log(density(m, s)), log(density(*old))
        if forward:
            kl = math.log(s / old[1]) + (old[1] ** 2 + (old[0] - m) ** 2) / (2 * s**2) - 0.5
            total += lam * new + c * kl - action**2
        else:
            total += c * new + q * (lam - c) * before - action**2
    return total / 2


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.7])
@pytest.mark.parametrize("settings", [{}, {"tsallis_q": 1.4}, {"tsallis_q": 2.0}, {"proximity": "forward"}], ids=str)
def test_loss_and_gradient_equal_finite_differences_of_the_loss_by_hand(settings, lam):
    method = MDPOOff(kl_coef=0.8, **settings)
    q, forward = settings.get("tsallis_q", 1.0), "proximity" in settings
    policy, old = gaussian(M, math.log(S)), gaussian(OLD_M, math.log(OLD_S))
    u = policy.pre_tanh(PAIR)
    loss = method.policy_objective(policy, old, u, u.tanh()[:, 0] ** 2, torch.tensor(lam, dtype=F64))
    found = [g.item() for g in torch.autograd.grad(loss, [policy.mean, policy.log_std])]

    def value(m, log_s):
        return by_hand(m, math.exp(log_s), 0.8, lam, q, forward=forward)

    h, s = 1e-5, math.log(S)
    expected = [(value(M + h, s) - value(M - h, s)) / (2 * h), (value(M, s + h) - value(M, s - h)) / (2 * h)]
    assert loss.item() == pytest.approx(value(M, s), abs=1e-12)
    assert found == pytest.approx(expected, abs=1e-8)


def test_the_floor_bounds_the_distance_and_stops_its_gradient():
    """An old policy far away: its log-density is log(1e-6) wherever the new one acts, and moves nothing."""
    policy, old = gaussian(M, math.log(S)), gaussian(9.0, math.log(0.1))
    u = policy.pre_tanh(PAIR)
    q, lam = torch.zeros(2, dtype=F64), torch.tensor(0.0, dtype=F64)
    floored = MDPOOff(kl_coef=0.8, probability_floor=1e-6).policy_objective(policy, old, u, q, lam)
    without_q = by_hand(M, S, 0.8, 0.0, 1.0, old=(9.0, 0.1), floor=1e-6) + u.tanh().square().mean().item()
    assert floored.item() == pytest.approx(without_q, abs=1e-12)
    leaves = [policy.mean, policy.log_std]
    only_new = torch.autograd.grad(0.8 * policy.log_prob(u).mean(), leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(floored, leaves), only_new, rtol=0, atol=1e-12)


# -- whole updates --------------------------------------------------------------------------------


class PlainMDPO:
    """Section 4 of the paper with the value network of the released code, or with slow critics in its place."""

    def __init__(
        self, modules, c=1.0, lam=0.2, q=1.0, forward=False, value=True, smallest=False, ridge=1e-3, floor=0.0
    ):
        self.c, self.lam, self.q, self.forward = c, lam, q, forward
        self.smallest, self.ridge, self.floor = smallest, ridge, floor
        self.actor = PlainGaussian(modules["actor"])
        self.old = copy.deepcopy(self.actor)
        self.critics = [plain(modules["critic"].body, i) for i in (0, 1)]
        self.slow = copy.deepcopy(self.critics)
        self.value = plain(modules["value"].body) if value else None
        self.slow_value = copy.deepcopy(self.value)
        self.optimisers = {"actor": adam(self.actor, lr=RATE), "critic": adam(*self.critics, lr=RATE)}
        if value:
            self.optimisers["value"] = adam(self.value, lr=RATE)

    def log(self, logp):
        x = logp.exp().clamp_min(self.floor)
        dual = 2.0 - self.q
        return (x.log() if self.q == 1.0 else (x ** (1.0 - dual) - 1.0) / (1.0 - dual)).sum(1)

    def step(self, name, loss):
        self.optimisers[name].zero_grad()
        loss.backward()
        self.optimisers[name].step()
        return loss.detach()

    def update(self, batch, action_noise, next_noise):
        obs, next_obs = batch.obs.double(), batch.next_obs.double()
        with torch.no_grad():
            if self.value is not None:
                following = self.slow_value(next_obs)[:, 0]
            else:
                action, logp, _ = self.actor.sample(next_obs, next_noise)
                values = [q(torch.cat([next_obs, action], 1))[:, 0] for q in self.slow]
                following = torch.minimum(*values) - self.lam * self.log(logp)
            rows = zip(batch.reward_t, batch.terminated_t, following, strict=True)
            wanted = torch.stack([r if end else r + GAMMA * v for r, end, v in rows])
        pairs = torch.cat([obs, batch.action], 1)
        losses = [0.5 * torch.nn.functional.mse_loss(q(pairs)[:, 0], wanted) for q in self.critics]
        found = {"critic_loss": self.step("critic", sum(losses))}

        action, logp, u = self.actor.sample(obs, action_noise)
        both = [q(torch.cat([obs, action], 1))[:, 0] for q in self.critics]
        q = torch.minimum(*both) if self.smallest else both[0]
        mean, log_std = self.actor.parts(obs)
        with torch.no_grad():
            old_mean, old_log_std = self.old.parts(obs)
        normals = [torch.distributions.Normal(m, s.exp()) for m, s in ((mean, log_std), (old_mean, old_log_std))]
        if self.forward:
            kl = torch.distributions.kl_divergence(normals[1], normals[0]).sum(1)
            loss = (self.lam * self.log(logp) - q + self.c * kl).mean()
        else:
            for parameter in self.old.parameters():
                parameter.requires_grad_(False)
            old = self.log(self.old.log_density(obs, u))
            loss = (self.c * self.log(logp) + self.q * (self.lam - self.c) * old - q).mean()
        found["kl_old"] = torch.distributions.kl_divergence(*normals).sum(1).mean().detach()
        loss = loss + self.ridge * ((mean**2).mean() + (log_std**2).mean())
        soft = (torch.minimum(*both) - self.lam * self.log(logp)).detach()
        found |= {"actor_loss": self.step("actor", loss), "entropy": -logp.detach().sum(1).mean()}
        if self.value is not None:
            found["value_loss"] = self.step("value", 0.5 * torch.nn.functional.mse_loss(self.value(obs)[:, 0], soft))
            polyak(self.slow_value, self.value, TAU)
        else:
            for target, critic in zip(self.slow, self.critics, strict=True):
                polyak(target, critic, TAU)
        return found


@pytest.mark.parametrize(
    "settings,reference",
    [
        ({}, {}),
        ({"kl_coef": 0.3, "entropy_temp": 0.0}, {"c": 0.3, "lam": 0.0}),
        ({"tsallis_q": 1.4}, {"q": 1.4}),
        ({"proximity": "forward"}, {"forward": True}),
        ({"value_network": False, "actor_critic": "min"}, {"value": False, "smallest": True}),
        ({"value_network": False, "tsallis_q": 2.0}, {"value": False, "q": 2.0}),
        ({"mean_penalty": 0.5, "log_std_penalty": 0.5}, {"ridge": 0.5}),
        ({"probability_floor": 0.3}, {"floor": 0.3}),
    ],
    ids=["default", "hard", "tsallis", "forward", "slow critics", "slow critics, tsallis", "penalties", "floor"],
)
def test_five_updates_equal_an_independent_implementation(settings, reference, double):
    mine = learner("mdpo_off", Double, gamma=GAMMA, tau=TAU, learning_rate=RATE, **settings)
    theirs = PlainMDPO(copy.deepcopy(mine.modules), **reference)
    batch, noise = transitions(5 * B), drawn(mine, 5, B)
    for i in range(5):
        if i == 2:  # the others are at a distance from the old policy
            mine.copy("actor_old", "actor")
            theirs.old.load_state_dict(theirs.actor.state_dict())
        rows = slice(i * B, (i + 1) * B)
        expected = theirs.update(part(batch, rows), noise["action"][i], noise["next_action"][i])
        found = mine.run(part(batch, rows), {k: v[i : i + 1] for k, v in noise.items()}, 1)
        assert expected.keys() | {"q", "ent_coef"} == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name][0], value, rtol=0, atol=1e-7, msg=f"{name} {i}")
        assert (found["kl_old"].item() > 1e-5) == (i not in (0, 2))
    modules = mine.modules
    assert_like(theirs.actor, [*modules["actor"].body, modules["actor"].mean, modules["actor"].log_std])
    assert_like(theirs.old, [*modules["actor_old"].body, modules["actor_old"].mean, modules["actor_old"].log_std])
    for k in (0, 1):
        assert_like(theirs.critics[k], modules["critic"].body, k)
        if theirs.value is None:
            assert_like(theirs.slow[k], modules["critic_target"].body, k)
    if theirs.value is not None:
        assert_like(theirs.value, modules["value"].body)
        assert_like(theirs.slow_value, modules["value_target"].body)
    assert ("value" in modules) == (theirs.value is not None) != ("critic_target" in modules)


# -- what makes it SAC ----------------------------------------------------------------------------


def test_with_c_at_lambda_the_actors_loss_is_sacs_exactly():
    """lambda log pi - Q, however far the old policy is: the difference is 0, and so is that of the gradients."""
    g = torch.Generator().manual_seed(0)
    mean, log_std, far, noise = (torch.randn(50, 2, generator=g) for _ in range(4))
    values = torch.randn(50, generator=g)
    for method, alpha in ((MDPOOff(kl_coef=0.2), 0.2), (MDPOOff(kl_coef=None, entropy_temp=None), 0.37)):
        found = []
        for kind in ("mdpo", "sac"):
            leaves = [x.clone().requires_grad_() for x in (mean, log_std)]
            policy, old = SquashedGaussian(*leaves), SquashedGaussian(far + 2.0, log_std)
            u = policy.pre_tanh(noise)
            if kind == "mdpo":
                loss = method.policy_objective(policy, old, u, values, torch.tensor(alpha))
            else:
                loss = (torch.tensor(alpha) * policy.log_prob(u) - values).mean()
            found.append([loss, *torch.autograd.grad(loss, leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def run_of(name, **settings):
    found = []

    class Noted:
        def on_update(self, agent, step, metrics):
            found.append({k: v for k, v in metrics.items() if k.startswith(("train/", "rollout/"))})

    agent = make(name, NOISY, seed=11, n_envs=2, **settings)
    quiet(agent, 8 * 12, callbacks=[Noted()])
    assert agent.learner.updates == 88
    return agent, found


@pytest.mark.parametrize(
    "settings,shared",
    [
        ({"preset": "sac"}, {}),
        ({"preset": "sac", "entropy_temp": 0.2, "kl_coef": 0.2}, {"entropy_temp": 0.2}),
        ({"preset": "sac", "entropy_temp": 0.2}, {"entropy_temp": 0.2}),
    ],
    ids=["learned", "c a number", "c none"],
)
def test_a_whole_run_with_c_at_lambda_is_sacs_bit_for_bit(settings, shared):
    sac, logged = run_of("sac", **shared)
    mdpo, found = run_of("mdpo_off", **settings)
    for name in ("actor", "critic", "critic_target", *(["temperature"] if not shared else [])):
        assert torch.equal(sac.learner.state[name], mdpo.learner.state[name]), name
    assert torch.equal(sac.replay.columns["obs"], mdpo.replay.columns["obs"])
    assert torch.equal(sac.replay.columns["action"], mdpo.replay.columns["action"])
    for a, b in zip(logged, found, strict=True):
        assert a == {k: b[k] for k in a}
    # the run with c at 1 is another one
    other, _ = run_of("mdpo_off", **{k: v for k, v in settings.items() if k != "kl_coef"}, kl_coef=1.0)
    assert not torch.equal(sac.learner.state["actor"], other.learner.state["actor"])


# -- the old policy -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n_envs,learning_starts,expected",
    [(1, 4, [7, 14, 21, 28]), (2, 4, [8, 14, 22, 28]), (3, 4, [9, 15, 21, 30]), (1, 14, [21, 28])],
)
def test_the_old_policy_is_refreshed_at_multiples_of_its_steps_over_all_environments(n_envs, learning_starts, expected):
    """With the policy as it was before the updates of that step; while nothing was learnt there is nothing to do."""
    seen = []

    class Watch:
        def on_update(self, agent, step, metrics):
            seen.append((step, *(agent.learner.state[k].clone() for k in ("actor", "actor_old"))))

    agent = make("mdpo_off", n_envs=n_envs, refresh_steps=7, learning_starts=learning_starts, iteration_steps=1)
    start = agent.learner.state["actor"].clone()
    quiet(agent, 30, callbacks=[Watch()])
    refreshed = []
    before, old = start, start
    for step, actor, now in seen:
        if not torch.equal(now, old):
            refreshed.append(step)
            assert torch.equal(now, before)
        assert torch.equal(actor, before) == (step <= learning_starts)
        before, old = actor, now
    assert refreshed == expected


def test_deterministic_rollouts_act_by_the_mode():
    for mode in (True, False):
        agent = make("mdpo_off", deterministic_rollout=mode, learning_rate=0.0, learning_starts=4)
        quiet(agent, 24)
        assert agent.steps == 24
        with torch.no_grad():
            modes = agent.policy.mode(agent.replay.columns["obs"][:24])
        close = (agent.replay.columns["action"][:24] - modes).abs().amax(1) < 1e-6
        assert not close[:4].any() and (close[4:].all() if mode else not close[4:].any())


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"kl_coef": -1.0}, "kl_coef=-1.0"),
        ({"mean_penalty": -1.0}, "mean_penalty=-1.0"),
        ({"tsallis_q": 2.1}, "tsallis_q=2.1"),
        ({"tsallis_q": 0.9}, "tsallis_q=0.9"),
        ({"refresh_steps": 0}, "refresh_steps=0"),
        ({"probability_floor": 0.0}, "probability_floor=0.0"),
        ({"proximity": "sideways"}, "sideways"),
        ({"actor_critic": "last"}, "last"),
        ({"proximity": "forward", "tsallis_q": 1.5}, "tsallis_q=1"),
        ({"kl_coef": None, "tsallis_q": 1.5}, "tsallis_q=1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        api.make("mdpo_off", NOISY, **settings)


def test_the_preset_released_is_the_released_code():
    agent = api.make("mdpo_off", NOISY, preset="released", device="cpu")
    own = agent.algorithm
    assert (own.deterministic_rollout, own.probability_floor, own.refresh_steps) == (True, 1e-6, 1000)
    assert (own.entropy_temp, own.kl_coef, own.value_network, own.actor_critic) == (0.2, 1.0, True, "first")
    config = agent.config
    assert (config.batch_size, config.gamma, config.tau, config.learning_starts) == (256, 0.99, 0.005, 10_000)
    assert config.network.actor_hidden == config.network.critic_hidden == (256, 256)
    assert (config.learning_rate, config.network.activation, config.replay_size) == (3e-4, "relu", 1_000_000)
