"""The same recipe on OpenRLHF's own Ray + vLLM trainer: actor, critic and reference groups, vLLM rollouts.

arguments  recipe -> OpenRLHF's options, and what differs
openrlhf   OpenRLHF's parser, checks and main function, and the one way to put parts of ours into them
workers    its Ray actors, extended: engine, policy, reference, critic
models     what they hold: the models of `extensions.model`, this project's optimizer
agent      its rollout contract
trainer    its PPO step in the driver, and the run around it
cluster    the Ray cluster that it runs on
driver     what launch/ppo_ray.sh runs

Only `workers`, `trainer` and `agent` need ray or vllm to be imported.
"""
