"""ctrlrl's losses inside TRL's GRPOTrainer: same value and gradient as on a batch built by hand, on a random model."""

import os
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytest.importorskip("trl", reason='TRL is not installed: pip install "ctrlrl[trl]"')

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig

from ctrlrl.interop.trl import CtrlrlGRPOTrainer, missing
from ctrlrl.losses import base
from ctrlrl.losses.gspo import GSPO
from ctrlrl.types import PolicyOutput, SequenceBatch

WORDS = ["<pad>", "<eos>", *"abcdefgh"]
GROUP = 4
TEMPERATURE = 0.8
RETURNS = (0.0, 1.75)
"""Ends of the returns: 1 for the share of a, 0.75 at weight 3/4 for the share of b."""

NEEDS = frozenset(
    ["groups", "whole_rows", "sequence_return", "score", "success", "rewards", "preferences", "tasks", "logp_ref",
     "logp_behaviour", "step_dist"]
)  # fmt: skip


def qualifies(name):
    loss = base.get(name)()
    plain = type(loss).grad_transform is base.PolicyLoss.grad_transform and loss.selector() is None
    return loss.required() <= NEEDS and not loss.critics and plain


NAMES = [name for name in base.names() if qualifies(name)]
ACCEPTED = [
    "adora", "bnpo", "c3po", "cispo", "copg", "d3s", "dagrpo", "dapo", "dpo", "dr_grpo", "empg", "epo", "etr", "g2rpo",
    "gbpo", "gdpo", "grpo", "gspo", "mhpo", "mini_rl", "p3o", "qwen_long", "real", "reinforce", "risk_po", "rloo",
    "rpo", "spear",
]  # fmt: skip
"""Losses that run in TRL; the others need what it does not give."""


# -- a world in memory ----------------------------------------------------------------------------


def tokenizer():
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved random model: TRL loads the reference from where the policy came from."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # far from uniform, so that sequences differ
        for p in model.parameters():
            p.mul_(8.0 if p.ndim == 2 else 1.0)
    model.save_pretrained(path)
    return path


def share_of_a(completion_ids, **_):
    return [sum(WORDS[t] == "a" for t in ids) / len(ids) for ids in completion_ids]


def share_of_b(completion_ids, **_):
    return [sum(WORDS[t] == "b" for t in ids) / len(ids) for ids in completion_ids]


def rollout(prompts, trainer):
    """Completions of a sampler of its own, which cannot score one of its tokens."""
    g = torch.Generator().manual_seed(trainer.state.global_step)
    ids = torch.randint(2, len(WORDS), (len(prompts), 5), generator=g).tolist()
    logprobs = (-3.0 * torch.rand(len(prompts), 5, generator=g)).tolist()
    logprobs[0][1] = None
    return {
        "prompt_ids": [trainer.processing_class(p)["input_ids"] for p in prompts],
        "completion_ids": ids,
        "logprobs": logprobs,
    }


class Recorder(TrainerCallback):
    """Keeps the gradient and the weights of every optimiser step."""

    def __init__(self):
        self.gradients, self.weights = [], []

    def on_step_begin(self, args, state, control, model=None, **_):
        self.weights.append({k: p.detach().clone() for k, p in model.named_parameters()})

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients.append({k: p.grad.clone() for k, p in model.named_parameters()})


class Watched(CtrlrlGRPOTrainer):
    """Keeps the value of every micro-batch."""

    values: ClassVar[list[float]]

    def training_step(self, *args, **kwargs):
        value = super().training_step(*args, **kwargs)
        self.values.append(float(value))
        return value


def trainer_of(folder, tmp_path, loss, accumulate=1, rows=8, iterations=2, steps=2, cls=Watched, **settings):
    asked = loss
    loss = (base.get(loss)() if loss in base.names() else GSPO()) if isinstance(loss, str) else loss
    fields = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "seed": 3,
        "num_generations": GROUP, "per_device_train_batch_size": rows // accumulate,
        "gradient_accumulation_steps": accumulate, "num_iterations": iterations, "max_steps": steps,
        "max_completion_length": 6, "temperature": TEMPERATURE, "learning_rate": 0.3, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no",
        "reward_weights": [1.0, 0.75], "beta": 0.5 if "logp_ref" in loss.needs else 0.0,
        "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    fields |= {k: settings.pop(k) for k in list(settings) if k in GRPOConfig.__dataclass_fields__}
    if "logp_behaviour" in loss.needs:
        settings.setdefault("rollout_func", rollout)
    recorder = Recorder()
    trainer = cls(
        str(folder), [share_of_a, share_of_b], GRPOConfig(**fields),
        Dataset.from_dict({"prompt": ["a b", "c", "d e f", "g h"], "task": [0, 1, 1, 0]}), loss=asked,
        return_range=RETURNS, processing_class=tokenizer(), callbacks=[recorder], **settings,
    )  # fmt: skip
    trainer.values = []
    trainer.recorder = recorder
    return trainer


# -- the same by hand -----------------------------------------------------------------------------


def likelihood(model, drawn):
    """Log-probabilities and entropies [B, T] from the logits."""
    ids = torch.cat([drawn["prompt_ids"], drawn["completion_ids"]], 1)
    attention = torch.cat([drawn["prompt_mask"], drawn["completion_mask"]], 1)
    length = drawn["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1].float() / TEMPERATURE
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, drawn["completion_ids"].unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def by_hand(folder, drawn, behaviour=None):
    """The batch of a generation, from its tokens alone."""
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logp, entropy = likelihood(model, drawn)
    mask = drawn["completion_mask"].bool()
    texts = [ids[m].tolist() for ids, m in zip(drawn["completion_ids"], mask, strict=True)]
    rewards = torch.tensor([share_of_a(texts), share_of_b(texts)]).T
    returns = rewards[:, 0] + 0.75 * rewards[:, 1]
    prompts = [tuple(p[m.bool()].tolist()) for p, m in zip(drawn["prompt_ids"], drawn["prompt_mask"], strict=True)]
    kinds = sorted(set(prompts))
    group = torch.tensor([kinds.index(p) for p in prompts])
    preference = torch.zeros_like(group)
    for g in group.unique():
        members = (group == g).nonzero().flatten()
        if returns[members].max() > returns[members].min():
            preference[members[returns[members].argmax()]] = 1
            preference[members[returns[members].argmin()]] = -1
    zero = torch.zeros_like(logp)
    clean = [torch.where(mask, x, zero) for x in (logp, entropy)]
    if behaviour is not None:
        behaviour = torch.where(behaviour.isnan(), clean[0], behaviour)
    return SequenceBatch(
        obs=drawn["completion_ids"],
        action=drawn["completion_ids"],
        mask=mask,
        logp_old=clean[0],
        advantage=zero,
        value_target=zero,
        value_old=zero,
        logp_ref=clean[0],  # nothing was trained before
        logp_behaviour=behaviour,
        entropy_old=clean[1],
        sequence_return=returns,
        group=group,
        task=torch.tensor([{"a b": 0, "c": 1, "d e f": 1, "g h": 0}[" ".join(WORDS[t] for t in p)] for p in prompts]),
        turn=torch.where(mask, 0, -1),
        score=returns / 1.75,
        success=returns > torch.stack([returns[group == g].mean() for g in group]),
        rewards=rewards,
        preference=preference,
        source=torch.zeros_like(group),
        pivot=torch.zeros_like(group),
    )


def in_order(parts):
    """Micro-batches put back together, rows as they were drawn."""
    order = torch.cat([p["row"] for p in parts]).argsort()
    return {k: torch.cat([p[k] for p in parts])[order] for k, v in parts[0].items() if v.ndim}


def expected(folder, loss, batch, drawn, knobs, weights):
    """Value and gradient of the whole update batch under ``weights``."""
    model = LlamaForCausalLM.from_pretrained(folder)
    model.load_state_dict(weights, strict=False)
    logp, entropy = likelihood(model, drawn)
    prepared = loss.prepare(batch, knobs)
    update = batch._replace(coef=prepared.coef, weight=prepared.weight)
    value = loss.loss(update, PolicyOutput(logp, entropy, {}, None), knobs).policy / prepared.denominator
    value.backward()
    return value.item(), {k: p.grad for k, p in model.named_parameters()}


QUICK = {("grpo", 1), ("grpo", 2), ("dr_grpo", 2), ("cispo", 1), ("dpo", 2), ("gdpo", 1), ("mini_rl", 2), ("spear", 1)}


@pytest.mark.parametrize(
    ("name", "accumulate"),
    [
        pytest.param(name, parts, marks=() if (name, parts) in QUICK else pytest.mark.slow)
        for name in NAMES
        for parts in (1, 2)
    ],
)
def test_two_steps_have_the_value_and_gradient_of_the_whole_batch(folder, tmp_path, name, accumulate):
    """The second step is on the same completions, with ratios that have left one."""
    loss = base.get(name)()
    trainer = trainer_of(folder, tmp_path, loss, accumulate)
    trainer.train()
    assert trainer.state.global_step == 2 and len(trainer.values) == 2 * accumulate
    drawn = in_order(trainer._buffered_inputs)
    knobs = trainer._knobs
    batch = by_hand(folder, drawn, drawn.get("sampling_per_token_logps"))
    batch = loss.begin(batch, knobs, loss.memory()).batch
    for step in range(2):
        value, gradient = expected(folder, loss, batch, drawn, knobs, trainer.recorder.weights[step])
        found = sum(trainer.values[step * accumulate : (step + 1) * accumulate])
        assert found == pytest.approx(value, rel=1e-5, abs=1e-6)
        for key, grad in trainer.recorder.gradients[step].items():
            torch.testing.assert_close(grad, gradient[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_the_losses_it_accepts_are_these():
    assert [n for n in base.names() if not missing(base.get(n)())] == ACCEPTED


# -- what the whole run must keep -----------------------------------------------------------------


def test_memory_and_controllers_live_across_generations_and_checkpoints(folder, tmp_path):
    """EPO remembers entropies and has a schedule; four steps are two generations."""
    trainer = trainer_of(folder, tmp_path, "epo", 2, steps=4, save_strategy="steps", save_steps=2)
    before = {k: v.clone() for k, v in trainer.loss_memory.items()}
    trainer.train()
    assert any(not torch.equal(trainer.loss_memory[k].cpu(), v) for k, v in before.items())
    assert trainer._knobs["progress"].item() == 0.5  # of the second generation
    logged = [x for x in trainer.state.log_history if "approx_kl" in x]
    assert len(logged) == 4 and abs(logged[0]["approx_kl"]) < 1e-6 < logged[1]["approx_kl"]
    again = trainer_of(folder, tmp_path, "epo", 2, steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for key, value in trainer.loss_memory.items():
        torch.testing.assert_close(again.loss_memory[key], value.cpu())
    assert again.controller_states == trainer.controller_states


def test_rows_tied_together_are_never_parted(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path, "dpo", 2, rows=16)
    trainer.train()
    groups = [trainer._begun["train"].group[x["row"]].tolist() for x in trainer._buffered_inputs]
    assert all(sorted(g.count(k) for k in set(g)) == [GROUP, GROUP] for g in groups)
    trainer = trainer_of(folder, tmp_path, "dpo", 4)
    with pytest.raises(ValueError, match="per_device_train_batch_size=2 to a multiple of num_generations=4"):
        trainer.train()


def test_what_no_function_scored_teaches_nothing(folder, tmp_path):
    """A function that skips one completion leaves its group's mean alone; a row that all skip is masked."""

    def picky(completion_ids, **_):
        return [None, *share_of_a(completion_ids[1:])]

    for other, masked in ((share_of_b, False), (picky, True)):
        trainer = trainer_of(folder, tmp_path, "gspo")
        trainer.reward_funcs = [picky, other]
        trainer.train()
        begun = trainer._begun["train"]
        assert not begun.rewards.isnan().any() and not begun.advantage.isnan().any()
        torch.testing.assert_close(begun.rewards[0, 0], begun.rewards[1:GROUP, 0].mean())
        assert bool(begun.mask[0].any()) is not masked and begun.mask[1:].any(-1).all()
        if masked:
            torch.testing.assert_close(begun.sequence_return[0], begun.sequence_return[1:GROUP].mean())


def test_turns_lie_between_the_tools(folder, tmp_path):
    """Tokens that a tool wrote belong to no turn."""
    trainer = trainer_of(folder, tmp_path, "gspo")
    trainer.train()
    drawn = in_order(trainer._buffered_inputs)
    drawn["tool_mask"] = torch.ones_like(drawn["completion_mask"])
    drawn["tool_mask"][:, 1:3] = 0
    batch = trainer._episodes([{}] * len(drawn["row"]), drawn, GROUP)
    longest = drawn["completion_mask"].sum(-1).argmax()
    assert batch.turn[longest].tolist()[:4] == [0, -1, -1, 1]
    assert not batch.mask[:, 1:3].any()


def test_evaluation_leaves_the_training_state_alone(folder, tmp_path):
    data = Dataset.from_dict({"prompt": ["h", "g f"]})
    trainer = trainer_of(
        folder, tmp_path, "epo", steps=2, eval_dataset=data, per_device_eval_batch_size=GROUP, eval_strategy="steps",
        eval_steps=1,
    )  # fmt: skip
    trainer.train()
    assert trainer._begun["eval"].mask.shape[0] == GROUP and trainer._begun["train"].mask.shape[0] == 8
    plain = trainer_of(folder, tmp_path, "epo", steps=2)
    plain.train()
    for key, value in plain.loss_memory.items():
        torch.testing.assert_close(trainer.loss_memory[key], value)
    assert torch.isfinite(torch.tensor([x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x])).all()


def test_settings_of_the_loss_reach_it(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path, GSPO(eps_low=0.5, eps_high=0.6))
    trainer.train()
    assert trainer.policy_loss.eps_high == 0.6
    assert trainer.state.log_history[0]["clip_fraction"] == 0.0


# -- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "need"),
    [
        ("ppo", "values"), ("copo", "answers"), ("steer", "dist_old"), ("sft", "demonstrations"),
        ("rover", "categorical"), ("aepo", "tempered"), ("knapsack", "known prompts"), ("bapo", "gradient before"),
        ("simple_tir", "turns"),
    ],
)  # fmt: skip
def test_a_loss_with_another_need_is_refused_by_name(folder, tmp_path, name, need):
    with pytest.raises(ValueError, match=rf"{name} cannot run in TRL's GRPOTrainer.*{need}"):
        trainer_of(folder, tmp_path, name)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("grpo", {"beta": 0.0}, "needs logp_ref: set GRPOConfig"),
        ("mini_rl", {"rollout_func": None}, "needs logp_behaviour: set GRPOConfig"),
        ("gspo", {"epsilon": 0.3, "scale_rewards": "none"}, "sets epsilon, scale_rewards"),
        ("gspo", {"accumulate": 4, "steps_per_generation": 2}, "steps_per_generation=2 must be a multiple"),
        ("grop", {}, "no loss named 'grop'.*grpo"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(folder, tmp_path, name, fields, message):
    with pytest.raises((ValueError, KeyError), match=message):
        trainer_of(folder, tmp_path, name, **fields)


def test_scores_and_tasks_must_be_there(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path, "risk_po")
    trainer.return_range = (0.0, 0.01)
    with pytest.raises(ValueError, match=r"needs scores in .0, 1.*set return_range"):
        trainer.train()
    trainer = trainer_of(folder, tmp_path, "qwen_long")
    trainer.train_dataset = Dataset.from_dict({"prompt": ["a b", "c"]})
    with pytest.raises(ValueError, match="add an integer column 'task'"):
        trainer.train()


@dataclass(frozen=True)
class Greedy(GSPO):
    """Reads the distribution without saying so."""

    def per_token(self, batch, out, knobs):
        return super().per_token(batch, out, knobs) + out.dist.entropy()


def test_a_loss_that_reads_distributions_unannounced_is_told(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path, Greedy())
    with pytest.raises(ValueError, match="whole distribution"):
        trainer.train()
