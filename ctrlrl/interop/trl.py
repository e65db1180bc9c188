"""ctrlrl's losses of whole sequences in TRL's GRPOTrainer (``pip install "ctrlrl[trl]"``).

::

    from trl import GRPOConfig
    from ctrlrl.interop.trl import CtrlrlGRPOTrainer
    from ctrlrl.losses.gspo import GSPO

    trainer = CtrlrlGRPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=[correct, well_formed],
        args=GRPOConfig(num_generations=8, per_device_train_batch_size=8, gradient_accumulation_steps=4),
        train_dataset=prompts,
        loss=GSPO(eps_low=3e-4, eps_high=4e-4),  # or "gspo"
    )
    trainer.train()

TRL samples, calls the reward functions, keeps the reference and steps the optimiser; advantages, ratios, masks and
averages are the loss's. An iteration is one generation batch of all processes, an update batch what TRL accumulates
for one optimiser step. Sums are divided by the denominator of the whole update batch, so the gradient does not depend
on how it is cut into micro-batches. What a loss sees:

===================  =============================================================================================
``group``            the ``num_generations`` completions of a prompt
``sequence_return``  the reward functions' weighted sum; ``rewards`` holds them one by one, without weights
``score``            the return between the ends of ``return_range``
``success``          a return of at least ``success_return``; without it, above the mean of the group
``preference``       the best and the worst of each group
``task``             the integer column ``task`` of the dataset
``turn``             stretches of the model's tokens between those of tools; without tools there is one
``logp_ref``         with any ``GRPOConfig(beta=...)`` but 0, which only makes TRL keep a reference
``logp_behaviour``   with vLLM, or a ``rollout_func`` that gives log-probabilities
===================  =============================================================================================

TRL gives no critics, no whole distributions and no gradient before the step, and chooses its prompts itself: losses
that need these, or episodes of other kinds, are refused. A loss's ``loop_defaults`` are up to GRPOConfig. TRL's own
correction for vLLM is not applied; ``mini_rl`` is a loss that has one. Each generation costs one forward pass more
than in TRL, for the entropies.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from ctrlrl.core import advantage, reduce
from ctrlrl.data.rows import rows, shuffled
from ctrlrl.engine.episode_estimate import preference_of
from ctrlrl.losses import base as losses
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.losses.needs import NEEDS, Need
from ctrlrl.types import PolicyOutput, SequenceBatch

try:
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
    from trl import GRPOConfig, GRPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid
except ImportError as error:
    raise ImportError(f'ctrlrl.interop.trl needs TRL: pip install "ctrlrl[trl]" ({error})') from error

PROVIDES: frozenset[Need] = frozenset(
    ["groups", "whole_rows", "sequence_return", "score", "success", "rewards", "preferences", "tasks", "logp_ref",
     "logp_behaviour", "step_dist"]
)  # fmt: skip
"""What TRL's trainer can put before a loss; of the distribution of each step, its entropy alone. Turns are known too,
but not what each of them did."""
REPLACED = (
    "loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "scale_rewards",
    "multi_objective_aggregation", "top_entropy_quantile", "off_policy_mask_threshold", "use_bias_correction_kl",
    "entropy_coef", "use_adaptive_entropy", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos",
    "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
)  # fmt: skip
"""Fields of GRPOConfig that shape TRL's own losses."""
MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
STATE = "ctrlrl.safetensors"


def missing(loss: PolicyLoss) -> list[str]:
    """What ``loss`` needs and TRL's trainer does not provide, in words; empty where it is accepted."""
    found = [f"{need} ({NEEDS[need]})" for need in sorted(loss.required() - PROVIDES)]
    if loss.critics and "values" not in loss.required():
        found.append(f"values ({NEEDS['values']})")
    if loss.selector() is not None:
        found.append("a choice among known prompts")
    if type(loss).grad_transform is not PolicyLoss.grad_transform:
        found.append("the gradient before the optimiser's step")
    return found


def check(loss: PolicyLoss, args: GRPOConfig, rollout_func: Any = None) -> None:
    """Raise ``ValueError`` where ``loss`` and TRL's settings do not go together, with what to do about it."""
    if lacking := missing(loss):
        raise ValueError(f"{loss.name} cannot run in TRL's GRPOTrainer, which does not provide {'; '.join(lacking)}")
    if "logp_ref" in loss.required() and args.beta == 0.0:
        raise ValueError(
            f"{loss.name} needs logp_ref: set GRPOConfig(beta=...) to any number but 0, so that TRL keeps a reference; "
            "its weight is the loss's own setting"
        )
    if "logp_behaviour" in loss.required() and not args.use_vllm and rollout_func is None:
        raise ValueError(
            f"{loss.name} needs logp_behaviour: set GRPOConfig(use_vllm=True), or give a rollout_func with 'logprobs'"
        )
    default = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    if changed := [k for k in REPLACED if getattr(args, k, default.get(k)) != default.get(k)]:
        raise ValueError(
            f"GRPOConfig sets {', '.join(changed)}, which only TRL's own losses read; leave them and set the fields "
            f"of the loss: loss={type(loss).__name__}(...)"
        )
    if (args.steps_per_generation or 1) % args.gradient_accumulation_steps:
        raise ValueError(
            f"steps_per_generation={args.steps_per_generation} must be a multiple of gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}: an update batch is averaged as a whole, so it must be drawn at once"
        )


class NoDistribution:
    """Stands where a policy's distribution would be."""

    def __getattr__(self, name: str) -> NoReturn:
        raise ValueError(
            "this loss reads the policy's whole distribution (dist_old, categorical), which TRL's GRPOTrainer does "
            "not provide: it keeps log-probabilities of the sampled tokens and entropies"
        )


NO_DISTRIBUTION: Any = NoDistribution()


class CtrlrlGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with a ctrlrl loss in place of its own.

    Args:
        model: As in GRPOTrainer, like all arguments not listed here.
        reward_funcs: As there.
        args: As there.
        others: As there.
        loss: A loss, or the name of one with its default settings.
        return_range: Returns that are a score of 0 and of 1, for losses that need scores.
        success_return: Returns from here on count as success; None: those above the mean of their group.
        settings: As there.

    Raises:
        ValueError: The loss needs what TRL does not provide, or settings contradict each other.
    """

    # set by TRL
    args: Any
    model: Any
    accelerator: Any
    num_generations: Any
    num_generations_eval: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *others: Any,
        loss: str | PolicyLoss = "grpo",
        return_range: tuple[float, float] = (0.0, 1.0),
        success_return: float | None = None,
        **settings: Any,
    ) -> None:
        self.policy_loss = losses.get(loss)() if isinstance(loss, str) else loss
        check(self.policy_loss, GRPOConfig() if args is None else args, settings.get("rollout_func"))
        self.return_range, self.success_return = return_range, success_return
        self.loss_memory = self.policy_loss.memory()
        self.controllers = self.policy_loss.controllers()
        self.controller_states = {k: c.initial() for k, c in self.controllers.items()}
        self._stats: dict[str, list[float]] = {}
        self._sums: dict[str, Tensor] = {}
        self._begun: dict[str, SequenceBatch] = {}
        self._knobs: dict[str, Tensor] = {}
        super().__init__(model, reward_funcs, args, *others, **settings)

    # -- an iteration: all episodes of a generation batch -------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, except that rows which the loss ties together are shuffled as one."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            drawn: Any = split_pixel_values_by_grid(self._generate_and_score_completions(generation_batch))
            mine = rows(self._begun["train"], drawn["row"])
            together, size = self.policy_loss.together(mine), self.args.per_device_train_batch_size
            if together is not None and size % self.num_generations:
                raise ValueError(
                    f"{self.policy_loss.name} compares the completions of a prompt with each other: set "
                    f"per_device_train_batch_size={size} to a multiple of num_generations={self.num_generations}, so "
                    "that no micro-batch cuts through them"
                )
            order = shuffled(len(drawn["row"]), together, size, torch.default_generator).tolist()
            mixed: Any = {
                k: v if v is None or (isinstance(v, Tensor) and v.ndim == 0)
                else v[order] if isinstance(v, Tensor) else [v[n] for n in order]
                for k, v in drawn.items()
            }  # fmt: skip
            parts: Any = split_tensor_dict(mixed, steps)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(x) for x in parts]
        return self._buffered_inputs[self._step % steps]

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        drawn = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        if mode == "train" or not self._knobs:
            self._steer()
        batch = self._episodes(inputs, drawn, self.num_generations if mode == "train" else self.num_generations_eval)
        start = self.policy_loss.begin(batch, self._knobs, self.loss_memory)
        if len(start.batch.mask) != len(batch.mask):
            raise ValueError(f"{self.policy_loss.name} changes the number of sequences, which TRL has fixed")
        self._begun[mode] = start.batch
        if mode == "train":
            self.loss_memory = start.memory
        for name, value in start.stats.items():
            self._record(mode, name, float(value))
        count, first = len(drawn["prompt_ids"]), self.accelerator.process_index * len(drawn["prompt_ids"])
        drawn["row"] = torch.arange(first, first + count, device=self.accelerator.device)
        return drawn

    def _episodes(self, inputs: Any, drawn: Any, group_size: int) -> SequenceBatch:
        """Every process's completions, as the loss sees them."""
        loss = self.policy_loss
        training = self.model.training
        size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logp, entropy, _ = self._outputs(self.model, drawn, size)
        mask = self._everywhere(self._mask(drawn)).bool()
        rewards, weights = self._rewards, self.reward_weights.to(self._rewards.device)
        group = torch.arange(len(rewards), device=rewards.device) // group_size
        scored = ~rewards.isnan().all(-1)
        returns = (rewards * weights).nansum(-1).masked_fill(~scored, torch.nan)
        returns = _filled(returns, group)
        mask = mask & scored.unsqueeze(-1)  # what no function scored teaches nothing
        zero = torch.zeros(mask.shape, dtype=logp.dtype, device=mask.device)
        if "tasks" in loss.required() and "task" not in inputs[0]:
            raise ValueError(f"{loss.name} needs tasks: add an integer column 'task' to the dataset")
        task = torch.tensor([int(x.get("task", 0)) for x in inputs], device=mask.device)
        ids = drawn["completion_ids"]
        logp_old = torch.where(mask, self._everywhere(logp), zero)
        behaviour, reference = drawn.get("sampling_per_token_logps"), drawn.get("ref_per_token_logps")
        if behaviour is not None:  # NaN where the sampler could not tell
            behaviour = torch.where(behaviour.isnan(), logp, behaviour)
        elif "logp_behaviour" in loss.required():
            raise ValueError(f"{loss.name} needs logp_behaviour, and rollout_func gave no 'logprobs'")
        starts = mask & ~pad(mask, (1, 0))[:, :-1]
        success = advantage.center_scale(returns, group, scale="none") > 0
        return SequenceBatch(
            obs=self._everywhere(torch.cat([drawn["prompt_ids"][:, -1:], ids[:, :-1]], 1)),
            action=self._everywhere(ids),
            mask=mask,
            logp_old=logp_old,
            advantage=zero,
            value_target=zero,
            value_old=zero,
            logp_ref=None if reference is None else torch.where(mask, self._everywhere(reference), zero),
            logp_behaviour=None if behaviour is None else torch.where(mask, self._everywhere(behaviour), zero),
            entropy_old=torch.where(mask, self._everywhere(entropy), zero),
            sequence_return=returns,
            group=group,
            task=self.accelerator.gather(task),
            turn=torch.where(mask, starts.long().cumsum(-1) - 1, -1),
            score=self._score(returns),
            success=success if self.success_return is None else returns >= self.success_return,
            rewards=torch.stack([_filled(x, group) for x in rewards.unbind(-1)], -1),
            preference=preference_of(returns, group),
            source=torch.zeros_like(group),
            pivot=torch.zeros_like(group),
        )

    def _score(self, returns: Tensor) -> Tensor:
        low, high = self.return_range
        score = (returns - low) / (high - low)
        if "score" in self.policy_loss.required() and ((score < -1e-6) | (score > 1.0 + 1e-6)).any():
            raise ValueError(
                f"{self.policy_loss.name} needs scores in [0, 1], and the rewards reach from {returns.min():g} to "
                f"{returns.max():g}: set return_range=(lowest, highest), now {self.return_range}"
            )
        return score.clamp(0.0, 1.0)

    def _everywhere(self, x: Tensor) -> Tensor:
        """[B, T] rows of all processes, padded to the longest."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1))

    def _steer(self) -> None:
        """Step the controllers with the means of what was measured since the last time."""
        stats = {k: sum(v) / len(v) for k, v in self._stats.items()}
        self._stats = {}
        numbers = {"progress": self.state.global_step / max(self.state.max_steps, 1)}
        for name, controller in self.controllers.items():
            state, knobs = controller.step(self.controller_states[name], stats | numbers)
            self.controller_states[name] = state
            numbers |= knobs
        self._knobs = {k: torch.tensor(v, device=self.accelerator.device) for k, v in numbers.items()}

    # -- an update: the micro-batches of one optimiser step -----------------------------------

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        batch, denominator, count, last = self._micro_batch(inputs)
        logp, entropy, auxiliary = self._outputs(model, inputs)
        width = batch.mask.shape[1] - logp.shape[1]
        out = PolicyOutput(pad(logp, (0, width)), pad(entropy, (0, width)), {}, NO_DISTRIBUTION)
        sums = self.policy_loss.loss(batch, out, self._knobs)
        total = sums.policy / denominator
        for value in sums.critics.values():
            total = total + value / count
        mode = "train" if self.model.training else "eval"
        entropy_sum = reduce.masked_sum(out.entropy.detach(), batch.mask)
        self._log_sums(mode, {"entropy": entropy_sum, "entropy_loss": -entropy_sum} | sums.metrics, count, last)
        # gradients are averaged over processes, and each of them holds a part of the sum
        total = total * self.accelerator.num_processes
        if self.aux_loss_enabled and auxiliary is not None:
            parts = self.args.gradient_accumulation_steps if mode == "train" else 1
            total = total + self.router_aux_loss_coef * auxiliary / parts
        return total

    def _micro_batch(self, inputs: Any) -> tuple[SequenceBatch, Tensor, Tensor, bool]:
        """This micro-batch, what divides the sums of its whole update batch, and whether it is the last of it."""
        mode, window, place = "eval", [inputs], 0
        if self.model.training:
            assert self._buffered_inputs is not None
            slot = self._step % self.args.steps_per_generation
            place = slot % self.args.gradient_accumulation_steps
            first = slot - place
            mode, window = "train", self._buffered_inputs[first : first + self.args.gradient_accumulation_steps]
        mine = torch.cat([x["row"] for x in window])
        update = rows(self._begun[mode], self.accelerator.gather(mine))
        prepared = self.policy_loss.prepare(update, self._knobs)
        coef = {k: v.detach() for k, v in prepared.coef.items()}
        update = update._replace(coef=coef, weight=prepared.weight.detach())
        size = len(inputs["row"])
        start = self.accelerator.process_index * len(mine) + place * size
        count = update.mask.sum().clamp_min(1)
        return rows(update, slice(start, start + size)), prepared.denominator, count, place == len(window) - 1

    def _outputs(self, model: Any, inputs: Any, size: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities and entropies [b, T] of the completions, and the load-balancing loss of mixtures."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logp, entropy, auxiliary = self._get_per_token_logps_and_entropies(
            model, ids, attention, inputs["completion_ids"].shape[1], size, compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled, **{k: inputs[k] for k in MULTIMODAL if inputs.get(k) is not None},
        )  # fmt: skip
        assert entropy is not None
        return logp, entropy, auxiliary

    def _mask(self, inputs: Any) -> Tensor:
        """[b, T] int: tokens that the model chose."""
        mask = inputs["completion_mask"]
        return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask

    # -- what is logged and saved --------------------------------------------------------------

    def _log_sums(self, mode: str, sums: dict[str, Tensor], count: Tensor, last: bool) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach() / count
        if last:
            for name, value in self._sums.items():
                self._record(mode, name, float(self.accelerator.reduce(value, "sum")))
            self._sums = {}

    def _record(self, mode: str, name: str, value: float) -> None:
        self._metrics[mode][name].append(value)
        if mode == "train":
            self._stats.setdefault(name, []).append(value)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = os.path.join(
                self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            )
            tensors = {k: v.detach().cpu().contiguous() for k, v in self.loss_memory.items()}
            numbers = {"controllers": self.controller_states, "stats": self._stats}
            save_file(tensors, os.path.join(folder, STATE), {k: json.dumps(v) for k, v in numbers.items()})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        with safe_open(os.path.join(checkpoint, STATE), "pt") as file:
            numbers = file.metadata()
            self.loss_memory = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        self.controller_states, self._stats = json.loads(numbers["controllers"]), json.loads(numbers["stats"])


def _filled(x: Tensor, group: Tensor) -> Tensor:
    """[B] with NaN, which stands for no reward, replaced by the mean of the rest of the group: an advantage of 0."""
    known = ~x.isnan()
    total = reduce.segment_sum(torch.where(known, x, torch.zeros_like(x)), group)
    return torch.where(known, x, total / reduce.segment_sum(known.to(x), group).clamp(min=1.0))
