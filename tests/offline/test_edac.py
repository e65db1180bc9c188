"""EDAC's penalty where the gradients are known, and SAC-N at its limit."""

import copy

import pytest
import torch
from helpers.off_policy import OBS, Double, drawn, learner, plain, transitions

from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine.config import build
from ctrlrl.engine.learner import part
from ctrlrl.engine.offline_config import OfflineConfig
from ctrlrl.nets.actors import QNetworkConfig
from ctrlrl.nets.q_ensemble import QEnsemble
from ctrlrl.offline.edac import likeness

B, N = 12, 4


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained(name, count=3, **settings):
    """A learner after ``count`` updates, and what it logged."""
    mine = learner(name, Double, **{"n_critics": N, "learning_rate": 1e-2} | settings)
    batch, noise = transitions(count * B), drawn(mine, count, B)
    found = [
        mine.run(part(batch, slice(i * B, (i + 1) * B)), {k: v[i : i + 1] for k, v in noise.items()}, 1)
        for i in range(count)
    ]
    return mine, found


# -- the limit ----------------------------------------------------------------------------------------


def test_at_eta_zero_every_number_is_that_of_sac_n(double):
    edac, found = trained("edac", eta=0.0)
    sac_n, expected = trained("sac_n")
    assert edac.state.keys() == sac_n.state.keys()
    for name, numbers in sac_n.state.items():
        assert torch.equal(edac.state[name], numbers), name
    assert [f.keys() for f in found] == [f.keys() for f in expected]


def test_a_small_eta_is_near_sac_n_and_moves_the_critics_alone_at_first(double):
    """The gradient is linear in eta: Adam's first moment tells it."""
    moments = {}
    for eta in (0.0, 1e-4, 1e-3):
        edac, _ = trained("edac", count=1, eta=eta)
        moments[eta] = edac.state["critic/m"].clone()
        actor = edac.state["actor/m"].clone()
        torch.testing.assert_close(actor, trained("sac_n", count=1)[0].state["actor/m"], rtol=0, atol=0)
    small, large = moments[1e-4] - moments[0.0], moments[1e-3] - moments[0.0]
    assert small.abs().max() > 1e-8
    torch.testing.assert_close(10 * small, large, rtol=1e-6, atol=1e-12)


# -- the penalty --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights,expected",
    [
        # cosines of the ordered pairs over N - 1: here 0, -1 and 0, each twice
        ([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], -1.0),
        ([[2.0, 1.0], [2.0, 1.0], [4.0, 2.0]], 3.0),
        ([[1.0, 1.0], [5.0, 0.0]], 2 * 0.5**0.5),
        ([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]], -1.5),
        ([[1.0, 0.0], [0.0, 0.0]], 0.0),
    ],
)
def test_linear_critics_are_as_alike_as_their_weights(weights, expected, double):
    mine = learner("edac", Double, critic_hidden=(), n_critics=len(weights), eta=2.5)
    with torch.no_grad():
        mine.modules["critic"].body[0].weight[:, OBS.shape[0] :, 0] = torch.tensor(weights)
    found = mine.run(transitions(B), drawn(mine, 1, B), 1)
    assert found["likeness_loss"].item() == pytest.approx(2.5 * expected, abs=1e-9)


def test_the_likeness_is_the_sum_over_pairs_of_members(double):
    slopes = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for i in range(5):
        for j in range(5):
            if i != j:
                total += torch.nn.functional.cosine_similarity(slopes[i], slopes[j], dim=-1).mean().item() / 4
    assert likeness(slopes).item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("network", [{"activation": "relu"}, {"activation": "silu", "layer_norm": "critic"}])
def test_slopes_are_each_members_own_gradients_and_come_with_the_values(network, double):
    ensemble = QEnsemble(OBS, 2, QNetworkConfig(critic_hidden=(8, 8), n_critics=3, **network), Double)
    obs, action = torch.randn(6, 3), torch.rand(6, 2) * 2 - 1
    values, slopes = ensemble(obs, action, slopes=True)
    torch.testing.assert_close(values, ensemble(obs, action))
    step = 1e-6
    for k in range(2):
        moved = action.clone()
        moved[:, k] += step
        torch.testing.assert_close(slopes[..., k], (ensemble(obs, moved) - values) / step, rtol=1e-4, atol=1e-5)


def test_the_critics_gradient_equals_an_independent_implementation(double):
    eta = 1.7
    mine = learner("edac", Double, eta=eta, n_critics=N, activation="relu", entropy_temp=0.2, gamma=0.0)
    critics = [plain(copy.deepcopy(mine.modules["critic"]).body, k) for k in range(N)]
    batch = transitions(B)
    mine.run(batch, drawn(mine, 1, B), 1)
    units, loss = [], 0.0
    for critic in critics:
        action = batch.action.clone().requires_grad_()
        q = critic(torch.cat([batch.obs.double(), action], 1))[:, 0]
        loss = loss + ((q - batch.reward_t) ** 2).mean()  # no discount, no next value
        (slope,) = torch.autograd.grad(q.sum(), action, create_graph=True)
        units.append(slope / slope.norm(dim=1, keepdim=True))
    for i in range(N):
        for j in range(N):
            if i != j:
                loss = loss + eta / (N - 1) * (units[i] * units[j]).sum(1).mean()
    moments = mine.flats["critic"].views(mine.state["critic/m"])  # a tenth of the gradient
    for k, critic in enumerate(critics):
        for i in (0, 2, 4):
            weight, bias = torch.autograd.grad(
                loss, [critic[i].weight, critic[i].bias], retain_graph=True, materialize_grads=True
            )
            torch.testing.assert_close(moments[f"body.{i}.weight"][k], 0.1 * weight.T, rtol=0, atol=1e-9)
            torch.testing.assert_close(moments[f"body.{i}.bias"][k, 0], 0.1 * bias, rtol=0, atol=1e-9)


def test_training_makes_the_critics_less_alike():
    first, last = {}, {}
    for eta in (0.0, 20.0):
        mine = learner("edac", eta=eta, n_critics=N, critic_learning_rate=1e-2)
        batch = transitions(B)
        before = likeness(mine.modules["critic"](batch.obs, batch.action, slopes=True)[1]).item()
        for seed in range(25):
            mine.run(batch, drawn(mine, 1, B, seed), 1)
        after = likeness(mine.modules["critic"](batch.obs, batch.action, slopes=True)[1]).item()
        first[eta], last[eta] = before, after
    assert first[0.0] == first[20.0]
    assert last[20.0] < min(first[20.0], last[0.0]) - 0.5


@pytest.mark.slow
def test_compiled_updates_equal_eager_ones():
    """The gradient within a gradient is one for the compiler, too."""
    results = []
    for compile in (False, True):
        mine = learner("edac", n_critics=3, compile=compile)
        batch, noise = transitions(2 * B), drawn(mine, 2, B)
        for i in range(2):
            mine.run(part(batch, slice(i * B, (i + 1) * B)), {k: v[i : i + 1] for k, v in noise.items()}, 1)
        results.append(mine.state["critic"].clone())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


# -- settings -----------------------------------------------------------------------------------------


def test_defaults_are_the_published_ones_for_halfcheetah():
    config, method = build(algorithms.get("edac"), {}, loop=OfflineConfig)
    assert (config.network.n_critics, method.eta) == (10, 1.0)
    assert (config.learning_rate, config.batch_size) == (3e-4, 256)


def test_one_critic_cannot_be_compared():
    with pytest.raises(ValueError, match="n_critics=1 must be at least 2"):
        learner("edac", n_critics=1)
    assert learner("edac", n_critics=1, eta=0.0).modules["critic"].members == 1


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match=r"eta=-1\.0"):
        learner("edac", eta=-1.0)
