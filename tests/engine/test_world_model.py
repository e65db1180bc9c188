"""Fits whose outcome is known, and rollouts checked step by step."""

import math

import numpy as np
import pytest
import torch
from helpers.agents import assert_same_tensors

from ctrlrl.engine import world_model
from ctrlrl.engine.errors import CheckpointError, NonFiniteUpdateError
from ctrlrl.engine.world_model import Rollouts, WorldModel, WorldModelConfig, WorldModelFit
from ctrlrl.nets.dynamics import DynamicsEnsemble
from ctrlrl.nets.trajectory_codec import Steps

SMALL = {
    "model_members": 3, "model_elites": 2, "model_hidden": (8,), "model_learning_rate": 1e-2, "model_batch_size": 32,
    "model_weight_decay": (),
}  # fmt: skip
A = torch.tensor([[1.0, 0.1], [-0.2, 0.9]])
B = torch.tensor([[0.0], [0.5]])
STD = torch.tensor([0.05, 0.2, 0.3])


def linear(n, seed=0, units=1.0):
    """Steps of s' = A s + B a + noise, r = s_0 - 2 a + 1 + noise, the deviations of the noises STD."""
    g = torch.Generator().manual_seed(seed)
    obs, action = torch.randn(n, 2, generator=g), torch.rand(n, 1, generator=g) * 2 - 1
    noise = STD * torch.randn(n, 3, generator=g)
    reward = obs[:, 0] - 2 * action[:, 0] + 1 + noise[:, 2]
    following = obs @ A.T + action @ B.T + noise[:, :2]
    return Steps(obs * units, action, reward * units, torch.zeros(n), following * units)


def fitting(steps, seed=0, **settings):
    config = WorldModelConfig(**SMALL | settings)
    fit = WorldModelFit(config.ensemble(steps.obs.shape[1], steps.action.shape[1], seed), config, seed)
    fit.begin(lambda places: Steps(*(x[places] for x in steps)), len(steps.obs))
    return fit


# -- fits ------------------------------------------------------------------------------------------


def test_a_linear_gaussian_system_is_found_mean_and_deviation():
    """Within 0.2 of each noise's deviation, and deviations within 15 %, in units a hundred times the networks' own."""
    fit = fitting(
        linear(4000, units=100.0), model_hidden=(24,), model_batch_size=128, model_max_epochs=30, model_patience=30
    )
    while not fit.done:
        fit.epoch()
    ensemble = fit.finish()
    g = torch.Generator().manual_seed(9)
    obs, action = torch.randn(500, 2, generator=g).clamp(-2, 2), torch.rand(500, 1, generator=g) * 2 - 1
    found = ensemble.predict(obs * 100, action)
    true = torch.cat([obs @ A.T + action @ B.T - obs, obs[:, :1] - 2 * action + 1], 1) * 100
    error = (found.mean - true).square().mean((0, 1)).sqrt()
    assert (error < 0.2 * 100 * STD).all(), error
    torch.testing.assert_close(found.std.mean((0, 1)), 100 * STD, rtol=0.15, atol=0.0)


def test_data_is_standardised_by_its_own_moments_and_its_range_is_known():
    steps = linear(90)
    model = fitting(steps).ensemble
    inputs = torch.cat([steps.obs, steps.action], 1)
    targets = torch.cat([steps.next_obs - steps.obs, steps.reward[:, None]], 1)
    for name, x in (("input", inputs), ("target", targets)):
        torch.testing.assert_close(getattr(model, f"{name}_mean"), x.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(getattr(model, f"{name}_std"), x.std(0, correction=0), rtol=1e-4, atol=1e-5)
    seen = torch.cat([steps.next_obs, steps.reward[:, None]], 1)
    assert torch.equal(model.least, seen.amin(0)) and torch.equal(model.most, seen.amax(0))


def own_errors(fit, params):
    """[E] held-out errors of the networks with ``params``, summed by hand."""
    names, views = zip(*fit.flat.views(params).items(), strict=True)
    model = DynamicsEnsemble(2, 1, 3, (8,), 2)
    model.load_state_dict(fit.ensemble.state_dict() | dict(zip(names, views, strict=True)))
    steps = fit.rows(fit.held_out)
    guess = model.predict(steps.obs, steps.action).mean
    true = torch.cat([steps.next_obs - steps.obs, steps.reward[:, None]], 1)
    return ((guess - true) / model.target_std).square().mean((1, 2))


def test_every_network_keeps_its_best_epoch_and_the_best_of_them_are_the_elites():
    """Few rows and many epochs: errors rise again, of each network at another epoch."""
    fit = fitting(linear(50), model_hidden=(8,), model_learning_rate=5e-2, model_max_epochs=40, model_patience=40)
    errors, params = [], []
    while not fit.done:
        found = fit.epoch()
        params.append(fit.state.params.clone())
        errors.append(own_errors(fit, params[-1]))
        assert found["held_out_error"] == pytest.approx(float(errors[-1].sort().values[:2].mean()), rel=1e-4)
    best, when = torch.full((3,), math.inf), torch.zeros(3, dtype=torch.int64)
    for epoch, error in enumerate(errors):
        better = error < 0.99 * best  # a lower one by less than a hundredth does not count
        best, when = torch.where(better, error, best), torch.where(better, epoch, when)
    assert (when < 39).all() and len(set(when.tolist())) > 1, when
    model = fit.finish()
    for member, epoch in enumerate(when.tolist()):
        for name, value in fit.flat.views(params[epoch]).items():
            assert torch.equal(dict(model.named_parameters())[name][member], value[member]), (name, member)
    torch.testing.assert_close(fit.best_error, best, rtol=1e-4, atol=1e-6)
    assert sorted(model.elites.tolist()) == sorted(best.argsort()[:2].tolist())


def test_elites_are_chosen_by_their_best_error_not_by_their_last():
    fit = fitting(linear(50))
    fit.best_error = torch.tensor([0.3, 0.1, 0.2])
    assert fit.finish().elites.tolist() == [1, 2]


def test_an_error_lower_by_less_than_a_hundredth_does_not_count():
    fit = fitting(linear(50), model_patience=2)
    errors = iter([[1.0, 1.0, 1.0], [0.995, 0.98, 1.1], [0.991, 0.975, 1.0], [0.992, 0.98, 2.0]])
    fit.errors = lambda: torch.tensor(next(errors))
    since = []
    while not fit.done:
        fit.epoch()
        since.append(fit.since)
    assert since == [0, 0, 1, 2] and fit.best_error.tolist() == pytest.approx([1.0, 0.98, 1.0])


@pytest.mark.parametrize("patience", [1, 3])
def test_the_fit_ends_when_no_network_gets_better_for_so_many_epochs(patience):
    fit = fitting(linear(60), model_learning_rate=1e-9, model_patience=patience)
    epochs = 0
    while not fit.done:
        fit.epoch()
        epochs += 1
    assert epochs == 1 + patience  # the first one is always better than nothing


def test_the_fit_ends_after_its_epochs_anyway():
    fit = fitting(linear(60), model_max_epochs=2)
    fit.epoch()
    assert not fit.done
    fit.epoch()
    assert fit.done


def test_held_out_rows_are_a_fifth_at_most_and_never_learned_from():
    for count, asked, held_out in ((100, 1000, 20), (100, 7, 7), (3, 1000, 1)):
        fit = fitting(linear(count), model_held_out=asked)
        assert len(fit.held_out) == held_out and fit.training.shape == (3, count - held_out)
        assert not set(fit.held_out.tolist()) & set(fit.training.flatten().tolist())


def test_networks_learn_from_rows_of_their_own_or_all_from_the_same():
    drawn = fitting(linear(100)).training.sort(1).values
    assert not torch.equal(drawn[0], drawn[1]) and len(drawn[0].unique()) < 70
    same = fitting(linear(100), model_bootstrap=False).training.sort(1).values
    assert all(len(rows.unique()) == 80 and torch.equal(rows, same[0]) for rows in same)


def seen_in_epoch(fit):
    """[steps] the places [E, B] of each optimiser step of an epoch."""
    seen, step = [], fit._step

    def noted(places):
        seen.append(places)
        return step(places)

    fit._step = noted
    fit.epoch()
    fit._step = step
    return seen


def test_an_epoch_passes_once_over_each_networks_rows_in_an_order_of_its_own():
    fit = fitting(linear(100), model_epoch_steps=None)
    first, second = seen_in_epoch(fit), seen_in_epoch(fit)
    assert [x.shape for x in first] == [(3, 32), (3, 32), (3, 16)]
    first, second = torch.cat(first, 1), torch.cat(second, 1)
    for k in range(3):
        assert torch.equal(first[k].sort().values, fit.training[k].sort().values)
        assert not torch.equal(first[k], fit.training[k]) and not torch.equal(first[k], second[k])


def test_an_epoch_has_at_most_so_many_steps():
    assert [x.shape for x in seen_in_epoch(fitting(linear(100), model_epoch_steps=2))] == [(3, 32), (3, 32)]


@pytest.fixture(scope="module")
def norms():
    """Norms of the three layers' weights after a fit with a weight decay."""

    def of(decay):
        fit = fitting(linear(60), model_hidden=(8, 8), model_weight_decay=decay)
        for _ in range(20):
            fit.epoch()
        views = fit.flat.views(fit.state.params)
        return torch.stack([views[name].norm() for name in views if name.endswith("weight")])

    free = of(())
    return lambda decay: of(decay) / free


@pytest.mark.parametrize("decay,small", [((50.0, 0.0), [0]), ((0.0, 50.0), [1, 2]), ((50.0,), [0, 1, 2])])
def test_weights_decay_by_layer_and_the_last_number_is_for_all_after_it(decay, small, norms):
    left = norms(decay)
    assert left.shape == (3,) and [i for i in range(3) if left[i] < 0.4] == small, left
    assert all(left[i] > 0.6 for i in range(3) if i not in small), left


def test_a_fit_that_breaks_down_says_where():
    steps = linear(40)
    steps.reward[7] = math.inf
    with pytest.raises(NonFiniteUpdateError, match="world model"):
        fitting(steps).epoch(iteration=3)
    with pytest.raises(ValueError, match="1 row"):
        fitting(linear(1))


def test_a_fit_goes_on_from_what_it_saved_bit_for_bit():
    """Where not every epoch is better than the one before."""
    settings = {"seed": 4, "model_learning_rate": 5e-2, "model_patience": 99}
    whole, left, later = (fitting(linear(50), **settings) for _ in range(3))
    for _ in range(8):
        whole.epoch()
        left.epoch()
    saved = {k: v.clone() for k, v in left.tensors().items()}, left.counters()
    left.epoch()
    later.restore(*saved)
    assert (later.best_error == saved[0]["best_error"]).all() and (left.best_error == saved[0]["best_error"]).any()
    for fit in (whole, later):
        for _ in range(3):
            fit.epoch()
    assert_same_tensors(whole.tensors(), later.tensors())
    assert whole.counters() == later.counters() == {"since": whole.since, "epochs": 11}
    assert_same_tensors(dict(whole.finish().state_dict()), dict(later.finish().state_dict()))
    with pytest.raises(CheckpointError, match="another size"):
        fitting(linear(50), model_hidden=(9,)).restore(*saved)


def test_another_seed_gives_other_networks_and_another_split():
    a, b = (fitting(linear(80), seed=seed) for seed in (0, 1))
    assert not torch.equal(a.held_out, b.held_out) and not torch.equal(a.flat.flat, b.flat.flat)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_members": 0}, {"model_elites": 8}, {"model_batch_size": 0}, {"model_held_out": 0},
        {"model_patience": 0}, {"model_max_epochs": 0}, {"model_epoch_steps": 0}, {"model_learning_rate": 0.0},
        {"model_weight_decay": (-1.0,)},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        WorldModelConfig(**settings)


# -- rollouts --------------------------------------------------------------------------------------


class Proportional:
    """Acts by a tenth of the first coordinate, and of the noise."""

    def noise(self, n_steps, n_envs, generator):
        return torch.randn(n_steps, n_envs, 1, generator=generator)

    def act(self, obs, noise):
        return (0.1 * obs[:, :1] + 0.1 * noise).clamp(-1, 1)


def known(members=3, elites=2, shift=(0.0, 0.0, 0.0), log_std=-40.0):
    """Networks that say: each coordinate rises by 1 plus ``shift`` of the member, the reward is 5 plus it."""
    model = DynamicsEnsemble(2, 1, members, (4,), elites)
    with torch.no_grad():
        for parameter in model.body.parameters():
            parameter.zero_()
        model.body[-1].bias[:, 0, :3] = torch.tensor([1.0, 1.0, 5.0]) + torch.tensor(shift)[:members, None]
        model.log_var_min.fill_(log_std)
        model.log_var_max.fill_(0.0)
        model.body[-1].bias[..., 3:] = 2 * log_std
    return model


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rollouts_follow_the_model_from_every_start():
    start = torch.randn(5, 2, generator=g())
    steps = WorldModel(known()).rollout(Proportional(), start, 4, g())
    obs, following = steps.obs.view(4, 5, 2), steps.next_obs.view(4, 5, 2)
    for t in range(4):
        torch.testing.assert_close(obs[t], start + t)
        torch.testing.assert_close(following[t], start + t + 1)
    assert (steps.reward - 5.0).abs().max() < 1e-5 and (steps.done == 0.0).all()
    off = steps.action - 0.1 * steps.obs[:, :1]
    assert 0.02 < off.std() < 0.3  # it explores


def test_a_rollout_stops_where_its_episode_ends():
    start = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    steps = WorldModel(known(), terminal=lambda obs, action, following: following[:, 0] > 2.5).rollout(
        Proportional(), start, 5, g()
    )
    first = [[0, 2, 1], [1, 2], [2]]  # the second start ends at once, the third one step later, the first after three
    assert steps.obs[:, 0].round().tolist() == [x for row in first for x in row]
    assert steps.done.tolist() == [float(x == 2) for row in first for x in row]


def test_the_users_ends_see_the_whole_step():
    seen = []

    def ends(*step):
        seen.append(step)
        return torch.zeros(len(step[0]), dtype=torch.bool)

    steps = WorldModel(known(), terminal=ends).rollout(Proportional(), torch.zeros(2, 2), 1, g())
    ((obs, action, following),) = seen
    assert torch.equal(obs, steps.obs) and torch.equal(action, steps.action) and torch.equal(following, steps.next_obs)


@pytest.mark.parametrize("penalty", [0.5, 3.0])
def test_the_penalty_takes_exactly_its_multiple_of_the_uncertainty_off(penalty):
    torch.manual_seed(0)
    model = DynamicsEnsemble(2, 1, 3, (8,), 2)
    start = torch.randn(6, 2, generator=g())
    plain, paid = (WorldModel(model, p).rollout(Proportional(), start, 3, g()) for p in (0.0, penalty))
    unsure = model.uncertainty(plain.obs, plain.action)
    assert unsure.min() > 0.1 and unsure.std() > 1e-3
    torch.testing.assert_close(plain.reward - paid.reward, penalty * unsure, rtol=1e-4, atol=1e-5)
    assert torch.equal(plain.next_obs, paid.next_obs) and len(plain.obs) == 18
    made = WorldModel(model, penalty)
    made.rollout(Proportional(), start, 3, g())
    assert made.statistics == {"uncertainty": pytest.approx(float(unsure.mean())), "dropped": 0.0}


def test_every_elite_is_followed_and_no_other_though_all_are_asked_how_sure_they_are():
    model = known(4, 2, shift=(0.0, 0.25, 500.0, 0.5))
    model.elites.copy_(torch.tensor([3, 1]))
    with torch.no_grad():
        model.body[-1].bias[2, 0, 3:] = 0.0
    found = WorldModel(model).rollout(Proportional(), torch.zeros(60, 2), 1, g())
    rises = found.next_obs[:, 0]
    assert set(rises.mul(4).round().div(4).tolist()) == {1.25, 1.5}
    assert 15 < (rises > 1.4).sum() < 45
    assert model.uncertainty(found.obs, found.action).min() > 0.5  # the third network's, which is not followed


def test_noise_is_that_of_the_deviations_and_new_at_every_step():
    model = known(1, 1, log_std=math.log(0.3) + 1e-6)
    with torch.no_grad():
        model.log_var_min.fill_(2 * math.log(0.3))
        model.log_var_max.fill_(30.0)
        model.body[-1].bias[..., 3:] = -60.0
    steps = WorldModel(model).rollout(Proportional(), torch.zeros(500, 2), 2, g())
    off = torch.cat([steps.next_obs - steps.obs - 1.0, steps.reward[:, None] - 5.0], 1)
    torch.testing.assert_close(off.std(0), torch.full((3,), 0.3), rtol=0.1, atol=0.0)
    assert off.mean(0).abs().max() < 0.05
    assert np.abs(np.corrcoef(torch.cat([off[:500], off[500:]], 1).T.numpy()) - np.eye(6)).max() < 0.2


def test_absurd_steps_are_left_out_and_end_their_rollout():
    """Data between 0 and 10: up to 20 is plausible, and from -10 on. The reward, always 5, may be off by 1."""
    model = known()
    model.least.copy_(torch.tensor([0.0, 0.0, 5.0]))
    model.most.copy_(torch.tensor([10.0, 10.0, 5.0]))
    made = WorldModel(model)
    steps = made.rollout(Proportional(), torch.tensor([[18.5, 0.0], [0.0, 0.0], [0.0, 20.5]]), 3, g())
    assert sorted(steps.obs[:, 0].tolist()) == [0.0, 1.0, 2.0, 18.5]
    assert made.statistics["dropped"] == pytest.approx(2 / 6)  # 19.5 to 20.5, and 20.5 to 21.5
    torch.testing.assert_close(steps.next_obs.max(), torch.tensor(19.5))


def test_what_is_plausible():
    model = known()
    model.least.copy_(torch.tensor([0.0, -1.0, 5.0]))
    model.most.copy_(torch.tensor([10.0, 1.0, 5.0]))
    inf, nan = math.inf, math.nan
    following = [[20, 3], [20.1, 0], [-10, -3], [-10.1, 0], [0, 3.1], [0, 0], [0, 0], [0, 0], [nan, 0], [0, -inf]]
    reward = [5, 5, 5, 5, 5, 6, 6.1, nan, 5, 5]
    expected = [True, False, True, False, False, True, False, False, False, False]
    blank = torch.zeros(10, 2)
    step = Steps(blank, blank[:, :1], torch.tensor(reward).float(), blank[:, 0], torch.tensor(following).float())
    assert WorldModel(model).plausible(step).tolist() == expected


def test_a_large_penalty_does_not_make_a_step_absurd():
    model = known(log_std=-1.0)
    with torch.no_grad():
        model.body[-1].bias[..., 3:] = -60.0
    model.least.copy_(torch.tensor([-100.0, -100.0, -2.0]))
    model.most.copy_(torch.tensor([100.0, 100.0, 12.0]))
    steps = WorldModel(model, penalty=1e4).rollout(Proportional(), torch.zeros(50, 2), 1, g())
    assert len(steps.obs) == 50 and steps.reward.max() < -1000.0


def test_rollouts_in_parts_are_rollouts_from_all_starts(monkeypatch):
    monkeypatch.setattr(world_model, "ROLLED", 4)
    start = torch.arange(20.0).view(10, 2)
    monkeypatch.setattr(Proportional, "act", lambda self, obs, noise: noise)
    steps = WorldModel(known()).rollout(Proportional(), start, 2, g())
    assert sorted(steps.obs[:, 0].round().tolist()) == sorted([*start[:, 0].tolist(), *(start[:, 0] + 1).tolist()])
    assert len(steps.action.unique()) == 20  # each part has noise of its own


def test_the_same_generator_gives_the_same_rollouts():
    torch.manual_seed(0)
    model = WorldModel(DynamicsEnsemble(2, 1, 3, (8,), 2))
    a, b, c = (model.rollout(Proportional(), torch.zeros(6, 2), 3, g(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and not torch.equal(a.next_obs, c.next_obs)


def test_a_set_of_rollouts_begins_where_it_is_told():
    asked = []

    def starts(count, generator):
        asked.append((count, generator))
        return torch.zeros(count, 2)

    source, drawing = Rollouts(WorldModel(known()), starts, 7, 3), g()
    assert len(source.rows(Proportional(), True, drawing).obs) == 21 and asked == [(7, drawing)]
    assert source.statistics.keys() == {"uncertainty", "dropped"}


def test_open_loop_goes_on_through_everything_and_takes_the_actions_it_is_given():
    model = known()
    model.most.copy_(torch.tensor([1.0, 1.0, 1.0]))  # all of it is absurd
    ending = WorldModel(model, penalty=7.0, terminal=lambda obs, action, following: following[:, 0] > 1.5)
    actions = torch.rand(4, 6, 1, generator=g()) * 2 - 1
    start = torch.randn(4, 2, generator=g())
    steps = ending.open_loop(lambda obs, t: actions[:, t], start, 6, g())
    assert torch.equal(steps.action, actions)
    torch.testing.assert_close(steps.next_obs, start[:, None] + torch.arange(1.0, 7.0)[:, None])
    assert torch.equal(steps.obs[:, 1:], steps.next_obs[:, :-1]) and torch.equal(steps.obs[:, 0], start)
    torch.testing.assert_close(steps.reward, torch.full((4, 6), 5.0))
    by_policy = ending.open_loop(lambda obs, t: 0.1 * obs[:, :1], start, 3, g())
    torch.testing.assert_close(by_policy.action, 0.1 * by_policy.obs[..., :1])
