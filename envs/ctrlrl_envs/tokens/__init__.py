"""Token tasks with verifiable rewards: the environment writes a prompt, the policy answers token by token.

Contract
--------
- An observation is the context so far: token id + 1 at every written position, 0 where nothing is written yet. The
  prompt has the same length in every episode of one environment.
- A step appends exactly one token to every episode that runs: the action, or the environment's own token where it is
  its turn and the action is ignored. Which positions are the environment's is the same in every episode.
- The reward lies in [0, 1] and comes with the last token; episodes terminate and are never truncated.
- ``metadata["tokens"]`` holds ``vocabulary``, ``prompt`` and ``length`` (of prompt and answer together).

Infos, for ``R = length - prompt`` positions after the prompt
------------------------------------------------------------
==============  ========  ==================================================================
``turn``        always    turn of the next position; -1 if the environment writes it, and at the end
``task``        always    which kind of task, or how difficult
``solution``    reset     [R] the best action at each position, -1 where there is none
``success``     end       the task was solved; ``is_success`` is the same
``rewards``     end       [K] the outcome by channel
``answer``      end       id of the final answer: equal answers have equal ids
``void``        end       [R] positions of turns that cannot be read as an answer (tasks of several turns only)
==============  ========  ==================================================================

The native vector environments (``gymnasium.make_vec(..., vectorization_mode="vector_entry_point")``) give the same
numbers as arrays with one row per environment. All keys are there at every step, and rows that have not ended hold
zeros (``answer``: -1). They do not reset by themselves; an ended row stays as it is, with reward 0, until it is
reset through ``reset(seed=[...], options={"reset_mask": mask})``.
"""
